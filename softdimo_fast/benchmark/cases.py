"""What is measured: operator, shape, dtype and variant, and the selections of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.shapes import SHAPES

DTYPES = ("float32", "bfloat16", "autocast")
PHASES = ("forward", "backward", "both")
# What is measured together: forward without gradients; forward, then backward, each timed, and their sum.
PASSES = {"forward": ("forward",), "training": ("backward", "both")}
# Operators whose results have no gradient.
FORWARD_ONLY = ("sample_tokens", "token_statistics")
# The sizes that an operator's work depends on.
LETTERS = {
    "soft_embedding": "NGVD",
    "linear_soft_embedding": "NVHD",
    "masked_attention": "BHLd",
}
# The meaning of every variant, as the report has it.
VARIANTS = {
    "": "",
    "t1": "temperature 1: eager then does not divide",
    "frozen": "the codebook needs no gradient",
    "gumbel": "Gumbel noise",
    "forward_kl": "KL(teacher ‖ model)",
    "reverse_kl": "KL(model ‖ teacher)",
    "jeffreys": "Jeffreys, beta 0.3",
    "guided": "KL(teacher ‖ model), guidance 2",
    "near-equal": "KL(teacher ‖ model), logits that differ by 0.001",
    "head": "from hidden states, with the product of the head",
    "keys": "half of the keys",
    "queries": "half of the queries",
    "dense": "no mask",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        operator: public name of the operator.
        shape: key of ``SHAPES``.
        dtype: "float32"; "bfloat16"; "autocast": bfloat16 logits, and float32 tables that autocast casts.
        variant: key of ``VARIANTS``.
        quick: part of the quick run.
        compiled: whether torch.compile is among the comparators (it costs seconds of compilation).
        only: "cpu" or "cuda" where the other device leaves it out, else empty.
    """

    operator: str
    shape: str
    dtype: str
    variant: str = ""
    quick: bool = False
    compiled: bool = False
    only: str = ""

    @property
    def key(self) -> str:
        """Unique, and fit for a file name."""
        return "+".join((self.operator, self.shape, self.dtype, *filter(None, (self.variant,))))

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that this operator has."""
        return ("forward",) if self.operator in FORWARD_ONLY else tuple(PASSES)

    def title(self, device: str) -> str:
        """Shape, sizes and variant, without operator and dtype."""
        sizes = SHAPES[self.shape].sizes(device)
        letters = LETTERS.get(self.operator, "NV" if self.variant != "head" else "NVH")
        shown = " ".join(f"{letter}{sizes[letter]}" for letter in letters if letter in sizes)
        title = SHAPES[self.shape].title
        words = [f"{title}, {shown}"]
        return ", ".join([*words, VARIANTS[self.variant]] if self.variant else words)


def _soft_embedding() -> Iterable[Case]:
    name = "soft_embedding"
    quick = ("maskgit", "maskgen-64")
    compiled = ("maskgit", "maskgen-64", "maskbit", "digits")
    for shape in ("maskgit", "maskgen-64", "maskbit", "digits", "maskgen-1024", "meissonic-64"):
        for dtype in ("float32", "bfloat16"):
            yield Case(name, shape, dtype, quick=shape in quick, compiled=shape in compiled)
    yield Case(name, "maskgit", "autocast")
    yield Case(name, "maskgen-64", "autocast", quick=True, compiled=True)
    yield Case(name, "meissonic-1024", "float32", only="cuda")
    yield Case(name, "meissonic-1024", "bfloat16")
    for shape in ("v1025", "v16384", "one-image"):
        yield Case(name, shape, "float32")
        yield Case(name, shape, "bfloat16")
    for variant, shapes in (
        ("t1", ("maskgen-64",)),
        ("frozen", ("maskgit", "maskgen-64")),
        ("gumbel", ("maskgit", "maskgen-64")),
    ):
        for shape in shapes:
            yield Case(name, shape, "float32", variant)


def _linear_soft_embedding() -> Iterable[Case]:
    for shape in ("maskgit", "maskgen-64", "maskgen-1024"):
        for dtype in ("float32", "bfloat16"):
            yield Case("linear_soft_embedding", shape, dtype, compiled=shape == "maskgit")


def _token_divergence() -> Iterable[Case]:
    name = "token_divergence"
    for shape in ("maskgit", "maskgen-64"):
        for dtype in ("float32", "bfloat16"):
            for kind in ("forward_kl", "reverse_kl", "jeffreys"):
                quick = (shape, dtype, kind) == ("maskgit", "float32", "forward_kl")
                compiled = dtype == "float32" or kind == "forward_kl"
                yield Case(name, shape, dtype, kind, quick=quick, compiled=compiled)
        yield Case(name, shape, "float32", "near-equal")
    yield Case(name, "maskgit", "float32", "guided")


def _distribution_matching_loss() -> Iterable[Case]:
    for shape in ("maskgit", "maskgen-64"):
        for dtype in ("float32", "bfloat16"):
            quick = (shape, dtype) == ("maskgit", "float32")
            compiled = dtype == "float32"
            yield Case(
                "distribution_matching_loss", shape, dtype, "guided", quick=quick, compiled=compiled
            )


def _masked_cross_entropy() -> Iterable[Case]:
    name = "masked_cross_entropy"
    for shape in ("v1025", "maskgen-64"):
        for dtype in ("float32", "bfloat16"):
            quick = (shape, dtype) == ("v1025", "float32")
            yield Case(name, shape, dtype, quick=quick, compiled=dtype == "float32")
    yield Case(name, "maskgit", "bfloat16", "head")


def _forward_only() -> Iterable[Case]:
    for shape in ("maskgit", "maskgen-64", "v16384"):
        for dtype in ("float32", "bfloat16"):
            quick = (shape, dtype) == ("maskgit", "float32")
            yield Case("sample_tokens", shape, dtype, quick=quick)
    for shape in ("maskgit", "maskgen-64"):
        for dtype in ("float32", "bfloat16"):
            quick = (shape, dtype) == ("maskgit", "float32")
            yield Case("token_statistics", shape, dtype, quick=quick, compiled=dtype == "float32")


def _masked_attention() -> Iterable[Case]:
    for variant in ("keys", "queries", "dense"):
        for dtype in ("float32", "bfloat16"):
            quick = (variant, dtype) == ("keys", "float32")
            yield Case("masked_attention", "attention", dtype, variant, quick=quick)


CASES: tuple[Case, ...] = (
    *_soft_embedding(),
    *_linear_soft_embedding(),
    *_token_divergence(),
    *_distribution_matching_loss(),
    *_masked_cross_entropy(),
    *_forward_only(),
    *_masked_attention(),
)
OPERATORS = tuple(dict.fromkeys(case.operator for case in CASES))


def select(
    *,
    device: str = "cpu",
    quick: bool = False,
    operators: Sequence[str] = (),
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Case]:
    """The cases that pass every filter; an empty filter lets all pass.

    Raises:
        BenchmarkError: a filter names something unknown, or nothing is left.
    """
    _known("--operator", operators, OPERATORS)
    _known("--shape", shapes, tuple(SHAPES))
    _known("--dtype", dtypes, DTYPES)
    found = [
        case
        for case in CASES
        if (case.quick or not quick)
        and case.only in ("", device)
        and (not operators or case.operator in operators)
        and (not shapes or case.shape in shapes)
        and (not dtypes or case.dtype in dtypes)
    ]
    if not found:
        raise BenchmarkError(
            "--operator, --shape and --dtype leave no case"
            + (" of the quick run: leave out --quick" if quick else "")
        )
    return found


def select_passes(case: Case, phases: Sequence[str]) -> list[str]:
    """The passes of a case that measure any of the phases (none given: all)."""
    return [one for one in case.passes if not phases or set(PASSES[one]) & set(phases)]


def _known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise BenchmarkError(f"{option} must be among {', '.join(known)}, got {name!r}")

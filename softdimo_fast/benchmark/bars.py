"""What is aimed at, in ratios, shares, errors and memory, beside what was measured. No test depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.results import Results, Row
from softdimo_fast.benchmark.settings import DEFAULT, HUGE_PAGES
from softdimo_fast.benchmark.workloads.names import COMPILED, EAGER, MULTINOMIAL, OURS, SDPA

# "ratio": the comparator's time over ours, at least; "share": of the measured ceiling, at least;
# "error": norm-relative error of the value, at most; "memory": MiB beyond inputs, results and float32 sums,
# for each thread, at most.
RATIO, SHARE, ERROR, MEMORY = "ratio", "share", "error", "memory"
UNITS = {RATIO: "x", SHARE: "of the ceiling", ERROR: "error", MEMORY: "MiB a thread"}


@dataclass(frozen=True)
class Bar:
    """One aim.

    Attributes:
        case: what it is about.
        phase: "forward", "backward" or "both".
        bound: least ratio or share, or largest error or memory.
        metric: a key of ``UNITS``.
        against: the comparator of a ratio.
        bound_huge: the bound where both sides have huge pages; None: there is none of its own.
        implementation: whose number it is.
    """

    case: Case
    phase: str
    bound: float
    metric: str = RATIO
    against: str = EAGER
    bound_huge: float | None = None
    implementation: str = OURS


@dataclass(frozen=True)
class Verdict:
    """A bar and what was measured; None: not measured.

    Attributes:
        bar: the aim.
        measured, measured_huge: with the default allocator, and with huge pages.
        met: whether both hold.
        limit: of a ratio: what it would be if ours took no more than the floor; a bar above it is out of
            reach of any kernel on this machine.
    """

    bar: Bar
    measured: float | None
    measured_huge: float | None
    met: bool | None
    limit: float | None


def _bar(
    operator: str,
    shape: str,
    dtype: str,
    phase: str,
    bound: float,
    bound_huge: float | None = None,
    variant: str = "",
    **more: str,
) -> Bar:
    return Bar(Case(operator, shape, dtype, variant), phase, bound, bound_huge=bound_huge, **more)


def _soft_embedding() -> Iterator[Bar]:
    name = "soft_embedding"
    for shape, dtype, bound, huge in (
        ("maskgit", "float32", 2.3, None),
        ("maskgit", "bfloat16", 1.15, None),
        ("maskgen-64", "float32", 7.0, 3.6),
        ("maskgen-64", "bfloat16", 6.0, 3.0),
        ("maskgen-64", "autocast", 8.0, 3.7),
        ("maskgen-1024", "float32", 2.5, None),
        ("maskgen-1024", "bfloat16", 1.35, None),
        ("maskbit", "float32", 8.0, None),
        ("maskbit", "bfloat16", 4.5, None),
        ("digits", "float32", 2.5, None),
        ("digits", "bfloat16", 2.3, None),
    ):
        yield _bar(name, shape, dtype, "both", bound, huge)
    for dtype in ("float32", "bfloat16", "autocast"):
        yield _bar(name, "maskgen-64", dtype, "both", 3.0, against=COMPILED)
    for shape, phase, bound in (
        ("maskgit", "forward", 0.80),
        ("maskgit", "backward", 0.80),
        ("maskgen-64", "forward", 0.75),
        ("maskgen-64", "backward", 0.65),
    ):
        for dtype in ("float32", "bfloat16"):
            yield _bar(name, shape, dtype, phase, bound, metric=SHARE)


def _linear_soft_embedding() -> Iterator[Bar]:
    name = "linear_soft_embedding"
    for shape in ("maskgit", "maskgen-64", "maskgen-1024"):
        for dtype, bound in (("float32", 1.9), ("bfloat16", 1.0)):
            yield _bar(name, shape, dtype, "both", bound)
            yield _bar(
                name, shape, dtype, "both", 4.0, metric=MEMORY,
                implementation=f"{OURS}, recompute",
            )  # fmt: skip


def _token_divergence() -> Iterator[Bar]:
    name = "token_divergence"
    for shape, half in (("maskgit", 6.0), ("maskgen-64", 19.0)):
        for kind in ("forward_kl", "reverse_kl", "jeffreys"):
            yield _bar(name, shape, "float32", "both", 20.0, 8.0, kind)
            yield _bar(name, shape, "bfloat16", "both", half, variant=kind)
            yield _bar(name, shape, "bfloat16", "both", 1e-3, variant=kind, metric=ERROR)
            yield _bar(name, shape, "float32", "both", 4.5, variant=kind, against=COMPILED)
        yield _bar(name, shape, "bfloat16", "both", 4.5, variant="forward_kl", against=COMPILED)
        yield _bar(name, shape, "float32", "both", 1e-3, variant="near-equal", metric=ERROR)


def _masked_attention() -> Iterator[Bar]:
    for variant in ("keys", "queries"):
        for dtype, bound in (("float32", 4.5), ("bfloat16", 7.0)):
            for phase, least in (("forward", bound), ("both", 4.0)):
                yield _bar(
                    "masked_attention", "attention", dtype, phase, least, variant=variant, against=SDPA
                )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        for phase in ("forward", "both"):
            # "Never slower": where it is the same call, the ratio is 1 but for noise.
            yield _bar(
                "masked_attention", "attention", dtype, phase, 0.97, variant="dense", against=SDPA
            )


def _sample_tokens() -> Iterator[Bar]:
    for shape in ("maskgit", "maskgen-64", "v16384"):
        for dtype in ("float32", "bfloat16"):
            yield _bar("sample_tokens", shape, dtype, "forward", 5.0, against=MULTINOMIAL)
            yield _bar("sample_tokens", shape, dtype, "forward", 4.0, metric=MEMORY)


BARS: tuple[Bar, ...] = (
    *_soft_embedding(),
    *_linear_soft_embedding(),
    *_token_divergence(),
    *_masked_attention(),
    *_sample_tokens(),
)


def judge(results: Results, bars: Iterable[Bar] = BARS) -> list[Verdict]:
    """Every bar that this run has a number for."""
    threads = int(results.machine.get("threads", "1"))
    verdicts = []
    for bar in bars:
        here, huge = (_measured(results, bar, name, threads) for name in (DEFAULT, HUGE_PAGES))
        if here is None and huge is None:
            continue
        met = None if here is None else _holds(bar, here, bar.bound)
        if met and bar.bound_huge is not None and huge is not None:
            met = _holds(bar, huge, bar.bound_huge)
        verdicts.append(Verdict(bar, here, huge, met, _limit(results, bar)))
    return verdicts


def _limit(results: Results, bar: Bar) -> float | None:
    row = _row(results, bar, DEFAULT)
    if bar.metric != RATIO or row is None or not row.floor_ms:
        return None
    return row.median_ms / row.floor_ms


def _holds(bar: Bar, measured: float, bound: float) -> bool:
    return measured >= bound if bar.metric in (RATIO, SHARE) else measured <= bound


def _row(results: Results, bar: Bar, allocator: str) -> Row | None:
    """The comparator's of a ratio, else ours."""
    case = bar.case
    return results.find(
        allocator=allocator,
        operator=case.operator,
        shape=case.shape,
        variant=case.variant,
        dtype=case.dtype,
        phase=bar.phase,
        implementation=bar.against if bar.metric == RATIO else bar.implementation,
    )


def _measured(results: Results, bar: Bar, allocator: str, threads: int) -> float | None:
    row = _row(results, bar, allocator)
    if row is None:
        return None
    if bar.metric == RATIO:
        return row.ratio
    if bar.metric == SHARE:
        return row.share
    if bar.metric == ERROR:
        return row.error_value
    if row.extra_mib is None:
        return None
    sums = results.accumulators.get(bar.case.key, 0) / 2**20
    return max(0.0, row.extra_mib - sums) / threads

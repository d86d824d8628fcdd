"""linear_soft_embedding: accuracy, memory, masks, gradients, and everything torch may do to it."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.contract import FLOORS, assert_contract
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.linear_soft_embedding import linear_soft_embedding
from softdimo_fast.ops.reference import linear_soft_embedding as reference
from softdimo_fast.ops.soft_embedding import soft_embedding

# By name: the package exports the function over the module.
module = importlib.import_module("softdimo_fast.ops.linear_soft_embedding")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATOR = "softdimo_reference::linear_soft_embedding"
NAMES = ("hidden", "weight", "codebook", "bias", "temperature", "mask_embedding")


class Case(NamedTuple):
    """One call: tensors that get gradients, in the order of NAMES, and the other options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def values(self) -> list[Tensor]:
        return list(self.tensors.values())

    def call(self, **more: Any) -> Callable[..., Tensor]:
        """The operator as a function of :attr:`values`."""

        def run(*values: Tensor) -> Tensor:
            named = dict(zip(self.tensors, values, strict=True))
            return linear_soft_embedding(**named, **(self.options | more))

        return run

    def composed(self, *values: Tensor) -> Tensor:
        """What a user would write, in the inputs' own dtype."""
        named = dict(zip(self.tensors, values, strict=True))
        dtype = self.values[0].dtype
        for value in self.values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        named = {
            name: value.to(torch.promote_types(dtype, value.dtype)) for name, value in named.items()
        }
        hidden, weight, codebook = (named[name] for name in NAMES[:3])
        mask = self.options.get("mask")
        if weight.dim() == 3:
            z = torch.einsum("...h,gvh->...gv", hidden, weight)
        else:
            z = hidden @ weight.T
        if "bias" in named:
            z = z + named["bias"]
        temperature = self.options.get("temperature", 1.0)
        if "temperature" in named:
            temperature = named["temperature"].unsqueeze(-1)
        if mask is not None:
            z = torch.where(mask.unsqueeze(-1), 0, z)
        p = torch.softmax(z / temperature, -1)
        if weight.dim() == 3:
            out = torch.einsum("...gv,gvd->...gd", p, codebook)
        else:
            out = p @ codebook
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), named["mask_embedding"], out)
        return out.to(self.tensors["codebook"].dtype)


def make(
    lead: tuple[int, ...] = (3, 4), groups: int | None = None, vocabulary: int = 7, hidden_width: int = 5,
    width: int = 3, dtype: torch.dtype = torch.float64, bias: str | None = None, scale: float = 1.0,
    rows_temperature: bool = False, masked: float | None = None, **options: Any,
) -> Case:  # fmt: skip
    """A random case; ``scale`` is the largest size of logits, and rows go from flat to that size."""
    grouped = () if groups is None else (groups,)
    rows = lead + grouped
    hidden = torch.randn(*lead, hidden_width)
    hidden = hidden * torch.logspace(-1, math.log10(scale), math.prod(lead)).reshape(*lead, 1)
    tensors = {
        "hidden": hidden,
        "weight": torch.randn(*grouped, vocabulary, hidden_width) / math.sqrt(hidden_width),
        "codebook": torch.randn(*grouped, vocabulary, width),
    }
    shapes = {
        "vocabulary": (vocabulary,),
        "all": (*rows, vocabulary),
        "one": (1,),
        "positions": (*lead[-1:], *grouped, vocabulary),
        "samples": (*lead[:1], *[1] * (len(rows) - 1), vocabulary),
    }
    if bias is not None:
        tensors["bias"] = torch.randn(shapes[bias])
    if rows_temperature:
        tensors["temperature"] = torch.rand(rows) + 0.5
    if masked is not None:
        options["mask"] = torch.rand(rows) < masked
        tensors["mask_embedding"] = torch.randn(*grouped, width)
    return Case({name: tensor.to(dtype) for name, tensor in tensors.items()}, options)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "vocabulary", "temperature": 0.7},
    "positions": {"bias": "positions", "rows_temperature": True, "masked": 0.4},
    "samples": {"bias": "samples", "masked": 0.4},
    "grouped": {"groups": 2, "bias": "positions", "rows_temperature": True, "masked": 0.4},
}


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to seven slices even for the smallest case."""
    monkeypatch.setattr(reference, "SLICE_BYTES", 200)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(VARIANTS[request.param])


# --------------------------------------------------------------------------------------------------
# Values and gradients


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    case = make(
        lead=draw(st.sampled_from([(300,), (16, 18), (4, 8, 9)])),
        groups=draw(st.sampled_from([None, 1, 3])),
        vocabulary=draw(st.sampled_from([1, 2, 33, 128, 257])),
        hidden_width=draw(st.sampled_from([1, 7, 64])),
        width=draw(st.sampled_from([1, 5, 64])),
        bias=draw(st.sampled_from([None, "vocabulary", "all", "one", "positions", "samples"])),
        scale=draw(st.sampled_from([1.0, 10.0, 50.0])),
        rows_temperature=draw(st.booleans()),
        masked=draw(st.sampled_from([None, 0.0, 0.4])),
        memory=draw(st.sampled_from(["keep", "recompute", "auto"])),
    )
    if "temperature" not in case.tensors:
        temperature = draw(st.sampled_from([1e-3, 0.5, 1.0, 1e3]))
        case.options["temperature"] = temperature
        # Logits that suit the temperature: neither all one-hot nor all flat.
        case.tensors["hidden"].mul_(min(temperature, 100.0))
    mixed = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    for name, tensor in case.tensors.items():
        case.tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)) if mixed else dtype)
    if draw(st.booleans()):
        hidden = case.tensors["hidden"]
        wide = torch.full((*hidden.shape[:-1], hidden.shape[-1] + 3), math.nan, dtype=hidden.dtype)
        wide[..., :-3] = hidden
        case.tensors["hidden"] = wide[..., :-3]
        case.tensors["weight"] = case.tensors["weight"].mT.contiguous().mT
    return case


def floor(case: Case) -> float:
    dtypes = [value.dtype for value in case.values]
    return max(FLOORS[dtype] if dtype != torch.float32 else 1e-6 for dtype in dtypes)


@given(case=cases())
def test_contract(case: Case) -> None:
    """Over at least 256 rows; a gradient that is zero but for rounding is bounded by its terms."""
    upstream = torch.randn(case.call()(*case.values).shape)
    value, grads = gradients(case.call(), case.values, upstream)
    yard, yard_grads = gradients(case.composed, case.values, upstream)
    wide = Case({name: tensor.double() for name, tensor in case.tensors.items()}, case.options)
    upstream = upstream.to(value.dtype)
    truth, true_grads = gradients(wide.composed, wide.values, upstream)
    assert value.dtype == case.tensors["codebook"].dtype
    assert_contract(value, yard, truth, floor=floor(case))
    for name, mine, theirs, exact in zip(case.tensors, grads, yard_grads, true_grads, strict=True):
        assert mine.dtype == case.tensors[name].dtype, name
        if float(exact.norm()) > 1e-3:
            assert_contract(mine, theirs, exact, floor=floor(case), what=name)
        else:
            size = float(upstream.norm()) * float(wide.tensors["codebook"].norm())
            assert float((mine - exact).abs().max()) <= floor(case) * size, name


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(distance: float) -> None:
    """A head that copies its input: max p is 1 - distance in every row."""
    vocabulary = 64
    winner = torch.randint(vocabulary, (256, 1))
    logits = torch.randn(256, vocabulary, dtype=torch.float64)
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), 1, keepdim=True)
    logits = logits.scatter(1, winner, others + math.log((1 - distance) / distance)).float()
    case = Case({"hidden": logits, "weight": torch.eye(64), "codebook": torch.randn(64, 16)}, {})
    upstream = torch.randn(256, 16)
    value, grads = gradients(case.call(), case.values, upstream)
    yard, yard_grads = gradients(case.composed, case.values, upstream)
    wide = [tensor.double() for tensor in case.values]
    truth, true_grads = gradients(case.composed, wide, upstream)
    assert_contract(value, yard, truth, floor=1e-6)
    for name, mine, theirs, exact in zip(NAMES, grads, yard_grads, true_grads, strict=False):
        assert_contract(mine, theirs, exact, floor=1e-6, what=name)
    # The head is the identity, so dhidden is dlogits, and its dominant entry must not cancel.
    error = (grads[0].double() - true_grads[0]).abs().gather(1, winner)
    assert float((error / true_grads[0].abs().gather(1, winner)).median()) < 2e-5


def test_equals_the_soft_embedding_of_the_logits(variant: dict[str, Any]) -> None:
    case = make(**variant)
    named = case.tensors
    z = torch.einsum("...h,gvh->...gv", named["hidden"], named["weight"]) if variant.get(
        "groups"
    ) else named["hidden"] @ named["weight"].T  # fmt: skip
    options = case.options | {
        name: named[name] for name in ("temperature", "mask_embedding") if name in named
    }
    expected = soft_embedding(z + named.get("bias", 0), named["codebook"], **options)
    torch.testing.assert_close(case.call()(*case.values), expected)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.usefixtures("small_slices")
def test_explicit_backward_is_the_derivative_of_the_forward(
    variant: dict[str, Any], memory: str
) -> None:
    case = make(**variant)
    value = case.call()(*case.values)
    upstream = torch.randn_like(value)
    _, found = gradients(case.call(memory=memory), case.values, upstream)
    _, expected = gradients(case.composed, case.values, upstream)
    for name, mine, theirs in zip(case.tensors, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("small_slices")
def test_gradcheck_and_gradgradcheck(variant: dict[str, Any]) -> None:
    """Over several slices; the second derivative with kept logits and without."""
    case = make(lead=(2, 3), vocabulary=4, hidden_width=3, width=2, **variant)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    assert torch.autograd.gradcheck(case.call(memory="recompute"), leaves)
    memory = "keep" if variant.get("groups") else "recompute"
    assert torch.autograd.gradgradcheck(case.call(memory=memory), leaves)


def test_second_derivative_does_not_depend_on_memory() -> None:
    case = make(**VARIANTS["positions"])
    found = []
    for memory in ("keep", "recompute"):
        leaves = [tensor.detach().requires_grad_() for tensor in case.values]
        value = case.call(memory=memory)(*leaves).square().sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(penalty, leaves))
    assert all(bool(grad.any()) for grad in found[0])
    for first, second in zip(*found, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_frozen_inputs(masked: bool) -> None:
    """Every subset of inputs that require a gradient gets the gradients of the full set."""
    settings = VARIANTS["positions"] | {"masked": 0.4 if masked else None}
    case = make(dtype=torch.float32, **settings)
    _, expected = gradients(case.call(), case.values)
    for wanted in itertools.product([False, True], repeat=len(expected)):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip(case.values, wanted, strict=True)]
        case.call()(*leaves).sum().backward()
        for leaf, needed, grad in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == needed
            if leaf.grad is not None:
                assert_same_bits(leaf.grad, grad)


def test_backward_computes_only_what_is_wanted() -> None:
    case = make()
    hidden, weight, codebook = case.values
    upstream = torch.randn(3, 4, 3, dtype=torch.float64)
    found = reference.linear_soft_embedding_backward(
        upstream, hidden, weight, codebook, None, 1.0, None, None, None, None, [False, True] + [False] * 4
    )  # fmt: skip
    assert [tuple(grad.shape) for grad in found] == [(0,), (7, 5), *[(0,)] * 4]


# --------------------------------------------------------------------------------------------------
# Memory


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that any torch operator inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that ``call`` holds at once beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


BIG = {"vocabulary": 2048, "hidden_width": 16, "width": 16, "dtype": torch.float32}


@pytest.mark.parametrize("name", ["plain", "positions", "grouped"])
def test_no_temporary_is_larger_than_a_slice(name: str) -> None:
    """The logits take 16 MiB or 32; forward and backward never make a tensor above 4 MiB."""
    case = make(lead=(16, 128), **(VARIANTS[name] | BIG))
    named, mask = case.tensors, case.options.get("mask")
    arguments = [named.get(name) for name in NAMES[:4]] + [1.0, named.get("temperature"), mask]
    arguments.append(named.get("mask_embedding"))
    with LargestTensor() as forward:
        output, logits = reference.linear_soft_embedding(*arguments, False)  # type: ignore[arg-type]
    assert logits.numel() == 0
    assert forward.bytes <= reference.SLICE_BYTES
    wanted = [name in named for name in NAMES]
    with LargestTensor() as backward:
        reference.linear_soft_embedding_backward(
            torch.randn_like(output), *arguments, None, wanted  # type: ignore[arg-type]
        )  # fmt: skip
    assert 2**20 < backward.bytes <= reference.SLICE_BYTES


def test_peak_memory_grows_with_the_logits_only_where_they_are_kept() -> None:
    """Twice the rows add 16 MiB of logits to "keep", and to "recompute" nothing but small outputs."""

    def peak(rows: int, memory: str) -> int:
        case = make(lead=(rows,), memory=memory, **BIG)
        leaves = [tensor.requires_grad_() for tensor in case.values]
        return peak_bytes(lambda: case.call()(*leaves).sum().backward())

    few, many = peak(2048, "recompute"), peak(4096, "recompute")
    assert few < 10 * reference.SLICE_BYTES
    assert many - few < 2**20
    assert peak(4096, "keep") - peak(2048, "keep") > 15 * 2**20


@pytest.mark.usefixtures("small_slices")
def test_memory_does_not_change_a_bit(variant: dict[str, Any]) -> None:
    case = make(dtype=torch.float32, **variant)
    upstream = torch.randn(case.call()(*case.values).shape)
    kept, kept_grads = gradients(case.call(memory="keep"), case.values, upstream)
    value, grads = gradients(case.call(memory="recompute"), case.values, upstream)
    assert_same_bits(kept, value)
    for name, first, second in zip(case.tensors, kept_grads, grads, strict=True):
        assert_same_bits(first, second, name)


def test_slices_agree_with_one_slice(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(**variant)
    value, grads = gradients(case.call(), case.values)
    for size in (1, 200, 500):
        monkeypatch.setattr(reference, "SLICE_BYTES", size)
        sliced, sliced_grads = gradients(case.call(), case.values)
        torch.testing.assert_close(sliced, value)
        for first, second in zip(sliced_grads, grads, strict=True):
            torch.testing.assert_close(first, second)


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the largest tensor that autograd saves for ``call``'s backward."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return max(sizes)


def test_auto_keeps_logits_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(lead=(10,), vocabulary=50, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    logits = 10 * 50 * 4  # kept in float32
    assert module.KEEP_BYTES == 256 * 2**20
    for limit, memory, expected in (
        (logits, "auto", True),
        (logits - 1, "auto", False),
        (logits - 1, "keep", True),
        (logits, "recompute", False),
    ):
        monkeypatch.setattr(module, "KEEP_BYTES", limit)
        largest = kept_bytes(lambda memory=memory: case.call(memory=memory)(*leaves))
        assert (largest == logits) == expected, (limit, memory)
        note = explain(linear_soft_embedding, *leaves, memory=memory).notes[0]
        assert note.endswith("kept for backward" if expected else "not kept")


def test_nothing_is_kept_without_a_gradient() -> None:
    case = make(memory="keep", dtype=torch.float32)
    assert "not kept" in explain(linear_soft_embedding, *case.values, memory="keep").notes[0]
    leaves = [tensor.requires_grad_() for tensor in case.values]
    with torch.no_grad():
        assert "not kept" in explain(linear_soft_embedding, *leaves, memory="keep").notes[0]


# --------------------------------------------------------------------------------------------------
# Masks and special values


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("groups", [None, 2])
def test_masked_rows_are_never_read(garbage: float, memory: str, groups: int | None) -> None:
    """Hidden, bias and temperature of a masked row may be anything; all gradients are the same."""
    case = make(
        groups=groups, dtype=torch.float32, bias="all", rows_temperature=True, masked=0.5, memory=memory
    )  # fmt: skip
    mask = case.options["mask"]
    mask[0, 0], mask[1, 1] = True, False
    unread = mask if groups is None else mask.all(-1)
    upstream = torch.randn(*mask.shape, 3)
    value, grads = gradients(case.call(), case.values, upstream)
    case.tensors["hidden"][unread] = garbage
    case.tensors["bias"][mask] = garbage
    dirty_value, dirty_grads = gradients(case.call(), case.values, upstream)
    assert_same_bits(value, dirty_value)
    for name, first, second in zip(case.tensors, grads, dirty_grads, strict=True):
        assert_same_bits(first, second, name)
    assert not bool(grads[0][unread].any())
    assert not bool(grads[3][mask].any())
    assert not bool(grads[4][mask].any())
    embedding = case.tensors["mask_embedding"].expand(value.shape)
    assert_same_bits(value[mask], embedding[mask])


def test_a_nan_in_a_group_that_counts_does_not_reach_a_masked_one() -> None:
    case = make(groups=2, dtype=torch.float32, masked=0.0)
    mask = case.options["mask"]
    mask[..., 0] = True
    case.tensors["hidden"][0, 0] = math.nan
    value, grads = gradients(case.call(), case.values)
    named = dict(zip(case.tensors, grads, strict=True))
    assert bool(value[0, 0, 1].isnan().all())
    assert bool(value[..., 0, :].isfinite().all())
    assert not bool(named["weight"][0].any())
    assert not bool(named["codebook"][0].any())
    assert bool(named["weight"][1].isnan().any())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_no_rows_masked(share: float) -> None:
    case = make(dtype=torch.float32, masked=share, bias="vocabulary")
    value, grads = gradients(case.call(), case.values)
    named = dict(zip(case.tensors, grads, strict=True))
    if share == 0:
        plain = Case({k: v for k, v in case.tensors.items() if k != "mask_embedding"}, {})
        assert_same_bits(value, plain.call()(*plain.values))
        assert not bool(named["mask_embedding"].any())
    else:
        assert_same_bits(value, case.tensors["mask_embedding"].expand(value.shape))
        assert not any(bool(named[name].any()) for name in NAMES[:4])
        assert_same_bits(named["mask_embedding"], torch.full((3,), 12.0))


def test_special_values_stay_in_their_row() -> None:
    """NaN hidden, an excluded token (bias -inf), +inf, and a row without any token."""
    case = make(lead=(6,), dtype=torch.float32, bias="all")
    clean = case.call()(*case.values)
    case.tensors["hidden"][0, 1] = math.nan
    case.tensors["bias"][1, 2] = math.inf
    case.tensors["bias"][2] = -math.inf
    case.tensors["bias"][3, 4] = -math.inf
    value, grads = gradients(case.call(), case.values)
    assert bool(value[:3].isnan().all())
    assert_same_bits(value[4:], clean[4:])
    kept = torch.arange(7) != 4
    z = case.tensors["hidden"][3] @ case.tensors["weight"].T + case.tensors["bias"][3]
    expected = torch.softmax(z[kept], -1) @ case.tensors["codebook"][kept]
    torch.testing.assert_close(value[3], expected)
    assert bool(grads[0][3:].isfinite().all())
    assert float(grads[3][3, 4]) == 0


def test_excluded_tokens_have_finite_second_derivatives() -> None:
    case = make(bias="vocabulary", rows_temperature=True)
    case.tensors["bias"][2] = -math.inf
    frozen = case.tensors.pop("bias")
    leaves = [tensor.requires_grad_() for tensor in case.values]
    assert torch.autograd.gradgradcheck(case.call(bias=frozen), leaves)


def test_bad_temperature_rows() -> None:
    """On the CPU in eager they raise; where values are not looked at the row becomes NaN."""
    case = make(lead=(4,), dtype=torch.float32)
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan])
    with pytest.raises(ValueError, match="linear_soft_embedding: temperature must be positive"):
        linear_soft_embedding(*case.values, temperature=temperature)
    operator = torch.ops.softdimo_reference.linear_soft_embedding
    value, _ = operator(*case.values, None, 1.0, temperature, None, None, False)
    assert bool(value[1:].isnan().all())
    torch.testing.assert_close(value[:1], case.call()(*case.values)[:1])


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (1,)])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_small_shapes(lead: tuple[int, ...], groups: int | None, memory: str) -> None:
    settings: dict[str, Any] = {"vocabulary": 1, "hidden_width": 1, "width": 1, "memory": memory}
    case = make(lead, groups, bias="positions", rows_temperature=True, masked=0.5, **settings)
    value, grads = gradients(case.call(), case.values)
    expected, expected_grads = gradients(case.composed, case.values)
    torch.testing.assert_close(value, expected)
    for first, second in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(first, second)


def test_no_rows_give_zero_gradients_to_the_tables() -> None:
    case = make(lead=(0, 4), dtype=torch.float32, bias="vocabulary")
    value, grads = gradients(case.call(), case.values)
    assert value.shape == (0, 4, 3)
    assert all(not bool(grad.any()) for grad in grads)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in case.values]


# --------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    """Forward and backward, bare and with every option, keeping the logits and not."""
    operators = torch.ops.softdimo_reference
    case = make(dtype=torch.float32, **VARIANTS["positions" if requires_grad else "plain"])
    named = {name: t.requires_grad_(requires_grad) for name, t in case.tensors.items()}
    arguments = (
        *(named.get(name) for name in NAMES[:4]), 0.7, named.get("temperature"),
        case.options.get("mask"), named.get("mask_embedding"),
    )  # fmt: skip
    for keep in (False, True):
        torch.library.opcheck(operators.linear_soft_embedding.default, (*arguments, keep))
    output, logits = operators.linear_soft_embedding(*arguments, True)
    upstream = torch.randn_like(output).requires_grad_(requires_grad)
    wanted = [name in named for name in NAMES]
    torch.library.opcheck(
        operators.linear_soft_embedding_backward.default,
        (upstream, *arguments, logits if requires_grad else None, wanted),
    )


@pytest.mark.parametrize(
    ("name", "memory"), [("plain", "auto"), ("positions", "keep"), ("grouped", "recompute")]
)
def test_compile_and_export_give_the_same_bits(name: str, memory: str) -> None:
    case = make(dtype=torch.float32, memory=memory, **VARIANTS[name])
    assert_compiles_bitwise(case.call(), *case.values)
    assert_exports(case.call(), *case.values)


def test_autocast_casts_everything_but_the_temperature() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(case.call(), case.values)
        wide = make().call()(*make().values)
    halves = {
        name: tensor if name == "temperature" else tensor.bfloat16()
        for name, tensor in case.tensors.items()
    }
    expected, half_grads = gradients(Case(halves, case.options).call(), halves.values())
    assert_same_bits(value, expected)
    for grad, half_grad in zip(grads, half_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_same_bits(grad, half_grad.float())
    assert wide.dtype == torch.float64


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    _, expected = gradients(case.call(), case.values)
    _, found = gradients(
        lambda *values: checkpoint(case.call(), *values, use_reentrant=False),  # type: ignore[no-untyped-call]
        case.values,
    )
    for first, second in zip(found, expected, strict=True):
        assert_same_bits(first, second)


def test_backward_twice_and_an_expanded_upstream() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    leaves = [tensor.requires_grad_() for tensor in case.values]
    value = case.call()(*leaves)
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.ones_like(value))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_in_place_change_after_forward_is_caught() -> None:
    case = make(dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    value = case.call()(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_fake_tensors_trace_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone: a trace must not unroll the walk over the slices."""
    monkeypatch.setattr(reference, "_slices", None)
    with FakeTensorMode():
        hidden = torch.empty(2, 3, 5, requires_grad=True)
        weight = torch.empty(2, 7, 5, dtype=torch.bfloat16, requires_grad=True)
        value = linear_soft_embedding(hidden, weight, torch.empty(2, 7, 4, dtype=torch.float16))
        value.sum().backward()
    assert value.shape == (2, 3, 2, 4)
    assert value.dtype == torch.float16
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_vmap_and_jvp_raise_clearly() -> None:
    case = make(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"linear_soft_embedding does not support torch\.vmap"):
        torch.func.vmap(case.call(), in_dims=(0, None, None))(*case.values)
    with pytest.raises(RuntimeError, match="hidden carries a forward-mode tangent"):
        torch.func.jvp(case.call(), tuple(case.values), tuple(case.values))


def test_only_our_operator_runs_and_explain_counts_it() -> None:
    case = make(dtype=torch.bfloat16, groups=2)
    assert operators_run(lambda: case.call()(*case.values)) == [OPERATOR]
    explanation = explain(linear_soft_embedding, *case.values, **case.options)
    assert explanation.backend == "reference"
    assert explanation.flops == 2 * 12 * 2 * 7 * (5 + 3)
    assert explanation.exponentials == 12 * 2 * 7
    assert explanation.bytes == 2 * (12 * 5 + 2 * 7 * 5 + 2 * 7 * 3 + 12 * 2 * 3)
    rows = reference.SLICE_BYTES // (4 * 2 * 7)
    assert explanation.kernel == f"plain torch, {rows} rows at a time"


HIDDEN, WEIGHT, CODEBOOK = torch.ones(3, 5), torch.ones(7, 5), torch.ones(7, 2)
ROWS = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must have dtype"),
        ({"codebook": CODEBOOK.to_sparse()}, TypeError, "codebook must be a dense"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have shape \[..., H\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \[V, H\] or \[G, V, H\]"),
        ({"weight": torch.ones(0, 5)}, ValueError, "weight must have shape .* no size 0"),
        ({"weight": torch.ones(7, 4)}, ValueError, "weight must have H = 5 columns"),
        ({"codebook": torch.ones(6, 2)}, ValueError, r"codebook must have shape \[V, D\]"),
        ({"codebook": torch.ones(7, 0)}, ValueError, "codebook must have .* D >= 1"),
        ({"codebook": torch.ones(2, 7, 2)}, ValueError, r"codebook must have shape \[V, D\]"),
        ({"weight": torch.ones(2, 7, 5)}, ValueError, r"codebook must have shape \[G, V, D\]"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"bias": torch.ones(2, 7)}, ValueError, r"bias must broadcast to the rows .*= \[3, 7\]"),
        ({"mask": ROWS}, ValueError, "mask_embedding is required when mask is given"),
        (
            {"mask_embedding": torch.ones(2)},
            ValueError,
            "mask_embedding is given, but mask is None",
        ),
        (
            {"mask": ROWS, "mask_embedding": torch.ones(3)},
            ValueError,
            r"mask_embedding must have shape \[D\] = \[2\], got \[3\]",
        ),
        (
            {"mask": torch.ones(3), "mask_embedding": torch.ones(2)},
            TypeError,
            "mask must have dtype",
        ),
        ({"mask": ROWS[:2], "mask_embedding": torch.ones(2)}, ValueError, "mask must broadcast"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must .* hidden.shape\[:-1\]"),
        ({"memory": "small"}, ValueError, "memory must be one of 'auto', 'keep', 'recompute'"),
        ({"precision": "low"}, ValueError, "precision must be one of 'default', 'high'"),
        ({"codebook": CODEBOOK.to("meta")}, ValueError, "codebook is on meta"),
        ({"bias": torch.ones(7, device="meta")}, ValueError, "bias is on meta"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        ({"backend": "cpp"}, ValueError, r"backend='cpp' cannot run: this operator has no C\+\+"),
        (
            {"backend": "cuda"},
            ValueError,
            r"backend='cuda' cannot run: this operator has no CUDA kernel",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = {"hidden": HIDDEN, "weight": WEIGHT, "codebook": CODEBOOK} | options
    with pytest.raises(error, match="linear_soft_embedding: " + message):
        linear_soft_embedding(**tensors)

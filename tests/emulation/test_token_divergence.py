"""The CUDA kernels of token_divergence, run on the CPU: values and gradients, layouts, order of threads."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.contract import FLOORS, assert_contract
from support.divergence_calls import KINDS, NAMES, Call, Result, assert_same, rows_of_every_sort
from torch import Tensor

OPERATORS = torch.ops.softdimo_emulated
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every number of threads per row, in forward and backward, at both ends of its range; rows in registers,
# and rows that are read again.
VOCABULARIES = (1, 7, 8, 128, 129, 1024, 1025, 4096, 4097, 8192, 8203)


def assert_accurate(call: Call, found: Result | None = None) -> None:
    """The rows and every gradient keep the numerics contract, whose floor counts the exponential's 2 ulp."""
    found = call.run(OPERATORS) if found is None else found
    truth, yardstick = call.exact(), call.composed()
    assert_contract(found.value, yardstick.value, truth.value, floor=1e-6)
    for name, mine, theirs, true in zip(
        NAMES, found.grads, yardstick.grads, truth.grads, strict=False
    ):
        assert_contract(mine, theirs, true, floor=max(2e-6, FLOORS[mine.dtype]), what=name)


def finite(call: Call) -> Call:
    """Without -inf, where no gradient is NaN and the composed expression is defined."""
    tensors = {name: getattr(call, name) for name in NAMES}
    return call.change(**{n: t.clamp(min=-1e4) for n, t in tensors.items() if t is not None})


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64_and_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Direct and centred rows; the same bits whichever warp and lane goes first."""
    weights = KINDS[(vocabulary + DTYPES.index(dtype)) % len(KINDS)]
    tensors = rows_of_every_sort(24 if vocabulary < 2000 else 6, vocabulary, dtype)
    call = Call(*tensors, guidance=1.5, temperatures=(0.8, 1.2), weights=weights)
    found = call.run(OPERATORS)
    emulated.set_schedule(emulated.Schedule.reverse)
    backwards = call.run(OPERATORS)
    emulated.set_schedule(emulated.Schedule.greedy)
    assert_same(found, backwards)
    assert_accurate(finite(call))


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("guidance", [None, 0.0, 0.4, 1.0, 2.5, "rows"])
@pytest.mark.parametrize("same", [True, False])
def test_every_option(
    emulated: ModuleType, weights: tuple[float, float], guidance: float | str | None, same: bool
) -> None:
    teacher, model, uncond = (t.clamp(min=-1e4) for t in rows_of_every_sort(40, 150))
    call = Call(
        teacher, model, None if guidance is None else uncond,
        guidance=4 * torch.rand(40) if isinstance(guidance, str) else guidance or 1.0,
        temperatures=(0.7, 0.7 if same else 1.3), weights=weights, upstream=torch.randn(40),
        weight=torch.rand(40),
    )  # fmt: skip
    assert_accurate(call if guidance != 0.0 else call.change(guidance=0.0))


@pytest.mark.parametrize("weights", KINDS[:2])
@pytest.mark.parametrize(
    ("distance", "size", "offset"),
    [(1e-2, 1.0, 0.0), (1e-6, 1.0, 0.0), (1e-2, 20.0, 0.0), (1e-5, 20.0, 0.0), (1e-3, 3.0, 4096.0)],
)
def test_nearly_equal_logits_do_not_cancel(
    emulated: ModuleType, weights: tuple[float, float], distance: float, size: float, offset: float
) -> None:
    """Relative to float64, with no allowance for the error of a yardstick."""
    model = size * torch.randn(64, 300) + offset
    teacher = model + distance * size * torch.randn(64, 300)
    call = Call(teacher, model - offset, temperatures=(0.7, 0.7), weights=weights)
    found, truth = call.run(OPERATORS), call.exact()
    for mine, true in zip(
        (found.value, *found.grads[:2]), (truth.value, *truth.grads), strict=False
    ):
        assert float((mine - true).norm() / true.norm()) < 1e-6
    assert float(((found.value - truth.value).abs() / truth.value).max()) < 1e-5


@pytest.mark.parametrize("weights", KINDS)
def test_equal_logits_give_exactly_nothing(
    emulated: ModuleType, weights: tuple[float, float]
) -> None:
    logits = 5 * torch.randn(16, 100)
    call = Call(logits, logits.clone(), torch.randn(16, 100), torch.ones(16), weights=weights)
    found = call.run(OPERATORS)
    for zero in (found.value, *found.grads):
        assert_same_bits(zero.abs(), torch.zeros_like(zero))


@pytest.mark.parametrize("distance", [1e-2, 1e-6])
@pytest.mark.parametrize("weights", KINDS[:2])
def test_nearly_one_hot_rows(
    emulated: ModuleType, weights: tuple[float, float], distance: float
) -> None:
    """Both hold about 1 - distance at one entry, whose gradient cancels in q - p; rows sum to zero."""
    winner = torch.randint(200, (64, 1))

    def one_hot(rest: float) -> Tensor:
        logits = torch.randn(64, 200, dtype=torch.double)
        others = logits.scatter(1, winner, -torch.inf).logsumexp(1, keepdim=True)
        return logits.scatter(1, winner, others + math.log(1 / rest - 1)).float()

    call = Call(one_hot(distance), one_hot(distance / 2), weights=weights)
    found, truth = call.run(OPERATORS), call.exact()
    for mine, true in zip(found.grads[:2], truth.grads, strict=False):
        error = (mine - true).abs().gather(1, winner) / true.abs().gather(1, winner)
        assert float(error.median()) < 2e-5
        assert float(mine.double().sum(1).abs().max()) <= 1e-6 * float(mine.abs().max())


@pytest.mark.parametrize("weights", KINDS)
def test_gradients_sum_to_zero(emulated: ModuleType, weights: tuple[float, float]) -> None:
    """To the rounding of the single entries, from flat rows to one-hot ones."""
    size = torch.logspace(-2, 1, 64)[:, None]
    call = Call(*(torch.randn(64, 300) * size for _ in range(3)), guidance=2.0, weights=weights)
    for gradient in call.run(OPERATORS).grads:
        sums, sizes = gradient.double().sum(1).abs(), gradient.double().abs().sum(1)
        assert float((sums / sizes).max()) < 1e-6


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_reductions(emulated: ModuleType, reduction: str, rows: int) -> None:
    teacher, model, _ = (t.clamp(min=-1e4) for t in rows_of_every_sort(300, 20))
    mask, weight = torch.rand(300) < 0.6, torch.rand(300)
    call = Call(
        teacher, model, mask=mask, weight=weight, upstream=torch.tensor(1.7), reduction=reduction
    )
    call = call.rows(slice(rows))
    assert_accurate(call)
    nothing = call.change(mask=torch.zeros_like(call.mask)).run(OPERATORS)  # type: ignore[arg-type]
    for zero in (nothing.value, *nothing.grads):
        assert_same_bits(zero, torch.zeros_like(zero))
    assert_accurate(call.change(mask=None))


@given(
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    leading=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    vocabulary=st.integers(1, 400) | st.sampled_from([1030, 2050, 8200]),
    padding=st.integers(0, 9),
    offset=st.integers(0, 9),
    size=st.sampled_from([0.1, 3.0, 100.0]),
    temperatures=st.tuples(*[st.floats(-3, 3).map(lambda x: 10.0**x)] * 2),
    weights=st.sampled_from(KINDS),
    transposed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_layout(
    emulated: ModuleType, dtypes: tuple[torch.dtype, ...], leading: tuple[int, int], vocabulary: int,
    padding: int, offset: int, size: float, temperatures: tuple[float, float], weights: tuple[float, float],
    transposed: bool, seed: int,
) -> None:  # fmt: skip
    """Mixed types, rows between NaN, leading dimensions in any order; rows not counted hold NaN."""
    torch.manual_seed(seed)
    mask = torch.rand(leading) < 0.7
    tensors = []
    for dtype in dtypes:
        memory = torch.full((*leading, offset + vocabulary + padding), torch.nan, dtype=dtype)
        view = memory[..., offset : offset + vocabulary]
        values = size * min(*temperatures, 1.0) * torch.randn(*leading, vocabulary)
        view.copy_(torch.where(mask[..., None], values, torch.nan))
        tensors.append(view.transpose(0, 1).contiguous().transpose(0, 1) if transposed else view)
    call = Call(
        *tensors, guidance=3 * torch.rand(leading[0], 1).expand(leading), temperatures=temperatures,
        weights=weights, mask=mask, weight=torch.rand(leading[1]).expand(leading),
    )  # fmt: skip
    found, truth, rough = call.run(OPERATORS), call.exact(), finite_composed(call)
    assert_contract(found.value, rough.value, truth.value, floor=1e-5)
    for name, mine, theirs, true in zip(NAMES, found.grads, rough.grads, truth.grads, strict=True):
        assert_contract(mine, theirs, true, floor=max(1e-5, FLOORS[mine.dtype]), what=name)
        assert not mine[~mask].any()


def finite_composed(call: Call) -> Result:
    """Of the same rows, zeros where they are not counted."""
    assert call.mask is not None
    kept = call.mask[..., None]
    tensors = {name: torch.where(kept, getattr(call, name), 0.0) for name in NAMES}
    return call.change(**tensors).composed()

"""The CUDA kernels of masked_cross_entropy, run on the CPU through their binding.

Outputs and workspaces hold NaN until a kernel has written them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.contract import FLOORS, assert_contract
from torch import Tensor

from softdimo_fast.ops.reference import cross_entropy as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 8, 31, 128, 129, 1025, 2049)
SCALES = (0.0, 0.01, 1.0, 5.0, 50.0, 1000.0)
OK, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    """One call, forward and backward."""

    logits: Tensor
    targets: Tensor
    mask: Tensor | None = None
    smoothing: float = 0.0
    reduction: str = "none"

    def rows(self, picked: slice) -> Case:
        mask = None if self.mask is None else self.mask[picked]
        return self._replace(logits=self.logits[picked], targets=self.targets[picked], mask=mask)


class Found(NamedTuple):
    loss: Tensor
    row_max: Tensor
    row_rest: Tensor
    gradient: Tensor


def run(emulated: ModuleType, case: Case, upstream: Tensor, schedule: str = "greedy") -> Found:
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    operators = torch.ops.softdimo_emulated
    loss, *saved = operators.masked_cross_entropy(*case)
    gradient = operators.masked_cross_entropy_backward(upstream, *case, *saved)
    return Found(loss, *saved, gradient)


def truth(case: Case, upstream: Tensor) -> tuple[Tensor, Tensor]:
    wide = case._replace(logits=case.logits.double())
    loss = reference.masked_cross_entropy(*wide)
    return loss, reference.masked_cross_entropy_backward(upstream.double(), *wide, [True])


def composed(case: Case, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """F.cross_entropy in the logits' own dtype, with ignore_index for the rows left out."""
    logits = case.logits.detach().requires_grad_()
    targets = case.targets if case.mask is None else torch.where(case.mask, case.targets, -100)
    loss = F.cross_entropy(
        logits, targets, label_smoothing=case.smoothing, reduction=case.reduction
    )
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return loss.detach(), gradient


def assert_accurate(found: Found, case: Case, upstream: Tensor) -> None:
    (loss, gradient), theirs = truth(case, upstream), composed(case, upstream)
    assert found.loss.dtype == torch.float32
    assert found.gradient.dtype == case.logits.dtype
    assert_contract(found.loss, theirs[0], loss, what="loss")
    # In a flat row what is left of p - e / V is the (1 - e)-th part of both.
    floor = max(FLOORS[case.logits.dtype], FLOORS[torch.float32] / (1 - case.smoothing))
    assert_contract(found.gradient, theirs[1], gradient, floor=floor, what="gradient")


def assert_same(first: Found, second: Found) -> None:
    for name, a, b in zip(Found._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def targets_of(logits: Tensor) -> Tensor:
    """Half of them where the row is largest, as in a model that is trained."""
    rows, vocabulary = logits.shape
    return torch.where(
        torch.rand(rows) < 0.5, logits.float().argmax(-1), torch.randint(vocabulary, (rows,))
    )


def surrounded(values: Tensor, offset: int, padding: int) -> Tensor:
    """The same rows inside a wider matrix of NaN."""
    rows, columns = values.shape
    memory = torch.full((rows, offset + columns + padding), torch.nan, dtype=values.dtype)
    view = memory[:, offset : offset + columns]
    view.copy_(values)
    return view


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64_and_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int, smoothing: float
) -> None:
    """From flat rows to one-hot ones, and the same bits whichever warp and lane goes first."""
    rows = 258 if vocabulary < 1000 else 66
    scales = torch.tensor(SCALES).repeat(rows // len(SCALES))
    logits = (torch.randn(rows, vocabulary) * scales[:, None]).to(dtype)
    case, upstream = Case(logits, targets_of(logits), smoothing=smoothing), torch.randn(rows)
    found = run(emulated, case, upstream)
    assert_same(found, run(emulated, case, upstream, "reverse"))
    for first in range(len(SCALES)):
        some = slice(first, None, len(SCALES))
        part = Found(*(tensor[some] for tensor in found))
        assert_accurate(part, case.rows(some), upstream[some])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions(emulated: ModuleType, reduction: str, smoothing: float) -> None:
    logits = 3 * torch.randn(300, 65)
    mask = torch.rand(300) > 0.4
    logits[~mask] = torch.nan
    targets = torch.where(mask, targets_of(logits), -100)
    case = Case(logits, targets, mask, smoothing, reduction)
    upstream = torch.randn(300) if reduction == "none" else torch.tensor(-1.3)
    found = run(emulated, case, upstream)
    assert found.loss.shape == upstream.shape
    assert_accurate(found, case, upstream)
    assert_same(found, run(emulated, case, upstream, "reverse"))
    if reduction != "none":
        whole = run(emulated, case._replace(reduction="none"), upstream)
        total = whole.loss.double().sum()
        expected = total / mask.sum() if reduction == "mean" else total
        assert_same_bits(found.loss, expected.float())


@pytest.mark.parametrize("vocabulary", [1000, 1025, 5000])
def test_nearly_one_hot(emulated: ModuleType, vocabulary: int) -> None:
    """The relative error of a tiny loss, and of the target's gradient: minus the sum of the others."""
    logits, targets = torch.randn(64, vocabulary), torch.randint(vocabulary, (64,))
    logits[torch.arange(64), targets] = 30
    case, upstream = Case(logits, targets), torch.ones(64)
    found, (loss, gradient) = run(emulated, case, upstream), truth(case, upstream)
    assert float(loss.max()) < 1e-8
    assert float((found.loss / loss - 1).abs().max()) < 2e-6
    assert float((found.gradient / gradient - 1).abs().max()) < 4e-6
    assert float((found.gradient.double().sum(-1) / loss).abs().max()) < 4e-6


def test_gradients_of_a_row_sum_to_zero(emulated: ModuleType) -> None:
    logits = torch.randn(96, 700) * torch.tensor([1.0, 10.0, 100.0]).repeat(32)[:, None]
    case = Case(logits, targets_of(logits), smoothing=0.1)
    found = run(emulated, case, torch.ones(96))
    assert float(found.gradient.double().sum(-1).abs().max()) < 1e-6


def test_logits_far_from_zero(emulated: ModuleType) -> None:
    """A common offset of 1e4 changes nothing: differences come first."""
    logits = torch.randint(-64, 64, (40, 500)) / 8.0
    case, upstream = Case(logits, targets_of(logits), smoothing=0.1), torch.randn(40)
    near = run(emulated, case, upstream)
    far = run(emulated, case._replace(logits=logits + 1e4), upstream)
    assert_same_bits(near.loss, far.loss, "loss")
    assert_same_bits(near.gradient, far.gradient, "gradient")


# ---------------------------------------------------------------------------------------------------
# layouts


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
    vocabulary=st.integers(1, 5000),
    padding=st.integers(0, 9),
    offset=st.integers(0, 9),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    masked=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
)
def test_any_layout(
    emulated: ModuleType, dtype: torch.dtype, rows: int, vocabulary: int, padding: int, offset: int,
    scale: float, masked: bool, smoothing: float, reduction: str,
) -> None:  # fmt: skip
    logits = surrounded((scale * torch.randn(rows, vocabulary)).to(dtype), offset, padding)
    targets, mask = targets_of(logits), torch.rand(rows) > 0.3 if masked else None
    if mask is not None:
        logits[~mask] = torch.nan
        targets[~mask] = torch.randint(-(2**62), 2**62, (rows,))[~mask]
    case = Case(logits, targets, mask, smoothing, reduction)
    upstream = torch.randn(rows if reduction == "none" else ())
    found, (loss, gradient) = run(emulated, case, upstream), truth(case, upstream)
    torch.testing.assert_close(found.loss.double(), loss, rtol=3e-6, atol=1e-6)
    error = found.gradient.double() - gradient
    assert float(error.norm()) <= 2 * max(FLOORS[dtype], 1e-6) * float(gradient.norm()) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 31, 129, 1025, 2111])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Alone and in a batch, at every address modulo 16, in padded rows."""
    logits = torch.randn(19, vocabulary).to(dtype)
    case, upstream = Case(logits, targets_of(logits), smoothing=0.1), torch.randn(19)
    expected = run(emulated, case, upstream)
    for row in range(19):
        some = slice(row, row + 1)
        alone = case.rows(some)._replace(logits=logits[some].clone())
        found = run(emulated, alone, upstream[some])
        assert_same(found, Found(*(part[some] for part in expected)))
    for offset in range(16 // logits.element_size()):
        moved = case._replace(logits=surrounded(logits, offset, offset % 3))
        assert_same(run(emulated, moved, upstream), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [3, 100, 1025])
def test_only_logits_of_counted_rows_are_read(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    logits = surrounded(torch.randn(40, vocabulary).to(dtype), 1, 2)
    targets, mask = targets_of(logits), torch.rand(40) > 0.5
    targets[::5] = vocabulary
    size = logits.element_size()
    counted = mask.nonzero().flatten().tolist()
    emulated.allow_reads([(logits[n].data_ptr(), vocabulary * size) for n in counted])
    try:
        found = run(emulated, Case(logits, targets, mask, 0.1), torch.ones(40))
    finally:
        emulated.allow_all_reads()
    assert torch.equal(found.loss.isnan(), mask & (targets == vocabulary))
    assert not bool(found.gradient[~mask].any())


def test_any_strides(emulated: ModuleType) -> None:
    """Transposed rows, strided columns, expanded logits; targets, masks and gradients of any stride."""
    base = torch.randn(6, 5, 40)
    targets = torch.randint(20, (5, 6)).t()
    mask = (torch.rand(6, 1) > 0.4).expand(6, 5)
    for logits in (
        base[..., 3:23],
        base.transpose(0, 1)[..., 3:23].transpose(0, 1),
        base[..., ::2],
        base.permute(2, 1, 0)[:20].permute(2, 1, 0),
        base[:1, :, :20].expand(6, -1, -1),
    ):
        plain = Case(logits.contiguous(), targets.contiguous(), mask.contiguous(), 0.1)
        expected = run(emulated, plain, torch.full((6, 5), 0.7))
        case = Case(logits, targets, mask, 0.1)
        assert_same(run(emulated, case, torch.tensor(0.7).expand(6, 5)), expected)
        assert expected.gradient.is_contiguous()
        assert not bool(expected.gradient.isnan().any())


def test_rows_more_than_four_gigabytes_apart(emulated: ModuleType) -> None:
    """Offsets are 64-bit. The memory between the rows is promised by the system, not filled."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2 * (2**31 + 8) + 100, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    logits, values = memory.as_strided((3, 100), (2**31 + 8, 1)), torch.randn(3, 100).bfloat16()
    for row in range(3):
        logits[row].copy_(values[row])
    case, upstream = Case(logits, torch.tensor([0, 50, 99])), torch.randn(3)
    expected = run(emulated, case._replace(logits=values), upstream)
    assert_same(run(emulated, case, upstream), expected)


# ---------------------------------------------------------------------------------------------------
# special rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 4200])
def test_special_rows(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int, smoothing: float
) -> None:
    inf, nan = torch.inf, torch.nan
    logits, targets = torch.randn(17, vocabulary).to(dtype), torch.full((17,), 3)
    logits[0] = -inf  # nothing to choose from
    logits[1:3] = -inf
    logits[1, 3] = 2.5  # one-hot at the target
    logits[2, 0] = 2.5  # elsewhere
    logits[3, ::2] = -inf  # not the target
    logits[4, 1::2] = -inf  # the target too
    logits[5, -1] = nan
    logits[6, 0] = nan
    logits[7, 3] = nan  # the target's
    logits[8, 2] = inf
    logits[9, 3] = inf
    logits[10, :2] = inf
    logits[11] = -inf
    logits[11, 3] = nan
    logits[12] = 3.0  # uniform
    targets[13:16] = torch.tensor([-1, vocabulary, -(2**63)])
    logits[16, :2] = 9.0  # two maxima
    case, upstream = Case(logits, targets, smoothing=smoothing), torch.linspace(-2, 2, 17)
    found, (loss, gradient) = run(emulated, case, upstream), truth(case, upstream)
    lost = [0, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15]
    assert found.loss.isnan().nonzero().flatten().tolist() == lost
    torch.testing.assert_close(found.loss.double(), loss, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert found.gradient[lost].isnan().all()
    close = {"rtol": 2 * FLOORS[dtype] + 2e-6, "atol": FLOORS[dtype] + 1e-6, "equal_nan": True}
    torch.testing.assert_close(found.gradient.double(), gradient, **close)
    assert_same(found, run(emulated, case, upstream, "reverse"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_finite_extremes(emulated: ModuleType, smoothing: float) -> None:
    """Differences that overflow are a probability of zero and an infinite distance, never NaN."""
    logits = torch.tensor([[3e38, -3e38, -3e38], [-3e38, -3e38, -3e38], [3e38, 3e38, -3e38]])
    case = Case(logits, torch.tensor([0, 1, 2]), smoothing=smoothing)
    found = run(emulated, case, torch.ones(3))
    expected = [torch.inf if smoothing else 0.0, float(torch.tensor(3.0).log()), torch.inf]
    torch.testing.assert_close(found.loss, torch.tensor(expected))
    share = smoothing / 3
    own = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]])
    own[torch.arange(3), case.targets] -= 1 - smoothing
    torch.testing.assert_close(found.gradient, own - share)


# ---------------------------------------------------------------------------------------------------
# sizes and errors


def test_no_rows(emulated: ModuleType) -> None:
    for shape in ((0,), (3, 0)):
        case = Case(torch.randn(*shape, 9), torch.zeros(shape, dtype=torch.int64), None, 0.1)
        found = run(emulated, case, torch.ones(shape))
        assert found.loss.shape == shape
        assert found.gradient.shape == (*shape, 9)
        for reduction in ("sum", "mean"):
            found = run(emulated, case._replace(reduction=reduction), torch.ones(()))
            assert float(found.loss) == 0


@pytest.mark.parametrize("vocabulary", [9, 2100])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_counted_row(emulated: ModuleType, reduction: str, vocabulary: int) -> None:
    logits, mask = torch.full((20, vocabulary), torch.nan), torch.zeros(20, dtype=torch.bool)
    case = Case(logits, torch.full((20,), -100), mask, 0.1, reduction)
    found = run(emulated, case, torch.ones(20 if reduction == "none" else ()))
    assert not any(bool(part.any()) for part in found)


@pytest.mark.parametrize("launcher", ["masked_cross_entropy", "masked_cross_entropy_backward"])
def test_what_the_launchers_refuse(emulated: ModuleType, launcher: str) -> None:
    """Sizes past a kernel's, and 2^32 + 1 blocks, which would wrap to one."""
    launch, before, types = getattr(emulated, launcher), emulated.launches(), emulated.DType
    for dtype, vocabulary in ((types.float32, 0), (types.float32, 2**30 + 1), (types.float64, 9)):
        assert launch(dtype, 2, vocabulary) == INVALID_VALUE
    assert launch(types.float32, 0, 100) == OK
    assert launch(types.float32, 2**36 + 16, 8) == INVALID_CONFIGURATION
    assert launch(types.float32, 2**33 + 2, 8192) == INVALID_CONFIGURATION
    assert emulated.launches() == before


def test_what_the_operators_refuse(emulated: ModuleType) -> None:
    operators, row = torch.ops.softdimo_emulated, torch.zeros(2, dtype=torch.int64)
    for logits, targets, mask, message in (
        (torch.randn(2, 3).double(), row, None, "logits must be float32, bfloat16 or float16"),
        (torch.zeros(1).expand(2, 2**30 + 1), row, None, r"1 <= V <= 2\^30"),
        (torch.randn(2, 3), row.int(), None, "targets must be int64"),
        (torch.randn(2, 3), torch.zeros(5, dtype=torch.int64), None, "targets must broadcast"),
        (torch.randn(2, 3), row, torch.ones(3, dtype=torch.bool), "mask must broadcast"),
        (torch.randn(2, 3), row, torch.ones(2), "mask must be bool"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.masked_cross_entropy(logits, targets, mask, 0.0, "none")
    case, saved = Case(torch.randn(2, 3), row), torch.zeros(2)
    backward = operators.masked_cross_entropy_backward
    with pytest.raises(RuntimeError, match="the saved tensors do not fit"):
        backward(saved, *case, torch.zeros(3), saved)
    with pytest.raises(RuntimeError, match="grad must be a scalar"):
        backward(saved, *case._replace(reduction="sum"), saved, saved)

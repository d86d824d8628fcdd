"""The CUDA kernels of token_divergence: lone rows, memory, special rows, what is refused."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.checks import assert_same_bits
from support.divergence_calls import KINDS, NAMES, Call, Result, assert_same, rows_of_every_sort
from torch import Tensor

OPERATORS = torch.ops.softdimo_emulated
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = torch.inf, torch.nan


# ---------------------------------------------------------------------------------------------------
# a row's bits depend on the row alone; what is read and written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 129, 1025, 4111, 8200])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Alone and in a batch, in another order, at every address modulo 16, with a mask."""
    rows = 9 if vocabulary < 2000 else 3
    call = Call(
        *rows_of_every_sort(rows, vocabulary, dtype),
        guidance=2 * torch.rand(rows),
        weights=(0.7, 0.3),
    )
    expected = call.run(OPERATORS)
    order = torch.randperm(rows)
    for chosen in (order, order[:2], slice(1, 2)):
        found = call.rows(chosen).run(OPERATORS)
        assert_same(found, Result(expected.value[chosen], tuple(g[chosen] for g in expected.grads)))
    for offset in range(16 // call.model.element_size()):
        memory = torch.full((3, rows, vocabulary + offset + 1), NAN, dtype=dtype)
        views = memory[..., offset : offset + vocabulary].unbind()
        for view, name in zip(views, NAMES, strict=True):
            view.copy_(getattr(call, name))
        assert_same(call.change(**dict(zip(NAMES, views, strict=True))).run(OPERATORS), expected)
    mask = torch.arange(rows) % 2 == 0
    masked = call.change(mask=mask).run(OPERATORS)
    kept = [torch.where(mask[:, None], g, 0.0) for g in expected.grads]
    assert_same(masked, Result(torch.where(mask, expected.value, 0.0), tuple(kept)))


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("vocabulary", [40, 130])
def test_gradients_that_are_not_wanted(
    emulated: ModuleType, wanted: tuple[int, ...], vocabulary: int
) -> None:
    call = Call(*rows_of_every_sort(20, vocabulary, torch.bfloat16), guidance=1.5)
    expected, found = call.run(OPERATORS), call.run(OPERATORS, [bool(w) for w in wanted])
    for needed, mine, all_of_them in zip(wanted, found.grads, expected.grads, strict=True):
        assert_same_bits(mine, all_of_them if needed else all_of_them.new_empty(0))


@pytest.mark.parametrize("vocabulary", [33, 136, 1100, 8200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_other_memory(emulated: ModuleType, vocabulary: int, dtype: torch.dtype) -> None:
    """The logits of the rows that count alone; the unconditional ones only where the guidance is not 1."""
    mask = torch.tensor([True, False, True, True, False])
    guidance = torch.tensor([1.5, 1.5, 1.0, 0.0, 1.0])
    tensors = [
        torch.full((5, vocabulary + 3), NAN, dtype=dtype)[:, 1 : vocabulary + 1] for _ in range(3)
    ]
    allowed = []
    for place, logits in enumerate(tensors):
        for row in torch.nonzero(mask & ((guidance != 1) | (place < 2))).flatten().tolist():
            logits[row] = torch.randn(vocabulary)
            allowed.append((logits[row].data_ptr(), vocabulary * logits.element_size()))
    call = Call(*tensors, guidance=guidance, mask=mask)
    try:
        emulated.allow_reads(allowed)
        found = call.run(OPERATORS)
        emulated.allow_reads(allowed[1:])
        with pytest.raises(RuntimeError, match="no business with"):
            call.run(OPERATORS)
    finally:
        emulated.allow_all_reads()
    assert all(bool(part.isfinite().all()) for part in (found.value, *found.grads))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_output_is_written(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, reduction: str
) -> None:
    """Fresh memory holds NaN; nothing of it is left, in rows that are not counted either."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(5).isnan().all())
        tensors = [t.clamp(min=-1e4) for t in rows_of_every_sort(21, 137)]
        found = Call(*tensors, mask=torch.rand(21) < 0.5, reduction=reduction).run(OPERATORS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.statistics is not None
    assert found.statistics.shape == (21, 9)
    for part in (found.value, found.statistics, *found.grads):
        assert bool(part.isfinite().all())


def test_rows_more_than_four_gigabytes_apart(emulated: ModuleType) -> None:
    """Offsets are 64-bit. The memory between the rows is promised by the system, not filled."""
    stride = 2**31 + 8
    call = Call(*rows_of_every_sort(3, 100, torch.bfloat16), guidance=1.5)
    no_reserve = 0x4000  # Linux; Python names it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (2 * stride + 100), flags=flags)
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, 100), (stride, 1))
    far.copy_(call.teacher)
    assert_same(call.change(teacher=far).run(OPERATORS), call.run(OPERATORS))


# ---------------------------------------------------------------------------------------------------
# special rows


def special_rows(vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """Teacher, model and unconditional logits, and which rows hold no distributions."""
    teacher, model, uncond = torch.randn(3, 14, vocabulary)
    teacher[0] = -INF
    model[1] = -INF
    teacher[2, -1] = NAN
    model[3, 0] = NAN
    teacher[4, 1] = INF
    model[5, 1] = INF
    uncond[6, 1] = INF  # guided: -inf by the formula, and yet no distribution
    uncond[7, 1] = -INF  # guided: +inf
    teacher[8, 1] = uncond[8, 1] = -INF  # q has it alone
    model[9, 1] = -INF  # p has it alone
    for logits in (teacher, model, uncond):
        logits[10, ::2] = -INF  # both rule it out
    teacher[11, 1:] = model[11, 1:] = uncond[11, 1:] = -INF  # one-hot, the same
    teacher[12, 1] = -INF  # guided: -inf
    broken = torch.zeros(14, dtype=torch.bool)
    broken[:8] = True
    return [teacher, model, uncond], broken


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 8200])
def test_special_rows(emulated: ModuleType, weights: tuple[float, float], vocabulary: int) -> None:
    """Infinite and NaN exactly where the specification is."""
    tensors, broken = special_rows(vocabulary)
    call = Call(*tensors, guidance=2.0, weights=weights)
    found, truth = call.run(OPERATORS), call.exact()
    assert torch.equal(found.value.isnan(), truth.value.isnan())
    assert bool(found.value[broken].isnan().all())
    torch.testing.assert_close(
        found.value.double(), truth.value, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    for name, mine, true in zip(NAMES, found.grads, truth.grads, strict=True):
        assert torch.equal(mine.isnan(), true.isnan()), name
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("lowest", [-1e4, -3e7, -1e30, -3e38])
def test_an_entry_that_one_distribution_all_but_rules_out(
    emulated: ModuleType, lowest: float
) -> None:
    """A huge log ratio where only the other side holds mass does not cost the digits of the rest."""
    teacher, model = torch.randn(2, 64, 5)
    teacher[:, 0] = lowest
    call = Call(teacher, model)
    found, truth = call.run(OPERATORS), call.exact()
    for mine, true in zip(
        (found.value, *found.grads[:2]), (truth.value, *truth.grads), strict=False
    ):
        assert float((mine - true).norm() / true.norm()) < 2e-6


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, 1e-46])
@pytest.mark.parametrize("side", [0, 1])
def test_a_temperature_that_is_not_positive(
    emulated: ModuleType, temperature: float, side: int
) -> None:
    temperatures = (temperature, 1.0) if side == 0 else (1.0, temperature)
    call = Call(*torch.randn(2, 5, 40).unbind(), temperatures=temperatures)
    found = call.run(OPERATORS)
    assert all(bool(part.isnan().all()) for part in (found.value, *found.grads[:2]))


@pytest.mark.parametrize("upstream", [NAN, INF, 0.0])
@pytest.mark.parametrize("vocabulary", [1, 9])
def test_upstream_gradients_of_any_sort(
    emulated: ModuleType, vocabulary: int, upstream: float
) -> None:
    call = Call(*torch.randn(2, 3, vocabulary).unbind(), upstream=torch.full((3,), upstream))
    for mine in call.run(OPERATORS).grads[:2]:
        assert bool(mine.isnan().all()) == (upstream != 0)
        assert upstream != 0 or not bool(mine.any())


# ---------------------------------------------------------------------------------------------------
# the binding


def test_no_rows(emulated: ModuleType) -> None:
    found = Call(*torch.randn(3, 0, 40).unbind()).run(OPERATORS)
    assert [part.shape for part in (found.value, *found.grads)] == [(0,), *[(0, 40)] * 3]


Z, M = torch.randn(4, 6), torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.change(teacher=Z[:2]), "the logits differ in shape"),
        (lambda c: c.change(uncond=Z[:, :5]), "the logits differ in shape"),
        (
            lambda c: c.change(teacher=Z.double()),
            "teacher_logits must be float32, bfloat16 or float16",
        ),
        (lambda c: c.change(mask=M[:3]), "mask must broadcast to the rows"),
        (lambda c: c.change(mask=M.byte()), "mask must be bool"),
        (lambda c: c.change(weight=torch.ones(5)), "weight must broadcast to the rows"),
        (lambda c: c.change(teacher=Z[:, :0], model=Z[:, :0]), "logits must have shape"),
    ],
)
def test_what_it_cannot_run_is_refused(
    emulated: ModuleType, change: Callable[[Call], Call], message: str
) -> None:
    before = emulated.launches()
    with pytest.raises(RuntimeError, match=f"token_divergence: {message}"):
        OPERATORS.token_divergence(*change(Call(Z, Z)).arguments())
    assert emulated.launches() == before


def test_statistics_of_another_call_are_refused(emulated: ModuleType) -> None:
    call = Call(Z, Z)
    with pytest.raises(RuntimeError, match="the saved statistics do not fit"):
        OPERATORS.token_divergence_backward(
            torch.ones(4), *call.arguments(), torch.zeros(3, 9), [True] * 3
        )

"""The CUDA kernels of distribution_matching_loss, run on the CPU: normalization, masks, gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.divergence_calls import Call, is_float, rows_of_every_sort
from torch import Tensor

from softdimo_fast.ops.reference import divergence as reference

OPERATORS = torch.ops.softdimo_emulated
NORMALIZATIONS = ("sum", "batch", "masked")
Arguments = tuple[Any, ...]


def arguments(
    student: Tensor, teacher: Tensor, auxiliary: Tensor, mask: Tensor, *, uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0, weights: tuple[float, float] = (1.0, 0.0), weight: Tensor | None = None,
    normalization: str = "batch",
) -> Arguments:  # fmt: skip
    scalar = 1.0 if isinstance(guidance, Tensor) else guidance
    per_row = guidance if isinstance(guidance, Tensor) else None
    return (
        student, teacher, auxiliary, mask, uncond, scalar, per_row, 0.8, 1.3, *weights, weight,
        normalization,
    )  # fmt: skip


def run(call: Arguments, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    value, statistics = OPERATORS.distribution_matching_loss(*call)
    gradient = OPERATORS.distribution_matching_loss_backward(
        torch.tensor(upstream), *call, statistics, [True]
    )
    return value, gradient


def exact(call: Arguments, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    wide = tuple(a.double() if is_float(a) else a for a in call)
    value = reference.distribution_matching_loss(*wide)
    gradient = reference.distribution_matching_loss_backward(
        torch.tensor(upstream, dtype=torch.double), *wide, [True]
    )
    return value, gradient


def logits(*shape: int) -> list[Tensor]:
    rows = torch.Size(shape[:-1]).numel()
    return [t.clamp(min=-1e4).reshape(shape) for t in rows_of_every_sort(max(rows, 1), shape[-1])]


def assert_close(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], rtol: float) -> None:
    for mine, true in zip(found, truth, strict=True):
        error = float((mine.double() - true).norm())
        assert error <= rtol * float(true.norm()) + 1e-12, f"{error} of {float(true.norm())}"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(5, 9), (3, 7, 20), (2, 3, 5, 140), (4, 300, 11), (1, 70, 1030)])
def test_float64_and_order_of_threads(
    emulated: ModuleType, normalization: str, shape: tuple[int, ...]
) -> None:
    teacher, auxiliary, uncond = logits(*shape)
    mask = torch.rand(shape[:-1]) < 0.6
    mask[0] = False  # a sample without any
    call = arguments(
        torch.full(shape, torch.nan), teacher, auxiliary, mask, uncond=uncond, guidance=2.5,
        weights=(0.7, 0.3), weight=torch.rand(shape[:-1]), normalization=normalization,
    )  # fmt: skip
    found = run(call, 1.7)
    emulated.set_schedule(emulated.Schedule.reverse)
    backwards = run(call, 1.7)
    emulated.set_schedule(emulated.Schedule.greedy)
    assert_same_bits(found[0], backwards[0])
    assert_same_bits(found[1], backwards[1])
    assert_close(found, exact(call, 1.7), 2e-6)
    assert not found[1][~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_student_is_not_read_and_names_the_type(
    emulated: ModuleType, dtype: torch.dtype
) -> None:
    teacher, auxiliary, _ = (t.bfloat16() for t in logits(3, 7, 30))
    mask = torch.rand(3, 7) < 0.6
    student = torch.full((3, 7, 30), torch.nan, dtype=dtype)
    call = arguments(student, teacher, auxiliary, mask, normalization="masked")
    value, gradient = run(call)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close((value, gradient), exact(call), 5e-3 if dtype != torch.float32 else 2e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_it_is_the_divergence(emulated: ModuleType, weights: tuple[float, float]) -> None:
    """Same kernel, same bits: the student's gradient is the model's of token_divergence."""
    teacher, auxiliary, uncond = logits(6, 10, 133)
    mask, guidance = torch.rand(6, 10) < 0.6, 3 * torch.rand(6, 1).expand(6, 10)
    call = arguments(
        torch.empty(6, 10, 133), teacher, auxiliary, mask, uncond=uncond, guidance=guidance, weights=weights,
        normalization="sum",
    )  # fmt: skip
    value, gradient = run(call)
    rows = Call(
        teacher, auxiliary, uncond, guidance, (0.8, 1.3), weights, mask, reduction="sum"
    ).run(OPERATORS)
    assert_same_bits(value, rows.value)
    assert_same_bits(gradient, rows.grads[1])


@given(
    batch=st.integers(1, 5),
    per_sample=st.integers(1, 90),
    offset=st.integers(0, 17),
    step=st.integers(1, 2),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_samples_count_their_masked_rows(
    emulated: ModuleType,
    batch: int,
    per_sample: int,
    offset: int,
    step: int,
    share: float,
    seed: int,
) -> None:
    """Masks at any address, contiguous and strided, of any number of rows."""
    torch.manual_seed(seed)
    memory = torch.rand(offset + step * batch * per_sample) < share
    mask = memory[offset::step].reshape(batch, per_sample)
    teacher, auxiliary, _ = logits(batch, per_sample, 5)
    call = arguments(
        torch.empty(batch, per_sample, 5), teacher, auxiliary, mask, normalization="masked"
    )
    assert_close(run(call), exact(call), 2e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 8)])
def test_nothing_counts(emulated: ModuleType, normalization: str, shape: tuple[int, ...]) -> None:
    empty = torch.full(shape, torch.nan)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    value, gradient = run(arguments(empty, empty, empty, mask, normalization=normalization))
    assert_same_bits(value, torch.zeros(()))
    assert_same_bits(gradient, torch.zeros(shape))


def test_an_expanded_mask(emulated: ModuleType) -> None:
    teacher, auxiliary, _ = logits(4, 9, 12)
    rows = torch.rand(9) < 0.5
    for normalization in NORMALIZATIONS:
        calls = [
            arguments(teacher, teacher, auxiliary, mask, normalization=normalization)
            for mask in (rows.expand(4, 9), rows.expand(4, 9).contiguous())
        ]
        for one, two in zip(*map(run, calls), strict=True):
            assert_same_bits(one, two)


def test_a_gradient_that_is_not_wanted(emulated: ModuleType) -> None:
    teacher, auxiliary, _ = logits(2, 3, 8)
    call = arguments(teacher, teacher, auxiliary, torch.ones(2, 3, dtype=torch.bool))
    _, statistics = OPERATORS.distribution_matching_loss(*call)
    gradient = OPERATORS.distribution_matching_loss_backward(
        torch.ones(()), *call, statistics, [False]
    )
    assert gradient.shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 4, 8), (8,)])
def test_a_student_of_another_shape_is_refused(
    emulated: ModuleType, shape: tuple[int, ...]
) -> None:
    teacher, auxiliary, _ = logits(2, 3, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match="distribution_matching_loss: the logits differ in shape"
    ):
        OPERATORS.distribution_matching_loss(
            *arguments(torch.empty(shape), teacher, auxiliary, mask)
        )

"""The CUDA reduction over rows, run on the CPU: values, order of threads, counts, sizes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

SEGMENT = 2**15
SCHEDULES = ("greedy", "reverse")


def row_sum(
    emulated: ModuleType, rows: int, *, values: Tensor | None = None, value: Tensor | None = None,
    mask: Tensor | None = None, mean: bool = False, schedule: str = "greedy",
) -> Tensor:  # fmt: skip
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    blocks = emulated.row_sum_partials(rows)
    partials, result = torch.full((2 * blocks,), torch.nan).double(), torch.full((1,), torch.nan)
    code = emulated.row_sum(
        values=0 if values is None else values.data_ptr(),
        value=0 if value is None else value.data_ptr(),
        rows=rows,
        mask=0 if mask is None else mask.data_ptr(),
        mask_stride=0 if mask is None else mask.stride(0),
        mean=mean,
        partials=partials.data_ptr(),
        result=result.data_ptr(),
    )
    assert code == 0
    return result[0]


@pytest.mark.parametrize(
    "rows", [0, 1, 31, 1024, 1025, 9000, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 5]
)
def test_sum_and_mean(emulated: ModuleType, rows: int) -> None:
    """As exact as one rounding: the sum is in double."""
    values, mask = 1e3 * torch.randn(rows), torch.rand(rows) > 0.4
    values[~mask] = 0
    total, count = values.double().sum(), max(int(mask.sum()), 1)
    for schedule in SCHEDULES:
        options = {"values": values, "schedule": schedule}
        assert_same_bits(row_sum(emulated, rows, **options), total.float())
        found = row_sum(emulated, rows, mask=mask, mean=True, **options)
        assert_same_bits(found, (total / count).float())
        found = row_sum(emulated, rows, mean=True, **options)
        assert_same_bits(found, (total / max(rows, 1)).float())


@pytest.mark.parametrize("rows", [5, SEGMENT + 9])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_number_over_the_counted_rows(emulated: ModuleType, rows: int, step: int) -> None:
    mask = (torch.rand(3 * rows) > 0.4).as_strided((rows,), (step,))
    value = torch.tensor([-3.7])
    found = row_sum(emulated, rows, value=value, mask=mask, mean=True)
    assert_same_bits(found, (value[0].double() / max(int(mask.sum()), 1)).float())


def test_no_counted_row(emulated: ModuleType) -> None:
    values, mask = torch.zeros(40), torch.zeros(40, dtype=torch.bool)
    assert float(row_sum(emulated, 40, values=values, mask=mask, mean=True)) == 0
    number = torch.tensor([2.5])
    assert float(row_sum(emulated, 40, value=number, mask=mask, mean=True)) == 2.5


def test_nan_is_kept(emulated: ModuleType) -> None:
    values = torch.zeros(SEGMENT + 1)
    values[-1] = torch.nan
    assert bool(row_sum(emulated, SEGMENT + 1, values=values).isnan())


def test_launches(emulated: ModuleType) -> None:
    """One up to 32768 rows, then two."""
    before = emulated.launches()
    row_sum(emulated, SEGMENT, values=torch.zeros(SEGMENT))
    assert emulated.launches() == before + 1
    row_sum(emulated, SEGMENT + 1, values=torch.zeros(SEGMENT + 1))
    assert emulated.launches() == before + 3

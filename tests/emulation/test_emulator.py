"""The emulator itself: correct kernels give what a GPU would, and planted bugs are noticed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

THREADS = 64
SCHEDULES = ("greedy", "reverse")


def run(emulated: ModuleType, name: str, schedule: str, values: Tensor) -> Tensor:
    output = torch.full((THREADS,), -1.0)
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    emulated.run_planted(name, values.data_ptr(), output.data_ptr())
    return output


@pytest.fixture
def values() -> Tensor:
    return torch.arange(1.0, THREADS + 1)


def expected(name: str, values: Tensor) -> Tensor:
    if name.startswith("mirror"):
        return values.flip(0)
    if name == "two_rounds":
        return 11 * values.flip(0)
    if name == "warp_mirror":
        return values.view(2, 32).flip(1).view(-1)
    if name == "warp_sum":
        return values.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(-1)
    assert name == "shift_and_broadcast"
    groups = values.view(8, 8)
    following = torch.cat([groups[:, 1:], groups[:, -1:]], 1)
    return (following + 100 * groups[:, :1]).view(-1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "name",
    ["mirror", "mirror_dynamic", "two_rounds", "warp_mirror", "warp_sum", "shift_and_broadcast"],
)
def test_correct_kernels(emulated: ModuleType, values: Tensor, name: str, schedule: str) -> None:
    assert torch.equal(run(emulated, name, schedule, values), expected(name, values))


@pytest.mark.parametrize(
    "name",
    ["mirror without barrier", "mirror_dynamic without barrier", "warp_mirror without barrier"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_barrier_reads_poison(
    emulated: ModuleType, values: Tensor, name: str, schedule: str
) -> None:
    correct = expected(name.removesuffix(" without barrier"), values)
    output = run(emulated, name, schedule, values)
    assert bool(output.isnan().any())
    assert not torch.equal(output, correct)


def test_missing_barrier_before_reuse(emulated: ModuleType, values: Tensor) -> None:
    """Nothing poisoned is read: what tells is that a schedule gives another result."""
    outputs = [
        run(emulated, "two_rounds without barrier", schedule, values) for schedule in SCHEDULES
    ]
    assert not all(torch.equal(output, expected("two_rounds", values)) for output in outputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "report"),
    [
        (
            "divergent_barrier",
            r"stuck: threads 0-31 wait at __syncthreads \(.*planted.cu:\d+\); "
            r"threads 32-63 wait at __syncthreads",
        ),
        ("early_exit", r"threads 0-31 wait at __syncthreads .*; threads 32-63 have ended"),
        ("divergent_shuffle", r"threads 0-15 wait at __shfl_xor_sync .*; threads 16-31 have ended"),
        ("absent_lane", r"reads from lane \d+, which does not take part"),
        ("out_of_bounds", "shared array of 64: index 64"),
        ("misaligned_load", "a load of 16 bytes at an address that is not aligned"),
    ],
)
def test_planted_bug_is_reported(
    emulated: ModuleType, values: Tensor, name: str, report: str, schedule: str
) -> None:
    with pytest.raises((RuntimeError, IndexError), match=report):
        run(emulated, name, schedule, values)


def test_runs_on_after_an_error(emulated: ModuleType, values: Tensor) -> None:
    with pytest.raises(RuntimeError, match="stuck"):
        run(emulated, "early_exit", "greedy", values)
    assert torch.equal(run(emulated, "mirror", "greedy", values), expected("mirror", values))

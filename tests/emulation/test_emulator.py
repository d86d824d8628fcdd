"""The emulator itself: correct kernels give what a GPU would, and planted bugs are noticed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    if name == "prefix_sum":
        return values.view(8, 8).cumsum(1).view(-1)
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
    [
        "mirror",
        "mirror_dynamic",
        "mirror_large",
        "two_rounds",
        "warp_mirror",
        "warp_sum",
        "shift_and_broadcast",
        "prefix_sum",
    ],
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


def test_large_shared_memory_has_to_be_asked_for(emulated: ModuleType, values: Tensor) -> None:
    with pytest.raises(RuntimeError, match="the launch was refused"):
        run(emulated, "mirror_large unasked", "greedy", values)


def test_arrays_and_the_launch_share_one_limit(emulated: ModuleType, values: Tensor) -> None:
    assert torch.equal(run(emulated, "mirror_both", "greedy", values), values.flip(0))
    with pytest.raises(RuntimeError, match="24580 bytes of arrays and 24576 of the launch"):
        run(emulated, "mirror_both with more than there is", "greedy", values)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_votes(emulated: ModuleType, schedule: str) -> None:
    values = torch.ones(64)
    values[3], values[40] = 0.0, 101.0
    output = run(emulated, "votes", schedule, values)
    assert torch.equal(output, torch.tensor([31.0] * 32 + [1132.0] * 32))


FLOATS = st.lists(
    st.floats(width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32),
    min_size=THREADS,
    max_size=THREADS,
)


@pytest.mark.parametrize(
    ("name", "dtype"), [("pack_bf16", torch.bfloat16), ("pack_f16", torch.half)]
)
@given(numbers=FLOATS)
def test_pack(emulated: ModuleType, name: str, dtype: torch.dtype, numbers: list[float]) -> None:
    """The first number is in the lower half: first in memory. NaN has one form."""
    values = torch.tensor(numbers)
    words = run(emulated, name, "greedy", values).view(dtype).view(THREADS, 2)
    pairs = torch.stack([values, -values], 1).to(dtype)
    assert torch.equal(words.isnan(), pairs.isnan())
    assert torch.equal(
        words[~words.isnan()].view(torch.int16), pairs[~pairs.isnan()].view(torch.int16)
    )


def test_every_float16(emulated: ModuleType) -> None:
    for start in range(0, 1 << 16, THREADS):
        bits = torch.arange(start, start + THREADS, dtype=torch.int32)
        output = run(emulated, "unpack_f16", "greedy", bits.view(torch.float32))
        expected = bits.to(torch.int16).view(torch.float16).float()
        assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(output.isnan(), expected.isnan())


@given(
    numbers=st.lists(st.floats(2.0**-126, 2.0**126, width=32), min_size=THREADS, max_size=THREADS)
)
def test_log2(emulated: ModuleType, numbers: list[float]) -> None:
    """Within what the instruction promises, and not closer than it."""
    values = torch.tensor(numbers)
    exact = values.double().log2()
    error = (run(emulated, "log2_approx", "greedy", values).double() - exact).abs()
    bound = torch.where((values > 0.5) & (values < 2), 1.0, exact.abs()) * 2.0**-22
    assert bool((error <= 1.3 * bound).all())
    assert bool((error >= 0.7 * bound).all())


def test_log2_of_specials(emulated: ModuleType) -> None:
    specials = torch.tensor([0.0, -0.0, 1e-40, float("inf"), -1.0, float("nan")])
    output = run(emulated, "log2_approx", "greedy", torch.cat([specials, torch.ones(58)]))[:6]
    assert output[:4].tolist() == [float("-inf")] * 3 + [float("inf")]
    assert bool(output[4:].isnan().all())

"""The emulator's ldmatrix, mma and cp.async: exact layouts, and planted bugs are noticed."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

SCHEDULES = ("greedy", "reverse")
CORRECT = ("bfloat16", "bfloat16 by rows", "float16", "float16 by rows")


def dtype_of(name: str) -> torch.dtype:
    return torch.float16 if name.startswith("float16") else torch.bfloat16


def operands(name: str, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """a [2, 32, 64] and b [2, 64, 8] of the kernel's type, c [32, 8]."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 32, 64, generator=generator).mul(scale).to(dtype_of(name))
    b = torch.randn(2, 64, 8, generator=generator).to(dtype_of(name))
    return a, b, torch.randn(32, 8, generator=generator)


def run(emulated: ModuleType, name: str, schedule: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    by_rows = name.endswith("by rows")
    b = b.contiguous() if by_rows else b.mT.contiguous()
    out = c.clone()
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    emulated.run_planted_product(name, a.data_ptr(), b.data_ptr(), out.data_ptr())
    return out


def assert_is_product(out: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Sixteen sums of eight products each were cut off at 2^-23 of what they came to."""
    exact = c.double() + (a.double() @ b.double()).sum(0)
    most = c.double().abs() + (a.double().abs() @ b.double().abs()).sum(0)
    assert bool(((out.double() - exact).abs() <= 16 * 2.0**-23 * most).all())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CORRECT)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 1e-3, 1e4]))
def test_product(emulated: ModuleType, name: str, schedule: str, seed: int, scale: float) -> None:
    a, b, c = operands(name, seed, scale)
    assert_is_product(run(emulated, name, schedule, a, b, c), a, b, c)


@pytest.mark.parametrize("name", CORRECT)
@given(seed=st.integers(0, 2**31))
def test_integers_are_exact(emulated: ModuleType, name: str, seed: int) -> None:
    """Any order of exact sums gives the same."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-9, 10, (2, 32, 64), generator=generator)
    b = torch.randint(-9, 10, (2, 64, 8), generator=generator)
    c = torch.randint(-9, 10, (32, 8), generator=generator)
    out = run(emulated, name, "greedy", a.to(dtype_of(name)), b.to(dtype_of(name)), c.float())
    assert torch.equal(out, (c + (a @ b).sum(0)).float())


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", CORRECT)
def test_specials(emulated: ModuleType, name: str, special: float) -> None:
    a, b, c = operands(name, 0)
    a[1, 5, 7] = special
    out = run(emulated, name, "greedy", a, b, c)
    expected = c[5] + (a.float() @ b.float()).sum(0)[5]
    torch.testing.assert_close(out[5], expected, equal_nan=True)
    rest = [row for row in range(32) if row != 5]
    assert_is_product(out[rest], a[:, rest], b, c[rest])


@pytest.mark.parametrize("name", ["no_wait", "no_commit", "newest_not_waited"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copy_that_was_not_waited_for(emulated: ModuleType, name: str, schedule: str) -> None:
    assert bool(run(emulated, name, schedule, *operands(name, 0)).isnan().all())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_missing_barrier_after_the_wait(emulated: ModuleType, schedule: str) -> None:
    """A thread sees its own copies and poison in the other warp's place."""
    out = run(emulated, "no_barrier", schedule, *operands("no_barrier", 0))
    assert bool(out.isnan().any())


def test_missing_barrier_before_reuse(emulated: ModuleType) -> None:
    """The warp behind reads poison, or the second tile in place of the first."""
    a, b, c = operands("no_barrier_before_reuse", 0)
    for schedule in SCHEDULES:
        with pytest.raises(AssertionError):
            assert_is_product(run(emulated, "no_barrier_before_reuse", schedule, a, b, c), a, b, c)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["other_swizzle", "fragment_order"])
def test_wrong_layout(emulated: ModuleType, name: str, schedule: str) -> None:
    a, b, c = operands(name, 0)
    with pytest.raises(AssertionError):
        assert_is_product(run(emulated, name, schedule, a, b, c), a, b, c)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("row_overrun", "a matrix's row of 16 bytes outside of shared memory"),
        ("row_misaligned", "a matrix's row of 16 bytes at an address that is not aligned"),
        ("copy_overrun", "an asynchronous copy of 16 bytes outside of shared memory"),
        ("copy_misaligned", "an asynchronous copy of 16 bytes at an address that is not"),
        ("source_misaligned", "an asynchronous copy of 16 bytes at an address that is not"),
    ],
)
def test_bad_address(emulated: ModuleType, name: str, report: str, schedule: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=report):
        run(emulated, name, schedule, *operands(name, 0))


@pytest.mark.parametrize(("name", "passes"), [("bfloat16", {1.0}), ("no_swizzle", {1.0, 8.0})])
def test_bank_conflicts(emulated: ModuleType, name: str, passes: set[float]) -> None:
    """Without a swizzle eight rows of 128 bytes start at one bank; the copies write whole rows."""
    a, b, c = operands(name, 0)
    emulated.count_bank_conflicts()
    assert_is_product(run(emulated, name, "greedy", a, b, c), a, b, c)
    conflicts = emulated.bank_conflicts()
    assert len(conflicts) == 4  # two copies, two loads
    assert set(conflicts.values()) == passes
    assert emulated.bank_conflicts() == {}

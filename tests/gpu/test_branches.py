"""Every branch of every kernel (support/branches) on a GPU: as on the CPU, and the same a thousand times."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from support.branches import Results, branches
from support.checks import assert_same_bits
from torch import Tensor

pytestmark = pytest.mark.gpu

BRANCHES = [pytest.param(call, id=name) for name, call in branches()]
REPEATS = 1000
# Seconds that test_repeats may take for all branches that were selected; each stops at its share of them.
RACE_SECONDS = float(os.environ.get("SOFTDIMO_RACE_SECONDS", "inf"))
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("call", BRANCHES)
def test_agrees_with_the_cpu(call: Callable[[str], Results]) -> None:
    """To a few roundings of the result's type, of the largest entry and in norm; integers exactly."""
    for found, expected in zip(call("cuda"), call("cpu"), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if not expected.is_floating_point():
            assert torch.equal(found.cpu(), expected)
            continue
        values, true = found.cpu().double(), expected.double()
        usual = true.isfinite()
        assert_same_bits(values[~usual], true[~usual])
        if bool(usual.any()):
            distance, true = (values - true)[usual], true[usual]
            rounding = max(torch.finfo(expected.dtype).eps, 2e-5)
            assert bool(distance.norm() <= rounding * true.norm() + 1e-6)
            assert bool((distance.abs() <= 4 * rounding * true.abs().max() + 1e-6).all())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


@pytest.mark.parametrize("call", BRANCHES)
def test_repeats(call: Callable[[str], Results], request: pytest.FixtureRequest) -> None:
    """The same bits a thousand times, while another stream keeps the device's memory busy.

    The device compares, so that repeats follow each other without a wait.
    """
    selected = sum(item.name.startswith("test_repeats[") for item in request.session.items)
    end = time.monotonic() + RACE_SECONDS / selected
    expected = [bits(result) for result in call("cuda")]
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    other, noise = torch.cuda.Stream(), torch.empty(1 << 24, device="cuda")
    done = 0
    while done < REPEATS and (done == 0 or time.monotonic() < end):
        for _ in range(10):
            for found, first in zip(call("cuda"), expected, strict=True):
                differs |= (bits(found) != first).any()
        with torch.cuda.stream(other):
            noise.normal_()
        done += 10
        if done % 100 == 0:
            torch.cuda.synchronize()
    assert not bool(differs), f"at least one of {done} repeats gave other bits"
    if done < REPEATS:
        warnings.warn(f"{done} repeats in this branch's share of the time", stacklevel=1)

"""Every branch of every kernel (support/branches) on a GPU: as on the CPU, and the same a thousand times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.branches import Results, branches
from support.checks import assert_same_bits

pytestmark = pytest.mark.gpu

BRANCHES = [pytest.param(call, id=name) for name, call in branches()]


@pytest.mark.parametrize("call", BRANCHES)
def test_agrees_with_the_cpu(call: Callable[[str], Results]) -> None:
    for found, expected in zip(call("cuda"), call("cpu"), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("call", BRANCHES)
def test_repeats(call: Callable[[str], Results]) -> None:
    """The same bits a thousand times, while another stream keeps the device's memory busy."""
    expected = call("cuda")
    other, noise = torch.cuda.Stream(), torch.empty(1 << 24, device="cuda")
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(other):
                noise.normal_()
        for found, first in zip(call("cuda"), expected, strict=True):
            assert_same_bits(found, first)

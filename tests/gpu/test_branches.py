"""Small shapes on each branch of each kernel: compute-sanitizer watches them, a thousand repeats agree.

A branch is a call that takes another path through a kernel: element types, vectorised and scalar rows,
masks, row temperatures, rows of one or of many threads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

from softdimo_fast.ops.token_statistics import token_statistics

pytestmark = pytest.mark.gpu

Results = tuple[Tensor, ...]
Branch = tuple[str, Callable[[str], Results]]

# One thread's vector, one warp's row, one block's row in registers, one that is read twice; aligned and not.
VOCABULARIES = (1, 7, 129, 1024, 1025, 4111)


def _statistics(
    vocabulary: int, dtype: torch.dtype, device: str, *, masked: bool, by_row: bool
) -> Results:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(37, vocabulary, generator=generator)).to(dtype).to(device)
    mask = (torch.rand(37, generator=generator) > 0.3).to(device) if masked else None
    temperature = (torch.rand(37, generator=generator) + 0.5).to(device) if by_row else 0.8
    return tuple(token_statistics(logits, temperature=temperature, mask=mask))


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    found: list[Branch] = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for masked, by_row in ((False, False), (True, True)):
                name = f"token_statistics-{vocabulary}-{dtype}-{masked}"
                found.append(
                    (
                        name,
                        lambda device, v=vocabulary, d=dtype, m=masked, r=by_row: _statistics(
                            v, d, device, masked=m, by_row=r
                        ),
                    )
                )
    return found


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

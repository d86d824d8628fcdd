"""Branches of ``token_statistics``."""

from __future__ import annotations

import torch

from softdimo_fast.ops.token_statistics import token_statistics
from support.branches import Branch, Results

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

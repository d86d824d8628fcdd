"""Branches of ``soft_embedding``'s backward."""

from __future__ import annotations

from typing import Any

import torch

from softdimo_fast.ops.soft_embedding import soft_embedding
from support.branches import Branch, Results

HALF, FULL = torch.bfloat16, torch.float32
NOISE = {"noise": "gumbel", "seed": 7}
# Name, rows, vocabulary, width, dtypes of logits and codebook, options. Each product, width and element
# size has kernels of its own, and each of those another one for noise and temperatures of rows.
CASES: list[tuple[Any, ...]] = [
    ("tiny", 37, 128, 7, HALF, HALF, {}),
    ("bfloat16", 150, 1025, 64, HALF, HALF, {}),
    ("bfloat16_wide", 37, 304, 128, HALF, HALF, {"precision": "high"}),
    ("float16", 37, 1024, 64, torch.float16, torch.float16, {}),
    ("float16_wide", 37, 301, 100, torch.float16, torch.float16, {"precision": "high"}),
    ("float32", 37, 2048, 64, HALF, FULL, {}),
    ("float32_wide", 37, 301, 128, FULL, FULL, {}),
    ("float_logits", 37, 304, 64, FULL, HALF, {"precision": "high"}),
    ("parts", 1100, 300, 20, FULL, FULL, {}),
    ("noise", 37, 1025, 64, HALF, HALF, NOISE),
    ("noise_wide", 37, 301, 128, torch.float16, torch.float16, NOISE),
    ("noise_float32", 37, 301, 64, FULL, FULL, NOISE),
    ("noise_float32_wide", 37, 301, 128, FULL, FULL, NOISE),
]


def _gradients(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, table: torch.dtype,
    options: dict[str, Any], device: str, *, masked: bool,
) -> Results:  # fmt: skip
    generator = torch.Generator().manual_seed(vocabulary + width)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).to(device)
    logits[0, 5] = 40.0  # one row is nearly one-hot
    codebook = torch.randn(vocabulary, width, generator=generator).to(table).to(device)
    upstream = torch.randn(rows, width, generator=generator).to(table).to(device)
    inputs, extra = [logits, codebook], dict[str, Any]()
    if masked:
        extra["mask"] = (torch.rand(rows, generator=generator) > 0.6).to(device)
        extra["mask_embedding"] = codebook[0].clone()
        extra["temperature"] = (torch.rand(rows, generator=generator) + 0.5).to(device)
        inputs += [extra["mask_embedding"], extra["temperature"]]
    for tensor in inputs:
        tensor.requires_grad_()
    return torch.autograd.grad(
        soft_embedding(logits, codebook, **options, **extra), inputs, upstream
    )


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    return [
        (
            f"soft_embedding_backward-{name}-{masked}",
            lambda device, c=case, m=masked: _gradients(*c, device, masked=m),
        )
        for name, *case in CASES
        for masked in (False, True)
    ]

"""Branches of ``soft_embedding``'s forward."""

from __future__ import annotations

from typing import Any

import torch

from softdimo_fast.ops.soft_embedding import soft_embedding
from support.branches import Branch, Results

HALF, FULL = torch.bfloat16, torch.float32
# Name, rows, vocabulary, width, dtypes of logits and codebook, options. A block walks over chunks
# from 18,241 rows on; every width, term count and element size has a kernel of its own.
CASES: list[tuple[Any, ...]] = [
    ("tiny", 37, 128, 7, HALF, HALF, {}),
    ("one_term", 37, 1024, 64, HALF, HALF, {}),
    ("one_term_wide", 37, 1024, 128, HALF, HALF, {}),
    ("two_terms", 37, 1024, 64, HALF, HALF, {"precision": "high"}),
    ("two_terms_wide", 37, 1024, 100, HALF, torch.float16, {"precision": "high"}),
    ("three_terms", 37, 1025, 20, HALF, FULL, {}),
    ("three_terms_wide", 37, 300, 128, HALF, FULL, {}),
    ("float_logits", 37, 1024, 64, FULL, HALF, {}),
    ("float_logits_wide", 37, 301, 128, FULL, torch.float16, {}),
    ("float", 37, 1024, 64, FULL, FULL, {}),
    ("float_wide", 37, 301, 128, FULL, FULL, {}),
    ("chunks", 37, 4111, 64, torch.float16, torch.float16, {"hard": True}),
    ("walk", 18_433, 1100, 64, HALF, HALF, {"hard": True}),
    ("noise", 37, 1025, 64, HALF, HALF, {"noise": "gumbel", "seed": 7}),
    ("noise_wide", 37, 301, 128, HALF, HALF, {"noise": "gumbel", "seed": 7, "hard": True}),
    ("noise_three_terms", 37, 301, 64, HALF, FULL, {"noise": "gumbel", "seed": 7}),
    ("noise_three_terms_wide", 37, 301, 128, HALF, FULL, {"noise": "gumbel", "seed": 7}),
    ("noise_float_logits", 37, 301, 64, FULL, HALF, {"noise": "gumbel", "seed": 7}),
    ("noise_float_logits_wide", 37, 301, 128, FULL, HALF, {"noise": "gumbel", "seed": 7}),
    ("noise_float", 37, 301, 64, FULL, FULL, {"noise": "gumbel", "seed": 7}),
    ("noise_float_wide", 37, 301, 128, FULL, FULL, {"noise": "gumbel", "seed": 7}),
]


def _embedding(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, table: torch.dtype,
    options: dict[str, Any], device: str, *, masked: bool,
) -> Results:  # fmt: skip
    generator = torch.Generator().manual_seed(vocabulary + width)
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype).to(device)
    codebook = torch.randn(vocabulary, width, generator=generator).to(table).to(device)
    extra: dict[str, Any] = {}
    if masked:
        extra["mask"] = (torch.rand(rows, generator=generator) > 0.6).to(device)
        extra["mask_embedding"] = codebook[0]
        extra["temperature"] = (torch.rand(rows, generator=generator) + 0.5).to(device)
    return (soft_embedding(logits, codebook, **options, **extra),)


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    return [
        (
            f"soft_embedding-{name}-{masked}",
            lambda device, c=case, m=masked: _embedding(*c, device, masked=m),
        )
        for name, *case in CASES
        for masked in (False, True)
    ]

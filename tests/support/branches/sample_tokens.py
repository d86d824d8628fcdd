"""Branches of ``sample_tokens``."""

from __future__ import annotations

import torch

from softdimo_fast.ops.sample_tokens import sample_tokens
from support.branches import Branch, Results

# 16 threads a row, 128 threads, rows that are read in every sweep; aligned and not.
VOCABULARIES = (1, 7, 129, 1024, 4111, 8192, 16500)
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "both": {"top_k": 100, "top_p": 0.8},
}


def _sample(
    vocabulary: int, dtype: torch.dtype, device: str, options: dict[str, float], *, by_row: bool
) -> Results:
    """Logits on a grid of quarters, so that there are ties to cut and sums of weights differ by little."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (8 * torch.randn(37, vocabulary, generator=generator)).round() / 4
    temperature = (torch.rand(37, generator=generator) + 0.5).to(device) if by_row else 1.0
    return sample_tokens(  # type: ignore[call-overload, no-any-return]
        logits.to(dtype).to(device),
        temperature=temperature,
        seed=3,
        return_log_prob=True,
        **options,
    )


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    found: list[Branch] = []
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name, options in OPTIONS.items():
                for by_row in (False, True):
                    found.append(
                        (
                            f"sample_tokens-{vocabulary}-{dtype}-{name}-{by_row}",
                            lambda device, v=vocabulary, d=dtype, o=options, r=by_row: _sample(
                                v, d, device, o, by_row=r
                            ),
                        )
                    )
    return found

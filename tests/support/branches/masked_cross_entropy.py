"""Branches of ``masked_cross_entropy``, forward and backward, with those of its reductions."""

from __future__ import annotations

import torch

from softdimo_fast.ops.masked_cross_entropy import masked_cross_entropy
from support.branches import Branch, Results

# Rows of 8 threads and of 64, with whole chunks or without; odd ones are misaligned in every second row.
VOCABULARIES = (1, 7, 129, 1024, 1025, 4111)


def _cross_entropy(
    rows: int, vocabulary: int, dtype: torch.dtype, device: str, *, masked: bool, reduction: str,
    smoothing: float, padding: int = 0,
) -> Results:  # fmt: skip
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(rows, vocabulary + padding, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    mask = (torch.rand(rows, generator=generator) > 0.3).to(device) if masked else None
    leaf = logits.to(dtype).to(device).requires_grad_()
    loss = masked_cross_entropy(
        leaf[:, :vocabulary],
        targets.to(device),
        mask,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    found: list[Branch] = []

    def add(rows: int, vocabulary: int, dtype: torch.dtype, **options: object) -> None:
        name = f"masked_cross_entropy-{rows}-{vocabulary}-{dtype}-{'-'.join(map(str, options.values()))}"
        found.append(
            (name, lambda device: _cross_entropy(rows, vocabulary, dtype, device, **options))  # type: ignore[arg-type]
        )

    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            add(37, vocabulary, dtype, masked=False, reduction="none", smoothing=0.0)
            add(37, vocabulary, dtype, masked=True, reduction="mean", smoothing=0.1)
            add(37, vocabulary, dtype, masked=True, reduction="sum", smoothing=0.1, padding=3)
    # Two blocks of rows to add up.
    add(2**15 + 9, 3, torch.float32, masked=True, reduction="mean", smoothing=0.0)
    return found

"""soft_embedding beside the expression it replaces, at the shapes of the published teachers.

    make bench

Rows of one group are the same work; read the ratio of their medians. Operators run on all of torch's
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from softdimo_fast import soft_embedding


class Shape(NamedTuple):
    """Whose shape it is; rows, groups (None: one table), vocabulary and width."""

    name: str
    rows: int
    groups: int | None
    vocabulary: int
    width: int


SHAPES = (
    Shape("digits", 1024, None, 128, 64),
    Shape("MaskBit", 8192, 2, 128, 7),
    Shape("MaskGIT", 4096, None, 1024, 768),
    Shape("MaskGen", 2048, None, 8192, 64),
)
TEMPERATURE = 0.9


def composed(logits: Tensor, codebook: Tensor) -> Tensor:
    """What a user writes without this package."""
    p = torch.softmax(logits / TEMPERATURE, dim=-1)
    return torch.einsum("ngv,gvd->ngd", p, codebook) if codebook.dim() == 3 else p @ codebook


def fused(logits: Tensor, codebook: Tensor) -> Tensor:
    return soft_embedding(logits, codebook, temperature=TEMPERATURE)


@pytest.mark.parametrize("implementation", [fused, composed], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_soft_embedding(
    benchmark: Any,
    shape: Shape,
    dtype: torch.dtype,
    phase: str,
    implementation: Callable[..., Tensor],
) -> None:
    name, rows, groups, vocabulary, width = shape
    lead, table = ((), ()) if groups is None else ((groups,), (groups,))
    logits = (3 * torch.randn(rows, *lead, vocabulary)).to(dtype).requires_grad_()
    codebook = torch.randn(*table, vocabulary, width).to(dtype).requires_grad_()
    upstream = torch.randn(rows, *lead, width).to(dtype)

    def run() -> Tensor:
        if phase == "forward":
            with torch.no_grad():
                return implementation(logits, codebook)
        return torch.autograd.grad(implementation(logits, codebook), (logits, codebook), upstream)[
            0
        ]

    benchmark.group = f"{name} {dtype} {phase}"
    result = benchmark(run)
    assert result.isfinite().all()

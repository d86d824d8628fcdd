"""Pieces shared by the specifications."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: statistics and sums are never narrower."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def wanted_or_empty(wanted: bool, gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in its input's dtype, or an empty tensor where none was asked for."""
    return gradient.to(like.dtype) if wanted else like.new_empty(0)


def sum_to_shape(gradient: Tensor, like: Tensor) -> Tensor:
    """Undoes broadcasting: the sum of ``gradient`` over the dimensions along which ``like`` was expanded."""
    extra = gradient.dim() - like.dim()
    if extra > 0:
        gradient = gradient.sum(dim=tuple(range(extra)))
    expanded = [
        i
        for i, (wide, own) in enumerate(zip(gradient.shape, like.shape, strict=True))
        if wide != own
    ]
    return gradient.sum(dim=expanded, keepdim=True) if expanded else gradient


def mean_divisor(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The number of counted rows (all of ``rows`` without a mask), and 1 where there is none."""
    counted = rows.new_full((), rows.numel()) if mask is None else mask.sum().to(rows.dtype)
    return counted.clamp(min=1)


@contextmanager
def ieee_float32(tensor: Tensor) -> Iterator[None]:
    """No TF32 inside: a float32 product on CUDA means float32, whatever the caller's global setting."""
    if tensor.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

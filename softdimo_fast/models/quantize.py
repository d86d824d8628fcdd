"""The nearest code of a vector, for tokenizers whose codebook is a table."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def nearest_codes(vectors: Tensor, table: Tensor) -> Tensor:
    """int64 ``[...]``: the row of ``table`` ``[V, D]`` nearest to each vector ``[..., D]``.

    By Euclidean distance; the lowest index on ties. The distances ``[..., V]`` are in memory at once.
    """
    device = vectors.device.type
    # Half precision would choose another code where two are about as near. (The meta device, which tells
    # shapes alone, has no autocast.)
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        # |c|^2 - 2 v.c: the constant |v|^2 changes no minimum.
        products = vectors.to(table.dtype) @ table.T
        return (table.square().sum(-1) - 2 * products).argmin(-1)

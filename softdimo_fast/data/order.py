"""In which order samples are seen: a function of the seed and the sample's number, with no state to save."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from softdimo_fast.diffusion.draws import Draws


def sample_indices(seed: int, first: int, count: int, size: int) -> Tensor:
    """The data-set indices of samples number ``first`` .. ``first + count - 1`` of an endless stream.

    The stream is one random permutation of 0 .. size - 1 after another; permutation e is a function of
    (seed, e). Every epoch therefore visits each index once, and however the stream is cut into batches,
    micro-batches or processes, sample number i has the same index.

    Args:
        seed: of the run.
        first: number of the first sample, >= 0.
        count: how many, >= 0.
        size: of the data set, >= 1.

    Returns:
        int64 ``[count]`` on the CPU. The permutations in use are cached: most calls only copy a slice.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value, minimum in (("first", first, 0), ("count", count, 0), ("size", size, 1)):
        if value < minimum:
            raise ValueError(f"sample_indices: {name} must be >= {minimum}, got {value}")
    last = first + count
    pieces = [torch.empty(0, dtype=torch.int64, device="cpu")]
    for epoch in range(first // size, -(-last // size)):
        start = epoch * size
        pieces.append(_permutation(seed, epoch, size)[max(first - start, 0) : last - start])
    return torch.cat(pieces)


# Two epochs meet in a batch; a few data sets (or seeds) may be read in turn.
@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Sorts random keys."""
    # Two draws make one key of 48 bits: float32 keys of a large data set would have ties.
    draws = Draws.of(seed, epoch, size, device=torch.device("cpu"))
    high, low = draws.uniform("data/order", 2).double().unbind(1)
    return torch.argsort(high + low * 2.0**-24, stable=True)

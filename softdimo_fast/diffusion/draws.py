"""Counter-based randomness: every random number of a run is a function of (seed, stream, step, sample).

There is no generator state to save, so a resumed run draws what an uninterrupted one would have drawn, and
a sample draws the same numbers however the global batch is cut into micro-batches or spread over processes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from softdimo_fast.ops.reference import random as philox


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. What the host made is copied without waiting for the device's queue."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory may wait
    return tensor.to(device, non_blocking=True)


@lru_cache(maxsize=4096)
def _stream_key(seed: int, stream: str) -> int:
    """A signed 64-bit Philox key: streams of one seed are independent of each other."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples in one step.

    Attributes:
        seed: of the run.
        step: counts from 0; below 2^32.
        first: the number of the first sample within the step's global batch.
        samples: int64 ``[B]``, the numbers first .. first + B - 1.
    """

    seed: int
    step: int
    first: int
    samples: Tensor

    @classmethod
    def of(
        cls, seed: int, step: int, count: int, *, first: int = 0, device: torch.device | None = None
    ) -> Draws:
        """The draws of ``count`` consecutive samples."""
        return cls(seed, step, first, torch.arange(first, first + count, device=device))

    def part(self, first: int, count: int) -> Draws:
        """The draws of at most ``count`` of these samples, from the ``first``-th on."""
        return Draws(self.seed, self.step, self.first + first, self.samples[first : first + count])

    def fork(self, name: str) -> Draws:
        """Draws that share nothing with these: for a second use of the same streams within a step."""
        seed = _stream_key(self.seed, f"fork/{name}")
        return Draws(seed, self.step, self.first, self.samples)

    @property
    def on_host(self) -> Draws:
        """The same draws on the CPU, made there: the device is not asked."""
        return Draws.of(self.seed, self.step, len(self), first=self.first)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, stream: str) -> Tensor:
        """The (seed, offset) pair, int64 ``[2]``, that the operators take as ``seed``."""
        pair = torch.empty(2, dtype=torch.int64, device=self.samples.device)
        pair[0].fill_(_stream_key(self.seed, stream))
        pair[1].fill_(self.step)
        return pair

    def row_ids(self, length: int) -> Tensor:
        """int64 ``[B, length]``: the row number of each position, for the operators' ``row_ids``."""
        positions = torch.arange(length, device=self.samples.device)
        return self.samples[:, None] * length + positions

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """float32 ``[B, *shape]`` on the open interval (0, 1)."""
        count = math.prod(shape)
        values = philox.uniform(self.key(stream), self.samples, count)
        return values.reshape(len(self), *shape)

    def normal(self, stream: str, *shape: int) -> Tensor:
        """float32 ``[B, *shape]``, standard normal (Box-Muller)."""
        count = math.prod(shape)
        u = self.uniform(stream, 2, (count + 1) // 2)
        radius, angle = torch.sqrt(-2 * torch.log(u[:, 0])), 2 * math.pi * u[:, 1]
        pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return pair.flatten(1)[:, :count].reshape(len(self), *shape)

    def integers(self, stream: str, high: int, *shape: int) -> Tensor:
        """int64 ``[B, *shape]``, uniform on 0 .. high - 1."""
        # float32 reaches its last bits near 1 only by 2^-24: scale in float64.
        scaled = self.uniform(stream, *shape).double() * high
        return scaled.long().clamp(max=high - 1)

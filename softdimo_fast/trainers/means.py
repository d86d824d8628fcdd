"""Means of logged scalars over an interval, kept on the device and read in one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """The mean of each scalar over the steps that had it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._seen: set[str] = set()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds to the present step: several values of a name (one a micro-batch) sum up."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._seen.add(name)

    def end_step(self) -> None:
        """What is added from here on belongs to the next step."""
        for name in self._seen:
            self._steps[name] = self._steps.get(name, 0) + 1
        self._seen.clear()

    def read(self, *others: Tensor) -> tuple[dict[str, float], list[float]]:
        """The means, and other scalars that are wanted in the same transfer; the means start again."""
        names = sorted(self._sums)
        means = [self._sums[name] / self._steps[name] for name in names]
        values = torch.stack([*means, *others]).tolist()
        self._sums, self._steps = {}, {}
        return dict(zip(names, values, strict=False)), values[len(names) :]

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and step counts, for a checkpoint."""
        return dict(self._sums), dict(self._steps)

    def restore(self, sums: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """What :meth:`state` gave."""
        self._sums, self._steps = dict(sums), dict(steps)

"""Samples for the methods: callables that give what a micro-batch's draws ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdimo_fast.data.augment import random_affine
from softdimo_fast.data.order import sample_indices
from softdimo_fast.diffusion.draws import Draws, send


@dataclass(frozen=True)
class ImageSource:
    """Augmented images and their labels; sample i of step s is number s x batch_size + i of the order.

    Attributes:
        images: ``[N, C, height, width]`` in [-1, 1].
        labels: ``[N]``.
        batch_size: the global one.
    """

    images: Tensor
    labels: Tensor
    batch_size: int

    def __call__(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, height, width]`` and labels ``[B]``."""
        rows = _rows(draws, self.batch_size, len(self.images))
        return random_affine(self.images[rows], draws), self.labels[rows]


@dataclass(frozen=True)
class TokenSource:
    """Encoded images and their conditions.

    Attributes:
        tokens: int64 ``[N, *token_shape]``.
        conditions: ``[N]``.
        batch_size: the global one.
    """

    tokens: Tensor
    conditions: Tensor
    batch_size: int

    def __call__(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, *token_shape]`` and conditions ``[B]``."""
        rows = _rows(draws, self.batch_size, len(self.tokens))
        return self.tokens[rows], self.conditions[rows]

    def to(self, device: torch.device) -> TokenSource:
        """The same on ``device``, so that no step copies."""
        return TokenSource(self.tokens.to(device), self.conditions.to(device), self.batch_size)


@dataclass(frozen=True)
class UniformConditions:
    """Class labels drawn uniformly from 0 .. count - 1."""

    count: int

    def __call__(self, draws: Draws) -> Tensor:
        """int64 ``[B]``."""
        return draws.integers("condition", self.count)


def step_rows(draws: Draws, batch_size: int, size: int) -> Tensor:
    """Which of ``size`` samples a micro-batch's are, int64 ``[B]`` on the CPU: a source's order.

    Args:
        draws: of the micro-batch.
        batch_size: the global one.
        size: of the data set.

    Raises:
        ValueError: the step has more samples than ``batch_size``.
    """
    if draws.first + len(draws) > batch_size:
        raise ValueError(
            f"the source's batch_size is {batch_size}, but a step has at least {draws.first + len(draws)} "
            "samples: it must be the trainer's, or samples would repeat in the next step"
        )
    first = draws.step * batch_size + draws.first
    return sample_indices(draws.seed, first, len(draws), size)


def _rows(draws: Draws, batch_size: int, size: int) -> Tensor:
    return send(step_rows(draws, batch_size, size), draws.samples.device)

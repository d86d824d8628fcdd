"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from softdimo_fast.rewards.protocol import Reward


class WeightedRewards:
    r"""The weighted sum of named rewards, :math:`\sum_i \lambda_i R_i(x, c)`.

    Soft-Di[M]O's reward loss (arXiv 2509.22925) is minus this sum over the decoded soft embeddings. Where
    the single values are wanted too, for a log, :meth:`parts` and :meth:`combine` give both in one pass::

        parts = rewards.parts(images, condition)
        loss = -rewards.combine(parts).mean()
        log.update({name: value.detach().mean() for name, value in parts.items()})
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None):
        """
        Args:
            rewards: name -> reward, at least one.
            weights: name -> :math:`\\lambda_i`, finite, for exactly these names; None: 1 for each.

        Raises:
            ValueError: there is no reward, the names differ, or a weight is not finite.
        """
        if not rewards:
            raise ValueError("WeightedRewards: rewards must hold at least one reward, got none")
        weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
        if set(weights) != set(rewards):
            raise ValueError(
                f"WeightedRewards: weights must name the rewards {sorted(rewards)}, got {sorted(weights)}"
            )
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"WeightedRewards: weights[{name!r}] must be finite, got {weight}")
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        """The weighted sum ``[B]`` (see :class:`~softdimo_fast.rewards.protocol.Reward`)."""
        return self.combine(self.parts(images, condition))

    def parts(self, images: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Each reward's own values ``[B]``, without its weight, with their graphs."""
        return {name: reward(images, condition) for name, reward in self.rewards.items()}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum ``[B]`` of what :meth:`parts` returned."""
        weighted = [weight * parts[name] for name, weight in self.weights.items()]
        return torch.stack(weighted).sum(0)

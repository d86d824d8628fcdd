"""Discriminator heads on the features of a frozen teacher (Soft-Di[M]O, arXiv 2509.22925; DMD2, 2405.14867).

The papers leave the heads open. Two kinds stand here, and both may be used: one score a token and layer,
which sees local faults; and one global score a sample, without which the heads stay blind to combinations
of tokens that are wrong only together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Options of :class:`DiscriminatorHeads`.

    Attributes:
        layers: the teacher layers they look at; empty: all up to six, else six evenly spaced.
        token_heads: a score of every position, averaged. ``hidden`` is their width.
        global_head: a score of all positions together, each first squeezed to ``squeeze`` numbers.
        class_projection: the global score also depends on the class, by projection (arXiv 1802.05637).
    """

    layers: tuple[int, ...] = ()
    token_heads: bool = True
    hidden: int = 64
    global_head: bool = True
    class_projection: bool = True
    squeeze: int = 16
    global_hidden: tuple[int, int] = (192, 64)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require(
            self.token_heads or self.global_head,
            self,
            "global_head",
            self.global_head,
            "True where token_heads is off",
        )
        for name in ("hidden", "squeeze"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require(
            min(self.global_hidden) >= 1, self, "global_hidden", self.global_hidden,
            "two numbers >= 1",
        )  # fmt: skip

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """The layers of a teacher that has ``depth`` of them."""
        if self.layers:
            _config.require(
                all(0 <= layer < depth for layer in self.layers), self, "layers", self.layers,
                f"numbers from 0 to {depth - 1}",
            )  # fmt: skip
            return self.layers
        if depth <= 6:
            return tuple(range(depth))
        return tuple(round(i * (depth - 1) / 5) for i in range(6))


class DiscriminatorHeads(nn.Module):
    """Scores ``[B, scores]`` of features ``[B, T, H]``, one tensor a layer; positive means real."""

    def __init__(
        self, config: HeadsConfig, *, width: int, positions: int, layers: int, conditions: int
    ) -> None:
        """Args:
        width: H. positions: T. layers: how many feature tensors. conditions: classes.
        """
        super().__init__()
        self.config = config
        if config.token_heads:
            self.tokens = nn.ModuleList(
                nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, config.hidden), nn.LeakyReLU(0.2),
                    nn.Linear(config.hidden, 1),
                )
                for _ in range(layers)
            )  # fmt: skip
        if config.global_head:
            first, last = config.global_hidden
            self.squeeze = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.squeeze))
                for _ in range(layers)
            )
            self.body = nn.Sequential(
                nn.Linear(positions * config.squeeze * layers, first), nn.LeakyReLU(0.2),
                nn.Linear(first, last), nn.LeakyReLU(0.2),
            )  # fmt: skip
            self.score = nn.Linear(last, 1)
            if config.class_projection:
                self.projection = nn.Embedding(conditions, last)

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        scores = []
        if self.config.global_head:
            squeezed = [
                layer(f).flatten(1) for layer, f in zip(self.squeeze, features, strict=True)
            ]
            body = self.body(torch.cat(squeezed, dim=1))
            score = self.score(body)[:, 0]
            if self.config.class_projection:
                score = score + (body * self.projection(condition)).sum(-1) / body.shape[-1] ** 0.5
            scores.append(score)
        if self.config.token_heads:
            local = [layer(f)[..., 0] for layer, f in zip(self.tokens, features, strict=True)]
            scores.append(torch.cat(local, dim=1).mean(1))
        return torch.stack(scores, dim=1)


def generator_loss(scores: Tensor, kind: str) -> Tensor:
    """What the generator minimises: softplus(-D) (non-saturating), or -D (hinge). ``[B]``."""
    per_score = F.softplus(-scores) if kind == "non_saturating" else -scores
    return per_score.mean(1)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)), or their hinge counterparts. ``[B]``."""
    if kind == "non_saturating":
        return (F.softplus(-real) + F.softplus(fake)).mean(1)
    return (F.relu(1 - real) + F.relu(1 + fake)).mean(1)

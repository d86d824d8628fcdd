"""Exponential moving averages of a module's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from softdimo_fast import _config


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How much of the average is kept at each step (s counts from 0).

    Attributes:
        profile: ``"constant"`` keeps ``decay``; ``"power"`` keeps (1 - 1 / (s + 1))^(exponent + 1), whose
            memory grows with the run (Karras et al., arXiv 2312.02696, equation 127).
        warm_start: keep at most (1 + s) / (10 + s), as the public Di[M]O code does.
    """

    profile: Literal["constant", "power"] = "constant"
    decay: float = 0.9999
    exponent: float = 6.94
    warm_start: bool = True

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "decay", self.decay, minimum=0, maximum=1)
        _config.require_range(self, "exponent", self.exponent, minimum=0)

    def kept(self, step: int) -> float:
        """The weight of the old average at ``step``."""
        if self.profile == "power":
            kept = float((1 - 1 / (step + 1)) ** (self.exponent + 1))
        else:
            kept = self.decay
        return min(kept, (1 + step) / (10 + step)) if self.warm_start else kept


class Ema:
    """The averaged twin of a module. Buffers are copied, parameters averaged."""

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """Moves the average towards ``source``."""
        targets: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(
            targets, [p.detach() for p in source.parameters()], 1 - self.config.kept(step)
        )
        for target, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            target.copy_(buffer)

"""Optimizers and learning rates: what a config says, as torch objects that never wait for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from softdimo_fast import _config


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A factor on the learning rate, a function of the step alone.

    Attributes:
        warmup_steps: linear from 0; the first step has 1 / warmup_steps.
        decay: after the share ``decay_start`` of the run, to ``final`` of the learning rate at its end.
    """

    warmup_steps: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_start: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "warmup_steps", self.warmup_steps, minimum=0)
        _config.require_range(self, "decay_start", self.decay_start, minimum=0, maximum=1)
        _config.require_range(self, "final", self.final, minimum=0, maximum=1)

    def factor(self, step: int, steps: int) -> float:
        """At ``step`` (from 0) of ``steps``."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = max(self.decay_start * steps, self.warmup_steps)
        if self.decay == "none" or step < start:
            return factor
        progress = min(1.0, (step - start) / max(steps - start, 1))
        shape = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return factor * (self.final + (1 - self.final) * shape)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or SGD, for one role.

    Attributes:
        clip_norm: largest gradient norm, None for no clipping.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "learning_rate", self.learning_rate, minimum=0)
        _config.require(
            all(0 <= beta < 1 for beta in self.betas),
            self,
            "betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        _config.require_range(self, "epsilon", self.epsilon, above=0)
        _config.require_range(self, "momentum", self.momentum, minimum=0, maximum=1)
        _config.require(
            self.momentum == 0 or self.name == "sgd", self, "momentum", self.momentum,
            "0 with adamw, whose momentum is betas[0]",
        )  # fmt: skip
        _config.require_range(self, "weight_decay", self.weight_decay, minimum=0)
        if self.clip_norm is not None:
            _config.require_range(self, "clip_norm", self.clip_norm, above=0)


class RoleOptimizer:
    """The optimizer of one role: its parameters, clipping, and steps that a device flag can skip."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # fused: one kernel for all parameters, and the only form that takes `found_inf`.
        if config.name == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters, config.learning_rate, config.betas, config.epsilon,
                config.weight_decay, fused=True,
            )  # fmt: skip
        else:
            self.optimizer = torch.optim.SGD(
                self.parameters, config.learning_rate, config.momentum,
                weight_decay=config.weight_decay, fused=True,
            )  # fmt: skip
            if config.momentum:
                # The kernel makes them at the first step, without writing them where that one is skipped.
                for parameter in self.parameters:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int, steps: int, finite_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips and steps; where the loss or the gradient is not finite, nothing moves.

        Returns:
            The gradient norm before clipping, and whether the update was bad: float32 scalars on the
            device. The flag goes to the fused kernel as gradient scaling's ``found_inf`` does, so that
            the host need not look at it.
        """
        rate = self.config.learning_rate * self.config.schedule.factor(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = clip_gradients(self.parameters, self.config.clip_norm)
        bad = 1.0 - (norm.isfinite() & finite_loss).to(torch.float32)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        return norm, bad


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The global gradient norm, float32 on the device; gradients are scaled to at most ``clip_norm``."""
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, clip_norm, norm)
    return norm.float()

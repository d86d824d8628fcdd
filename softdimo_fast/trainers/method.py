"""What an algorithm is to the training loop: the modules it trains, its phases, and their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from softdimo_fast.diffusion import Draws
from softdimo_fast.trainers.optimization import OptimizerConfig

Metrics = dict[str, Tensor]


class Phase(NamedTuple):
    """One optimizer step: which role it trains, and which of several such steps it is."""

    role: str
    repeat: int = 0


class Loss(NamedTuple):
    """A phase's loss on one micro-batch, and what to log of it: detached scalars on the device.

    Both are shares of the global batch: summed over its micro-batches they give the batch's value.
    """

    value: Tensor
    metrics: Metrics


@dataclass
class MicroBatch:
    """The samples of one micro-batch, and what phases of the same step hand to each other."""

    draws: Draws
    global_draws: Draws
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part of the global batch that this micro-batch is."""
        return len(self.draws) / len(self.global_draws)


class Method(ABC):
    """An algorithm. The :class:`Trainer` accumulates, clips, steps, averages, logs and saves around it."""

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, nn.Module]:
        """Every module that is trained; frozen ones are the method's own affair."""

    @property
    @abstractmethod
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        """One for each role."""

    @property
    def averaged_roles(self) -> Sequence[str]:
        """The roles of which a moving average is kept."""
        return tuple(self.roles)

    @abstractmethod
    def phases(self, step: int) -> Sequence[Phase]:
        """The optimizer steps of this step, in order."""

    def first_step(self, role: str) -> int:
        """The step at which a role begins to train: its learning-rate schedule counts from there."""
        return 0

    @abstractmethod
    def loss(self, phase: Phase, batch: MicroBatch) -> Loss:
        """The loss whose gradient trains ``phase.role``."""

    def finish_step(self, step: int, batches: Sequence[MicroBatch]) -> Metrics:
        """Called after the last phase: updates that are not gradient steps. Returns what to log."""
        return {}

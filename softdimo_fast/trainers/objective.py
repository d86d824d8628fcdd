"""What the losses of a one-step generator have in common: a rollout to look at, modules of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from softdimo_fast.diffusion import Draws
from softdimo_fast.models.conditions import Condition
from softdimo_fast.trainers.method import Loss, Phase
from softdimo_fast.trainers.optimization import OptimizerConfig

Relaxation = Literal["soft", "gumbel", "gumbel_hard"]


@dataclass
class Rollout:
    """One forward pass of the generator on one micro-batch.

    Attributes:
        logits: z_theta ``[B, *token_shape, V]``; they carry a graph in the student's phase alone.
        tokens: x_theta ~ softmax(z_theta), int64 ``[B, *token_shape]``.
        reused: whether the objectives' own phases will see this rollout again.
        memory: what an objective keeps from the student's phase for its own.
    """

    draws: Draws
    global_draws: Draws
    condition: Condition
    logits: Tensor
    tokens: Tensor
    reused: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The part of the global batch that this micro-batch is."""
        return len(self.draws) / len(self.global_draws)

    def detached(self) -> Rollout:
        """The same without the graph; ``memory`` is shared."""
        return replace(self, logits=self.logits.detach())


class Objective(ABC):
    """One term of the generator's loss, with the modules that it trains beside the generator."""

    @property
    def roles(self) -> Mapping[str, nn.Module]:
        """Modules that this objective trains."""
        return {}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        """One for each of :attr:`roles`."""
        return {}

    def phases(self, step: int) -> Sequence[Phase]:
        """The optimizer steps of :attr:`roles`, after the generator's."""
        return ()

    @abstractmethod
    def student_loss(self, rollout: Rollout) -> Loss:
        """The weighted term; its gradient reaches ``rollout.logits`` alone."""

    def role_loss(self, phase: Phase, rollout: Rollout) -> Loss:
        """The loss of one of :attr:`roles`; ``rollout`` carries no graph."""
        raise LookupError(f"{type(self).__name__} trains no role {phase.role!r}")


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within it the modules' parameters collect no gradient, while their inputs do."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def relaxation_options(
    relaxation: Relaxation, temperature: float, draws: Draws, rows: Sequence[int]
) -> dict[str, Any]:
    """Options of ``soft_embedding``: the soft embedding of the paper, or what it is compared with.

    ``"gumbel"`` is the Concrete relaxation, ``"gumbel_hard"`` its straight-through form, a hard sample with
    the soft gradient (arXiv 1611.01144, 1611.00712).
    """
    if relaxation == "soft":
        return {"temperature": temperature}
    positions = 1
    for size in rows[1:]:
        positions *= size
    return {
        "temperature": temperature,
        "noise": "gumbel",
        "hard": relaxation == "gumbel_hard",
        "seed": draws.key("relaxation"),
        "row_ids": draws.row_ids(positions).view(*rows),
    }

"""Training a one-step generator: L = L_DiMO + w_gan L_GAN + w_reward L_reward, any of them.

Source: Soft-Di[M]O (arXiv 2509.22925). Each term is an :class:`Objective`; this method makes the rollouts
they look at and orders the phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws, OneStepConfig, draw_tokens, one_step_logits
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.ops import token_statistics
from softdimo_fast.trainers.method import Loss, Method, MicroBatch, Phase
from softdimo_fast.trainers.objective import Objective, Rollout
from softdimo_fast.trainers.optimization import OptimizerConfig

STUDENT = "student"


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Options of :class:`GeneratorMethod`.

    Attributes:
        one_step: the generator's input and draw.
        sigma_schedule, sigma_steps: how its sigma rises from 0 over the first steps (the public code's
            warm-ups end at 1 instead, which leaves nothing but noise).
        warmup_steps: first steps in which only the objectives' own modules train. A restart from weights
            alone needs it: a fresh optimizer and an auxiliary that lags behind spoil the generator.
        freeze_embeddings: keep the input embedding (and a head tied to it) as the teacher's.
        reuse_rollout: the objectives' own phases look at the student phase's rollout (Algorithm 1 of
            Di[M]O); False makes a fresh one with the updated generator (its public code).
    """

    one_step: OneStepConfig = field(default_factory=OneStepConfig)
    sigma_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    sigma_steps: int = 0
    warmup_steps: int = 0
    freeze_embeddings: bool = True
    reuse_rollout: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "warmup_steps", self.warmup_steps, minimum=0)
        _config.require(
            (self.sigma_steps > 0) == (self.sigma_schedule != "constant"), self, "sigma_steps",
            self.sigma_steps, "positive where sigma_schedule is not 'constant', and 0 otherwise",
        )  # fmt: skip

    def one_step_at(self, step: int) -> OneStepConfig:
        """The generator's input at a training step."""
        if self.sigma_schedule == "constant":
            return self.one_step
        progress = step / self.sigma_steps
        share = {
            "linear": min(progress, 1.0),
            "cosine": (1 - math.cos(math.pi * min(progress, 1.0))) / 2,
            # Nears 1 but has no end: sigma_steps is its time constant.
            "exponential": 1 - math.exp(-progress),
        }[self.sigma_schedule]
        return replace(self.one_step, sigma=self.one_step.sigma * share)


class GeneratorMethod(Method):
    """Role ``student``, and the objectives' roles. Only the student is averaged."""

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Callable[[Draws], Condition],
        objectives: Sequence[Objective],
        config: GeneratorConfig,
    ) -> None:
        """Args:
        conditions: the condition of each sample, a function of its draws.
        """
        if not objectives:
            raise ValueError("GeneratorMethod: objectives must hold at least one, got none")
        self.student, self.conditions, self.config = student, conditions, config
        self.objectives = tuple(objectives)
        self._owner = {role: o for o in self.objectives for role in o.roles}
        self._require_separate_roles()
        # eval: no dropout, which would draw from torch's global generator.
        student.eval().requires_grad_(True)
        if config.freeze_embeddings:
            for parameter in student.embedding_parameters():
                parameter.requires_grad_(False)

    def _require_separate_roles(self) -> None:
        names = [STUDENT, *(role for o in self.objectives for role in o.roles)]
        if len(set(names)) < len(names):
            raise ValueError(f"GeneratorMethod: objectives must train different roles, got {names}")
        parameters = [id(p) for module in self.roles.values() for p in module.parameters()]
        if len(set(parameters)) < len(parameters):
            raise ValueError(f"GeneratorMethod: the roles {names} must not share parameters")

    @property
    def roles(self) -> Mapping[str, nn.Module]:
        owned = {role: m for o in self.objectives for role, m in o.roles.items()}
        return {STUDENT: self.student, **owned}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        owned = {role: c for o in self.objectives for role, c in o.optimizers.items()}
        return {STUDENT: self.config.optimizer, **owned}

    @property
    def averaged_roles(self) -> Sequence[str]:
        return (STUDENT,)

    def phases(self, step: int) -> Sequence[Phase]:
        owned = [phase for o in self.objectives for phase in o.phases(step)]
        return owned if step < self.config.warmup_steps else [Phase(STUDENT), *owned]

    def first_step(self, role: str) -> int:
        return self.config.warmup_steps if role == STUDENT else 0

    def loss(self, phase: Phase, batch: MicroBatch) -> Loss:
        if phase.role == STUDENT:
            return self._student_loss(batch)
        return self._owner[phase.role].role_loss(phase, self._role_rollout(phase, batch))

    def _student_loss(self, batch: MicroBatch) -> Loss:
        rollout = self._rollout(batch.draws, batch.global_draws)
        rollout.reused = self.config.reuse_rollout
        if rollout.reused:
            batch.memory["rollout"] = rollout.detached()
        statistics = token_statistics(rollout.logits.detach())
        metrics = {
            "student/entropy": statistics.entropy.mean() * rollout.share,
            "student/max_probability": statistics.max_prob.mean() * rollout.share,
        }
        losses = [objective.student_loss(rollout) for objective in self.objectives]
        for loss in losses:
            metrics |= loss.metrics
        total = torch.stack([loss.value for loss in losses]).sum()
        return Loss(total, metrics)

    def _role_rollout(self, phase: Phase, batch: MicroBatch) -> Rollout:
        """The student phase's rollout where it may be used again, else one of its own, kept for the step."""
        first: Rollout | None = batch.memory.get("rollout")
        if first is not None and phase.repeat == 0:
            return first
        name = f"rollout/{phase.repeat}"
        if name not in batch.memory:
            with torch.no_grad():
                batch.memory[name] = self._rollout(
                    batch.draws.fork(name), batch.global_draws.fork(name)
                )
        fresh: Rollout = batch.memory[name]
        return fresh

    def _rollout(self, draws: Draws, global_draws: Draws) -> Rollout:
        condition = self.conditions(draws)
        one_step = self.config.one_step_at(draws.step)
        logits = one_step_logits(self.student, condition, draws, one_step)
        tokens = draw_tokens(logits.detach(), draws, temperature=one_step.temperature)
        return Rollout(draws, global_draws, condition, logits, tokens)

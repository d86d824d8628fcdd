"""Di[M]O: on-policy token-level distribution matching (arXiv 2503.15457)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import MaskedRows, branch_logits, draw_mask, draw_masked_count
from softdimo_fast.diffusion.masking import MaskSchedule
from softdimo_fast.models.conditions import select
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.ops import (
    distribution_matching_loss,
    masked_cross_entropy,
    token_divergence,
)
from softdimo_fast.trainers.method import Loss, Phase
from softdimo_fast.trainers.objective import Objective, Rollout, frozen
from softdimo_fast.trainers.optimization import OptimizerConfig

AUXILIARY = "auxiliary"


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Options of :class:`DistributionMatching`; the defaults are the public code's.

    Attributes:
        weight: of this term.
        divergence, beta: D(teacher || auxiliary); ``"jeffreys"`` is (1 - beta) forward + beta reverse KL.
        guidance_scale: s of the teacher's u + s (c - u).
        adaptive_guidance: s becomes 1 + (s - 1) x the sample's share of [MASK] positions.
        teacher_temperature, auxiliary_temperature: of the two softmaxes in the divergence.
        normalization: ``"masked"`` divides by the sample's [MASK] positions (the paper's formula),
            ``"batch"`` by the batch alone (the public code), ``"sum"`` by nothing.
        mask_schedule: of re-masking the generator's tokens, for both networks.
        weighting: w(t) as a power of the sample's mask ratio: 0 is the public code's constant.
        path: what the networks see at the positions that are not masked: ``"hard"`` tokens (the paper),
            ``"soft"`` embeddings, or ``"soft_gradient"``, soft embeddings through which the divergence is
            differentiated too, weighted by ``soft_gradient_weight``.
        auxiliary_steps: auxiliary updates for one generator update.
        auxiliary_label_smoothing: of its cross-entropy on the generator's tokens.
        auxiliary_soft_weight: of KL(generator || auxiliary) beside that cross-entropy.
        auxiliary_condition_drop: the share of samples without condition in its training.
    """

    weight: float = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jeffreys"] = "forward_kl"
    beta: float | None = None
    guidance_scale: float = 1.0
    adaptive_guidance: bool = False
    teacher_temperature: float = 1.0
    auxiliary_temperature: float = 1.0
    normalization: Literal["masked", "batch", "sum"] = "masked"
    mask_schedule: MaskSchedule = "arccos"
    weighting: float = 0.0
    path: Literal["hard", "soft", "soft_gradient"] = "hard"
    soft_gradient_weight: float = 0.0
    auxiliary_steps: int = 1
    auxiliary_label_smoothing: float = 0.1
    auxiliary_soft_weight: float = 0.0
    auxiliary_condition_drop: float = 0.0
    auxiliary_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "weight", self.weight, minimum=0)
        _config.require(
            (self.beta is not None) == (self.divergence == "jeffreys"), self, "beta", self.beta,
            "a number with divergence='jeffreys', and None otherwise",
        )  # fmt: skip
        _config.require(
            (self.soft_gradient_weight != 0) == (self.path == "soft_gradient"), self,
            "soft_gradient_weight", self.soft_gradient_weight,
            "non-zero with path='soft_gradient', and 0 otherwise",
        )  # fmt: skip
        for name in ("teacher_temperature", "auxiliary_temperature"):
            _config.require_range(self, name, getattr(self, name), above=0)
        _config.require_range(
            self, "auxiliary_label_smoothing", self.auxiliary_label_smoothing, minimum=0, below=1
        )
        _config.require_range(
            self, "auxiliary_condition_drop", self.auxiliary_condition_drop, minimum=0, maximum=1
        )
        _config.require_range(self, "auxiliary_soft_weight", self.auxiliary_soft_weight, minimum=0)
        _config.require_range(self, "auxiliary_steps", self.auxiliary_steps, minimum=1)


class DistributionMatching(Objective):
    """The divergence between the frozen teacher and an auxiliary that follows the generator's output."""

    def __init__(
        self,
        teacher: MaskedDiffusionModel,
        auxiliary: MaskedDiffusionModel,
        config: DistillationConfig,
    ) -> None:
        if auxiliary is teacher:
            raise ValueError("DistributionMatching: auxiliary must be another module than teacher")
        # Dropout, in the teacher's targets above all, is a known defect of the public code.
        self.teacher = teacher.eval().requires_grad_(False)
        self.auxiliary = auxiliary.eval().requires_grad_(True)
        self.config = config

    @property
    def roles(self) -> Mapping[str, MaskedDiffusionModel]:
        return {AUXILIARY: self.auxiliary}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        return {AUXILIARY: self.config.auxiliary_optimizer}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase(AUXILIARY, index) for index in range(self.config.auxiliary_steps)]

    # -----------------------------------------------------------------------------------------------
    # the generator's term

    def student_loss(self, rollout: Rollout) -> Loss:
        config = self.config
        masked = self._mask(rollout, "matching")
        differentiated = config.path == "soft_gradient"
        logits = rollout.logits if differentiated else rollout.logits.detach()
        with frozen(self.auxiliary), torch.set_grad_enabled(differentiated):
            teacher = branch_logits(
                self.teacher, self._input(self.teacher, rollout, logits, masked.mask),
                self.teacher.masked_condition(rollout.condition, masked.mask),
                guided=config.guidance_scale != 1, rows=masked.rows,
            )  # fmt: skip
            auxiliary = self.auxiliary.logits(
                self._input(self.auxiliary, rollout, logits, masked.mask),
                self.auxiliary.masked_condition(rollout.condition, masked.mask),
                masked.rows,
            )
        scale = self._scale(masked)
        matching = distribution_matching_loss(
            masked.of(rollout.logits), teacher.conditional.detach(), auxiliary.detach(),
            masked.row_mask, kind=config.divergence, beta=config.beta,
            teacher_uncond_logits=None if teacher.unconditional is None else teacher.unconditional.detach(),
            guidance_scale=scale, teacher_temperature=config.teacher_temperature,
            auxiliary_temperature=config.auxiliary_temperature,
            weight=self._weight(masked, rollout, config.normalization), normalization="sum",
        )  # fmt: skip
        value = config.weight * matching
        metrics = {"distillation/divergence": matching.detach()}
        if differentiated:
            # The divergence as a function of the networks' soft inputs.
            through = token_divergence(
                teacher.conditional, auxiliary, kind=config.divergence, beta=config.beta,
                teacher_uncond_logits=teacher.unconditional, guidance_scale=scale,
                teacher_temperature=config.teacher_temperature,
                model_temperature=config.auxiliary_temperature, mask=masked.row_mask,
                weight=self._weight(masked, rollout, "masked"), reduction="sum",
            )  # fmt: skip
            value = value + config.soft_gradient_weight * through
            metrics["distillation/soft_divergence"] = through.detach()
        return Loss(value, metrics)

    def _input(
        self, model: MaskedDiffusionModel, rollout: Rollout, logits: Tensor, mask: Tensor
    ) -> Tensor:
        if self.config.path == "hard":
            return model.embed(model.masked_tokens(rollout.tokens, mask))
        return model.soft_embed(logits, mask=mask)

    def _mask(self, rollout: Rollout, stream: str) -> MaskedRows:
        return draw_mask(rollout.draws, stream, self.config.mask_schedule, self.teacher.token_shape)

    def _scale(self, masked: MaskedRows) -> float | Tensor:
        if not self.config.adaptive_guidance or self.config.guidance_scale == 1:
            return self.config.guidance_scale
        return masked.spread(1 + (self.config.guidance_scale - 1) * _mask_share(masked.mask))

    def _weight(self, masked: MaskedRows, rollout: Rollout, normalization: str) -> Tensor:
        """Of each row, with which the *sum* over the rows is normalised, as a share of the global batch."""
        weight = _mask_share(masked.mask) ** self.config.weighting
        if normalization != "sum":
            weight = weight / len(rollout.global_draws)
        if normalization == "masked":
            weight = weight / masked.counts
        return masked.spread(weight)

    # -----------------------------------------------------------------------------------------------
    # the auxiliary

    def role_loss(self, phase: Phase, rollout: Rollout) -> Loss:
        config, model = self.config, self.auxiliary
        stream = f"auxiliary/{phase.repeat}"
        masked = self._mask(rollout, stream)
        condition = model.masked_condition(rollout.condition, masked.mask)
        if config.auxiliary_condition_drop:
            dropped = (
                rollout.draws.uniform(f"{stream}/drop", 1)[:, 0] < config.auxiliary_condition_drop
            )
            condition = select(dropped, model.unconditional(condition), condition)
        logits = model.logits(
            self._input(model, rollout, rollout.logits, masked.mask), condition, masked.rows
        )
        total = masked_cross_entropy(
            logits, masked.of(rollout.tokens), masked.row_mask,
            label_smoothing=config.auxiliary_label_smoothing, reduction="sum",
        )  # fmt: skip
        if config.auxiliary_soft_weight:
            total = total + config.auxiliary_soft_weight * token_divergence(
                masked.of(rollout.logits), logits, mask=masked.row_mask, reduction="sum"
            )
        counted = draw_masked_count(
            rollout.global_draws, stream, config.mask_schedule, masked.mask[0].numel()
        ).sum()
        loss = total / counted
        return Loss(loss, {"auxiliary/loss": loss.detach() / config.auxiliary_steps})


def _mask_share(mask: Tensor) -> Tensor:
    """``[B]``: the share of True in each sample."""
    return mask.flatten(1).float().mean(1)

"""The GAN term of Soft-Di[M]O (arXiv 2509.22925): frozen teacher features, light heads, soft embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws, random_mask
from softdimo_fast.models.conditions import Condition, map_condition
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.trainers.heads import (
    DiscriminatorHeads,
    HeadsConfig,
    discriminator_loss,
    generator_loss,
)
from softdimo_fast.trainers.method import Loss, Metrics, Phase
from softdimo_fast.trainers.objective import (
    Objective,
    Relaxation,
    Rollout,
    frozen,
    relaxation_options,
)
from softdimo_fast.trainers.optimization import OptimizerConfig

HEADS = "heads"


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Options of :class:`Adversarial`. The paper gives the mask range; most of the rest is open there.

    Attributes:
        weight: w_gan.
        loss: ``"non_saturating"`` (the paper's generator side) or ``"hinge"``.
        mask_range: the share of [MASK] positions in what the teacher sees, uniform in this range for
            each sample. It keeps the teacher in distribution and augments; [0, 0] was the worst.
        relaxation, temperature: of the generator's tokens on the fake side.
        heads_steps: head updates for one generator update.
        r1: a penalty on the heads' gradient at real embeddings, weighted by ``r1_weight``:
            ``"finite_difference"`` estimates it with one perturbed pass of size ``r1_sigma``
            (arXiv 2501.08316; a run with autocast makes two, without it); ``"exact"`` differentiates twice,
            which needs math attention.
    """

    weight: float = 1.0
    loss: Literal["non_saturating", "hinge"] = "non_saturating"
    mask_range: tuple[float, float] = (0.0, 0.95)
    relaxation: Relaxation = "soft"
    temperature: float = 1.0
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    heads_steps: int = 1
    heads_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    r1: Literal["none", "finite_difference", "exact"] = "none"
    r1_weight: float = 0.0
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "weight", self.weight, minimum=0)
        low, high = self.mask_range
        _config.require(
            0 <= low <= high <= 1,
            self,
            "mask_range",
            self.mask_range,
            "a pair low <= high in [0, 1]",
        )
        _config.require_range(self, "temperature", self.temperature, above=0)
        _config.require_range(self, "heads_steps", self.heads_steps, minimum=1)
        _config.require(
            self.r1_weight > 0 if self.r1 != "none" else self.r1_weight == 0, self, "r1_weight",
            self.r1_weight, "positive where r1 is on, and 0 where it is 'none'",
        )  # fmt: skip
        _config.require_range(self, "r1_sigma", self.r1_sigma, above=0)


class Adversarial(Objective):
    """Real: hard embeddings of encoded images. Fake: soft embeddings of the generator's tokens."""

    def __init__(
        self,
        teacher: MaskedDiffusionModel,
        heads: DiscriminatorHeads,
        real: Callable[[Draws], tuple[Tensor, Condition]],
        config: AdversarialConfig,
    ) -> None:
        """Args:
        real: tokens and conditions of real images, for a micro-batch's draws.
        """
        self.teacher = teacher.eval().requires_grad_(False)
        self.heads, self.real, self.config = heads.requires_grad_(True), real, config
        self.layers = config.heads.layers_of(teacher.depth)

    @property
    def roles(self) -> Mapping[str, DiscriminatorHeads]:
        return {HEADS: self.heads}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        return {HEADS: self.config.heads_optimizer}

    def phases(self, step: int) -> Sequence[Phase]:
        return [Phase(HEADS, index) for index in range(self.config.heads_steps)]

    def student_loss(self, rollout: Rollout) -> Loss:
        features = self._fake_features(rollout, self._mask(rollout.draws, 0))
        if rollout.reused:
            rollout.memory["fake_features"] = [feature.detach() for feature in features]
        with frozen(self.heads):
            scores = self.heads(features, rollout.condition)
        loss = generator_loss(scores, self.config.loss).mean() * rollout.share
        return Loss(self.config.weight * loss, {"adversarial/generator": loss.detach()})

    def role_loss(self, phase: Phase, rollout: Rollout) -> Loss:
        mask = self._mask(rollout.draws, phase.repeat)
        with torch.no_grad():
            fake = rollout.memory.pop("fake_features", None) or self._fake_features(rollout, mask)
        tokens, condition = self.real(rollout.draws)
        embeddings = self.teacher.embed(self.teacher.masked_tokens(tokens, mask))
        condition = self.teacher.masked_condition(condition, mask)
        if self.config.r1 == "exact":
            # The derivative of the penalty needs the second derivative of attention.
            with sdpa_kernel(SDPBackend.MATH):
                embeddings.requires_grad_(True)
                real_scores = self.heads(self._features(embeddings, condition), condition)
        else:
            real_scores = self._scores(embeddings, condition)
        fake_scores = self.heads(fake, rollout.condition)
        loss = discriminator_loss(real_scores, fake_scores, self.config.loss).mean()
        metrics: Metrics = {
            "adversarial/heads": loss,
            "adversarial/real_score": real_scores.mean(),
            "adversarial/fake_score": fake_scores.mean(),
        }
        if self.config.r1 != "none":
            penalty = self._penalty(embeddings, condition, real_scores, rollout.draws)
            loss = loss + self.config.r1_weight * penalty
            metrics["adversarial/r1"] = penalty
        scale = rollout.share / self.config.heads_steps
        return Loss(loss * rollout.share, {name: m.detach() * scale for name, m in metrics.items()})

    def _penalty(
        self, embeddings: Tensor, condition: Condition, scores: Tensor, draws: Draws
    ) -> Tensor:
        """The squared gradient of each score at real embeddings, or its estimate: the sum over the scores.

        The mean over the batch.
        """
        if self.config.r1 == "exact":
            with sdpa_kernel(SDPBackend.MATH):
                squares = [
                    torch.autograd.grad(score.sum(), embeddings, create_graph=True)[0]
                    .square()
                    .sum()
                    for score in scores.unbind(1)
                ]
            return torch.stack(squares).sum() / len(scores)
        sigma = self.config.r1_sigma
        noise = draws.normal("adversarial/r1", *embeddings.shape[1:])
        device = embeddings.device.type
        rounded = torch.is_autocast_enabled(device)
        # Under autocast the difference of two scores would be that of their rounding.
        with torch.autocast(device, enabled=False):
            if rounded:
                embeddings, condition = _full(embeddings), map_condition(_full, condition)
                scores = self._scores(embeddings, condition)
            moved = self._scores(embeddings + sigma * noise, condition)
        estimate: Tensor = ((moved - scores) / sigma).square().sum(1).mean()
        return estimate

    def _scores(self, embeddings: Tensor, condition: Condition) -> Tensor:
        """``[B, scores]``, with a graph from the heads on."""
        with torch.no_grad():
            features = self._features(embeddings, condition)
        scores: Tensor = self.heads(features, condition)
        return scores

    def _mask(self, draws: Draws, index: int) -> Tensor:
        low, high = self.config.mask_range
        shape = self.teacher.token_shape
        share = low + (high - low) * draws.uniform(f"adversarial/ratio/{index}", 1)[:, 0]
        u = draws.uniform(f"adversarial/positions/{index}", *shape)
        return random_mask((share * u[0].numel()).round().long(), u)

    def _fake_features(self, rollout: Rollout, mask: Tensor) -> list[Tensor]:
        config = self.config
        options = relaxation_options(
            config.relaxation, config.temperature, rollout.draws, rollout.logits.shape[:-1]
        )
        embeddings = self.teacher.soft_embed(rollout.logits, mask=mask, **options)
        return self._features(embeddings, self.teacher.masked_condition(rollout.condition, mask))

    def _features(self, embeddings: Tensor, condition: Condition) -> list[Tensor]:
        return self.teacher.features(embeddings, condition, self.layers)


def _full(tensor: Tensor) -> Tensor:
    """At least float32, where it is floating point: what autocast made of it fits no float32 weight."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

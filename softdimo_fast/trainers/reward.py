"""The reward term of Soft-Di[M]O (arXiv 2509.22925): rewards of softly decoded images, differentiated."""

from __future__ import annotations

from dataclasses import dataclass

from softdimo_fast import _config
from softdimo_fast.models.protocol import Tokenizer
from softdimo_fast.rewards.protocol import Reward
from softdimo_fast.trainers.method import Loss
from softdimo_fast.trainers.objective import (
    Objective,
    Relaxation,
    Rollout,
    relaxation_options,
)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Options of :class:`RewardObjective`.

    Attributes:
        weight: w_reward.
        relaxation, temperature: of the generator's tokens on the way to the image decoder.
    """

    weight: float = 1.0
    relaxation: Relaxation = "soft"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "weight", self.weight, minimum=0)
        _config.require_range(self, "temperature", self.temperature, above=0)


class RewardObjective(Objective):
    """Minus the mean reward of Dec(softmax(z_theta) codebook)."""

    def __init__(self, tokenizer: Tokenizer, reward: Reward, config: RewardConfig) -> None:
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.reward, self.config = reward, config

    def student_loss(self, rollout: Rollout) -> Loss:
        config = self.config
        options = relaxation_options(
            config.relaxation, config.temperature, rollout.draws, rollout.logits.shape[:-1]
        )
        images = self.tokenizer.decode_soft(rollout.logits, rollout.condition, **options)
        reward = self.reward(images, rollout.condition).mean() * rollout.share
        return Loss(-config.weight * reward, {"reward/value": reward.detach()})

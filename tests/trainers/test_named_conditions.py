"""Conditions of several tensors, and models that are told how much is masked, through every method."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.training import (
    FAST,
    SIZES,
    distillation,
    generator,
    heads,
    micro_batch,
    reward,
    snapshot,
    token_source,
    tokenizer,
    trainer,
)
from torch import Tensor, nn

from softdimo_fast.diffusion import (
    ConfidenceSamplerConfig,
    Draws,
    confidence_sample,
    initial_tokens,
)
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.transformer import TokenTransformer, TokenTransformerConfig
from softdimo_fast.trainers import (
    Adversarial,
    AdversarialConfig,
    RewardConfig,
    RewardObjective,
    TeacherConfig,
    TeacherMethod,
    TestTimeConfig,
    TestTimeEmbeddingOptimizer,
)


class Described(NamedTuple):
    """A label, a style of two numbers, and the share of [MASK] that the model is told."""

    label: Tensor
    style: Tensor
    masked: Tensor


def described(label: Tensor, draws: Draws) -> Described:
    return Described(label, draws.normal("style", 2), torch.full((len(draws),), -1.0))


class DescribedTransformer(TokenTransformer):
    """The package's transformer with style and masked share in the class token."""

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__(config)
        self.style = nn.Linear(3, config.width)
        self.told: list[Tensor] = []

    def unconditional(self, condition: Described) -> Described:  # type: ignore[override]
        label = super().unconditional(condition.label)
        return condition._replace(label=label, style=torch.zeros_like(condition.style))

    def masked_condition(self, condition: Described, mask: Tensor) -> Described:
        return condition._replace(masked=mask.float().mean(1))

    def _layers(self, embeddings: Tensor, condition: Described) -> list[Tensor]:  # type: ignore[override]
        self.told.append(condition.masked)
        # What it was told is true: [MASK] embeddings can be counted, but for a generator's, which are noisy.
        is_mask = (embeddings == self.mask_embedding).all(-1).float().mean(1)
        known = (condition.masked >= 0) & (is_mask > 0)
        assert torch.equal(condition.masked[known], is_mask[known])
        style = self.style(torch.cat([condition.style, condition.masked[:, None]], dim=1))
        return super()._layers(embeddings + style[:, None], condition.label)


def model(seed: int = 0) -> DescribedTransformer:
    config = TokenTransformerConfig(**SIZES, width=16, depth=2, heads=2, mlp_ratio=2)
    with seeded(seed):
        result = DescribedTransformer(config)
    with torch.no_grad():
        result.head_weight.mul_(20)
    return result


def source(draws: Draws) -> tuple[Tensor, Described]:
    tokens, label = token_source()(draws)
    return tokens, described(label, draws)


def conditions(draws: Draws) -> Described:
    return described(draws.integers("label", 2), draws)


def label_reward(images: Tensor, condition: Described) -> Tensor:
    value: Tensor = reward()(images, condition.label)
    return value


def method(name: str) -> Any:
    if name == "teacher":
        return TeacherMethod(model(), source, TeacherConfig(condition_drop=0.4, optimizer=FAST))
    teacher = model()
    discriminator = heads(teacher, class_projection=False)
    options = AdversarialConfig(heads=discriminator.config, heads_optimizer=FAST)
    objectives = [
        distillation(
            teacher=teacher, auxiliary=model(1), guidance_scale=2.0, auxiliary_condition_drop=0.4
        ),
        Adversarial(teacher, discriminator, source, options),
        RewardObjective(tokenizer(), label_reward, RewardConfig()),
    ]
    return generator(*objectives, student=model(2), conditions=conditions)


@pytest.mark.parametrize("name", ["teacher", "all"])
def test_methods(name: str) -> None:
    run = trainer(method(name))
    before = snapshot(run)
    run.run()
    for role in run.method.roles:
        assert any(
            not torch.equal(before[key], value)
            for key, value in snapshot(run).items()
            if key.startswith(f"{role}/")
        ), role


def test_every_network_is_told_the_share() -> None:
    run = method("all")
    batch = micro_batch()
    for phase in run.phases(0):
        run.loss(phase, batch)
    matching, gan, _ = run.objectives
    for network in (matching.teacher, matching.auxiliary, gan.teacher):
        told = torch.cat(network.told)
        assert len(told) > 0
        assert bool((told >= 0).all())
    ratio = run.config.one_step.initial_ratio
    initial = initial_tokens(run.student, batch.draws, ratio)
    masked = (initial == run.student.mask_id).float().mean(1)
    assert torch.equal(run.student.told[0], masked)


def test_accumulation() -> None:
    states = []
    for accumulation in (1, 2):
        run = trainer(method("all"), accumulation=accumulation, steps=1)
        run.train_step()
        states.append(run._means.read()[0])
    for key, value in states[0].items():
        assert states[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_sampling_and_search() -> None:
    draws = Draws.of(0, 0, 5)
    condition = conditions(draws)
    config = ConfidenceSamplerConfig(steps=4, guidance_scale=2.0)
    teacher = model()
    tokens = confidence_sample(teacher, condition, draws, config)
    assert int(tokens.max()) < 8
    assert [round(float(told[0]), 2) for told in teacher.told] == [1.0, 0.75, 0.5, 0.25]
    search = TestTimeEmbeddingOptimizer(
        model(2), tokenizer(), label_reward, TestTimeConfig(batch_size=3, candidates=2)
    )
    result = search(condition, condition, draws)
    assert bool((result.reward >= result.initial_reward).all())

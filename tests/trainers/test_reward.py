"""The reward term is minus the mean reward of the softly decoded images, differentiated."""

from __future__ import annotations

import pytest
import torch
from support.training import FAMILIES, gradient, reward, reward_objective, rollout, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient(family: str) -> None:
    objective, sample = reward_objective(family, weight=2.5, temperature=0.8), rollout(family)
    images = tokenizer(family).decode_soft(sample.logits / 0.8)
    expected = reward()(images, sample.condition).mean()
    loss = objective.student_loss(sample)
    torch.testing.assert_close(loss.value, -2.5 * expected)
    torch.testing.assert_close(loss.metrics["reward/value"], expected.detach())
    (want,) = torch.autograd.grad(-2.5 * expected, sample.logits)
    torch.testing.assert_close(gradient(objective, sample), want, atol=1e-7, rtol=1e-4)
    assert want.abs().max() > 0


def test_a_small_step_along_the_gradient_raises_the_reward() -> None:
    objective, sample = reward_objective(), rollout()
    before = reward_objective().student_loss(sample).value
    step = gradient(objective, sample)
    with torch.no_grad():
        sample.logits -= 0.1 * step / step.norm()
    after = objective.student_loss(sample).value
    slope = float((before - after).detach() / 0.1)
    assert slope == pytest.approx(float(step.norm()), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_straight_through_shows_the_decoder_hard_tokens(family: str) -> None:
    hard, soft = (
        reward_objective(family, relaxation=kind, temperature=0.5)
        for kind in ("gumbel_hard", "gumbel")
    )
    sample = rollout(family)
    shown = []
    with hard.tokenizer.decoder.register_forward_pre_hook(lambda _, args: shown.append(args[0])):
        hard.student_loss(sample)
    codes = shown[0] if family == "grouped" else shown[0].flatten(2).transpose(1, 2)
    codebook = hard.tokenizer.codebook
    parts = codes.unflatten(-1, (-1, codebook.shape[-1])) if family == "grouped" else codes
    assert bool((parts[..., None, :] == codebook).all(-1).any(-1).all())
    # The gradient is that of the soft sample with the same noise, taken at the hard one.
    assert not torch.equal(hard.student_loss(sample).value, soft.student_loss(sample).value)
    assert gradient(hard, sample).abs().max() > 0


def test_nothing_but_the_logits_gets_a_gradient() -> None:
    objective, sample = reward_objective(), rollout()
    objective.student_loss(sample).value.backward()
    assert sample.logits.grad is not None
    assert all(p.grad is None for p in objective.tokenizer.parameters())
    assert not any(p.requires_grad for p in objective.tokenizer.parameters())
    assert objective.roles == {}
    assert objective.phases(0) == ()

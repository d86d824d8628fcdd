"""ClassifierReward: the stated log-probability, stable at both ends, gradients to the images alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softdimo_fast.models.classifier import MlpClassifier, MlpClassifierConfig
from softdimo_fast.rewards.classifier import ClassifierReward

PARITY = torch.arange(10) % 2


class Logits(nn.Module):
    """Images [B, C, 1, 1] are their own logits [B, C]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def as_images(logits: Tensor) -> Tensor:
    return logits[:, :, None, None]


def test_is_the_log_of_the_summed_probabilities() -> None:
    logits, condition = torch.randn(50, 10).double() * 3, torch.randint(0, 2, (50,))
    p = logits.softmax(1)
    expected = torch.where(condition == 0, p[:, 0::2].sum(1), p[:, 1::2].sum(1)).log()
    found = ClassifierReward(Logits(), PARITY)(as_images(logits), condition)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_without_groups_a_class_is_its_own_condition() -> None:
    logits, digits = torch.randn(20, 10), torch.randint(0, 10, (20,))
    found = ClassifierReward(Logits(), None)(as_images(logits), digits)
    expected = -nn.functional.cross_entropy(logits, digits, reduction="none")
    torch.testing.assert_close(found, expected)
    seven = ClassifierReward(Logits(), None, num_classes=7)
    assert seven(as_images(logits[:, :7]), digits % 7).shape == (20,)


def test_gradient() -> None:
    reward = ClassifierReward(Logits(), torch.tensor([0, 1, 2, 0, 1]))
    images = as_images(torch.randn(6, 5, dtype=torch.float64)).requires_grad_()
    condition = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: reward(x, condition), images)


@pytest.mark.parametrize("size", [30.0, 1e3, 1e30])
def test_stable_at_both_ends(size: float) -> None:
    """A hopeless image keeps a finite value and its gradient, a perfect one is at most 0."""
    logits = torch.zeros(2, 10)
    logits[:, 3] = size
    images = as_images(logits).requires_grad_()
    value = ClassifierReward(Logits(), PARITY)(images, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    exact = nn.functional.logsigmoid(
        torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        * (
            torch.full((), 5.0).double().log()
            - torch.tensor([size, 0.0] + [0.0] * 3).double().logsumexp(0)
        )
    ).flatten()
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-30)
    assert bool((value <= 0).all())
    assert bool(gradient.isfinite().all())
    assert float(gradient[0, 3]) == pytest.approx(-1, abs=1e-6)


def test_the_classifier_is_frozen_and_images_get_gradients() -> None:
    classifier = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)
    )
    reward = ClassifierReward(classifier, PARITY)
    statistics = classifier[1].running_mean.clone()
    reward.train()
    images = torch.randn(4, 1, 8, 8, requires_grad=True)
    reward(images, torch.tensor([0, 1, 0, 1])).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().min(0).values.max()) > 0
    assert not any(p.requires_grad or p.grad is not None for p in classifier.parameters())
    assert not any(module.training for module in reward.modules())
    assert torch.equal(statistics, classifier[1].running_mean)


def test_climbing_the_reward_raises_the_probability() -> None:
    reward = ClassifierReward(MlpClassifier(MlpClassifierConfig()), PARITY)
    images, condition = torch.zeros(8, 1, 8, 8, requires_grad=True), torch.arange(8) % 2
    before = reward(images, condition)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = reward(images + 0.1 * gradient, condition)
    assert bool((after > before).all())


def test_low_precision_logits_are_computed_in_float32() -> None:
    reward = ClassifierReward(Logits(), PARITY)
    logits, condition = torch.randn(8, 10).bfloat16(), torch.arange(8) % 2
    value = reward(as_images(logits), condition)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reward(as_images(logits.float()), condition))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (torch.zeros(10).long(), ValueError, "at least two different conditions"),
        (torch.zeros(10), TypeError, "groups must be int64, got torch.float32"),
        (torch.zeros(2, 5).long(), ValueError, r"groups must have shape \[classes\], got \[2, 5\]"),
    ],
)
def test_refused_groups(groups: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClassifierReward(Logits(), groups)


def test_refused_calls() -> None:
    reward, images = ClassifierReward(Logits(), PARITY), as_images(torch.randn(3, 10))
    with pytest.raises(ValueError, match=r"condition must have shape \[3\], .* got \[2\]"):
        reward(images, torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"condition 2 is none of the groups' conditions \[0, 1\]"):
        reward(images, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"must give logits \[B, 10\].* got \[3, 9\]"):
        reward(images[:, :9], torch.zeros(3).long())

"""WeightedRewards: the weighted sum, its parts in one pass, refused weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softdimo_fast.rewards.protocol import Reward
from softdimo_fast.rewards.weighted import WeightedRewards


class Brightness:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        return images.flatten(1).mean(1)


def closeness(images: Tensor, condition: Tensor) -> Tensor:
    return -(images.flatten(1).sum(1) - condition).square()


def test_is_the_weighted_sum_with_its_gradient() -> None:
    images = torch.randn(5, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    condition = torch.arange(5)
    rewards: Reward = WeightedRewards(
        {"brightness": Brightness(), "closeness": closeness},
        {"closeness": 0.25, "brightness": -2.0},
    )
    value = rewards(images, condition)
    expected = -2 * Brightness()(images, condition) + 0.25 * closeness(images, condition)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), images) for v in (value, expected)))


def test_parts_and_their_sum_take_one_pass() -> None:
    brightness = Brightness()
    rewards = WeightedRewards({"a": brightness, "b": closeness}, {"a": 3.0, "b": 1.0})
    images, condition = torch.randn(4, 1, 2, 2), torch.zeros(4)
    parts = rewards.parts(images, condition)
    assert list(parts) == ["a", "b"]
    torch.testing.assert_close(parts["b"], closeness(images, condition))
    total = rewards.combine(parts)
    assert brightness.calls == 1
    assert torch.equal(total, rewards(images, condition))


def test_weights_default_to_one() -> None:
    rewards = WeightedRewards({"a": closeness, "b": closeness})
    images, condition = torch.randn(4, 1, 2, 2), torch.zeros(4)
    torch.testing.assert_close(rewards(images, condition), 2 * closeness(images, condition))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"weights must name the rewards \['a', 'b'\], got \['a'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"got \['a', 'b', 'c'\]"),
        ({"a": 1.0, "b": math.nan}, r"weights\['b'\] must be finite, got nan"),
    ],
)
def test_refused_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedRewards({"a": closeness, "b": closeness}, weights)


def test_no_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        WeightedRewards({})

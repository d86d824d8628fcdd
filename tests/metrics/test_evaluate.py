"""evaluate_images: every number is the one its own function gives, and the subset keeps all conditions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softdimo_fast.data.digits import load_digits
from softdimo_fast.metrics import evaluate
from softdimo_fast.metrics.evaluate import evaluate_images
from softdimo_fast.metrics.frechet import frechet_distance
from softdimo_fast.metrics.manifold import manifold_metrics


class FirstPixelJudge:
    """Reads the class from the first pixel; features are the next three."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        assert not torch.is_grad_enabled()
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10).float()

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, 1:4]


def images_of(classes: Tensor) -> Tensor:
    images = torch.randn(len(classes), 1, 2, 2)
    images[:, 0, 0, 0] = classes.float()
    return images


def test_all_numbers() -> None:
    classes = torch.randint(0, 10, (60,))
    condition = classes % 2
    condition[:6] = 1 - condition[:6]
    images, real = images_of(classes), torch.randn(20, 3)
    found = evaluate_images(FirstPixelJudge(), images, condition, real)
    features = images.flatten(1)[:, 1:4]
    assert found.n == 60
    assert found.accuracy == pytest.approx(0.9)
    assert found.fd == frechet_distance(features, real)
    shares = torch.bincount(classes) / 60
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in shares.tolist() if p))
    subset = features[evaluate._spread(condition, 20)]
    expected = manifold_metrics(real, subset)
    assert (found.precision, found.recall, found.coverage) == (
        expected.precision, expected.recall, expected.coverage
    )  # fmt: skip


def test_any_condition_of_the_class() -> None:
    classes = torch.arange(30) % 10
    found = evaluate_images(
        FirstPixelJudge(), images_of(classes), classes // 5, torch.randn(9, 3),
        condition_of=lambda digits: digits // 5,
    )  # fmt: skip
    assert found.accuracy == 1
    assert found.entropy == pytest.approx(math.log(10))


def test_batches_do_not_matter() -> None:
    classes = torch.arange(50) % 10
    images, real, judge = images_of(classes), torch.randn(12, 3), FirstPixelJudge()
    whole = evaluate_images(judge, images, classes % 2, real)
    parts = evaluate_images(judge, images, classes % 2, real, batch_size=20)
    assert whole == parts
    assert judge.batches == [50, 20, 20, 10]


def test_the_subset_keeps_the_shares_of_alternating_conditions() -> None:
    condition = torch.arange(2000) % 2
    subset = evaluate._spread(condition, 500)
    assert len(subset.unique()) == 500
    assert torch.bincount(condition[subset]).tolist() == [250, 250]
    uneven = evaluate._spread((torch.arange(1000) % 4 == 0).long(), 100)
    assert int((uneven % 4 == 0).sum()) == 25
    # Evenly spaced within a condition.
    assert set(subset[:250].diff().tolist()) == {8}


def test_fewer_generated_than_real_images_are_all_used() -> None:
    assert evaluate._spread(torch.zeros(7).long(), 500).tolist() == list(range(7))


def test_real_training_digits_are_nearly_perfect() -> None:
    """Raw pixels as features: other real images of the same law."""

    class PixelJudge(FirstPixelJudge):
        def __call__(self, images: Tensor) -> Tensor:
            distances = torch.cdist(images.flatten(1), means)
            return -distances

        def features(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    split = load_digits()
    means = torch.stack(
        [split.train.images[split.train.digits == d].mean(0).flatten() for d in range(10)]
    )
    found = evaluate_images(
        PixelJudge(), split.train.images, split.train.parity, split.held_out.images.flatten(1)
    )
    assert found.n == 1297
    assert found.accuracy > 0.9
    assert found.entropy > 2.29
    assert min(found.precision, found.recall, found.coverage) > 0.9


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (8, {}, r"condition must have shape \[9\], one for each image, got \[8\]"),
        (9, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_errors(count: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_images(
            FirstPixelJudge(), images_of(torch.arange(9)), torch.zeros(count).long(), torch.randn(9, 3),
            **options,
        )  # fmt: skip

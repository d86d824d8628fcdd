"""One row of a results table: generated images against real ones, seen by a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from softdimo_fast.data.digits import parity
from softdimo_fast.metrics.diversity import class_entropy
from softdimo_fast.metrics.frechet import frechet_distance
from softdimo_fast.metrics.manifold import manifold_metrics

NEIGHBOURS = 5


class Judge(Protocol):
    """A classifier that no training has seen; `softdimo_fast.models.classifier` has one."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, h, w]``."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors ``[B, F]`` of images ``[B, C, h, w]``."""
        ...


@dataclass(frozen=True)
class ImageMetrics:
    """How generated images compare with real ones.

    Attributes:
        fd: Frechet distance in the judge's features, all generated against all real images.
        accuracy: share of images whose predicted class has the wanted condition.
        precision, recall, coverage: of nearest neighbours (k = 5), between the real images and as many
            generated ones.
        entropy: of the predicted classes' histogram, in nats.
        n: number of generated images.
    """

    fd: float
    accuracy: float
    precision: float
    recall: float
    coverage: float
    entropy: float
    n: int


@torch.no_grad()
def evaluate_images(
    judge: Judge,
    images: Tensor,
    condition: Tensor,
    real_features: Tensor,
    *,
    condition_of: Callable[[Tensor], Tensor] = parity,
    batch_size: int = 1024,
) -> ImageMetrics:
    """Measures ``images``, which were generated for ``condition``.

    Args:
        judge: sees the images in batches, without gradients.
        images: floating ``[N, C, h, w]``, N > 5.
        condition: int64 ``[N]``, what each image should show.
        real_features: floating ``[R, F]``, R > 5: the judge's features of real, held-out images.
        condition_of: the conditions ``[N]`` of predicted classes ``[N]``; default: a digit's parity.
        batch_size: images per call of the judge.

    Returns:
        The metrics. Precision, recall and coverage depend on the sample sizes, so they compare the R real
        images with R generated ones (all, if N <= R), always the same: the images sorted by condition (in
        their given order within one), evenly spaced through that list, so that every condition keeps its
        share even if the conditions alternate.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, there are too few images, or a feature is not
            finite.
    """
    if condition.shape != images.shape[:1]:
        raise ValueError(
            f"evaluate_images: condition must have shape [{len(images)}], one for each image, got "
            f"{list(condition.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"evaluate_images: batch_size must be >= 1, got {batch_size}")
    batches = images.split(batch_size)
    features = torch.cat([judge.features(batch) for batch in batches])
    logits = torch.cat([judge(batch) for batch in batches])
    predicted = logits.argmax(1)
    subset = features[_spread(condition, len(real_features))]
    manifold = manifold_metrics(real_features, subset, NEIGHBOURS)
    return ImageMetrics(
        fd=frechet_distance(features, real_features),
        accuracy=float((condition_of(predicted) == condition).double().mean()),
        precision=manifold.precision,
        recall=manifold.recall,
        coverage=manifold.coverage,
        entropy=class_entropy(predicted, logits.shape[1]),
        n=len(images),
    )


def _spread(condition: Tensor, count: int) -> Tensor:
    """``count`` indices (all, if there are fewer), evenly spaced through a list sorted by condition.

    Evenly spaced through the unsorted list they could all have one condition: every fourth image of
    alternating conditions does.
    """
    order = torch.argsort(condition, stable=True)
    count = min(count, len(order))
    return order[torch.arange(count, device=order.device) * len(order) // max(count, 1)]

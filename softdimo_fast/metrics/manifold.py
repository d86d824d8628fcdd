"""Fidelity and coverage from nearest neighbours: do two sets of features lie in the same places?

Sources: T. Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models"
(NeurIPS 2019); M. F. Naeem et al., "Reliable fidelity and diversity metrics for generative models"
(ICML 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softdimo_fast.metrics._features import require_features

# Distances held at a time: 2^24 float64 values are 128 MiB, whatever the number of samples.
_CHUNK = 2**24


@dataclass(frozen=True)
class ManifoldMetrics:
    """Where B(x) is the closed ball around x that reaches the k-th nearest neighbour in x's own set.

    Attributes:
        precision: share of generated samples that lie in B of some real sample (2019, eq. 2).
        recall: share of real samples that lie in B of some generated sample (2019, eq. 3).
        density: mean over generated samples of (number of real samples whose B holds it) / k; may
            exceed 1 (2020, eq. 4).
        coverage: share of real samples whose B holds a generated sample (2020, eq. 5).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(real: Tensor, generated: Tensor, k: int = 5) -> ManifoldMetrics:
    """Precision, recall, density and coverage of ``generated`` against ``real``.

    Precision and recall grow with the number of real and of generated samples: compare values of equal
    sample sizes only, and prefer N = M.

    Args:
        real: floating ``[N, F]``, N > k.
        generated: floating ``[M, F]``, M > k, on the same device.
        k: which neighbour sets the radius, >= 1; a sample is not its own neighbour.

    Returns:
        The four numbers. Distances are float64 (float32 cancels for near neighbours far from the origin)
        and are computed chunk by chunk: memory grows with N + M, not with N x M.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, k is not positive, a set has no k-th neighbour,
            or a value is not finite.
    """
    if k < 1:
        raise ValueError(f"manifold_metrics: k must be >= 1, got {k}")
    require_features("manifold_metrics", k + 1, real=real, generated=generated)
    # Distances do not depend on the origin; near it they cancel least.
    centre = real.detach().double().mean(0)
    real, generated = real.detach().double() - centre, generated.detach().double() - centre
    real_radius, generated_radius = _squared_radii(real, k), _squared_radii(generated, k)
    hits = torch.zeros(len(generated), dtype=torch.int64, device=generated.device)
    recalled = covered = torch.zeros((), dtype=torch.int64, device=generated.device)
    for rows, distances in _squared_distances(real, generated):
        in_real_ball = distances <= real_radius[rows, None]
        hits += in_real_ball.sum(0)
        covered = covered + in_real_ball.any(1).sum()
        recalled = recalled + (distances <= generated_radius).any(1).sum()
    return ManifoldMetrics(
        precision=float((hits > 0).double().mean()),
        recall=int(recalled) / len(real),
        density=int(hits.sum()) / (k * len(generated)),
        coverage=int(covered) / len(real),
    )


def _squared_radii(samples: Tensor, k: int) -> Tensor:
    """float64 ``[N]``: the squared distance to the k-th nearest other sample."""
    radii = torch.empty(len(samples), dtype=torch.float64, device=samples.device)
    for rows, distances in _squared_distances(samples, samples):
        numbers = torch.arange(rows.start, rows.stop, device=samples.device)
        distances[numbers - rows.start, numbers] = torch.inf
        radii[rows] = distances.topk(k, dim=1, largest=False).values[:, -1]
    return radii


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows of ``x`` with their squared distances to all of ``y``.

    |x|^2 + |y|^2 - 2 x.y, the only form that is fast at 50,000 x 50,000. What it cannot tell from zero, it
    calls zero, so that copies of a sample are at distance 0 (the threshold is 1e-7 of the norm, the
    resolution of float32 features).
    """
    y_norm = y.square().sum(1)
    step = max(1, _CHUNK // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        norm = x[rows].square().sum(1)[:, None] + y_norm
        distances = torch.addmm(norm, x[rows], y.T, alpha=-2)
        yield rows, distances.masked_fill_(distances <= 1e-14 * norm, 0)

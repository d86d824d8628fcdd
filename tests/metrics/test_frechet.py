"""frechet_distance against scipy's matrix square root, against analytic Gaussians, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from softdimo_fast.metrics.frechet import frechet_distance


def by_matrix_root(a: Tensor, b: Tensor) -> float:
    """The formula as Heusel et al. compute it."""
    x, y = a.double().numpy(), b.double().numpy()
    shift = x.mean(0) - y.mean(0)
    cov_x, cov_y = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (x, y))
    root = linalg.sqrtm(cov_x @ cov_y)
    return float(shift @ shift + np.trace(cov_x + cov_y - 2 * root.real))


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_agrees_with_scipy(width: int) -> None:
    a = torch.randn(200, width) @ torch.randn(width, width) + torch.randn(width)
    b = torch.randn(300, width) @ torch.randn(width, width)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def standardised(count: int, width: int) -> Tensor:
    """Samples with mean 0 and covariance I exactly."""
    x = torch.randn(count, width, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


def test_analytic_gaussians() -> None:
    """With covariances diag(s^2), diag(t^2): |mu|^2 + sum (s - t)^2."""
    s, t, mu = (torch.rand(6, dtype=torch.float64) + 0.1 for _ in range(3))
    a, b = standardised(50, 6) * s, standardised(80, 6) * t + mu
    expected = float(mu.square().sum() + (s - t).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_invariances() -> None:
    a, b = torch.randn(100, 5).double(), (torch.randn(90, 5) * 2 + 1).double()
    base = frechet_distance(a, b)
    rotation = torch.linalg.qr(torch.randn(5, 5).double()).Q
    assert frechet_distance(b, a) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(a[torch.randperm(100)], b) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * base, rel=1e-9)


def test_fewer_samples_than_features() -> None:
    """Rank-deficient covariances: no added diagonal, no complex root."""
    a, b = torch.randn(10, 40), torch.randn(12, 40)
    expected = by_matrix_root(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_equal_sets_have_distance_zero() -> None:
    a = torch.randn(50, 8)
    assert 0 <= frechet_distance(a, a.clone()) < 1e-9
    constant = torch.ones(5, 3)
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, constant + 2) == pytest.approx(12)


def test_float32_features_far_from_the_origin_are_computed_in_float64() -> None:
    a, b = torch.randn(300, 4), torch.randn(300, 4) + 1
    far_a, far_b = a.double() + 1e6, b.double() + 1e6
    assert frechet_distance(far_a, far_b) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    half = frechet_distance(a.bfloat16(), b.bfloat16())
    assert half == pytest.approx(frechet_distance(a.bfloat16().float(), b.bfloat16().float()))


def test_agrees_with_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    a, b = torch.randn(200, 6).double(), torch.randn(150, 6).double() * 2
    value = image._compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert frechet_distance(a, b) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(1, 2), ValueError, "b must hold at least 2 samples, got 1"),
        (torch.ones(3), torch.ones(3, 2), ValueError, r"a must have shape \[N, F\].*got \[3\]"),
        (torch.ones(3, 0), torch.ones(3, 0), ValueError, "F >= 1"),
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, r"same width F, got \{'a': 2, 'b': 4\}"),
        (torch.ones(3, 2).long(), torch.ones(3, 2), TypeError, "a must be floating point"),
        (
            torch.ones(3, 2),
            torch.tensor([[1.0, torch.nan], [torch.inf, torch.nan], [0, 0]]),
            ValueError,
            "b has 2 of 3 rows that are not finite",
        ),
    ],
)
def test_errors(a: Tensor, b: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        frechet_distance(a, b)

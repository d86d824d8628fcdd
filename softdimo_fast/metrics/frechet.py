"""The Frechet distance between two sets of features, each taken as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast.metrics._features import require_features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""The squared Frechet (2-Wasserstein) distance of the Gaussians fitted to ``a`` and ``b``.

    :math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})`, the "FID" of
    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium"
    (NeurIPS 2017, eq. 6), there with Inception features; the formula is Dowson and Landau's (1982). The
    trace of the root is a sum of square roots of eigenvalues of a symmetric matrix, so that nothing
    complex appears and rank-deficient covariances need no added diagonal. Covariances are unbiased (N - 1).
    The estimate falls with N and M: compare values of equal sample sizes only.

    Args:
        a: floating ``[N, F]``, N >= 2.
        b: floating ``[M, F]``, M >= 2.

    Returns:
        A number >= 0, computed in float64 on the device of ``a``.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, there are too few samples, or a value is not
            finite.
    """
    require_features("frechet_distance", 2, a=a, b=b)
    a = a.detach().double()
    b = b.detach().to(a)
    mean_a, mean_b = a.mean(0), b.mean(0)
    covariance_a, covariance_b = _covariance(a - mean_a), _covariance(b - mean_b)
    root = _symmetric_root(covariance_a)
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_b @ root)
    # Eigenvalues of semidefinite matrices: what lies below 0 is rounding.
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    shift = (mean_a - mean_b).square().sum()
    distance = shift + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return float(distance.clamp(min=0))


def _covariance(centred: Tensor) -> Tensor:
    return torch.mm(centred.T, centred) / (len(centred) - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The positive semidefinite square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.mm(vectors * values.clamp(min=0).sqrt(), vectors.T)

"""The check that all metrics over feature vectors share."""

from __future__ import annotations

import torch
from torch import Tensor


def require_features(metric: str, samples: int, **features: Tensor) -> None:
    """Each is a finite floating ``[N, F]`` with N >= ``samples``, and all have the same F >= 1.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    for name, value in features.items():
        if not value.is_floating_point():
            raise TypeError(f"{metric}: {name} must be floating point, got {value.dtype}")
        if value.dim() != 2 or value.shape[1] < 1:
            raise ValueError(
                f"{metric}: {name} must have shape [N, F] with F >= 1, got {list(value.shape)}"
            )
        if len(value) < samples:
            raise ValueError(
                f"{metric}: {name} must hold at least {samples} samples, got {len(value)}"
            )
        bad = int((~torch.isfinite(value)).any(dim=1).sum())
        if bad:
            raise ValueError(f"{metric}: {name} has {bad} of {len(value)} rows that are not finite")
    widths = {name: value.shape[1] for name, value in features.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{metric}: the features must have the same width F, got {widths}")

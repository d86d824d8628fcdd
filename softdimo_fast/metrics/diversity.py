"""How evenly generated images spread over the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def class_entropy(classes: Tensor, num_classes: int) -> float:
    """Entropy, in nats, of the histogram of predicted classes.

    log(num_classes) if every class is equally frequent, 0 if only one occurs: the marginal entropy H(y) of
    the Inception Score (Salimans et al., "Improved techniques for training GANs", 2016), taken over hard
    predictions.

    Args:
        classes: int64 ``[N]``, N >= 1, values 0 .. num_classes - 1.
        num_classes: >= 1.

    Raises:
        TypeError, ValueError: a dtype, shape or value is wrong.
    """
    if classes.dtype != torch.int64:
        raise TypeError(f"class_entropy: classes must be int64, got {classes.dtype}")
    if classes.dim() != 1 or len(classes) < 1:
        raise ValueError(
            f"class_entropy: classes must have shape [N] with N >= 1, got {list(classes.shape)}"
        )
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"class_entropy: classes must lie in 0 .. {num_classes - 1}, got {low} .. {high}"
        )
    shares = torch.bincount(classes, minlength=num_classes).double() / len(classes)
    return float(torch.special.entr(shares).sum())

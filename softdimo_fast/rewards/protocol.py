"""What every reward is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Scores images; larger is better."""

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        """The reward of each image.

        Args:
            images: floating ``[B, C, h, w]``, in the decoder's range.
            condition: what each image should show; for class labels int64 ``[B]``.

        Returns:
            ``[B]``, differentiable with respect to ``images``; row b depends on image b alone.
        """
        ...

"""The reward of a classifier: how probable is it that the image shows what was asked for?"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional


class ClassifierReward(nn.Module):
    r"""The log-probability that an image shows a class of the wanted condition.

    :math:`R(x, c) = \log \sum_{d:\, g(d) = c} \mathrm{softmax}(f(x))_d`, at most 0, computed as
    :math:`\log\sigma(\mathrm{lse}_{g(d) = c} f_d - \mathrm{lse}_{g(d) \ne c} f_d)`, which neither
    underflows for hopeless images nor rounds to a positive number for perfect ones.

    The classifier is frozen in place (eval mode, which :meth:`train` keeps; no parameter requires a
    gradient); gradients flow to the images.
    """

    groups: Tensor

    def __init__(self, classifier: nn.Module, groups: Tensor | None, *, num_classes: int = 10):
        """
        Args:
            classifier: images ``[B, C, h, w]`` -> logits ``[B, classes]``.
            groups: int64 ``[classes]``, the condition that each class belongs to (parity:
                ``torch.arange(10) % 2``), at least two different ones; None: a class is its own condition.
            num_classes: number of classes where ``groups`` is None.

        Raises:
            TypeError, ValueError: ``groups`` has the wrong dtype, shape or values.
        """
        super().__init__()
        groups = torch.arange(num_classes) if groups is None else groups
        if groups.dtype != torch.int64:
            raise TypeError(f"ClassifierReward: groups must be int64, got {groups.dtype}")
        if groups.dim() != 1:
            raise ValueError(
                f"ClassifierReward: groups must have shape [classes], got {list(groups.shape)}"
            )
        if len(groups.unique()) < 2:
            raise ValueError(
                "ClassifierReward: groups must hold at least two different conditions (with one the "
                f"reward is constant), got {groups.tolist()}"
            )
        self.classifier = classifier.requires_grad_(False)
        self.register_buffer("groups", groups.clone(), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Keeps the classifier in eval mode, whatever mode a trainer sets."""
        return super().train(False)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """The rewards ``[B]``, float32 (float64) of images ``[B, C, h, w]`` for ``condition`` int64 ``[B]``.

        Raises:
            ValueError: a shape is wrong, or a condition is in no group (on the CPU; on other devices,
                where the check would wait for the device, such a row is NaN).
        """
        logits = self.classifier(images)
        if logits.dim() != 2 or logits.shape[1] != len(self.groups):
            raise ValueError(
                f"ClassifierReward: the classifier must give logits [B, {len(self.groups)}], one for each "
                f"entry of groups, got {list(logits.shape)}"
            )
        if condition.shape != logits.shape[:1]:
            raise ValueError(
                f"ClassifierReward: condition must have shape [{len(logits)}], one for each image, got "
                f"{list(condition.shape)}"
            )
        wanted = self.groups == condition[:, None]
        self._check_condition(condition, wanted)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        inside = logits.masked_fill(~wanted, -torch.inf).logsumexp(1)
        outside = logits.masked_fill(wanted, -torch.inf).logsumexp(1)
        return functional.logsigmoid(inside - outside).where(wanted.any(1), torch.nan)

    def _check_condition(self, condition: Tensor, wanted: Tensor) -> None:
        if condition.device.type != "cpu":
            return
        unknown = condition[~wanted.any(1)]
        if len(unknown):
            raise ValueError(
                f"ClassifierReward: condition {int(unknown[0])} is none of the groups' conditions "
                f"{self.groups.unique().tolist()}"
            )

"""Scikit-learn's bundled digits: 1797 real scans of 8x8 pixels, so that a run needs no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(1998), its test part; https://archive.ics.uci.edu/dataset/80.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 500
NUM_DIGITS = 10


def parity(digits: Tensor) -> Tensor:
    """0 for even digits, 1 for odd ones: the coarse condition, which leaves five digits open."""
    return digits % 2


@dataclass(frozen=True)
class LabelledImages:
    """Images with the digit that each one shows.

    Attributes:
        images: float32 ``[N, 1, 8, 8]`` in [-1, 1]; -1 is the background.
        digits: int64 ``[N]``, 0 .. 9.
    """

    images: Tensor
    digits: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def parity(self) -> Tensor:
        """int64 ``[N]``: the condition of the digits run (see :func:`parity`)."""
        return parity(self.digits)


@dataclass(frozen=True)
class DigitsSplit:
    """The fixed split: ``train`` (1297) and ``held_out`` (500), which nothing is ever trained on."""

    train: LabelledImages
    held_out: LabelledImages


def load_digits() -> DigitsSplit:
    """The digits, split into 1297 images to train on and 500 held out.

    The split never changes and is stratified by digit: it is scikit-learn's
    ``train_test_split(test_size=500, stratify=target, random_state=0)``, in the order that it returns.
    Pixels 0 .. 16 become pixel / 8 - 1.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn, which is missing: pip install "softdimo-fast[demo]"'
        ) from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 8 - 1
    digits = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    parts = model_selection.train_test_split(
        np.arange(len(digits)), test_size=HELD_OUT, stratify=bunch.target, random_state=0
    )
    train, held_out = (
        LabelledImages(images[rows], digits[rows]) for rows in map(torch.from_numpy, parts)
    )
    return DigitsSplit(train, held_out)

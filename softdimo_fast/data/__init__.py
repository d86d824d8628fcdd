"""Images to train on: the bundled digits, augmentation, and the order in which samples are seen.

Importing this package costs torch alone; scikit-learn is imported by :func:`load_digits`.
"""

from softdimo_fast.data.augment import random_affine
from softdimo_fast.data.digits import DigitsSplit, LabelledImages, load_digits, parity
from softdimo_fast.data.order import sample_indices

__all__ = [
    "DigitsSplit",
    "LabelledImages",
    "load_digits",
    "parity",
    "random_affine",
    "sample_indices",
]

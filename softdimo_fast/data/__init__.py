"""What to train on: the bundled digits, token files, prompts, and the order in which samples are seen.

Importing this package costs torch alone; scikit-learn is imported by :func:`load_digits`.
"""

from softdimo_fast.data.augment import random_affine
from softdimo_fast.data.captions import Captions
from softdimo_fast.data.digits import DigitsSplit, LabelledImages, load_digits, parity
from softdimo_fast.data.order import sample_indices
from softdimo_fast.data.prompts import PromptConditions, PromptFile
from softdimo_fast.data.token_file import TokenFile, TokenFileError, TokenFileWriter

__all__ = [
    "Captions",
    "DigitsSplit",
    "LabelledImages",
    "PromptConditions",
    "PromptFile",
    "TokenFile",
    "TokenFileError",
    "TokenFileWriter",
    "load_digits",
    "parity",
    "random_affine",
    "sample_indices",
]

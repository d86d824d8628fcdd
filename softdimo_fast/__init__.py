"""Soft-Di[M]O at memory speed: a one-step generator's token distribution, made differentiable."""

from softdimo_fast._version import __version__
from softdimo_fast.ops import Explanation, explain, soft_embedding

__all__ = ["Explanation", "__version__", "explain", "soft_embedding"]

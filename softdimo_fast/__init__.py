"""Soft-Di[M]O at memory speed: a one-step generator's token distribution, made differentiable."""

from softdimo_fast._version import __version__
from softdimo_fast.ops import (
    Explanation,
    distribution_matching_loss,
    explain,
    linear_soft_embedding,
    masked_attention,
    masked_cross_entropy,
    sample_tokens,
    soft_embedding,
    token_divergence,
    token_statistics,
)

__all__ = [
    "Explanation",
    "__version__",
    "distribution_matching_loss",
    "explain",
    "linear_soft_embedding",
    "masked_attention",
    "masked_cross_entropy",
    "sample_tokens",
    "soft_embedding",
    "token_divergence",
    "token_statistics",
]

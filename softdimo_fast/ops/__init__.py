"""The operators: typed functions over tensors, each in a module of its own name."""

from softdimo_fast.ops._explain import Explanation, explain
from softdimo_fast.ops.distribution_matching_loss import distribution_matching_loss
from softdimo_fast.ops.linear_soft_embedding import linear_soft_embedding
from softdimo_fast.ops.masked_attention import masked_attention
from softdimo_fast.ops.masked_cross_entropy import masked_cross_entropy
from softdimo_fast.ops.sample_tokens import sample_tokens
from softdimo_fast.ops.soft_embedding import soft_embedding
from softdimo_fast.ops.token_divergence import token_divergence
from softdimo_fast.ops.token_statistics import token_statistics

__all__ = [
    "Explanation",
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

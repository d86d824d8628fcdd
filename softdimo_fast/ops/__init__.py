"""The operators: typed functions over tensors, each in a module of its own name."""

from softdimo_fast.ops._explain import Explanation, explain
from softdimo_fast.ops.soft_embedding import soft_embedding

__all__ = ["Explanation", "explain", "soft_embedding"]

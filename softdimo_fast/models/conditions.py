"""What a model is conditioned on: class labels, or a NamedTuple of tensors (text, pooled text, numbers).

Every tensor counts the samples in its first dimension; these functions treat a condition as one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

# int64 labels ``[B]``, or a NamedTuple of tensors ``[B, ...]``.
Condition: TypeAlias = Any


def map_condition(function: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """``function`` on the tensors that stand at the same place of each condition.

    Raises:
        TypeError: a condition is neither a tensor nor a NamedTuple, or they differ in kind.
    """
    first = conditions[0]
    if any(type(condition) is not type(first) for condition in conditions):
        kinds = ", ".join(type(condition).__name__ for condition in conditions)
        raise TypeError(f"conditions must be of one kind, got {kinds}")
    if isinstance(first, Tensor):
        return function(*conditions)
    if not (isinstance(first, tuple) and hasattr(first, "_fields")):
        raise TypeError(
            f"a condition must be a Tensor or a NamedTuple of tensors, got {type(first).__name__}"
        )
    return type(first)(*(function(*tensors) for tensors in zip(*conditions, strict=True)))


def concatenate(*conditions: Condition) -> Condition:
    """One batch after the other."""
    return map_condition(lambda *tensors: torch.cat(tensors), *conditions)


def select(mask: Tensor, condition: Condition, other: Condition) -> Condition:
    """Sample by sample: ``condition`` where ``mask``, bool ``[B]``, is True, else ``other``."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    return map_condition(choose, condition, other)


def rows(condition: Condition, index: Tensor | slice) -> Condition:
    """Some samples."""
    return map_condition(lambda tensor: tensor[index], condition)


def batch_size(condition: Condition) -> int:
    """The number of samples."""
    return len(condition if isinstance(condition, Tensor) else condition[0])

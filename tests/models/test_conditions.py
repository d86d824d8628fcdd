"""Conditions as batches: tensors, and NamedTuples of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from softdimo_fast.models.conditions import batch_size, concatenate, map_condition, rows, select


class Text(NamedTuple):
    tokens: Tensor
    pooled: Tensor


def text(offset: float, count: int = 3) -> Text:
    return Text(torch.full((count, 4, 2), offset), torch.full((count, 5), offset + 0.5))


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    pairs = zip(first, second, strict=True)
    return type(first) is type(second) and all(torch.equal(a, b) for a, b in pairs)


def test_labels() -> None:
    a, b = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    mask = torch.tensor([True, False, True])
    assert same(concatenate(a, b), torch.tensor([0, 1, 2, 5, 6, 7]))
    assert same(select(mask, a, b), torch.tensor([0, 6, 2]))
    assert same(rows(a, slice(1, 3)), torch.tensor([1, 2]))
    assert batch_size(a) == 3


def test_named_tuples() -> None:
    a, b = text(0.0), text(1.0)
    mask = torch.tensor([True, False, True])
    both = concatenate(a, b)
    assert isinstance(both, Text)
    assert batch_size(both) == 6
    assert same(rows(both, slice(0, 3)), a)
    assert same(rows(both, torch.tensor([3, 4, 5])), b)
    chosen = select(mask, a, b)
    assert chosen.tokens[:, 0, 0].tolist() == [0, 1, 0]
    assert chosen.pooled[:, 0].tolist() == [0.5, 1.5, 0.5]
    assert same(map_condition(lambda t: t.double(), a).pooled, a.pooled.double())


@pytest.mark.parametrize("wrong", [(text(0.0), torch.zeros(3)), (("a", "b"),), ([torch.zeros(3)],)])
def test_what_is_no_condition(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="condition"):
        concatenate(*wrong)

"""class_entropy: known histograms and refused arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softdimo_fast.metrics.diversity import class_entropy


def test_known_histograms() -> None:
    assert class_entropy(torch.arange(10).repeat(7), 10) == pytest.approx(math.log(10))
    assert class_entropy(torch.full((5,), 3), 10) == 0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert class_entropy(torch.tensor([0, 4, 0, 0]), 5) == pytest.approx(expected)


def test_the_order_and_the_names_of_classes_do_not_matter() -> None:
    classes = torch.randint(0, 6, (100,))
    base = class_entropy(classes, 6)
    assert class_entropy(classes.flip(0), 6) == base
    assert class_entropy(5 - classes, 6) == pytest.approx(base)
    assert class_entropy(classes, 60) == pytest.approx(base)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (torch.zeros(3), TypeError, "classes must be int64, got torch.float32"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"\[N\] with N >= 1, got \[0\]"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"got \[2, 2\]"),
        (torch.tensor([0, 4]), ValueError, r"must lie in 0 .. 3, got 0 .. 4"),
        (torch.tensor([-1, 2]), ValueError, r"got -1 .. 2"),
    ],
)
def test_errors(classes: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        class_entropy(classes, 4)

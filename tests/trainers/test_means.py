"""Means of logged scalars: micro-batches sum, steps average, an interval survives a checkpoint."""

from __future__ import annotations

import torch

from softdimo_fast.trainers.means import Means


def test_micro_batches_sum_and_steps_average() -> None:
    means = Means()
    for values in [(1.0, 2.0), (3.0, 4.0), (5.0, 0.0)]:
        for value in values:
            means.add({"a": torch.tensor(value)})
        means.end_step()
    scalars, others = means.read(torch.tensor(7.0), torch.tensor(-1.0))
    assert scalars == {"a": 5.0}
    assert others == [7.0, -1.0]


def test_a_scalar_counts_the_steps_that_had_it() -> None:
    means = Means()
    for step in range(4):
        means.add({"always": torch.tensor(1.0)})
        if step >= 2:
            means.add({"late": torch.tensor(float(step))})
        means.end_step()
    assert means.read()[0] == {"always": 1.0, "late": 2.5}


def test_reading_starts_again() -> None:
    means = Means()
    for value in (1.0, 9.0):
        means.add({"a": torch.tensor(value, dtype=torch.float64, requires_grad=True)})
        means.end_step()
        assert means.read()[0] == {"a": value}
    assert means.read(torch.tensor(2.0)) == ({}, [2.0])


def test_state() -> None:
    means, other = Means(), Means()
    for step in range(5):
        means.add({"a": torch.tensor(0.1 * step), "b": torch.tensor(float(step))})
        means.end_step()
        if step == 2:
            other.restore(*means.state())
    for step in (3, 4):
        other.add({"a": torch.tensor(0.1 * step), "b": torch.tensor(float(step))})
        other.end_step()
    assert means.read() == other.read()

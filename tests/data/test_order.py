"""sample_indices: epochs of permutations, however the stream is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softdimo_fast.data import order
from softdimo_fast.data.order import sample_indices


def test_every_epoch_visits_each_index_once_in_another_order() -> None:
    stream = sample_indices(0, 0, 5 * 97, 97).reshape(5, 97)
    assert stream.dtype == torch.int64
    for epoch in stream:
        assert torch.equal(epoch.sort().values, torch.arange(97))
    assert len(stream.unique(dim=0)) == 5


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    size=st.integers(1, 40),
    first=st.integers(0, 200),
    cuts=st.lists(st.integers(0, 50), max_size=8),
)
def test_any_cut_gives_the_same_stream(seed: int, size: int, first: int, cuts: list[int]) -> None:
    whole = sample_indices(seed, first, sum(cuts), size)
    starts = [first + sum(cuts[:i]) for i in range(len(cuts))]
    parts = [sample_indices(seed, s, c, size) for s, c in zip(starts, cuts, strict=True)]
    assert torch.equal(whole, torch.cat([whole[:0], *parts]))
    assert torch.equal(whole, sample_indices(seed, 0, first + sum(cuts), size)[first:])


def test_the_seed_decides() -> None:
    assert torch.equal(sample_indices(7, 3, 50, 60), sample_indices(7, 3, 50, 60))
    assert not torch.equal(sample_indices(7, 3, 50, 60), sample_indices(8, 3, 50, 60))


def test_far_into_the_stream() -> None:
    epoch = 2**31
    assert sorted(sample_indices(0, epoch * 10, 10, 10).tolist()) == list(range(10))


def test_permutations_are_uniform() -> None:
    """All 24 orders of 4 indices occur equally often: chi-squared with 23 degrees of freedom."""
    orders = sample_indices(5, 0, 4 * 4800, 4).reshape(-1, 4)
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24
    # 49.7 is the 0.1 % point; the seed is fixed.
    assert float(((counts - 200.0) ** 2 / 200).sum()) < 49.7


def test_a_caller_cannot_change_the_cached_permutation() -> None:
    first = sample_indices(0, 0, 20, 20)
    kept = first.clone()
    first.fill_(-1)
    assert torch.equal(sample_indices(0, 0, 20, 20), kept)


def test_one_epoch_computes_one_permutation() -> None:
    order._permutation.cache_clear()
    for batch in range(10):
        sample_indices(0, batch * 10, 10, 100)
    assert order._permutation.cache_info().misses == 1


def test_global_generator_is_left_alone() -> None:
    order._permutation.cache_clear()
    state = torch.get_rng_state()
    sample_indices(0, 0, 10, 10)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, -1, 5, 10), "first must be >= 0, got -1"),
        ((0, 0, -5, 10), "count must be >= 0, got -5"),
        ((0, 0, 5, 0), "size must be >= 1, got 0"),
    ],
)
def test_errors(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_indices(*arguments)

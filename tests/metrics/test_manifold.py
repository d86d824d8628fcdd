"""manifold_metrics against a brute-force version, against known cases, in chunks and far from the origin."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softdimo_fast.metrics import manifold
from softdimo_fast.metrics.manifold import ManifoldMetrics, manifold_metrics


def brute_force(real: Tensor, generated: Tensor, k: int) -> ManifoldMetrics:
    """One pair at a time, from the definitions."""

    def radius(points: list[list[float]], i: int) -> float:
        others = [math.dist(points[i], p) for j, p in enumerate(points) if j != i]
        return sorted(others)[k - 1]

    xs, ys = real.double().tolist(), generated.double().tolist()
    x_radius = [radius(xs, i) for i in range(len(xs))]
    y_radius = [radius(ys, j) for j in range(len(ys))]
    inside = [[math.dist(x, y) <= r for y in ys] for x, r in zip(xs, x_radius, strict=True)]
    recalled = [any(math.dist(x, y) <= r for y, r in zip(ys, y_radius, strict=True)) for x in xs]
    return ManifoldMetrics(
        precision=sum(any(row[j] for row in inside) for j in range(len(ys))) / len(ys),
        recall=sum(recalled) / len(xs),
        density=sum(map(sum, inside)) / (k * len(ys)),
        coverage=sum(map(any, inside)) / len(xs),
    )


@given(
    counts=st.tuples(st.integers(7, 40), st.integers(7, 40)),
    width=st.integers(1, 40),
    k=st.integers(1, 6),
    shift=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_brute_force(
    counts: tuple[int, int], width: int, k: int, shift: float, seed: int
) -> None:
    torch.manual_seed(seed)
    real, generated = torch.randn(counts[0], width), torch.randn(counts[1], width) + shift
    found, expected = manifold_metrics(real, generated, k), brute_force(real, generated, k)
    assert astuple(found) == pytest.approx(astuple(expected))


def test_same_law_and_disjoint_sets() -> None:
    real, generated = torch.randn(500, 4), torch.randn(500, 4)
    found = manifold_metrics(real, generated)
    assert found.precision > 0.9
    assert found.recall > 0.9
    assert found.density == pytest.approx(1, abs=0.1)
    # Naeem et al. 2020, eq. 9: 1 - (M-1)...(M-k) / (2M-1)...(2M-k) for equal laws and sizes.
    expected = 1 - math.prod((500 - i) / (1000 - i) for i in range(1, 6))
    assert found.coverage == pytest.approx(expected, abs=0.03)
    assert manifold_metrics(real, generated + 100) == ManifoldMetrics(0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_and_covers_nothing() -> None:
    real = torch.randn(300, 2)
    generated = real[:1] + 1e-4 * torch.randn(300, 2)
    found = manifold_metrics(real, generated)
    assert found.precision == 1
    assert found.recall < 0.02
    assert found.coverage < 0.05


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    real, generated = torch.randn(60, 3), torch.randn(80, 3) * 1.5
    one, two = manifold_metrics(real, generated), manifold_metrics(generated, real)
    assert (one.precision, one.recall) == (two.recall, two.precision)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = torch.randn(61, 6), torch.randn(47, 6) + 0.3
    whole = manifold_metrics(real, generated)
    for chunk in (1, 47, 200, 1000):
        monkeypatch.setattr(manifold, "_CHUNK", chunk)
        assert manifold_metrics(real, generated) == whole


def test_no_distance_matrix_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_CHUNK", 500)
    real, generated = torch.randn(70, 3), torch.randn(90, 3)
    for x, y in ((real, generated), (generated, generated)):
        sizes = [d.numel() for _, d in manifold._squared_distances(x.double(), y.double())]
        assert max(sizes) <= 500
        assert sum(sizes) == len(x) * len(y)


def test_copies_are_at_distance_zero_even_far_from_the_origin() -> None:
    """Radius 0: every point has copies enough. Closed balls hold the point itself."""
    real = (torch.randn(5, 30) * 3 + 1000).repeat_interleave(4, 0)
    assert manifold_metrics(real, real.clone(), 3) == ManifoldMetrics(1, 1, 4 / 3, 1)
    far = real + 0.5
    assert manifold_metrics(real, far, 3) == ManifoldMetrics(0, 0, 0, 0)


def test_rounding_is_called_zero_and_nothing_else_is() -> None:
    """Norms and products sum in different orders: without a threshold copies are not at distance 0."""
    x = torch.randn(50, 333).double() * 10
    y = torch.cat([x, x * (1 + 1e-5)])
    distances = torch.cat([d for _, d in manifold._squared_distances(x, y)])
    assert float(distances[:, :50].diagonal().abs().max()) == 0
    exact = (1e-5 * x).square().sum(1)
    torch.testing.assert_close(distances[:, 50:].diagonal(), exact, rtol=1e-3, atol=0)


def test_the_origin_does_not_matter() -> None:
    real, generated = torch.randn(80, 8).double(), torch.randn(80, 8).double() + 0.5
    near = manifold_metrics(real, generated)
    assert manifold_metrics(real + 1e6, generated + 1e6) == near


@pytest.mark.parametrize(
    ("real", "generated", "k", "error", "message"),
    [
        (torch.ones(9, 2), torch.ones(9, 2), 0, ValueError, "k must be >= 1, got 0"),
        (torch.ones(5, 2), torch.ones(9, 2), 5, ValueError, "real must hold at least 6 samples"),
        (torch.ones(9, 2), torch.ones(9, 3), 5, ValueError, "same width F"),
        (torch.ones(9, 2), torch.ones(9, 2).int(), 5, TypeError, "generated must be floating"),
        (torch.ones(9, 2), torch.full((9, 2), torch.nan), 5, ValueError, "9 of 9 rows"),
    ],
)
def test_errors(
    real: Tensor, generated: Tensor, k: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        manifold_metrics(real, generated, k)

"""Random numbers that are a function of seed, stream, step and sample, and of nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

from softdimo_fast.diffusion import Draws
from softdimo_fast.diffusion.draws import send

KINDS = ("uniform", "normal", "integers")


def draw(draws: Draws, kind: str, stream: str = "a", shape: tuple[int, ...] = (3, 5)) -> Tensor:
    if kind == "integers":
        return draws.integers(stream, 1000, *shape)
    return getattr(draws, kind)(stream, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_coordinate_changes_every_number(kind: str) -> None:
    base = draw(Draws.of(1, 2, 64), kind)
    assert base.shape == (64, 3, 5)
    torch.manual_seed(99)  # torch's generator takes no part
    assert_same_bits(base, draw(Draws.of(1, 2, 64), kind))
    others = [
        draw(Draws.of(2, 2, 64), kind),
        draw(Draws.of(1, 3, 64), kind),
        draw(Draws.of(1, 2, 64, first=64), kind),
        draw(Draws.of(1, 2, 64), kind, stream="b"),
        draw(Draws.of(1, 2, 64).fork("a"), kind),
    ]
    for other in others:
        # Of 960 numbers out of 1000 about one is equal by chance.
        assert (other == base).float().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_no_draw_depends_on_the_cut_of_the_batch(kind: str) -> None:
    whole = Draws.of(3, 7, 10)
    parts = [whole.part(0, 4), whole.part(4, 1), whole.part(5, 99)]
    assert [len(part) for part in parts] == [4, 1, 5]
    assert [part.first for part in parts] == [0, 4, 5]
    assert_same_bits(draw(whole, kind), torch.cat([draw(part, kind) for part in parts]))
    forked = torch.cat([draw(part.fork("x"), kind) for part in parts])
    assert_same_bits(draw(whole.fork("x"), kind), forked)
    assert_same_bits(draw(whole, kind)[6:7], draw(Draws.of(3, 7, 1, first=6), kind))


def test_row_ids_and_keys() -> None:
    whole = Draws.of(3, 7, 6)
    part = whole.part(2, 3)
    assert part.row_ids(4).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert part.key("a").dtype == torch.int64
    assert part.key("a").tolist() == whole.key("a").tolist()
    assert whole.key("a")[1] == 7
    assert whole.key("a")[0] != whole.key("b")[0]
    assert whole.fork("x").key("a")[0] != whole.key("a")[0]
    assert whole.fork("x").fork("y").key("a")[0] != whole.fork("y").fork("x").key("a")[0]


def test_uniform_is_uniform_on_the_open_interval() -> None:
    u = Draws.of(0, 0, 4000).uniform("u", 50).double()
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001.
    ordered = u.flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert float((ordered - steps).abs().max()) < 1.95 / math.sqrt(len(ordered))
    # Neither the numbers of a sample nor neighbouring samples and steps are correlated.
    centred = (u - 0.5) * math.sqrt(12)
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) < 4 / math.sqrt(4000)
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 / math.sqrt(200_000)
    later = (Draws.of(0, 1, 4000).uniform("u", 50).double() - 0.5) * math.sqrt(12)
    assert abs(float((centred * later).mean())) < 4 / math.sqrt(200_000)


def test_normal_has_the_moments_of_a_normal_law() -> None:
    x = Draws.of(0, 0, 4001).normal("n", 7, 7).double()  # 49 numbers a sample: an odd count
    n = x.numel()
    # Standard errors of the first four moments: 1, sqrt 2, sqrt 15, sqrt 96, over sqrt n.
    for power, (mean, deviation) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(float((x**power).mean()) - mean) < 4 * math.sqrt(deviation / n), power
    # cos and sin of one angle are the pair of Box and Muller: uncorrelated.
    flat = x.flatten(1)
    assert abs(float((flat[:, 0] * flat[:, 1]).mean())) < 4 / math.sqrt(len(x))
    assert bool(x.isfinite().all())


def test_integers_are_uniform() -> None:
    high = 10
    values = Draws.of(0, 0, 2000).integers("i", high, 20)
    assert values.dtype == torch.int64
    counts = values.flatten().bincount(minlength=high).double()
    assert len(counts) == high
    expected = values.numel() / high
    # Chi-square with 9 degrees of freedom exceeds 27.9 with probability 0.001.
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9


def test_shapes_without_numbers() -> None:
    draws = Draws.of(0, 0, 3)
    assert draws.uniform("u").shape == (3,)
    assert draws.integers("i", 4).shape == (3,)
    assert Draws.of(0, 0, 0).uniform("u", 4).shape == (0, 4)
    assert Draws.of(0, 0, 0).normal("u", 3).shape == (0, 3)


def test_what_is_sent_to_a_gpu_is_pinned_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((*args, options))
        return tensor

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "pin_memory", pin_memory)
        patched.setattr(Tensor, "to", to)
        for device in (torch.device("cuda"), torch.device("cpu")):
            send(torch.arange(3), device)
    gpu, cpu = ((torch.device(name), {"non_blocking": True}) for name in ("cuda", "cpu"))
    assert calls == ["pinned", gpu, cpu]

"""Philox4x32-10, the uniform numbers made of it, and the Gumbel noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softdimo_fast.ops.reference import random

# Known answers published with Random123: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def words(values: list[int]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers, which cannot overflow."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & mask,
            (first >> 32) ^ c3 ^ k1,
            first & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    found = random.philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word) for word in found] == expected
    assert philox(counter, key) == expected


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("offset", [0, 3, 2**32 + 5, 2**62])
def test_uniform_follows_its_counter(seed: int, offset: int) -> None:
    """Word v % 4 of the block (row low, row high, v // 4, offset) under the 64-bit seed as key."""
    rows = torch.tensor([0, 5, 2**32 + 9, -1])
    found = random.uniform(torch.tensor([seed, offset]), rows, 7)
    assert found.shape == (4, 7)
    assert found.dtype == torch.float32
    mask = 0xFFFFFFFF
    for n, row in enumerate(rows.tolist()):
        for v in range(7):
            counter = [row & mask, (row >> 32) & mask, v // 4, offset & mask]
            word = philox(counter, [seed & mask, (seed >> 32) & mask])[v % 4]
            exact = torch.tensor(word).float() + 0.5
            assert float(found[n, v]) == min(float(exact * 2.0**-32), 1 - 2.0**-24)


@pytest.mark.parametrize("word", [0, 1, 0x7FFFFFFF, 0xFFFFFF7F, 0xFFFFFFFE, 0xFFFFFFFF])
def test_uniform_is_open_at_extreme_words(monkeypatch: pytest.MonkeyPatch, word: int) -> None:
    """Neither 0 nor 1 for any word, so the noise is finite; near 0 the word is kept exactly."""
    monkeypatch.setattr(
        random,
        "philox4x32",
        lambda counter, key: [torch.full_like(counter[0] + counter[2], word)] * 4,
    )
    seed, rows = torch.tensor([0, 0]), torch.tensor([0])
    u = random.uniform(seed, rows, 4)
    assert bool((u > 0).all())
    assert bool((u < 1).all())
    if word < 2**20:
        assert float(u[0, 0]) == (word + 0.5) / 2**32
    for dtype in (torch.float32, torch.float64):
        noise = random.gumbel(seed, rows, 4, dtype)
        assert bool(noise.isfinite().all())
        expected = -math.log(-math.log1p(-float(u[0, 0])))
        assert float(noise[0, 0]) == pytest.approx(expected, rel=1e-6)


def test_gumbel_moments() -> None:
    """Mean = Euler's constant, variance = pi^2 / 6, to 5 standard errors."""
    noise = random.gumbel(torch.tensor([3, 0]), torch.arange(64), 4096, torch.float64)
    count = noise.numel()
    variance = math.pi**2 / 6
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.sqrt(variance / count)
    # The fourth central moment of the law is 27/5 of the squared variance.
    assert abs(float(noise.var()) - variance) < 5 * variance * math.sqrt(4.4 / count)


def test_default_row_ids_number_the_rows() -> None:
    found = random.default_row_ids(None, torch.Size([2, 3]), torch.device("cpu"))
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert random.default_row_ids(found, torch.Size([2, 3]), torch.device("cpu")) is found

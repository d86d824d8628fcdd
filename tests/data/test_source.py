"""Samples for the methods: every epoch shows each once, however the steps are cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

from softdimo_fast.data.augment import random_affine
from softdimo_fast.data.source import ImageSource, TokenSource, UniformConditions
from softdimo_fast.diffusion import Draws

SIZE, BATCH = 20, 8


def token_source() -> TokenSource:
    tokens = torch.arange(SIZE)[:, None].expand(-1, 3).contiguous()
    return TokenSource(tokens, torch.arange(SIZE) % 2, BATCH)


def image_source() -> ImageSource:
    images = torch.linspace(-1, 1, SIZE)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return ImageSource(images, torch.arange(SIZE), BATCH)


def test_an_epoch_shows_every_sample_once() -> None:
    source = token_source()
    seen: list[Tensor] = []
    for step in range(5):  # 40 samples: two epochs, the second beginning within a step
        tokens, conditions = source(Draws.of(3, step, BATCH))
        assert torch.equal(conditions, tokens[:, 0] % 2)
        seen.append(tokens[:, 0])
    order = torch.cat(seen).tolist()
    assert sorted(order[:SIZE]) == sorted(order[SIZE:]) == list(range(SIZE))
    assert order[:SIZE] != order[SIZE:]


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_no_sample_depends_on_the_cut_of_the_batch(cut: int) -> None:
    whole = Draws.of(3, 2, BATCH)
    parts = [whole.part(first, cut) for first in range(0, BATCH, cut)]
    for source in (token_source(), image_source()):
        together = source(whole)
        apart = [torch.cat(values) for values in zip(*(source(p) for p in parts), strict=True)]
        for a, b in zip(together, apart, strict=True):
            assert_same_bits(a, b)


def test_images_are_augmented_by_their_own_numbers() -> None:
    source, draws = image_source(), Draws.of(3, 2, BATCH)
    images, labels = source(draws)
    assert_same_bits(images, random_affine(source.images[labels], draws))


def test_another_seed_is_another_order() -> None:
    first, second = (token_source()(Draws.of(seed, 0, BATCH))[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_batch_size_that_is_not_the_trainers() -> None:
    with pytest.raises(ValueError, match="batch_size is 8, but a step has at least 9 samples"):
        token_source()(Draws.of(0, 0, 9))
    whole = Draws.of(0, 0, 16)
    token_source()(whole.part(0, 8))
    with pytest.raises(ValueError, match="must be the trainer's"):
        token_source()(whole.part(8, 8))


def test_uniform_conditions() -> None:
    conditions = UniformConditions(3)(Draws.of(0, 0, 3000))
    assert conditions.shape == (3000,)
    counts = conditions.bincount(minlength=3).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 13.8  # chi-square, 2 degrees, 0.001


def test_to() -> None:
    moved = token_source().to(torch.device("cpu"))
    assert moved.batch_size == BATCH
    assert torch.equal(moved.tokens, token_source().tokens)

"""The VQ autoencoder's losses, and its codebook: start, exponential averages, revival, no NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.training import BATCH, FAST, images, micro_batch, tokenizer, trainer
from torch import Tensor
from torch.nn import functional

from softdimo_fast.data.source import ImageSource
from softdimo_fast.diffusion import Draws
from softdimo_fast.trainers import MicroBatch, Phase, TokenizerConfig, TokenizerMethod

PHASE = Phase("tokenizer")


def method(images_of: Any = None, **options: Any) -> TokenizerMethod:
    source = images_of or ImageSource(*images(), BATCH)
    config = TokenizerConfig(**{"start_step": 2, "revive_every": 100, "optimizer": FAST} | options)
    return TokenizerMethod(tokenizer(), source, config)


def finished(method: TokenizerMethod, step: int) -> Tensor:
    """Runs ``finish_step`` of a step whose encoder vectors are returned, ``[B L, D]``."""
    batch = micro_batch(step=step)
    method.loss(PHASE, batch)
    vectors: Tensor = batch.memory["vectors"].flatten(0, 1)
    method.finish_step(step, [batch])
    return vectors


def test_losses_before_and_after_the_start() -> None:
    run, batch = method(), micro_batch(step=1)
    vq, (pictures, _) = run.tokenizer, run.images(batch.draws)
    vectors = vq.encode_vectors(pictures)
    expected = functional.mse_loss(vq.decode_codes(vectors), pictures)
    torch.testing.assert_close(run.loss(PHASE, batch).value, expected)

    batch = micro_batch(step=2)
    pictures, _ = run.images(batch.draws)
    vectors = vq.encode_vectors(pictures)
    codes = vq.codebook[vq.encode(pictures)]
    straight_through = vectors + (codes - vectors).detach()
    reconstruction = functional.mse_loss(vq.decode_codes(straight_through), pictures)
    commitment = functional.mse_loss(vectors, codes)
    loss = run.loss(PHASE, batch)
    torch.testing.assert_close(loss.value, reconstruction + 0.25 * commitment)
    torch.testing.assert_close(loss.metrics["commitment"], commitment.detach())
    # The value decodes the codes; the gradient reaches the encoder all the same.
    torch.testing.assert_close(
        reconstruction, functional.mse_loss(vq.decode(vq.encode(pictures)), pictures)
    )
    loss.value.backward()
    assert all(p.grad is not None for p in vq.parameters())


def test_the_codebook_starts_on_encoder_vectors() -> None:
    run = method()
    before = run.tokenizer.codes.clone()
    finished(run, 0)
    assert_same_bits(run.tokenizer.codes, before)
    vectors = finished(run, 1)
    codes = run.tokenizer.codes
    rows = [int((vectors == code).all(1).nonzero()[0, 0]) for code in codes]
    assert len(set(rows)) == len(codes)  # without repetition
    assert_same_bits(run.tokenizer.totals, codes)
    assert run.tokenizer.usage.tolist() == [1.0] * 8


def test_fewer_vectors_than_codes() -> None:
    run = method()
    draws = Draws.of(0, 1, 1)
    batch = MicroBatch(draws, draws)
    run.loss(PHASE, batch)
    run.finish_step(1, [batch])
    vectors = batch.memory["vectors"][0]
    assert len(vectors) == 4
    assert bool((run.tokenizer.codes[:, None] == vectors).all(-1).any(1).all())


def test_the_codebook_follows_by_exponential_averages() -> None:
    run = method(codebook_decay=0.8)
    finished(run, 1)
    vq = run.tokenizer
    usage, totals = vq.usage.clone(), vq.totals.clone()
    batch = micro_batch(step=2)
    run.loss(PHASE, batch)
    vectors = batch.memory["vectors"].flatten(0, 1)
    chosen = vq.nearest(vectors)
    run.finish_step(2, [batch])
    for code in range(8):
        mine = vectors[chosen == code]
        usage[code] = 0.8 * usage[code] + 0.2 * len(mine)
        totals[code] = 0.8 * totals[code] + 0.2 * mine.sum(0)
    torch.testing.assert_close(vq.usage, usage)
    torch.testing.assert_close(vq.totals, totals)
    torch.testing.assert_close(vq.codes, totals / usage[:, None], atol=1e-4, rtol=1e-4)


def test_unused_codes_come_back_onto_encoder_vectors() -> None:
    run = method(revive_every=2, revive_until=6, revive_below=0.5, codebook_decay=1.0)
    finished(run, 1)
    vq = run.tokenizer

    def kill() -> None:
        vq.usage.copy_(torch.tensor([10.0, 10, 10, 10, 10, 10, 0.1, 0.1]))
        vq.codes[6:] = 100.0
        vq.totals.copy_(vq.codes * vq.usage[:, None])

    for step, revived in [(2, True), (3, False), (4, True), (6, False)]:
        kill()
        vectors = finished(run, step)
        back = (vq.codes[6:, None] == vectors).all(-1).any(1)
        assert back.tolist() == [revived] * 2, step
        if revived:
            # Enough usage to survive until the next look, and totals that agree with it.
            torch.testing.assert_close(vq.usage[6:], torch.full((2,), 0.3 * 60.2 / 8))
            torch.testing.assert_close(vq.totals[6:], vq.codes[6:] * vq.usage[6:, None])
        assert vq.usage[:6].tolist() == [10.0] * 6


@pytest.mark.parametrize("bad_step", [1, 2, 4])
def test_no_nan_enters_the_codebook(bad_step: int) -> None:
    """At its start, on its way and where codes are revived."""
    source = ImageSource(*images(), BATCH)

    def poisoned(draws: Draws) -> tuple[Tensor, Tensor]:
        pictures, labels = source(draws)
        return pictures * (torch.nan if draws.step == bad_step else 1.0), labels

    options = {"revive_every": 2, "revive_below": 0.9, "codebook_decay": 0.3}
    run = trainer(method(poisoned, **options), steps=8, nan_policy="skip")
    vq: Any = run.method.roles["tokenizer"]
    while run.step < 8:
        before = vq.codes.clone()
        run.train_step()
        if run.step == bad_step + 1:
            torch.testing.assert_close(vq.codes, before, atol=1e-4, rtol=1e-4)
    for name, value in vq.state_dict().items():
        assert bool(value.isfinite().all()), name
    assert bool(vq.usage.gt(0).all())


def test_perplexity() -> None:
    run = method()
    batch = micro_batch(step=1)
    run.loss(PHASE, batch)
    metrics = run.finish_step(1, [batch])
    assert float(metrics["codebook/perplexity"]) == pytest.approx(8, rel=1e-5)  # all used alike
    early = micro_batch(step=0)
    run.loss(PHASE, early)
    assert run.finish_step(0, [early]) == {}


def test_it_learns() -> None:
    run = trainer(
        method(start_step=20, revive_every=10), steps=80, log_every=1000, checkpoint_every=1000
    )
    run.run()
    vq, (pictures, _) = run.method.roles["tokenizer"], images()
    error = functional.mse_loss(vq.decode(vq.encode(pictures)), pictures)
    assert float(error.detach()) < 0.35 * float(pictures.var())

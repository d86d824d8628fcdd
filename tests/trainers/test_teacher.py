"""The teacher's loss: cross-entropy at the [MASK] positions of the whole step."""

from __future__ import annotations

import pytest
import torch
from support.training import FAMILIES, FAST, micro_batch, token_source, trainer, transformer
from torch import Tensor
from torch.nn import functional

from softdimo_fast.data.source import TokenSource
from softdimo_fast.diffusion import (
    Draws,
    draw_mask,
    draw_masked_count,
    mask_ratio,
    masked_count,
)
from softdimo_fast.trainers import Method, MicroBatch, Phase, TeacherConfig, TeacherMethod

TEACHER = Phase("teacher")


def method(family: str = "token", **options: object) -> TeacherMethod:
    config = TeacherConfig(**{"optimizer": FAST} | options)  # type: ignore[arg-type]
    return TeacherMethod(transformer(family), token_source(family), config)


def loss(method: Method, batch: MicroBatch) -> Tensor:
    return method.loss(TEACHER, batch).value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_over_the_masked_positions(family: str, smoothing: float) -> None:
    teacher, batch = method(family, condition_drop=0.0, label_smoothing=smoothing), micro_batch()
    model = teacher.teacher
    tokens, condition = teacher.tokens(batch.draws)
    mask = draw_mask(batch.draws, "teacher", "arccos", model.token_shape).mask
    logits = model.logits(model.embed(torch.where(mask, model.mask_id, tokens)), condition)
    expected = functional.cross_entropy(logits[mask], tokens[mask], label_smoothing=smoothing)
    torch.testing.assert_close(loss(teacher, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_known_without_the_mask(family: str) -> None:
    shape, draws = transformer(family).token_shape, Draws.of(1, 2, 300)
    for schedule in ("arccos", "mage"):
        mask = draw_mask(draws, "s", schedule, shape).mask  # type: ignore[arg-type]
        counts = mask.flatten(1).sum(1)
        positions = mask[0].numel()
        assert torch.equal(counts, draw_masked_count(draws, "s", schedule, positions))  # type: ignore[arg-type]
        r = draws.uniform("s/ratio", 1)[:, 0]
        assert torch.equal(counts, masked_count(mask_ratio(schedule, r), positions))  # type: ignore[arg-type]
        assert int(counts.min()) >= 1


def test_dropped_conditions_train_the_unconditional_branch() -> None:
    """Nobody sees a condition at drop 1; the stated share of samples drops it in between."""
    always, never, batch = method(condition_drop=1.0), method(condition_drop=0.0), micro_batch()
    tokens, condition = always.tokens(batch.draws)
    none = always.teacher.unconditional(condition)
    blind = TeacherMethod(
        transformer(), lambda draws: (tokens, none), TeacherConfig(condition_drop=0.0)
    )
    torch.testing.assert_close(loss(always, batch), loss(blind, batch))
    assert not torch.allclose(loss(always, batch), loss(never, batch))
    some = method(condition_drop=0.3)
    seen: list[Tensor] = []
    source = TokenSource(
        torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2000
    )
    some.tokens = source
    with some.teacher.class_embedding.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    ):
        loss(some, micro_batch(count=2000))
    assert float((seen[0] == 2).float().mean()) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns(family: str) -> None:
    run = trainer(method(family), steps=60, log_every=1000, checkpoint_every=1000)
    batch = micro_batch(seed=9)
    before = float(loss(run.method, batch).detach())
    run.run()
    assert float(loss(run.method, batch).detach()) < 0.7 * before

"""Confidence-based decoding of a teacher, and the one step of a generator."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import families
from support.checks import assert_same_bits
from support.training import FAMILIES, FAST, LENGTH, VOCABULARY, tokenizer, trainer, transformer
from torch import Tensor

from softdimo_fast import sample_tokens
from softdimo_fast.data.source import TokenSource
from softdimo_fast.diffusion import (
    ConfidenceSamplerConfig,
    Draws,
    MaskBitSamplerConfig,
    MaskGenSamplerConfig,
    MaskGitSamplerConfig,
    MeissonicSamplerConfig,
    OneStepConfig,
    confidence_sample,
    decode_logits,
    draw_tokens,
    one_step_logits,
    one_step_sample,
)
from softdimo_fast.diffusion.samplers import masked_after
from softdimo_fast.trainers import TeacherConfig, TeacherMethod

ONE_STEP = OneStepConfig(initial_ratio=(0.2, 0.9), sigma=0.3)


def conditions(draws: Draws) -> Tensor:
    return draws.integers("condition", 2)


def passes(
    model: Any, draws: Draws, config: ConfidenceSamplerConfig
) -> tuple[Tensor, list[Tensor]]:
    """The sample, and the tokens that each pass saw."""
    seen: list[Tensor] = []
    with model.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        tokens = confidence_sample(model, conditions(draws), draws, config)
    return tokens, seen


@pytest.mark.parametrize("positions", [1, 4, 16, 100])
@pytest.mark.parametrize("steps", [1, 2, 4, 16, 50])
def test_the_schedule_fixes_some_in_every_pass_and_all_in_the_end(
    steps: int, positions: int
) -> None:
    left = [positions, *(masked_after(step, steps, positions) for step in range(steps))]
    assert left[-1] == 0
    assert all(after < before or before == 0 for before, after in pairwise(left))
    for step, after in enumerate(left[1:-1]):
        cosine = round(positions * math.cos(math.pi / 2 * (step + 1) / steps))
        assert after == max(0, min(cosine, positions - 1 - step))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_token_is_filled(family: str, steps: int, scale: float) -> None:
    model, draws = transformer(family), Draws.of(0, 0, 20)
    config = ConfidenceSamplerConfig(steps=steps, guidance_scale=scale)
    tokens = confidence_sample(model, conditions(draws), draws, config)
    assert tokens.shape == (20, *model.token_shape)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_each_pass_sees_the_count_and_keeps_what_is_fixed(steps: int) -> None:
    model = transformer()
    config = ConfidenceSamplerConfig(steps=steps)
    tokens, seen = passes(model, Draws.of(0, 0, 10), config)
    counts = [LENGTH, *(masked_after(step, steps, LENGTH) for step in range(steps))]
    assert len(seen) == min(steps, LENGTH)
    for i, (now, later) in enumerate(zip(seen, [*seen[1:], tokens], strict=True)):
        masked = now == model.mask_id
        assert set(masked.sum(1).tolist()) == {counts[i]}
        assert torch.equal(now[~masked], later[~masked])


SAMPLERS: dict[str, Any] = {
    "token": ConfidenceSamplerConfig(steps=3, guidance_scale=2.0),
    "grouped": ConfidenceSamplerConfig(steps=5),
    "maskgit": MaskGitSamplerConfig(steps=4, mask_column=True),
    "maskbit": MaskBitSamplerConfig(steps=6),
    "maskgen": MaskGenSamplerConfig(steps=4),
    "meissonic": MeissonicSamplerConfig(steps=5),
}


@pytest.mark.parametrize("family", SAMPLERS)
def test_each_pass_computes_the_masked_positions_alone(family: str) -> None:
    """The tokens are those of logits at every position, of which the [MASK] positions are looked at."""
    model, draws, config = families.build(family), Draws.of(0, 0, 6), SAMPLERS[family]
    condition = families.conditions(family, draws)
    head_input, computed, seen = model.head_input, [], []

    def watched(hidden: Tensor) -> Tensor:
        computed.append(hidden.shape[:-1].numel())
        return head_input(hidden)

    model.head_input = watched
    tokens = confidence_sample(
        model, condition, draws, config, observe=lambda _, now, drawn: seen.append(now)
    )
    plan = config.plan(tokens[0].numel()).steps
    masks = [(now == model.mask_id).flatten(2).any(2) for now in map(_positions, seen)]
    branches = [1 if step.guidance == 1 else 2 for step in plan]
    if family != "maskgit":  # where a drawn [MASK] is a token
        wanted = [n * int(mask.sum()) for n, mask in zip(branches, masks, strict=True)]
        assert computed == wanted
    whole = [n * masks[0].numel() for n in branches]
    assert sum(computed) < sum(whole)
    columns = model.head_columns
    model.head_columns = lambda h, w, b, rows: columns(h, w, b, None).flatten(0, 1)[rows]
    computed.clear()
    assert torch.equal(confidence_sample(model, condition, draws, config), tokens)
    assert computed == whole


def _positions(tokens: Tensor) -> Tensor:
    """``[B, L, G]``, with one group where there are none."""
    return tokens.view(*tokens.shape[:2], -1)


def test_one_step_is_independent_sampling() -> None:
    model, n = transformer(), 20_000
    draws, condition = Draws.of(0, 0, n), torch.zeros(n, dtype=torch.int64)
    config = ConfidenceSamplerConfig(steps=1, temperature=1.5)
    tokens = confidence_sample(model, condition, draws, config)
    with torch.no_grad():
        masks = torch.full((1, LENGTH), model.mask_id)
        expected = (model.logits(model.embed(masks), condition[:1])[0] / 1.5).softmax(-1)
    one_hot = torch.nn.functional.one_hot(tokens, VOCABULARY).float()
    deviation = (expected * (1 - expected) / n).sqrt()
    assert float(((one_hot.mean(0) - expected) / deviation).abs().max()) < 4.5
    # Two positions are independent: the joint frequency is the product.
    joint = torch.einsum("nv,nw->vw", one_hot[:, 0], one_hot[:, 1]) / n
    product = expected[0][:, None] * expected[1]
    z = (joint - product) / (product * (1 - product) / n).sqrt()
    assert float(z.abs().max()) < 4.5


def test_what_is_not_kept_is_drawn_anew() -> None:
    """Of a law that depends on nothing: keeping the surest draws favours its likeliest token."""
    model, n = transformer(), 4000
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01])
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(p.log())
    draws, deviation = Draws.of(0, 0, n), (0.25 / (n * LENGTH)) ** 0.5
    share = {}
    for steps, heat in [(1, 0.0), (4, 0.0), (4, 1e3)]:
        config = ConfidenceSamplerConfig(steps=steps, confidence_temperature=heat)
        tokens = confidence_sample(model, conditions(draws), draws, config)
        share[steps, heat] = float((tokens == 0).float().mean())
    assert abs(share[1, 0.0] - 0.5) < 4 * deviation
    # Noise that drowns the confidences keeps positions at random: the law itself again.
    assert abs(share[4, 1e3] - 0.5) < 4 * deviation
    # The first of four positions is the likeliest token unless all four draws are others, and so on.
    expected = sum(1 - 0.5**left for left in (4, 3, 2, 1)) / 4
    assert abs(share[4, 0.0] - expected) < 4 * deviation


def test_the_heat_falls_linearly() -> None:
    model, draws, steps = transformer(), Draws.of(0, 0, 200), 4
    config = ConfidenceSamplerConfig(steps=steps, confidence_temperature=2.0)
    tokens, seen = passes(model, draws, config)
    for step, (now, later) in enumerate(zip(seen, [*seen[1:], tokens], strict=True)):
        with torch.no_grad():
            logits = model.logits(model.embed(now), conditions(draws))
        seed, rows = draws.key(f"confidence/tokens/{step}"), draws.row_ids(LENGTH)
        drawn = sample_tokens(logits, seed=seed, row_ids=rows)
        gumbel = -torch.log(-torch.log(draws.uniform(f"confidence/order/{step}", LENGTH)))
        confidence = logits.log_softmax(-1).gather(2, drawn[..., None])[..., 0]
        confidence = confidence + 2.0 * (1 - (step + 1) / steps) * gumbel
        first = confidence.masked_fill(now != model.mask_id, -math.inf).argmax(1, keepdim=True)
        assert torch.equal(later, now.scatter(1, first, drawn.gather(1, first)))


def test_without_heat_the_likeliest_tokens_come_first() -> None:
    model, draws = transformer(), Draws.of(0, 0, 50)
    config = ConfidenceSamplerConfig(steps=4, confidence_temperature=0.0, temperature=1e-3)
    _, seen = passes(model, draws, config)
    with torch.no_grad():
        likeliest = model.logits(model.embed(seen[0]), conditions(draws)) / 1e-3
    surest = likeliest.log_softmax(-1).max(-1).values
    first = (seen[1] != model.mask_id).nonzero()[:, 1]
    # At this temperature several positions are certain to rounding: any of these may come first.
    assert bool((surest.gather(1, first[:, None])[:, 0] >= surest.max(1).values - 1e-3).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_sample_depends_on_the_cut_of_the_batch(family: str) -> None:
    model, whole = transformer(family), Draws.of(5, 3, 9)
    config = ConfidenceSamplerConfig(steps=3, guidance_scale=2.0)
    together = confidence_sample(model, conditions(whole), whole, config)
    parts = [whole.part(0, 4), whole.part(4, 5)]
    assert torch.equal(
        together, torch.cat([confidence_sample(model, conditions(p), p, config) for p in parts])
    )
    logits = one_step_logits(model, conditions(whole), whole, ONE_STEP)
    apart = torch.cat([draw_tokens(logits[p.first : p.first + len(p)], p) for p in parts])
    assert_same_bits(draw_tokens(logits, whole), apart)


def test_a_teacher_that_knows_its_data_reproduces_it() -> None:
    rows = torch.tensor([[1, 5, 2, 7], [6, 0, 3, 3]])
    teacher = transformer(sharpness=1.0)
    method = TeacherMethod(
        teacher, TokenSource(rows, torch.tensor([0, 1]), 8), TeacherConfig(optimizer=FAST)
    )
    trainer(method, steps=150, log_every=1000, checkpoint_every=1000).run()
    draws = Draws.of(0, 0, 40)
    for steps in (1, 4):
        config = ConfidenceSamplerConfig(steps=steps, guidance_scale=1.5, temperature=0.2)
        tokens = confidence_sample(teacher, conditions(draws), draws, config)
        assert torch.equal(tokens, rows[conditions(draws)])


@pytest.mark.parametrize("family", FAMILIES)
def test_decodes(family: str) -> None:
    decoder, draws = tokenizer(family), Draws.of(0, 0, 6)
    shape = decoder.token_shape
    with torch.no_grad():
        # A [MASK] column, which no decoder knows, is left out.
        logits = torch.cat(
            [3 * draws.normal("l", *shape, VOCABULARY), torch.full((6, *shape, 1), 99.0)], -1
        )
        real = logits[..., :VOCABULARY]
        argmax = decode_logits(decoder, logits, draws, "argmax")
        torch.testing.assert_close(argmax, decoder.decode(real.argmax(-1)))
        soft = decode_logits(decoder, logits, draws, "soft", temperature=2.0)
        torch.testing.assert_close(soft, decoder.decode_soft(real / 2))
        sample = decode_logits(decoder, logits, draws, "sample", temperature=0.7)
        tokens = draw_tokens(real, draws, temperature=0.7)
        torch.testing.assert_close(sample, decoder.decode(tokens))
        # Where the law is one-hot, all three agree.
        sharp = [decode_logits(decoder, 1e4 * real, draws, d) for d in ("sample", "argmax", "soft")]
        torch.testing.assert_close(sharp[0], sharp[1])
        torch.testing.assert_close(sharp[2], sharp[1])


def test_one_step_sample() -> None:
    model, decoder, draws = transformer(), tokenizer(), Draws.of(0, 0, 6)
    images = one_step_sample(model, decoder, conditions(draws), draws, ONE_STEP, decode="soft")
    assert images.shape == (6, 1, 4, 4)
    assert not images.requires_grad
    with torch.no_grad():
        logits = one_step_logits(model, conditions(draws), draws, ONE_STEP)
        torch.testing.assert_close(images, decoder.decode_soft(logits))


def test_tokens_follow_the_softmax() -> None:
    n, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 2.5])
    tokens = draw_tokens(logits.expand(n, 1, 4), Draws.of(0, 0, n), temperature=2.0)
    expected = (logits / 2).softmax(-1)
    share = tokens.flatten().bincount(minlength=4) / n
    assert float(((share - expected) / (expected * (1 - expected) / n).sqrt()).abs().max()) < 4

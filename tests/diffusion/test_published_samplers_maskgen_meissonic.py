"""The samplers of the published MaskGen and Meissonic teachers: schedules, and the passes one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.text_families import (
    TRANSFORMERS,
    maskgen,
    meissonic,
    meissonic_condition,
    text_condition,
)
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import (
    DecodingPlan,
    Draws,
    InjectedNoise,
    MaskGenSamplerConfig,
    MeissonicSamplerConfig,
    confidence_sample,
    guidance_from_weight,
)
from softdimo_fast.models.conditions import rows

SCHEDULES = Path(__file__).parents[2].parent / "shared/fixtures/schedules_maskgen_meissonic.json"
needs_tables = pytest.mark.skipif(not SCHEDULES.is_file(), reason=f"no {SCHEDULES}")
BATCH = 4
SAMPLERS: dict[str, Any] = {
    "maskgen": MaskGenSamplerConfig(steps=4),
    "meissonic": MeissonicSamplerConfig(steps=4),
}


def tables(family: str) -> list[Any]:
    if not SCHEDULES.is_file():
        return []
    return list(json.loads(SCHEDULES.read_text())[family]["tables"].values())


# ---- the published schedules -------------------------------------------------------------------------------


@needs_tables
def test_maskgen_schedules() -> None:
    for table in tables("maskgen"):
        settings, published = table["settings"], table["rows"]
        config = MaskGenSamplerConfig(
            steps=settings["steps"],
            guidance_scale=guidance_from_weight(settings["guidance_scale"]),
            guidance_rise=settings["guidance_decay"],
            guidance_power=settings["guidance_decay_scale_pow"],
            temperature_annealing=settings["softmax_temperature_annealing"],
            confidence_temperature=settings["randomize_temperature"],
            schedule=settings["mask_schedule"],
        )
        plan = config.plan(settings["num_tokens"])
        assert_counts(plan, published)
        for step, row in zip(plan.steps, published, strict=True):
            assert step.number == row["step"]
            # Oracle 12: s = 1 + w.
            assert step.guidance - 1 == pytest.approx(row["guidance"], rel=1e-6)
            assert step.heat == step.draw_heat == pytest.approx(row["gumbel_temperature"])
            assert step.temperature == pytest.approx(row["softmax_temperature"])
    first = tables("maskgen")[0]["settings"]
    assert MaskGenSamplerConfig().guidance_scale == 1 + first["guidance_scale"]
    assert MaskGenSamplerConfig().confidence_temperature == first["randomize_temperature"]
    assert MaskGenSamplerConfig().steps == first["steps"]


@needs_tables
def test_meissonic_schedules() -> None:
    for table in tables("meissonic"):
        settings, published = table["settings"], table["rows"]
        config = MeissonicSamplerConfig(
            steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            confidence_temperature=tuple(float(t) for t in settings["temperature"]),
            schedule=settings["masking_schedule"],
        )
        plan = config.plan(settings["num_tokens"])
        assert_counts(plan, published)
        for step, row in zip(plan.steps, published, strict=True):
            assert step.number == row["index"]
            assert step.time == row["timestep"]
            assert step.time * 1000 == row["model_timestep_argument"]
            assert step.guidance == row["guidance"]
            assert step.heat == pytest.approx(row["gumbel_temperature"], rel=1e-6, abs=1e-9)
            assert (step.temperature, step.draw_heat) == (1.0, 1.0)
        if table is tables("meissonic")[0]:
            assert config == MeissonicSamplerConfig()


def assert_counts(plan: DecodingPlan, published: list[Any]) -> None:
    """Equal, but for one token where float32 rounding decides."""
    loose = False
    for step, row in zip(plan.steps, published, strict=True):
        before, after = step.left + step.fixed, step.left
        assert abs(before - row["masked_before"]) <= loose
        loose = bool(row.get("borderline"))
        assert abs(after - row["masked_after"]) <= loose


def test_guidance_rises_as_published() -> None:
    """w: from 1 to 12 by a raised cosine, in equal steps, flipped (and ending below 1), or not at all."""
    weights = {
        name: [
            step.guidance - 1
            for step in MaskGenSamplerConfig(steps=4, guidance_rise=name).plan(64).steps
        ]
        for name in ("cosine", "linear", "flippedcosine", "none")
    }
    root = math.sqrt(0.5)
    assert weights["cosine"] == pytest.approx([1 + 5.5 * (1 - root), 6.5, 1 + 5.5 * (1 + root), 12])
    assert weights["linear"] == pytest.approx([3.75, 6.5, 9.25, 12])
    assert weights["flippedcosine"] == pytest.approx([1 + 5.5 * root, 1, 1 - 5.5 * root, -4.5])
    assert weights["none"] == [12] * 4
    squared = MaskGenSamplerConfig(steps=4, guidance_power=2.0).plan(64).steps
    assert squared[1].guidance - 1 == pytest.approx(weights["cosine"][0])


def test_temperatures_without_annealing() -> None:
    """The logits are divided by the noise's factor; the division by 0 in the last pass is left out."""
    steps = MaskGenSamplerConfig(steps=4, temperature_annealing=False).plan(64).steps
    assert [step.temperature for step in steps] == [1.5, 1.0, 0.5, 1.0]
    assert [step.draw_heat for step in steps] == [1.5, 1.0, 0.5, 0.0]


def test_one_temperature_falls_to_a_hundredth() -> None:
    steps = MeissonicSamplerConfig(steps=3, confidence_temperature=2.0).plan(64).steps
    assert [step.heat for step in steps] == pytest.approx([2.0, 1.005, 0.01])


def test_timesteps_of_meissonic() -> None:
    def times(**options: Any) -> list[float | None]:
        steps = MeissonicSamplerConfig(steps=3, schedule="linear", **options).plan(30).steps
        return [step.time for step in steps]

    assert times() == [2, 1, 0]
    assert times(timestep="mask_ratio") == pytest.approx([1000, 2000 / 3, 1000 / 3], rel=0.1)
    assert times(timestep="condition") == [None] * 3


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("positions", [1, 2, 5, 24, 100])
@pytest.mark.parametrize("steps", [1, 2, 5, 60])
def test_every_pass_fixes_some_and_the_last_all(name: str, positions: int, steps: int) -> None:
    plan = replace(SAMPLERS[name], steps=steps).plan(positions).steps
    left = [positions, *(step.left for step in plan)]
    assert left[-1] == 0
    assert all(before > after for before, after in pairwise(left))
    assert [step.fixed for step in plan] == [before - after for before, after in pairwise(left)]
    assert plan[-1].number == steps - 1


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (MaskGenSamplerConfig(), "steps", 0), (MaskGenSamplerConfig(), "guidance_power", 0.0),
        (MaskGenSamplerConfig(), "guidance_rise", "late"),
        (MaskGenSamplerConfig(), "confidence_temperature", -1.0),
        (MeissonicSamplerConfig(), "steps", 0),
        (MeissonicSamplerConfig(), "confidence_temperature", (2.0, -1.0)),
        (MeissonicSamplerConfig(), "schedule", "arccos"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(config: Any, field: str, value: Any) -> None:
    with pytest.raises(_config.ConfigError, match=f"{type(config).__name__}.{field}"):
        replace(config, **{field: value})


# ---- the passes one by one, written out again --------------------------------------------------------------


def noise_of(model: Any, steps: int) -> InjectedNoise:
    generator = torch.Generator().manual_seed(1)

    def gumbel(*shape: int) -> Tensor:
        return -torch.log(-torch.log(torch.rand(shape, generator=generator)))

    length = model.token_shape[0]
    return InjectedNoise(
        gumbel(steps, BATCH, length, model.vocabulary), gumbel(steps, BATCH, length)
    )


@torch.no_grad()
def maskgen_passes(model: Any, condition: Any, noise: Any, steps: int) -> list[Tensor]:
    """The tokens after each pass, from the published description."""
    length = model.token_shape[0]
    tokens, seen = torch.full((BATCH, length), model.mask_id), []
    for i in range(steps):
        ratio = (i + 1) / steps
        masked = tokens == model.mask_id
        conditional = model.logits(model.embed(tokens), condition)
        other = model.logits(model.embed(tokens), model.unconditional(condition))
        weight = 1 + (12.0 - 1) * (1 - math.cos(math.pi * ratio)) / 2
        logits = conditional + weight * (conditional - other)
        logits = logits / (0.5 + 0.8 * (1 - ratio))
        heat = 2.0 * (1 - ratio)
        drawn = (logits + heat * noise.tokens[i]).argmax(-1)
        raw = logits.gather(-1, drawn[..., None])[..., 0]
        confidence = (raw + heat * noise.order[i]).masked_fill(~masked, math.inf)
        drawn = torch.where(masked, drawn, tokens)
        count = math.floor(length * math.acos(ratio) * 2 / math.pi)
        count = max(1, min(int(masked[0].sum()) - 1, count))
        if i + 1 < steps:
            lowest = confidence.argsort(1)[:, :count]
            drawn = drawn.scatter(1, lowest, model.mask_id)
        tokens = drawn
        seen.append(tokens)
    return seen


@torch.no_grad()
def meissonic_passes(model: Any, condition: Any, noise: Any, steps: int) -> list[Tensor]:
    length = model.token_shape[0]
    tokens, seen = torch.full((BATCH, length), model.mask_id), []
    for i, timestep in enumerate(reversed(range(steps))):
        told = condition._replace(time=torch.full((BATCH,), float(timestep)))
        masked = tokens == model.mask_id
        conditional = model.logits(model.embed(tokens), told)
        other = model.logits(model.embed(tokens), model.unconditional(told))
        log_p = (other + 9.0 * (conditional - other)).log_softmax(-1)
        drawn = (log_p + noise.tokens[i]).argmax(-1)
        confidence = log_p.gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + 2.0 * (1 - i / (steps - 1)) * noise.order[i]
        confidence = confidence.masked_fill(~masked, math.inf)
        drawn = torch.where(masked, drawn, tokens)
        if timestep:
            count = math.floor(length * math.cos(math.pi / 2 * (i + 1) / steps))
            count = max(1, min(int(masked[0].sum()) - 1, count))
            drawn = drawn.scatter(1, confidence.argsort(1)[:, :count], model.mask_id)
        tokens = drawn
        seen.append(tokens)
    return seen


PASSES = {"maskgen": maskgen_passes, "meissonic": meissonic_passes}


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_are_the_published_ones(name: str) -> None:
    build, make = TRANSFORMERS[name]
    model, condition = build().double(), make(BATCH)
    numbers = {"score", "time", "micro", "prompt"}
    condition = condition._replace(
        **{k: v.double() for k, v in condition._asdict().items() if k not in numbers}
    )
    noise = noise_of(model, 4)
    seen: list[Tensor] = []
    tokens = confidence_sample(
        model, condition, noise, SAMPLERS[name], observe=lambda _, now, drawn: seen.append(now)
    )
    expected = PASSES[name](model, condition, noise, 4)
    assert bool((seen[0] == model.mask_id).all())
    for ours, theirs in zip([*seen[1:], tokens], expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len({tuple(row) for row in tokens.tolist()}) > 1


@contextmanager
def recorded_times(model: Any) -> Iterator[list[list[float]]]:
    times: list[list[float]] = []
    inner = model.conditioning_vector

    def record(condition: Any) -> Tensor:
        times.append(condition.time.tolist())
        vector: Tensor = inner(condition)
        return vector

    model.conditioning_vector = record
    yield times
    del model.conditioning_vector


def test_meissonic_is_told_the_step() -> None:
    model, draws = meissonic(), Draws.of(0, 0, BATCH)
    condition = meissonic_condition(BATCH, time=7.0)
    told: dict[str, list[float]] = {}
    for timestep in ("step", "mask_ratio", "condition"):
        config = MeissonicSamplerConfig(steps=3, timestep=timestep, guidance_scale=2.0)
        with recorded_times(model) as times:
            confidence_sample(model, condition, draws, config)
        assert all(len(call) == 2 * BATCH and len(set(call)) == 1 for call in times)
        told[timestep] = [call[0] for call in times]
    assert told["step"] == [2, 1, 0]
    assert told["mask_ratio"] == pytest.approx([1000, 1000 * 20 / 24, 1000 * 11 / 24], abs=50)
    assert told["condition"] == [7, 7, 7]


def test_meissonic_guides_above_1_only() -> None:
    for scale, calls in ((0.5, BATCH), (1.0, BATCH), (1.5, 2 * BATCH)):
        model = meissonic()
        config = MeissonicSamplerConfig(steps=1, guidance_scale=scale)
        with recorded_times(model) as times:
            confidence_sample(model, meissonic_condition(BATCH), Draws.of(0, 0, BATCH), config)
        assert [len(call) for call in times] == [calls]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    build, make = TRANSFORMERS[name]
    model, condition, draws = build(), make(BATCH), Draws.of(5, 0, BATCH)
    tokens = confidence_sample(model, condition, draws, SAMPLERS[name])
    assert tokens.shape == (BATCH, *model.token_shape)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary
    half = confidence_sample(model, rows(condition, slice(2, 4)), draws.part(2, 2), SAMPLERS[name])
    assert_same_bits(half, tokens[2:])
    other = confidence_sample(model, condition, Draws.of(6, 0, BATCH), SAMPLERS[name])
    assert not torch.equal(other, tokens)


def test_the_last_pass_of_maskgen_takes_the_likeliest() -> None:
    """Its noise has cooled to nothing: with one pass the draws do not matter."""
    model, condition = maskgen(), text_condition(BATCH)
    config = MaskGenSamplerConfig(steps=1)
    tokens = confidence_sample(model, condition, Draws.of(1, 0, BATCH), config)
    assert_same_bits(confidence_sample(model, condition, Draws.of(2, 0, BATCH), config), tokens)
    embeddings = model.embed(torch.full((BATCH, 6), model.mask_id))
    c = model.logits(embeddings, condition)
    u = model.logits(embeddings, model.unconditional(condition))
    assert torch.equal(tokens, (c + 12 * (c - u)).argmax(-1))

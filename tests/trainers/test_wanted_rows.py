"""Losses see the head's logits at [MASK] positions alone: beside the same losses over every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import FAMILIES, build, conditions
from support.training import FAST, generator, micro_batch, trainer
from torch import Tensor

from softdimo_fast.diffusion import Draws, MaskedRows, branch_logits, draw_mask
from softdimo_fast.models.conditions import map_condition
from softdimo_fast.ops import (
    distribution_matching_loss,
    masked_cross_entropy,
    token_divergence,
)
from softdimo_fast.trainers import (
    DistillationConfig,
    DistributionMatching,
    MicroBatch,
    Phase,
    Rollout,
    TeacherConfig,
    TeacherMethod,
)

BATCH, GLOBAL = 3, 5
NORMALIZATIONS = ("masked", "batch", "sum")
AUXILIARY = Phase("auxiliary")


def rollout(family: str) -> Rollout:
    """Of a micro-batch, from free logits."""
    model, draws = build(family), Draws.of(0, 0, GLOBAL)
    part = draws.part(1, BATCH)
    logits = 2 * part.normal("logits", *model.token_shape, model.vocabulary)
    tokens = part.integers("tokens", model.vocabulary, *model.token_shape)
    return Rollout(part, draws, conditions(family, part), logits.requires_grad_(), tokens)


def matching(family: str, **options: Any) -> DistributionMatching:
    config = DistillationConfig(**{"guidance_scale": 3.0, "mask_schedule": "cosine"} | options)
    return DistributionMatching(build(family), build(family, 1), config)


def dense(objective: DistributionMatching, sample: Rollout) -> Tensor:
    """The generator's term from the logits of every position, a mask and the operator's normalisation."""
    config, c = objective.config, sample.condition
    mask = draw_mask(
        sample.draws, "matching", config.mask_schedule, objective.teacher.token_shape
    ).mask

    def embed(model: Any) -> Tensor:
        if config.path == "hard":
            return model.embed(model.masked_tokens(sample.tokens, mask))
        return model.soft_embed(sample.logits, mask=mask)

    teacher, auxiliary = objective.teacher, objective.auxiliary.requires_grad_(False)
    told = teacher.masked_condition(c, mask)
    p = branch_logits(teacher, embed(teacher), told, guided=config.guidance_scale != 1)
    q = auxiliary.logits(embed(auxiliary), auxiliary.masked_condition(c, mask))
    share = mask.flatten(1).float().mean(1).view(-1, *[1] * (mask.dim() - 1)).expand(mask.shape)
    scale: Any = config.guidance_scale
    if config.adaptive_guidance:
        scale = 1 + (scale - 1) * share
    options: Any = {
        "kind": config.divergence, "beta": config.beta, "guidance_scale": scale,
        "weight": share**config.weighting, "teacher_uncond_logits": p.unconditional,
    }  # fmt: skip
    value = distribution_matching_loss(
        sample.logits, p.conditional, q, mask, **options, normalization=config.normalization
    )
    if config.normalization != "sum":
        value = value * sample.share
    if config.path == "soft_gradient":
        rows = token_divergence(p.conditional, q, **options, mask=mask, reduction="none")
        through = (rows.flatten(1).sum(1) / mask.flatten(1).sum(1)).mean() * sample.share
        value = value + config.soft_gradient_weight * through
    return value


CASES: dict[str, dict[str, Any]] = {
    "plain": {"guidance_scale": 1.0},
    "adaptive, weighted": {"adaptive_guidance": True, "weighting": 0.7},
    "jeffreys, soft gradient": {
        "divergence": "jeffreys", "beta": 0.3, "path": "soft_gradient", "soft_gradient_weight": 0.5,
        "weighting": -0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_generators_term(family: str, normalization: str, case: str) -> None:
    objective = matching(family, normalization=normalization, **CASES[case])
    sample = rollout(family)
    ours, expected = objective.student_loss(sample).value, dense(objective, sample)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(v, sample.logits)[0] for v in (ours, expected))
    assert bool(wanted.any())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def assert_same_gradients(ours: Tensor, expected: Tensor, model: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (ours, expected))
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * float(1 + w.abs().max()))


def masked_total(draws: Draws, stream: str, model: Any) -> Tensor:
    return draw_mask(draws, stream, "cosine", model.token_shape).mask.sum()


@pytest.mark.parametrize("soft", [0.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliarys_loss(family: str, soft: float) -> None:
    objective = matching(family, auxiliary_soft_weight=soft)
    sample, model = rollout(family).detached(), objective.auxiliary
    mask = draw_mask(sample.draws, "auxiliary/0", "cosine", model.token_shape).mask
    told = model.masked_condition(sample.condition, mask)
    logits = model.logits(model.embed(model.masked_tokens(sample.tokens, mask)), told)
    total = masked_cross_entropy(
        logits, sample.tokens, mask, label_smoothing=0.1, reduction="sum"
    ) + soft * token_divergence(sample.logits, logits, mask=mask, reduction="sum")
    expected = total / masked_total(sample.global_draws, "auxiliary/0", model)
    assert_same_gradients(objective.role_loss(AUXILIARY, sample).value, expected, model)


def teacher_method(family: str) -> tuple[TeacherMethod, Callable[[Draws], Tensor]]:
    """A teacher in training, and the tokens it trains on."""
    model = build(family)

    def tokens(draws: Draws) -> Tensor:
        return draws.integers("tokens", model.vocabulary, *model.token_shape)

    config = TeacherConfig(
        mask_schedule="cosine", condition_drop=0.0, label_smoothing=0.1, optimizer=FAST
    )
    source: Any = lambda draws: (tokens(draws), conditions(family, draws))  # noqa: E731
    return TeacherMethod(model, source, config), tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teachers_loss(family: str) -> None:
    method, tokens = teacher_method(family)
    model, whole = method.teacher, Draws.of(0, 0, GLOBAL)
    batch = MicroBatch(whole.part(1, BATCH), whole)
    coded = tokens(batch.draws)
    mask = draw_mask(batch.draws, "teacher", "cosine", model.token_shape).mask
    told = model.masked_condition(conditions(family, batch.draws), mask)
    logits = model.logits(model.embed(model.masked_tokens(coded, mask)), told)
    total = masked_cross_entropy(logits, coded, mask, label_smoothing=0.1, reduction="sum")
    expected = total / masked_total(whole, "teacher", model)
    assert_same_gradients(method.loss(Phase("teacher"), batch).value, expected, model)


# ---- what the heads compute --------------------------------------------------------------------------------


def watch(model: Any, seen: list[int]) -> None:
    """Counts the rows for which the head is computed, in each call."""
    head_input = model.head_input

    def watched(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape[:-1].numel())
        computed: Tensor = head_input(hidden)
        return computed

    model.head_input = watched


def rows_of(draws: Draws, stream: str, schedule: Any, shape: tuple[int, ...]) -> int:
    """Positions with a [MASK], counted from the mask."""
    mask = draw_mask(draws, stream, schedule, shape).mask
    return int(mask.flatten(2).any(2).sum()) if mask.dim() > 2 else int(mask.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_compute_masked_positions_alone(family: str) -> None:
    objective = matching(family)
    teacher, auxiliary, student = objective.teacher, objective.auxiliary, build(family, 2)
    counts: dict[str, list[int]] = {"teacher": [], "auxiliary": [], "student": []}
    for name, model in (("teacher", teacher), ("auxiliary", auxiliary), ("student", student)):
        watch(model, counts[name])
    method = generator(
        objective, student=student, conditions=lambda draws: conditions(family, draws)
    )
    batch = micro_batch(count=BATCH)
    for phase in method.phases(0):
        method.loss(phase, batch)
    shape = teacher.token_shape
    matched, followed = (
        rows_of(batch.draws, stream, "cosine", shape) for stream in ("matching", "auxiliary/0")
    )
    assert 0 < matched < BATCH * shape[0]
    assert counts["teacher"] == [2 * matched]  # both branches of guidance
    assert counts["auxiliary"] == [matched, followed]
    assert counts["student"] == [BATCH * shape[0]]  # every token of a sample is drawn
    trained, _ = teacher_method(family)
    counts["teacher"].clear()
    watch(trained.teacher, counts["teacher"])
    trained.loss(Phase("teacher"), batch)
    assert counts["teacher"] == [rows_of(batch.draws, "teacher", "cosine", shape)]


@pytest.mark.parametrize("family", ["maskbit", "maskgit"])
def test_micro_batches_add_up(family: str) -> None:
    """A micro-batch's rows are counted within it."""
    results = []
    for accumulation in (1, 3):
        method = generator(
            matching(family, auxiliary_optimizer=FAST), student=build(family, 2),
            conditions=lambda draws: conditions(family, draws),
        )  # fmt: skip
        run = trainer(method, accumulation=accumulation, batch_size=6)
        run.train_step()
        results.append(run._means.read()[0])
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-4), key


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 2), (3, 2, 2)])
def test_masked_rows(shape: tuple[int, ...]) -> None:
    draws = Draws.of(2, 3, 6, first=4)
    masked = draw_mask(draws, "s", "arccos", shape)
    mask = masked.mask
    assert mask.shape == (6, *shape)
    assert torch.equal(masked.counts, mask.flatten(1).sum(1))
    flat = mask.view(6 * shape[0], -1)
    assert masked.rows.tolist() == [i for i, row in enumerate(flat.tolist()) if any(row)]
    assert torch.equal(masked.row_mask.view(-1), flat[masked.rows].view(-1))
    values = torch.arange(mask.numel()).view(mask.shape)
    picked = masked.of(values)
    assert picked.shape == (len(masked.rows), *shape[1:])
    assert torch.equal(masked.put(picked, torch.zeros_like(values)) * mask, values * mask)
    spread = masked.spread(torch.arange(6.0))
    assert torch.equal(spread.view(len(spread), -1)[:, 0], (masked.rows // shape[0]).float())
    # A part of the batch has the same mask.
    part = draw_mask(draws.part(2, 3), "s", "arccos", shape)
    assert torch.equal(part.mask, mask[2:5])
    assert torch.equal(MaskedRows.find(mask).rows, masked.rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_device_is_asked(family: str) -> None:
    """A meta tensor has no values: whatever reads one on the way to a loss fails."""
    meta = torch.device("meta")
    objective = matching(family, adaptive_guidance=True, auxiliary_soft_weight=0.5)
    teacher, auxiliary = objective.teacher.to(meta), objective.auxiliary.to(meta)
    draws = Draws.of(2, 3, BATCH, first=4, device=meta)
    shape = teacher.token_shape
    logits = torch.empty(BATCH, *shape, teacher.vocabulary, device=meta, requires_grad=True)
    told = map_condition(lambda t: t.to(meta), conditions(family, Draws.of(2, 3, BATCH, first=4)))
    sample = Rollout(draws, draws, told, logits, draws.integers("tokens", 3, *shape))
    objective.student_loss(sample).value.backward()
    assert logits.grad is not None
    objective.role_loss(AUXILIARY, sample.detached()).value.backward()
    assert any(p.grad is not None for p in auxiliary.parameters())
    rows = draw_mask(draws, "matching", "cosine", shape).rows
    host = draw_mask(draws.on_host, "matching", "cosine", shape).rows
    assert (rows.device, rows.shape) == (meta, host.shape)


def test_draws_on_the_host_are_the_same_draws() -> None:
    draws = Draws.of(2, 3, 6, first=4)
    assert torch.equal(draws.on_host.uniform("s", 3), draws.uniform("s", 3))
    forked = draws.part(1, 4).fork("f")
    assert torch.equal(forked.on_host.uniform("s", 3), forked.uniform("s", 3))
    on_meta = Draws.of(2, 3, 6, first=4, device=torch.device("meta"))
    assert on_meta.on_host.samples.tolist() == list(range(4, 10))

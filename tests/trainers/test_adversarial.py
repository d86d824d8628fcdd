"""The GAN term: losses against formulas, who gets a gradient, and R1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.training import (
    BATCH,
    FAMILIES,
    adversarial,
    generator,
    gradient,
    micro_batch,
    rollout,
    token_source,
)
from torch import Tensor
from torch.nn import functional

from softdimo_fast import soft_embedding
from softdimo_fast.trainers import Adversarial, Phase, Rollout

HEADS = Phase("heads")


def mask_of(objective: Adversarial, sample: Rollout, repeat: int = 0) -> Tensor:
    """round(N r) positions, r uniform in the range: written with a sort instead of ranks."""
    low, high = objective.config.mask_range
    shape = objective.teacher.token_shape
    r = low + (high - low) * sample.draws.uniform(f"adversarial/ratio/{repeat}", 1)[:, 0]
    u = sample.draws.uniform(f"adversarial/positions/{repeat}", *shape)
    mask = torch.zeros_like(u, dtype=torch.bool).flatten(1)
    for b, order in enumerate(u.flatten(1).argsort(1)):
        mask[b, order[: int((r[b] * len(order)).round())]] = True
    return mask.view(u.shape)


def scores(objective: Adversarial, embeddings: Tensor, condition: Tensor) -> Tensor:
    features = objective.teacher.features(embeddings, condition, objective.layers)
    result: Tensor = objective.heads(features, condition)
    return result


def fake_scores(objective: Adversarial, sample: Rollout, repeat: int = 0) -> Tensor:
    mask = mask_of(objective, sample, repeat)
    soft = objective.teacher.soft_embed(sample.logits, mask=mask)
    return scores(objective, soft, sample.condition)


def real_inputs(objective: Adversarial, sample: Rollout) -> tuple[Tensor, Tensor]:
    tokens, condition = objective.real(sample.draws)
    mask = mask_of(objective, sample)
    return objective.teacher.embed(torch.where(mask, objective.teacher.mask_id, tokens)), condition


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_the_generators_loss(family: str, kind: str) -> None:
    objective, sample = adversarial(family, loss=kind, weight=3.0), rollout(family)
    fake = fake_scores(objective, sample)
    expected = (functional.softplus(-fake) if kind == "non_saturating" else -fake).mean()
    loss = objective.student_loss(sample)
    torch.testing.assert_close(loss.value, 3 * expected)
    torch.testing.assert_close(loss.metrics["adversarial/generator"], expected.detach())
    (want,) = torch.autograd.grad(3 * expected, sample.logits)
    got = gradient(objective, sample)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-4)
    mask = mask_of(objective, sample)
    assert mask.any()
    assert not got[mask].any()
    assert got[~mask].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_the_heads_loss(family: str, kind: str) -> None:
    objective, sample = adversarial(family, loss=kind), rollout(family).detached()
    fake = fake_scores(objective, sample)
    real = scores(objective, *real_inputs(objective, sample))
    if kind == "non_saturating":
        expected = (functional.softplus(-real) + functional.softplus(fake)).mean()
    else:
        expected = ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean()
    loss = objective.role_loss(HEADS, sample)
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.metrics["adversarial/real_score"], real.mean().detach())
    torch.testing.assert_close(loss.metrics["adversarial/fake_score"], fake.mean().detach())
    loss.value.backward()
    assert all(p.grad is not None for p in objective.heads.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_the_generators_phase_leaves_the_heads_alone() -> None:
    objective, sample = adversarial(), rollout()
    objective.student_loss(sample).value.backward()
    assert sample.logits.grad is not None
    for module in (objective.heads, objective.teacher):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.requires_grad for p in objective.heads.parameters())
    assert not objective.teacher.training


def test_the_heads_look_again_at_what_the_generator_showed() -> None:
    objective, sample = adversarial(), replace(rollout(), reused=True)
    fresh = objective.role_loss(HEADS, replace(sample.detached(), memory={})).value
    objective.student_loss(sample)
    assert sample.memory
    kept = objective.role_loss(HEADS, sample.detached()).value
    torch.testing.assert_close(kept, fresh)
    assert not sample.memory


@pytest.mark.parametrize("reuse", [True, False])
def test_features_are_kept_only_for_who_reads_them(
    reuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = adversarial()
    method, batch = generator(objective, reuse_rollout=reuse), micro_batch()
    seen: list[Rollout] = []
    student_loss = objective.student_loss
    monkeypatch.setattr(
        objective, "student_loss", lambda rollout: seen.append(rollout) or student_loss(rollout)
    )
    method.loss(Phase("student"), batch)
    assert [set(rollout.memory) for rollout in seen] == [{"fake_features"} if reuse else set()]
    method.loss(HEADS, batch)
    assert not seen[0].memory


def test_several_head_steps_have_masks_and_logs_of_their_own() -> None:
    objective, sample = adversarial(heads_steps=2), rollout().detached()
    assert objective.phases(0) == [Phase("heads", 0), Phase("heads", 1)]
    first = objective.role_loss(Phase("heads", 0), sample)
    second = objective.role_loss(Phase("heads", 1), sample)
    assert not torch.equal(first.value, second.value)
    real, fake = first.metrics["adversarial/real_score"], fake_scores(objective, sample).mean()
    torch.testing.assert_close(2 * first.metrics["adversarial/fake_score"], fake.detach())
    assert real.dim() == 0


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.25, 0.75), (1.0, 1.0)])
def test_the_mask_range(low: float, high: float) -> None:
    objective, sample = adversarial(mask_range=(low, high)), rollout(count=200)
    counts = mask_of(objective, sample).sum(1)
    assert set(counts.tolist()) <= set(range(round(4 * low), round(4 * high) + 1))
    got = gradient(objective, sample)
    assert got.any(-1).sum() == 4 * 200 - counts.sum()


@pytest.mark.parametrize("relaxation", ["gumbel", "gumbel_hard"])
def test_relaxations(relaxation: str) -> None:
    objective = adversarial(relaxation=relaxation, temperature=0.7, mask_range=(0.0, 0.0))
    sample = rollout()
    embeddings = soft_embedding(
        sample.logits, objective.teacher.token_table, temperature=0.7, noise="gumbel",
        hard=relaxation == "gumbel_hard", seed=sample.draws.key("relaxation"),
        row_ids=sample.draws.row_ids(4),
    )  # fmt: skip
    table = objective.teacher.token_table
    is_a_token = (embeddings[:, :, None] == table).all(-1).any(-1)
    assert bool(is_a_token.all()) == (relaxation == "gumbel_hard")
    expected = functional.softplus(-scores(objective, embeddings, sample.condition)).mean()
    torch.testing.assert_close(objective.student_loss(sample).value, expected)
    (want,) = torch.autograd.grad(expected, sample.logits)
    torch.testing.assert_close(gradient(objective, sample), want, atol=1e-7, rtol=1e-4)


# ---- R1 ----------------------------------------------------------------------------------------------------


def double_case(family: str = "token", count: int = BATCH, **options: Any) -> tuple[Any, Rollout]:
    """In float64, every step on the same real images and without masks."""
    objective = adversarial(family, r1_weight=1.0, mask_range=(0.0, 0.0), **options)
    objective.teacher.double()
    objective.heads.double()
    tokens, condition = token_source(family)(rollout(family).draws)
    repeats = count // len(tokens)
    rows = tokens.repeat(repeats, *[1] * (tokens.dim() - 1)), condition.repeat(repeats)
    objective.real = lambda draws: rows
    sample = rollout(family, count=count)
    return objective, replace(sample, logits=sample.logits.double())


def squared_gradients(objective: Adversarial, sample: Rollout) -> Tensor:
    """Sum over the scores of |grad|^2, by central differences along every coordinate; mean over samples."""
    embeddings, condition = real_inputs(objective, sample)
    h, total = 1e-5, torch.zeros((), dtype=torch.float64)
    for i in range(embeddings[0].numel()):
        step = torch.zeros_like(embeddings).flatten(1)
        step[:, i] = h
        step = step.view_as(embeddings)
        ahead = scores(objective, embeddings + step, condition)
        behind = scores(objective, embeddings - step, condition)
        total = total + ((ahead - behind) / (2 * h)).square().sum(1).mean()
    return total.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_r1_is_the_squared_gradient(family: str) -> None:
    objective, sample = double_case(family, r1="exact")
    loss = objective.role_loss(HEADS, sample.detached())
    expected = squared_gradients(objective, sample)
    torch.testing.assert_close(loss.metrics["adversarial/r1"].double(), expected)
    plain, _ = double_case(family, r1="finite_difference")
    without = plain.role_loss(HEADS, sample.detached())
    gan = without.value - without.metrics["adversarial/r1"]
    torch.testing.assert_close(loss.value - loss.metrics["adversarial/r1"], gan)


def test_the_gradient_of_exact_r1_agrees_with_differences() -> None:
    objective, sample = double_case(r1="exact")
    parameters = list(objective.heads.parameters())
    loss = objective.role_loss(HEADS, sample.detached()).value
    gradients = torch.autograd.grad(loss, parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters
        ]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        values = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(h * d)
            values.append(objective.role_loss(HEADS, sample.detached()).value.detach())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(h * d)
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-8)


def test_estimated_r1_converges_to_the_directional_derivative() -> None:
    _, sample = double_case(r1="exact")
    errors = []
    for sigma in (1e-2, 1e-3, 1e-4):
        objective, _ = double_case(r1="finite_difference", r1_sigma=sigma)
        embeddings, condition = real_inputs(objective, sample)
        noise = sample.draws.normal("adversarial/r1", *embeddings.shape[1:]).double()
        leaf = embeddings.clone().requires_grad_(True)
        slopes = []
        for score in scores(objective, leaf, condition).unbind(1):
            (g,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
            slopes.append((g * noise).flatten(1).sum(1))
        got = objective.role_loss(HEADS, sample.detached()).metrics["adversarial/r1"]
        expected = torch.stack(slopes).square().sum(0).mean()
        errors.append(abs(float(got / expected) - 1))
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5
    assert errors[2] < 1e-4


def test_estimated_r1_is_the_exact_one_in_the_mean() -> None:
    exact, sample = double_case(r1="exact", count=2048)
    estimated, _ = double_case(r1="finite_difference", r1_sigma=1e-3, count=2048)
    values = [
        float(objective.role_loss(HEADS, sample.detached()).metrics["adversarial/r1"])
        for objective in (exact, estimated)
    ]
    # (g.eps)^2 of 2048 draws: relative standard error sqrt(2 / 2048) or a little more.
    assert values[1] == pytest.approx(values[0], rel=0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_r1_is_the_same_under_autocast(family: str) -> None:
    """A difference of scores that bfloat16 has rounded would be half as large again, from noise alone."""
    objective = adversarial(family, r1="finite_difference", r1_weight=1.0)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = objective.role_loss(HEADS, rollout(family).detached())
            penalty = objective._penalty(*penalised(objective, rollout(family)))
        torch.testing.assert_close(loss.metrics["adversarial/r1"], penalty.detach())
        parameters = list(objective.heads.parameters())
        found = torch.autograd.grad(penalty, parameters, allow_unused=True)
        whole = torch.cat([g.flatten() for g in found if g is not None])
        gradients.append((float(penalty.detach()), whole))
    (without, slope), (under, other) = gradients
    assert under == pytest.approx(without, rel=0.01)
    assert float((other - slope).norm() / slope.norm()) < 0.01


def penalised(objective: Adversarial, sample: Rollout) -> tuple[Any, ...]:
    """Arguments of the penalty."""
    embeddings, condition = real_inputs(objective, sample)
    return embeddings, condition, scores(objective, embeddings, condition), sample.draws


def test_r1_trains_the_heads_alone() -> None:
    for kind in ("exact", "finite_difference"):
        objective = adversarial(r1=kind, r1_weight=0.5)
        method = generator(objective)
        objective.role_loss(HEADS, rollout().detached()).value.backward()
        assert all(p.grad is not None for p in objective.heads.parameters())
        assert all(p.grad is None for p in objective.teacher.parameters())
        assert all(p.grad is None for p in method.student.parameters())

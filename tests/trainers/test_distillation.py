"""Di[M]O: the transplanted gradient, the auxiliary's loss, and that nothing else gets a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.training import (
    FAMILIES,
    distillation,
    gradient,
    micro_batch,
    rollout,
    transformer,
    twin,
)
from torch import Tensor
from torch.nn import functional

from softdimo_fast.diffusion import draw_mask
from softdimo_fast.trainers import DistributionMatching, Phase, Rollout

AUXILIARY = Phase("auxiliary")


def networks(
    objective: DistributionMatching, sample: Rollout, *, soft: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mask and what teacher (both branches) and auxiliary say, written out."""
    config = objective.config
    shape = objective.teacher.token_shape
    mask = draw_mask(sample.draws, "matching", config.mask_schedule, shape).mask

    def embed(model: Any) -> Tensor:
        if soft:
            return model.soft_embed(sample.logits, mask=mask)
        return model.embed(torch.where(mask, model.mask_id, sample.tokens))

    teacher, c = objective.teacher, sample.condition
    conditional = teacher.logits(embed(teacher), c)
    unconditional = teacher.logits(embed(teacher), teacher.unconditional(c))
    auxiliary = objective.auxiliary.logits(embed(objective.auxiliary), c)
    return mask, conditional, unconditional, auxiliary


def divergence_rows(
    objective: DistributionMatching, mask: Tensor, c: Tensor, u: Tensor, a: Tensor
) -> Tensor:
    """w D(p || q) of each row, in the words of method and paper."""
    config = objective.config
    share = mask.flatten(1).double().mean(1).view(-1, *[1] * mask.dim())
    scale = config.guidance_scale
    if config.adaptive_guidance:
        scale = 1 + (scale - 1) * share
    log_p = ((u + scale * (c - u)) / config.teacher_temperature).log_softmax(-1)
    log_q = (a / config.auxiliary_temperature).log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(config.divergence, config.beta)
    assert beta is not None
    rows = (1 - beta) * forward + beta * reverse
    return rows * share[..., 0] ** config.weighting * mask


def normalised(rows: Tensor, mask: Tensor, kind: str) -> Tensor:
    sums = rows.flatten(1).sum(1)
    if kind == "masked":
        return (sums / mask.flatten(1).sum(1)).mean()
    return sums.mean() if kind == "batch" else sums.sum()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"divergence": "reverse_kl"},
    "jeffreys": {"divergence": "jeffreys", "beta": -0.2},
    "guided": {"guidance_scale": 3.0},
    "adaptive": {"guidance_scale": 3.0, "adaptive_guidance": True},
    "adaptive without guidance": {"adaptive_guidance": True},
    "temperatures": {"teacher_temperature": 0.7, "auxiliary_temperature": 1.6},
    "batch": {"normalization": "batch"},
    "sum": {"normalization": "sum", "weight": 0.3},
    "weighted": {"weighting": 1.5, "mask_schedule": "cosine"},
    "mage": {"mask_schedule": "mage", "weight": 2.0, "guidance_scale": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_auxiliarys_transplanted(case: str, family: str) -> None:
    objective, sample = distillation(family, **CASES[case]), rollout(family)
    with torch.no_grad():
        mask, *logits = networks(objective, sample)
    c, u, a = (tensor.double() for tensor in logits)
    a.requires_grad_(True)
    rows = divergence_rows(objective, mask, c, u, a)
    value = objective.config.weight * normalised(rows, mask, objective.config.normalization)
    (expected,) = torch.autograd.grad(value, a)
    loss = objective.student_loss(sample)
    torch.testing.assert_close(loss.value.double(), value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        loss.metrics["distillation/divergence"].double(),
        value.detach() / objective.config.weight, atol=1e-6, rtol=1e-5,
    )  # fmt: skip
    got = gradient(objective, sample).double()
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    assert not got[~mask].any()
    torch.testing.assert_close(got.sum(-1), torch.zeros_like(got[..., 0]), atol=1e-7, rtol=0)


def test_the_gradient_of_the_forward_kl_in_closed_form() -> None:
    objective, sample = distillation(auxiliary_temperature=2.0, guidance_scale=2.0), rollout()
    with torch.no_grad():
        mask, c, u, a = networks(objective, sample)
        p, q = (u + 2 * (c - u)).softmax(-1), (a / 2).softmax(-1)
        scale = mask / mask.sum(1, keepdim=True) / len(mask)
        expected = (q - p) / 2 * scale[..., None]
    torch.testing.assert_close(gradient(objective, sample), expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_equal_networks_give_no_gradient_but_through_guidance(family: str, divergence: str) -> None:
    """All three start as the teacher: without guidance the first step has nothing to say."""
    teacher = transformer(family)
    options = {"teacher": teacher, "auxiliary": twin(teacher), "divergence": divergence}
    unguided = distillation(family, **options)
    assert not gradient(unguided, rollout(family)).any()
    assert float(unguided.student_loss(rollout(family)).value.detach()) == 0
    guided = distillation(family, **options, guidance_scale=2.0)
    assert gradient(guided, rollout(family)).abs().max() > 1e-3


@pytest.mark.parametrize("path", ["hard", "soft", "soft_gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_phase_gives_gradients_to_the_logits_alone(family: str, path: str) -> None:
    options = {"soft_gradient_weight": 0.5} if path == "soft_gradient" else {}
    objective, sample = (
        distillation(family, guidance_scale=2.0, path=path, **options),
        rollout(family),
    )
    objective.student_loss(sample).value.backward()
    assert sample.logits.grad is not None
    for model in (objective.teacher, objective.auxiliary):
        assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    # The auxiliary is trainable again afterwards.
    assert all(p.requires_grad for p in objective.auxiliary.parameters())


def test_the_networks_see_the_hard_tokens_alone() -> None:
    """The on-policy path: other logits with the same sampled tokens change nothing."""
    objective, sample = distillation(guidance_scale=2.0), rollout()
    other = replace(sample, logits=(5 * sample.logits.detach() + 1).requires_grad_())
    assert torch.equal(gradient(objective, sample), gradient(objective, other))
    moved = replace(sample, tokens=(sample.tokens + 1) % 8)
    assert not torch.equal(gradient(objective, sample), gradient(objective, moved))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_soft_path(family: str) -> None:
    """The networks see expected embeddings; "soft_gradient" differentiates through them too."""
    sample = rollout(family)
    soft = distillation(family, path="soft", guidance_scale=2.0)
    mask, c, u, a = networks(soft, sample, soft=True)
    leaf = a.detach().requires_grad_(True)
    rows = divergence_rows(soft, mask, c.detach(), u.detach(), leaf)
    (transplanted,) = torch.autograd.grad(normalised(rows, mask, "masked"), leaf)
    torch.testing.assert_close(gradient(soft, sample), transplanted.float(), atol=1e-6, rtol=1e-3)
    through = normalised(divergence_rows(soft, mask, c, u, a), mask, "masked")
    (direct,) = torch.autograd.grad(through, sample.logits)
    both = distillation(family, path="soft_gradient", soft_gradient_weight=0.25, guidance_scale=2.0)
    got = gradient(both, sample)
    torch.testing.assert_close(got, transplanted.float() + 0.25 * direct, atol=1e-6, rtol=1e-3)
    assert direct[~mask].abs().max() > 0


def test_teacher_and_auxiliary_have_no_dropout() -> None:
    teacher, auxiliary = transformer().train(), transformer(seed=1).train()
    objective = distillation(teacher=teacher, auxiliary=auxiliary)
    assert not any(module.training for module in objective.teacher.modules())
    assert not any(module.training for module in objective.auxiliary.modules())


def test_one_module_cannot_be_both() -> None:
    teacher = transformer()
    with pytest.raises(ValueError, match="auxiliary must be another module than teacher"):
        distillation(teacher=teacher, auxiliary=teacher)


# ---- the auxiliary -----------------------------------------------------------------------------------------


def auxiliary_case(
    objective: DistributionMatching, sample: Rollout, repeat: int = 0
) -> tuple[Tensor, Tensor]:
    """Its mask and logits, written out."""
    model = objective.auxiliary
    mask = draw_mask(
        sample.draws, f"auxiliary/{repeat}", objective.config.mask_schedule, model.token_shape
    ).mask
    tokens = torch.where(mask, model.mask_id, sample.tokens)
    return mask, model.logits(model.embed(tokens), sample.condition)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_auxiliary_learns_the_masked_tokens(family: str, smoothing: float) -> None:
    objective = distillation(family, auxiliary_label_smoothing=smoothing)
    sample = rollout(family).detached()
    mask, logits = auxiliary_case(objective, sample)
    expected = functional.cross_entropy(
        logits[mask], sample.tokens[mask], label_smoothing=smoothing
    )
    loss = objective.role_loss(AUXILIARY, sample)
    torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.metrics["auxiliary/loss"], expected.detach())
    names = [name for name, _ in objective.auxiliary.named_parameters()]
    parameters = list(objective.auxiliary.parameters())
    got = torch.autograd.grad(loss.value, parameters, allow_unused=True)
    want = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, g, w in zip(names, got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            torch.testing.assert_close(g, w, atol=1e-7, rtol=1e-4, msg=name)
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_its_masks_are_its_own() -> None:
    objective, sample = distillation(auxiliary_steps=2), rollout(count=64).detached()
    masks = [draw_mask(sample.draws, s, "arccos", (4,)).mask for s in ("matching", "auxiliary/0")]
    masks.append(auxiliary_case(objective, sample, repeat=1)[0])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    mask, logits = auxiliary_case(objective, sample, repeat=1)
    loss = objective.role_loss(Phase("auxiliary", 1), sample)
    expected = functional.cross_entropy(
        logits[mask], sample.tokens[mask], label_smoothing=0.1
    ).detach()
    torch.testing.assert_close(loss.value.detach(), expected)
    # Two phases a step: each logs its half, and the trainer sums.
    torch.testing.assert_close(loss.metrics["auxiliary/loss"], expected / 2)


def test_the_soft_term() -> None:
    objective, sample = distillation(auxiliary_soft_weight=0.7), rollout().detached()
    mask, logits = auxiliary_case(objective, sample)
    hard = functional.cross_entropy(logits[mask], sample.tokens[mask], label_smoothing=0.1)
    p = sample.logits.softmax(-1)
    kl = (p * (sample.logits.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)[mask].mean()
    loss = objective.role_loss(AUXILIARY, sample).value
    torch.testing.assert_close(loss, hard + 0.7 * kl)


def test_dropped_conditions() -> None:
    objective, sample = distillation(auxiliary_condition_drop=1.0), rollout().detached()
    none = objective.auxiliary.unconditional(sample.condition)
    plain = distillation()
    without = plain.role_loss(AUXILIARY, replace(sample, condition=none)).value
    torch.testing.assert_close(objective.role_loss(AUXILIARY, sample).value, without)
    assert not torch.allclose(plain.role_loss(AUXILIARY, sample).value, without)


def test_the_loss_is_a_share_of_the_global_batch() -> None:
    """Micro-batches add up to the batch, in value and gradient, whatever they are cut into."""
    objective, whole = distillation(guidance_scale=2.0, weighting=0.5), rollout(count=8)
    assert micro_batch().share == 1

    def part(first: int, count: int) -> Rollout:
        rows = slice(first, first + count)
        return Rollout(
            whole.draws.part(first, count), whole.draws, whole.condition[rows],
            whole.logits[rows], whole.tokens[rows],
        )  # fmt: skip

    parts = [part(0, 2), part(2, 5), part(7, 1)]
    for kind in ("masked", "batch", "sum"):
        cut = distillation(guidance_scale=2.0, weighting=0.5, normalization=kind)
        total = torch.stack([cut.student_loss(p).value for p in parts]).sum()
        torch.testing.assert_close(total, cut.student_loss(whole).value)
    together = objective.role_loss(AUXILIARY, whole.detached()).value
    apart = sum(objective.role_loss(AUXILIARY, p.detached()).value for p in parts)
    torch.testing.assert_close(apart, together)

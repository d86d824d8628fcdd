"""The generator's method: its losses add up, its phases are ordered, its embeddings stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.training import (
    FAMILIES,
    METHODS,
    adversarial,
    distillation,
    generator,
    micro_batch,
    reward_objective,
    snapshot,
    trainer,
    transformer,
    twin,
)
from torch import Tensor

from softdimo_fast.data.source import UniformConditions
from softdimo_fast.diffusion import OneStepConfig, draw_tokens, initial_embeddings
from softdimo_fast.trainers import (
    AdversarialTrainer,
    DistillationTrainer,
    GeneratorConfig,
    GeneratorMethod,
    Loss,
    Objective,
    OptimizerConfig,
    Phase,
    RewardTrainer,
    Rollout,
    ScheduleConfig,
    TrainerConfig,
)

STUDENT = Phase("student")


def terms(family: str) -> list[Objective]:
    return [
        distillation(family, guidance_scale=2.0, weight=1.5),
        adversarial(family, weight=0.5),
        reward_objective(family, weight=0.3),
    ]


def student_gradients(objectives: Sequence[Objective], family: str) -> dict[str, Tensor]:
    method = generator(*objectives, family=family)
    method.loss(STUDENT, micro_batch()).value.backward()
    named = method.student.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_add_up(family: str) -> None:
    together = student_gradients(terms(family), family)
    apart = [student_gradients([objective], family) for objective in terms(family)]
    assert together
    for name, gradient in together.items():
        expected = torch.stack([single[name] for single in apart]).sum(0)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4, msg=name)
        # All three terms speak.
        assert all(single[name].any() for single in apart if gradient.any()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_networks_leave_the_student_alone(family: str) -> None:
    """Student, teacher and auxiliary start equal: the first gradient is zero but for guidance."""
    teacher = transformer(family)
    for scale in (1.0, 2.0):
        matching = distillation(
            family, teacher=twin(teacher), auxiliary=twin(teacher), guidance_scale=scale
        )
        method = generator(matching, family=family, student=twin(teacher))
        method.loss(STUDENT, micro_batch()).value.backward()
        gradients = [p.grad for p in method.student.parameters() if p.grad is not None]
        assert gradients
        assert any(g.any() for g in gradients) == (scale != 1)


def test_the_students_phase_gives_gradients_to_the_student_alone() -> None:
    objectives = terms("token")
    method = generator(*objectives)
    method.loss(STUDENT, micro_batch()).value.backward()
    for role, module in method.roles.items():
        if role != "student":
            assert all(p.grad is None for p in module.parameters()), role
    for objective in objectives:
        for model in vars(objective).values():
            if isinstance(model, torch.nn.Module):
                assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_embeddings_do_not_move(family: str, freeze: bool) -> None:
    method = generator(reward_objective(family), family=family, freeze_embeddings=freeze)
    before = [p.detach().clone() for p in method.student.embedding_parameters()]
    run = trainer(method, steps=3)
    run.run()
    average = run.averages["student"].module.embedding_parameters()
    for old, new, mean in zip(before, method.student.embedding_parameters(), average, strict=True):
        assert torch.equal(old, new) == freeze
        if freeze:
            assert_same_bits(old, mean.detach())
    moved = [name for name in snapshot(run) if name.startswith("student_optimizer/")]
    assert moved


def test_phases_and_warm_up() -> None:
    objectives = [distillation(auxiliary_steps=2), adversarial(heads_steps=3)]
    method = generator(*objectives, warmup_steps=2)
    owned = [Phase("auxiliary", 0), Phase("auxiliary", 1)] + [Phase("heads", i) for i in range(3)]
    assert method.phases(1) == owned
    assert method.phases(2) == [STUDENT, *owned]
    run = trainer(method, steps=3)
    before = snapshot(run)
    run.train_step()
    run.train_step()
    for name, value in snapshot(run).items():
        if name.startswith(("student/", "student_average/")):
            assert_same_bits(before[name], value, name)
        elif name == "auxiliary/output.weight":
            assert not torch.equal(before[name], value)
    run.train_step()
    assert not torch.equal(before["student/output.weight"], snapshot(run)["student/output.weight"])


def test_the_students_schedule_counts_from_its_first_step() -> None:
    schedule = ScheduleConfig(warmup_steps=4)
    optimizer = OptimizerConfig(learning_rate=0.1, schedule=schedule)
    run = trainer(
        generator(reward_objective(), distillation(), warmup_steps=2, optimizer=optimizer)
    )
    for _ in range(3):
        run.train_step()
    rate = run.optimizers["student"].optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.1 / 4)


@pytest.mark.parametrize(
    ("auxiliary_steps", "reuse", "rollouts"),
    [(1, True, 1), (1, False, 2), (2, True, 2), (2, False, 3), (3, False, 4)],
)
def test_rollouts_are_shared(auxiliary_steps: int, reuse: bool, rollouts: int) -> None:
    """One forward pass of the generator for the student, and as few as can be for all others together."""
    objectives = [distillation(auxiliary_steps=auxiliary_steps), adversarial()]
    method = generator(*objectives, reuse_rollout=reuse)
    seen: list[Any] = []
    with method.student.register_forward_hook(lambda *args: seen.append(args[1][0])):
        trainer(method, steps=1).run()
    assert len(seen) == rollouts
    assert all(not torch.equal(seen[0], other) for other in seen[1:])


class Recorder(Objective):
    """An objective that keeps the rollouts which its own phases are given."""

    def __init__(self) -> None:
        self.module, self.rollouts = torch.nn.Linear(1, 1), list[Rollout]()

    @property
    def roles(self) -> dict[str, torch.nn.Module]:
        return {"recorder": self.module}

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        return {"recorder": OptimizerConfig()}

    def phases(self, step: int) -> list[Phase]:
        return [Phase("recorder", 0), Phase("recorder", 1)]

    def student_loss(self, rollout: Rollout) -> Loss:
        return Loss(0 * rollout.logits.sum(), {})

    def role_loss(self, phase: Phase, rollout: Rollout) -> Loss:
        self.rollouts.append(rollout)
        return Loss(self.module(torch.ones(1, 1)).sum(), {})


@pytest.mark.parametrize("reuse", [True, False])
def test_rollouts_carry_the_draws_they_were_made_of(reuse: bool) -> None:
    recorder = Recorder()
    run = trainer(generator(recorder, reuse_rollout=reuse), accumulation=2)
    run.train_step()
    for repeat in (0, 1):
        first, second = recorder.rollouts[2 * repeat : 2 * repeat + 2]
        for part, start in ((first, 0), (second, 4)):
            assert part.share == 0.5
            assert part.global_draws.seed == part.draws.seed
            assert part.draws.samples.tolist() == [start, start + 1, start + 2, start + 3]
            assert part.global_draws.samples.tolist() == list(range(8))
            assert torch.equal(part.tokens, draw_tokens(part.logits, part.draws))
            assert not part.logits.requires_grad
    seeds = [rollout.draws.seed for rollout in recorder.rollouts[::2]]
    assert len(set(seeds)) == 2
    assert (seeds[0] == 0) == reuse  # the student's own draws


def test_a_fresh_rollout_is_of_the_updated_generator() -> None:
    for reuse in (True, False):
        method, batch = generator(distillation(), reuse_rollout=reuse), micro_batch()
        method.loss(STUDENT, batch)
        with torch.no_grad():
            method.student.output.bias[5] += 1e4
        rows = []
        hook = method.objectives[0].auxiliary.token_embedding.register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda _, args, rows=rows: rows.append(args[0])
        )
        with hook:
            method.loss(Phase("auxiliary"), batch)
        (tokens,) = rows
        assert (set(tokens[tokens != 8].tolist()) == {5}) == (not reuse)


def test_the_student_and_its_average_have_no_dropout() -> None:
    student = transformer().train()
    run = trainer(generator(distillation(), student=student))
    assert not student.training
    assert not run.averages["student"].module.training


def test_the_trainers_are_the_loop_with_the_right_method() -> None:
    def build(kind: Any, *objectives: Any) -> Any:
        return kind(
            transformer(seed=2), UniformConditions(2), *objectives, generator=GeneratorConfig(),
            config=TrainerConfig(steps=2, batch_size=8, log_every=2),
        )  # fmt: skip

    states = []
    for kind, order in [
        (DistillationTrainer, "dar"),
        (AdversarialTrainer, "adr"),
        (RewardTrainer, "rda"),
    ]:
        objectives = {
            "d": distillation(guidance_scale=2.0),
            "a": adversarial(),
            "r": reward_objective(),
        }
        run = build(kind, *(objectives[letter] for letter in order))
        assert isinstance(run.method, GeneratorMethod)
        assert set(run.method.roles) == {"student", "auxiliary", "heads"}
        run.run()
        states.append(snapshot(run))
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-3, msg=name)


def test_objectives_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        generator()
    with pytest.raises(
        ValueError, match=r"different roles, got \['student', 'auxiliary', 'auxiliary'\]"
    ):
        generator(distillation(), distillation())
    auxiliary = transformer(seed=1)
    with pytest.raises(ValueError, match="must not share parameters"):
        generator(distillation(auxiliary=auxiliary), student=auxiliary)
    with pytest.raises(LookupError, match="RewardObjective trains no role 'heads'"):
        reward_objective().role_loss(Phase("heads"), None)  # type: ignore[arg-type]


def test_sigma_rises_to_its_own_value() -> None:
    one_step = OneStepConfig(sigma=0.4)
    for schedule in ("linear", "cosine", "exponential"):
        config = GeneratorConfig(one_step=one_step, sigma_schedule=schedule, sigma_steps=10)  # type: ignore[arg-type]
        values = [config.one_step_at(step).sigma for step in range(12)]
        assert values[0] == 0
        if schedule == "exponential":
            assert values[10] == pytest.approx(0.4 * (1 - math.exp(-1)))
        else:
            assert values[10] == values[11] == 0.4
        assert all(a < b for a, b in pairwise(values[:11]))
    middle = GeneratorConfig(one_step=one_step, sigma_schedule="linear", sigma_steps=10)
    assert middle.one_step_at(5).sigma == pytest.approx(0.2)
    assert GeneratorConfig(one_step=one_step).one_step_at(0) == one_step


def test_the_generator_sees_the_noise_of_its_step() -> None:
    config = {"sigma_schedule": "linear", "sigma_steps": 4, "one_step": OneStepConfig(sigma=0.8)}
    method, batch = generator(reward_objective(), **config), micro_batch(step=2)
    seen: list[Tensor] = []
    with method.student.register_forward_hook(lambda *args: seen.append(args[1][0])):
        method.loss(STUDENT, batch)
    expected = initial_embeddings(method.student, batch.draws, ratio=0.6, sigma=0.4)
    assert_same_bits(seen[0], expected)


@pytest.mark.parametrize("name", ["distillation", "distillation, two rollouts", "all"])
def test_logged_gradient_norms_are_means_over_the_phases(name: str) -> None:
    """Two phases of a role in a step are averaged, not summed."""
    run = trainer(METHODS[name](OptimizerConfig(clip_norm=None)), steps=1)
    norms: dict[str, list[float]] = {}
    for role, optimizer in run.optimizers.items():

        def record(*_: Any, role: str = role, parameters: Any = optimizer.parameters) -> None:
            total = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None])
            norms.setdefault(role, []).append(float(total.sum().sqrt()))

        optimizer.optimizer.register_step_pre_hook(record)
    run.train_step()
    metrics = run._means.read()[0]
    for role, values in norms.items():
        expected = sum(values) / len(values)
        assert metrics[f"{role}/gradient_norm"] == pytest.approx(expected, rel=1e-4), role

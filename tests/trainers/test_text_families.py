"""MaskGen with TA-TiTok and Meissonic with its VQ: steps of every method, on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.text_families import TRANSFORMERS, maskgen, meissonic_vq, tatitok
from support.training import FAST, generator, micro_batch, snapshot, trainer
from torch import Tensor

from softdimo_fast.diffusion import Draws, OneStepConfig, one_step_sample
from softdimo_fast.models.conditions import rows
from softdimo_fast.models.seeding import seeded
from softdimo_fast.trainers import (
    Adversarial,
    AdversarialConfig,
    DiscriminatorHeads,
    DistillationConfig,
    DistributionMatching,
    HeadsConfig,
    RewardConfig,
    RewardObjective,
    TeacherConfig,
    TeacherMethod,
    TestTimeConfig,
    TestTimeEmbeddingOptimizer,
)

FAMILIES = {"maskgen": tatitok, "meissonic": meissonic_vq}
PROMPTS = 16


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(family: str, seed: int = 0) -> Any:
    """A teacher whose logits differ."""
    made = TRANSFORMERS[family][0]()
    with seeded(seed), torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def conditions(family: str, draws: Draws) -> Any:
    """Prompts by number."""
    return rows(TRANSFORMERS[family][1](PROMPTS), draws.integers("prompt", PROMPTS))


def source(family: str, draws: Draws) -> tuple[Tensor, Any]:
    made = TRANSFORMERS[family][0]()
    return draws.integers("tokens", made.vocabulary, *made.token_shape), conditions(family, draws)


def red(images: Tensor, condition: Any) -> Tensor:
    """A reward."""
    return images[:, 0].flatten(1).mean(1) - images[:, 1:].flatten(1).mean(1)


def objective(family: str, name: str) -> Any:
    if name == "distillation":
        config = DistillationConfig(guidance_scale=3.0, auxiliary_optimizer=FAST)
        return DistributionMatching(model(family), model(family, 1), config)
    if name == "reward":
        return RewardObjective(FAMILIES[family](), red, RewardConfig())
    teacher = model(family)
    # No classes: a text family's heads look at features alone.
    config = HeadsConfig(hidden=8, squeeze=4, global_hidden=(8, 8), class_projection=False)
    with torch.no_grad():
        (features, *_) = teacher.features(
            teacher.embed(torch.zeros(1, *teacher.token_shape, dtype=torch.long)),
            conditions(family, Draws.of(0, 0, 1)), (0,),
        )  # fmt: skip
    with seeded(3):
        heads = DiscriminatorHeads(
            config, width=features.shape[2], positions=features.shape[1],
            layers=len(config.layers_of(teacher.depth)), conditions=1,
        )  # fmt: skip
    options = AdversarialConfig(
        heads=config, heads_optimizer=FAST, r1="finite_difference", r1_weight=0.1
    )
    return Adversarial(teacher, heads, lambda draws: source(family, draws), options)


@pytest.mark.parametrize("name", ["distillation", "adversarial", "reward", "all"])
def test_the_generator_trains(family: str, name: str) -> None:
    names = ["distillation", "adversarial", "reward"] if name == "all" else [name]
    method = generator(*(objective(family, n) for n in names), student=model(family, 2))
    method.conditions = lambda draws: conditions(family, draws)
    frozen = {id(p) for p in method.student.embedding_parameters()}
    run = trainer(method, steps=2)
    before = snapshot(run)
    run.run()
    after = snapshot(run)
    names_of = {n for n, p in method.student.named_parameters() if id(p) not in frozen}
    moved = {n for n in names_of if not torch.equal(before[f"student/{n}"], after[f"student/{n}"])}
    assert len(moved) > 0.9 * len(names_of)
    for n, p in method.student.named_parameters():
        if id(p) in frozen:
            assert_same_bits(before[f"student/{n}"], after[f"student/{n}"])
    assert all(bool(t.isfinite().all()) for t in after.values() if t.is_floating_point())


def test_the_teacher_trains(family: str) -> None:
    method = TeacherMethod(
        model(family), lambda draws: source(family, draws),  # type: ignore[arg-type]
        TeacherConfig(condition_drop=0.5, label_smoothing=0.1, optimizer=FAST),
    )  # fmt: skip
    run = trainer(method, steps=2)
    before = snapshot(run)
    run.run()
    after = snapshot(run)
    changed = [
        n for n, t in after.items() if n.startswith("teacher/") and not torch.equal(t, before[n])
    ]
    assert len(changed) > 0.9 * sum(n.startswith("teacher/") for n in after)


@pytest.mark.parametrize(("drop", "null"), [(0.0, False), (1.0, True)])
def test_dropped_conditions_are_dropped(family: str, drop: float, null: bool) -> None:
    """Meissonic's public training script keeps the share that it is told to drop."""
    method = TeacherMethod(
        model(family), lambda draws: source(family, draws),  # type: ignore[arg-type]
        TeacherConfig(condition_drop=drop),
    )  # fmt: skip
    seen: list[Any] = []
    method.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    (phase,) = method.phases(0)
    batch = micro_batch()
    method.loss(phase, batch)
    asked = conditions(family, batch.draws)
    assert_same_bits(seen[0].text, asked.null_text if null else asked.text)


def test_no_divergence_without_guidance(family: str) -> None:
    """Oracle 4: equal teacher and auxiliary give no gradient, but for guidance."""
    for scale, zero in ((1.0, True), (3.0, False)):
        matching = DistributionMatching(
            model(family), model(family), DistillationConfig(guidance_scale=scale)
        )
        method = generator(matching, student=model(family, 2))
        method.conditions = lambda draws: conditions(family, draws)
        (phase, *_) = method.phases(0)
        loss = method.loss(phase, micro_batch()).value
        loss.backward()
        total = sum(
            float(p.grad.abs().sum()) for p in method.student.parameters() if p.grad is not None
        )
        assert (total < 1e-4) == zero


def test_test_time_search(family: str) -> None:
    draws = Draws.of(4, 0, 3)
    condition = conditions(family, draws)
    config = TestTimeConfig(
        candidates=2,
        iterations=3,
        learning_rate=0.1,
        one_step=OneStepConfig(sigma=0.2),
        batch_size=2,
    )
    search = TestTimeEmbeddingOptimizer(model(family), FAMILIES[family](), red, config)
    result = search(condition, condition, draws)
    assert result.images.shape[0] == 3
    assert bool((result.reward >= result.initial_reward).all())
    assert bool((result.reward > result.initial_reward).any())


@pytest.mark.parametrize("decode", ["sample", "argmax", "soft"])
def test_one_step_images(family: str, decode: Any) -> None:
    draws = Draws.of(4, 0, 3)
    tokenizer = FAMILIES[family]()
    images = one_step_sample(
        model(family), tokenizer, conditions(family, draws), draws, OneStepConfig(), decode=decode
    )
    assert images.shape[:2] == (3, 3)
    assert bool(images.isfinite().all())


def test_the_image_follows_the_text_of_its_sample() -> None:
    """TA-TiTok's decoder gets each sample's own guidance, in rewards and in search."""
    draws = Draws.of(4, 0, 3)
    condition, tokenizer = conditions("maskgen", draws), tatitok()
    seen: list[Tensor] = []
    tokenizer.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    config = TestTimeConfig(iterations=1, batch_size=2)
    TestTimeEmbeddingOptimizer(maskgen(), tokenizer, red, config)(condition, condition, draws)
    for text in seen:
        part = condition.guidance[:2] if len(text) == 2 else condition.guidance[2:]
        assert_same_bits(text, part)
    seen.clear()
    method = generator(RewardObjective(tokenizer, red, RewardConfig()), student=maskgen())
    method.conditions = lambda draws: conditions("maskgen", draws)
    batch = micro_batch()
    method.loss(method.phases(0)[0], batch)
    assert_same_bits(seen[0], conditions("maskgen", batch.draws).guidance)

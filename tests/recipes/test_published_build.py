"""Published recipes on tiny teachers from files: training, resume, samples, search; every file a real one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_runs import (
    FAMILY,
    PROMPTS,
    RECIPES,
    TEXT_RECIPES,
    Files,
    brightness,
    tiny_model,
    tiny_run,
    write_files,
)
from torch import Tensor

from softdimo_fast.diffusion import MASKBIT_SAMPLERS, Draws, MaskGitSamplerConfig, OneStepConfig
from softdimo_fast.diffusion.text_samplers import MaskGenSamplerConfig, MeissonicSamplerConfig
from softdimo_fast.models import create, describe, from_pretrained, save_pretrained
from softdimo_fast.recipes.build import beside, build_trainer, finished_run, trained_role
from softdimo_fast.recipes.published import LONGER
from softdimo_fast.recipes.published_build import build_published_trainer
from softdimo_fast.recipes.published_inputs import Inputs
from softdimo_fast.recipes.published_models import feature_shape
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun
from softdimo_fast.recipes.published_samples import ImageMaker, published_sampler, search
from softdimo_fast.trainers import GeneratorTrainer, MicroBatch, Phase, Stopped, checkpoint

METHODS = ("distillation", "adversarial", "reward")
TRAINED = [(name, method) for name in RECIPES for method in METHODS] + [("maskbit", LONGER)]
CLASS_RECIPES = ("maskgit", "maskbit")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Of each family."""
    families = dict.fromkeys(FAMILY.values())
    return {family: write_files(tmp_path_factory.mktemp(family), family) for family in families}


def built(
    name: str, method: str, files: Mapping[str, Files], folder: Path, *changes: str
) -> GeneratorTrainer:
    ours = files[FAMILY[name]]
    run = tiny_run(name, method, ours, *changes)
    return build_published_trainer(run, folder, encoder=ours.encoder, reward=brightness)


def maker(name: str, source: Path, files: Mapping[str, Files], **options: Any) -> ImageMaker:
    ours = files[FAMILY[name]]
    options = {"tokenizer": str(ours.root / "tokenizer"), "encoder": ours.encoder} | options
    return ImageMaker.of(source, prompts=ours.root / "prompts.txt", **options)


def tensors(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    loaded = checkpoint.load(folder / "checkpoints")
    assert loaded.step == 2
    return {name: loaded.group(name) for name in loaded.tensors}


def different(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [key for key in first if not torch.equal(first[key], second[key])]


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_a_run_trains_and_a_stopped_one_goes_on_as_if_it_had_not_been(
    name: str, method: str, files: dict[str, Files], tmp_path: Path
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    built(name, method, files, whole).run()
    trainer = built(name, method, files, halved)
    with pytest.raises(Stopped):
        trainer.run(stop=lambda: True)
    assert trainer.step == 1
    built(name, method, files, halved).run(resume=True)
    groups = tensors(whole)
    roles = {"student", "student_average", "auxiliary"}
    roles |= {"heads"} if method in ("adversarial", LONGER) else set()
    assert roles <= set(groups)
    for group, other in tensors(halved).items():
        assert different(groups[group], other) == [], group
    teacher = from_pretrained(files[FAMILY[name]].root / "teacher")
    frozen = {id(p) for p in teacher.embedding_parameters()}
    still = {key for key, p in teacher.named_parameters() if id(p) in frozen}
    moved = set(different(teacher.state_dict(), groups["student"]))
    assert moved
    assert not moved & still
    assert different(teacher.state_dict(), groups["auxiliary"])
    assert finished_run(whole) == tiny_run(name, method, files[FAMILY[name]])


def sgd(optimizer: str) -> list[str]:
    """Visible moves, which a gradient's rounding changes no more than the gradient itself."""
    return [
        f"{optimizer}.{x}" for x in ("name=sgd", "learning_rate=0.1", "schedule.warmup_steps=0")
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_micro_batches_change_nothing(name: str, files: dict[str, Files], tmp_path: Path) -> None:
    optimizers = {
        "student": "generator.optimizer",
        "auxiliary": "distillation.auxiliary_optimizer",
        "heads": "adversarial.heads_optimizer",
    }
    changes = [change for optimizer in optimizers.values() for change in sgd(optimizer)]
    moves: list[dict[str, Tensor]] = []
    for parts in (1, 4):
        changed = [*changes, f"trainer.accumulation={parts}"]
        trainer = built(name, "adversarial", files, tmp_path / str(parts), *changed)
        before = {role: flat(trainer.method.roles[role]) for role in optimizers}
        trainer.run()
        moves.append({role: flat(trainer.method.roles[role]) - before[role] for role in optimizers})
    one, four = moves
    for role, moved in one.items():
        assert float(moved.norm()) > 0.01, role
        assert float((four[role] - moved).norm() / moved.norm()) < 1e-4, role


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("name", RECIPES)
def test_recomputed_blocks_change_nothing(
    name: str, files: dict[str, Files], tmp_path: Path
) -> None:
    for on in ("true", "false"):
        built(name, "adversarial", files, tmp_path / on, f"checkpoint_blocks={on}").run()
    first, second = tensors(tmp_path / "true"), tensors(tmp_path / "false")
    for role in ("student", "auxiliary", "heads"):
        assert different(first[role], second[role]) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_three_terms_add_up(name: str, files: dict[str, Files], tmp_path: Path) -> None:
    """GAN and reward, beside Di[M]O, in one run: its gradient is that of three runs of one term each."""
    ours = files[FAMILY[name]]
    run = tiny_run(name, "adversarial", ours)
    rewarded = tiny_run(name, "reward", ours)
    run = replace(run, reward=rewarded.reward, rewards=rewarded.rewards)
    terms = ("distillation", "adversarial", "reward")
    directions, equal = [], {}
    for term in terms:
        others: dict[str, Any] = {other: None for other in terms if other != term}
        others |= {} if term == "reward" else {"rewards": None}
        single = student_gradient(replace(run, **others), ours, tmp_path / term)
        norm = float(single.norm())
        directions.append(single / norm)
        # No term may hide behind another one, a thousand times larger.
        config = getattr(run, term)
        equal[term] = replace(config, weight=config.weight / norm)
    run = replace(run, **equal)
    found = student_gradient(run, ours, tmp_path / "all")
    assert float((found - torch.stack(directions).sum(0)).norm()) < 1e-4
    trainer = build_published_trainer(
        run, tmp_path / "run", encoder=ours.encoder, reward=brightness
    )
    trainer.run()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"reward/value", "adversarial/heads", "distillation/divergence"} <= set(line)


def student_gradient(run: PublishedGeneratorRun, files: Files, folder: Path) -> Tensor:
    """Of the first micro-batch."""
    trainer = build_published_trainer(run, folder, encoder=files.encoder, reward=brightness)
    draws = Draws.of(run.trainer.seed, 0, run.trainer.batch_size)
    trainer.method.loss(Phase("student"), MicroBatch(draws.part(0, 2), draws)).value.backward()
    parameters = trainer.method.roles["student"].parameters()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_build_trainer_takes_published_runs(files: dict[str, Files], tmp_path: Path) -> None:
    run = tiny_run("maskgit", "adversarial", files["maskgit"])
    trainer = build_trainer(run, tmp_path / "run")
    trainer.run()
    assert tensors(tmp_path / "run")


def test_the_longer_run_starts_from_the_adversarial_one(
    files: dict[str, Files], tmp_path: Path
) -> None:
    built("maskbit", "adversarial", files, tmp_path / "adversarial").run()
    trainer = built("maskbit", LONGER, files, tmp_path / "longer", "start=adversarial")
    before = tensors(tmp_path / "adversarial")
    roles = trainer.method.roles
    assert different(before["student_average"], roles["student"].state_dict()) == []
    assert different(before["auxiliary"], roles["auxiliary"].state_dict()) == []
    assert different(before["heads"], roles["heads"].state_dict()) == []
    trainer.run()
    assert different(before["student"], tensors(tmp_path / "longer")["student"])


def test_a_run_starts_from_a_published_student(files: dict[str, Files], tmp_path: Path) -> None:
    student = tiny_model("maskgit", seed=9)
    save_pretrained(student, tmp_path / "student")
    change = f"student={tmp_path / 'student'}"
    trainer = built("maskgit", "distillation", files, tmp_path / "run", change)
    assert different(student.state_dict(), trainer.method.roles["student"].state_dict()) == []
    teacher = from_pretrained(files["maskgit"].root / "teacher")
    auxiliary = trainer.method.roles["auxiliary"].state_dict()
    assert different(teacher.state_dict(), auxiliary) == []


def test_meissonic_is_told_of_time_as_the_run_says(files: dict[str, Files], tmp_path: Path) -> None:
    for timestep in ("condition", "mask_ratio"):
        change = f"timestep={timestep}"
        built("meissonic", "distillation", files, tmp_path / timestep, change).run()
        assert trained_role(tmp_path / timestep, "student").config.timestep == timestep
    one, other = tensors(tmp_path / "condition"), tensors(tmp_path / "mask_ratio")
    assert different(one["student"], other["student"])


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_the_gan_sees_each_real_image_with_its_own_caption(
    name: str, files: dict[str, Files], tmp_path: Path
) -> None:
    ours = files[FAMILY[name]]
    trainer = built(name, "adversarial", files, tmp_path / "run")
    real = trainer.method.objectives[1].real
    draws = Draws.of(0, 0, 4)
    tokens, condition = real(draws)
    _, labels = real.source(draws)
    expected = ours.encoder([PROMPTS[label] for label in labels.tolist()])
    assert torch.equal(condition.text, expected.text)
    assert torch.equal(condition.prompt, labels)
    assert tokens.shape == (4, *from_pretrained(ours.root / "teacher").token_shape)


def test_rewards_are_asked_about_the_generators_condition(
    files: dict[str, Files], tmp_path: Path
) -> None:
    asked: list[Any] = []

    def reward(images: Tensor, condition: Any) -> Tensor:
        asked.append(condition)
        return images.flatten(1).mean(1)

    for name in ("maskgit", "meissonic"):
        ours = files[FAMILY[name]]
        run = tiny_run(name, "reward", ours)
        build_published_trainer(run, tmp_path / name, encoder=ours.encoder, reward=reward).run()
    labels, text = asked[0], asked[-1]
    assert labels.dtype == torch.int64
    assert set(text.prompt.tolist()) <= {0, 1, 2}


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_heads_fit_the_features(name: str, files: dict[str, Files]) -> None:
    ours = files[FAMILY[name]]
    teacher = from_pretrained(ours.root / "teacher")
    inputs = Inputs.of(
        "test", teacher, tiny_run(name, "distillation", ours).text, batch_size=2,
        device=torch.device("cpu"), encoder=ours.encoder,
    )  # fmt: skip
    tokens = torch.full((2, *teacher.token_shape), teacher.mask_id)
    condition = inputs.numbered(torch.arange(2))
    (feature,) = teacher.features(teacher.embed(tokens), condition, (teacher.depth - 1,))
    assert feature.shape == (2, *feature_shape(teacher))


# ---- samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_teachers_sample_with_their_published_samplers(name: str, files: dict[str, Files]) -> None:
    images = maker(name, files[FAMILY[name]].root / "teacher", files)
    expected = {
        "maskgit": MaskGitSamplerConfig(), "maskbit": images.sampler,
        "maskgen_vq": MaskGenSamplerConfig(), "meissonic": MeissonicSamplerConfig(),
    }  # fmt: skip
    assert images.sampler == expected[FAMILY[name]]
    numbers = images.numbers(5)
    assert numbers.tolist() == [0, 1, 2, 0, 1]
    whole = images.images(numbers, seed=3)
    assert whole.shape[:2] == (5, 3)
    assert whole.isfinite().all()
    parts = images.images(numbers, seed=3, batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert not torch.equal(images.images(numbers, seed=4), whole)
    fewer = images.with_settings(["steps=3", "guidance_scale=1"]).images(numbers, seed=3)
    assert not torch.equal(fewer, whole)


def test_maskbit_samples_with_the_settings_of_its_bits() -> None:
    for bits in (10, 12, 14, 16, 18):
        with torch.device("meta"):
            model = create(tiny_config(bits))
        assert published_sampler(model) == MASKBIT_SAMPLERS[bits]


def tiny_config(bits: int) -> Any:
    return replace(tiny_model("maskbit").config, codebook_size=2**bits)


@pytest.mark.parametrize("name", RECIPES)
def test_generators_sample_in_one_step(name: str, files: dict[str, Files], tmp_path: Path) -> None:
    built(name, "distillation", files, tmp_path / "run").run()
    images = maker(name, tmp_path / "run", files, tokenizer=None)
    run = tiny_run(name, "distillation", files[FAMILY[name]])
    assert images.sampler == run.generator.one_step
    numbers = images.numbers(3)
    sampled = images.images(numbers, seed=1)
    assert torch.equal(images.images(numbers, seed=1, batch_size=3), sampled)
    # The same weights as a model of their own.
    save_pretrained(trained_role(tmp_path / "run", "student"), tmp_path / "model")
    alone = maker(name, tmp_path / "model", files, one_step=True)
    assert isinstance(alone.sampler, OneStepConfig)
    assert torch.equal(alone.images(numbers, seed=1), sampled)
    soft = images.images(numbers, seed=1, decode="soft")
    assert soft.shape == sampled.shape
    always = images.images(images.numbers(3, condition=2), seed=1)
    torch.testing.assert_close(always[2], sampled[2], rtol=1e-4, atol=1e-4)


# ---- search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_search_raises_the_reward(name: str, files: dict[str, Files], tmp_path: Path) -> None:
    ours = files[FAMILY[name]]
    built(name, "distillation", files, tmp_path / "run").run()
    save_pretrained(trained_role(tmp_path / "run", "student"), tmp_path / "model")
    results = []
    for source in ("run", "model"):
        run = tiny_run(name, "tteo", ours, f"generator={tmp_path / source}", "samples=4")
        found, numbers = search(run, encoder=ours.encoder, reward=brightness)
        assert numbers.tolist() == [0, 1, 2, 0]
        assert (found.reward >= found.initial_reward).all()
        assert (found.reward > found.initial_reward).any()
        assert found.history.shape == (3, 4)
        results.append(found)
    assert torch.equal(results[0].reward, results[1].reward)
    assert describe(from_pretrained(tmp_path / "model"))["family"] == FAMILY[name]
    assert beside(tmp_path / "run", "model") == tmp_path / "model"

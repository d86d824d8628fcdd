"""From run configs to trainers: one chain of tiny real runs, and what its links refuse."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.runs import tiny, train
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.data import load_digits
from softdimo_fast.models import ConvClassifier, TokenTransformer, VectorQuantizer
from softdimo_fast.recipes.build import (
    MissingRunError,
    beside,
    build_trainer,
    digit_reward,
    digits_tokens,
    finished_run,
    is_finished,
    parity_reward,
    starting_checkpoint,
    trained_role,
)
from softdimo_fast.recipes.runs import DigitsData
from softdimo_fast.trainers import CheckpointError, TrainerConfig, checkpoint

CHAIN = (
    "judge", "reward_classifier", "tokenizer", "teacher", "distillation", "control", "adversarial", "reward"
)  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of the recipe, each from those before it."""
    root = tmp_path_factory.mktemp("chain")
    for method in CHAIN:
        train(root, method)
    return root


@pytest.fixture
def copied(chain: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(chain, tmp_path / "runs"))


def tensors(folder: Path, group: str) -> dict[str, Tensor]:
    return checkpoint.load(folder / "checkpoints").group(group)


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def unfinished(root: Path, method: str) -> Path:
    """Removes the last checkpoint: the run stands at step 2 of 4."""
    checkpoint.discard_after(root / method / "checkpoints", 2)
    return root / method


# ---- what a finished run gives -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHAIN)
def test_a_finished_run_tells_its_config(chain: Path, method: str) -> None:
    assert finished_run(chain / method) == tiny(method)
    assert is_finished(chain / method)
    loaded = checkpoint.load(chain / method / "checkpoints")
    assert loaded.step == 4
    assert loaded.config["run"] == json.loads(json.dumps(_config.to_dict(tiny(method))))


def test_trained_roles_are_averages_frozen_and_in_eval_mode(chain: Path) -> None:
    kinds = {
        ("judge", "classifier"): ConvClassifier,
        ("tokenizer", "tokenizer"): VectorQuantizer,
        ("teacher", "teacher"): TokenTransformer,
        ("reward", "student"): TokenTransformer,
        ("reward", "auxiliary"): TokenTransformer,
    }
    for (method, role), kind in kinds.items():
        module = trained_role(chain / method, role)
        assert isinstance(module, kind)
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        groups = checkpoint.load(chain / method / "checkpoints").tensors
        name = f"{role}_average" if f"{role}_average" in groups else role
        assert equal(module.state_dict(), groups[name])
    assert "teacher_average" in checkpoint.load(chain / "teacher" / "checkpoints").tensors
    average, last = (tensors(chain / "reward", f"student{end}") for end in ("_average", ""))
    assert not equal(average, last)


def test_what_a_role_needs_is_all_that_is_read(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No optimizer's moments, and no discriminator where a generator is sampled."""
    read: list[str] = []
    load_file = safetensors.torch.load_file

    def recorded(path: Path) -> dict[str, Tensor]:
        read.append(path.stem)
        return load_file(path)

    monkeypatch.setattr(safetensors.torch, "load_file", recorded)
    finished_run(chain / "adversarial")
    assert read == []
    trained_role(chain / "adversarial", "student")
    assert read == ["student_average"]
    read.clear()
    start = starting_checkpoint(tiny("reward"), chain / "reward")
    assert start is not None
    assert sorted(read) == sorted({"student_average", "auxiliary", "heads"} & set(start.names))


def test_a_trained_role_does_not_touch_the_global_generator(chain: Path) -> None:
    state = torch.get_rng_state()
    trained_role(chain / "teacher", "teacher")
    build_trainer(tiny("adversarial"), chain / "another")
    assert torch.equal(state, torch.get_rng_state())
    assert not (chain / "another").exists()


def test_rewards_ask_the_trained_classifier(chain: Path) -> None:
    images = load_digits().held_out.images[:6]
    classes = torch.tensor([0, 1, 0, 1, 0, 1])
    log_p = trained_role(chain / "reward_classifier", "classifier")(images).log_softmax(1)
    assert torch.allclose(
        digit_reward(chain / "reward_classifier")(images, classes + 4),
        log_p.gather(1, classes[:, None] + 4)[:, 0],
        atol=1e-6,
    )
    of_parity = torch.stack([log_p[:, parity::2].logsumexp(1) for parity in (0, 1)], 1)
    assert torch.allclose(
        parity_reward(chain / "reward_classifier")(images, classes),
        of_parity.gather(1, classes[:, None])[:, 0],
        atol=1e-6,
    )


def test_tokens_are_plain_copies_then_augmented_ones(chain: Path) -> None:
    tokenizer, train = trained_role(chain / "tokenizer", "tokenizer"), load_digits().train
    data = DigitsData(plain_copies=2, augmented_copies=2)
    source = digits_tokens(tokenizer, data, TrainerConfig(seed=3))
    copies = source.tokens.view(4, len(train), 16)
    assert torch.equal(copies[0], tokenizer.encode(train.images))
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[1], copies[2])
    assert not torch.equal(copies[2], copies[3])
    assert torch.equal(source.conditions, train.parity.repeat(4))
    again = digits_tokens(tokenizer, data, TrainerConfig(seed=3))
    assert torch.equal(source.tokens, again.tokens)
    other = digits_tokens(tokenizer, data, TrainerConfig(seed=4))
    assert not torch.equal(source.tokens, other.tokens)


# ---- starting from another run -----------------------------------------------------------------------------


def test_without_a_start_all_begins_as_the_teacher(chain: Path) -> None:
    trainer = build_trainer(tiny("distillation"), chain / "new")
    teacher = tensors(chain / "teacher", "teacher_average")
    assert equal(trainer.method.roles["student"].state_dict(), teacher)
    assert equal(trainer.method.roles["auxiliary"].state_dict(), teacher)


def test_a_start_gives_its_average_auxiliary_and_heads(chain: Path) -> None:
    trainer = build_trainer(tiny("adversarial", "start=adversarial"), chain / "new")
    roles = {role: module.state_dict() for role, module in trainer.method.roles.items()}
    assert roles.keys() == {"student", "auxiliary", "heads"}
    assert equal(roles["student"], tensors(chain / "adversarial", "student_average"))
    assert equal(roles["auxiliary"], tensors(chain / "adversarial", "auxiliary"))
    assert equal(roles["heads"], tensors(chain / "adversarial", "heads"))
    assert not equal(roles["student"], tensors(chain / "adversarial", "student"))


def test_what_a_start_has_not_is_new(chain: Path) -> None:
    """A Di[M]O run has no heads; the GAN's begin from the seed."""
    first, second, other = (
        build_trainer(tiny("adversarial", seed=seed), chain / "new").method.roles["heads"]
        for seed in (0, 0, 1)
    )
    assert equal(first.state_dict(), second.state_dict())
    assert not equal(first.state_dict(), other.state_dict())


def test_a_start_without_a_generator_is_refused(chain: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensors called 'student_average'; there are:"):
        build_trainer(tiny("control", "start=teacher"), chain / "new")


def test_every_term_brings_its_roles(chain: Path) -> None:
    sets = {
        method: set(build_trainer(tiny(method), chain / "new").method.roles)
        for method in ("distillation", "adversarial", "reward")
    }
    assert sets["distillation"] == sets["reward"] == {"student", "auxiliary"}
    assert sets["adversarial"] == {"student", "auxiliary", "heads"}


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        ("teacher", ["tokenizer"]),
        ("distillation", ["teacher"]),
        ("control", ["teacher", "distillation"]),
        ("adversarial", ["teacher", "distillation", "tokenizer"]),
        ("reward", ["teacher", "distillation", "tokenizer", "reward_classifier"]),
    ],
)
def test_missing_and_unfinished_inputs_are_named(
    copied: Path, method: str, inputs: list[str]
) -> None:
    for name in inputs:
        kept = copied / name
        aside = kept.rename(copied / "aside")
        with pytest.raises(MissingRunError, match=f"{name} holds no trained run"):
            build_trainer(tiny(method), copied / "new")
        shutil.copytree(aside, kept)
        unfinished(copied, name)
        with pytest.raises(MissingRunError, match=f"{name} stands at step 2 of 4: finish it first"):
            build_trainer(tiny(method), copied / "new")
        shutil.rmtree(kept)
        aside.rename(kept)
    build_trainer(tiny(method), copied / "new")
    assert not (copied / "new").exists()


def test_a_damaged_input_is_not_used(copied: Path) -> None:
    for path in (copied / "tokenizer").rglob("tokenizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    assert not is_finished(copied / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors has \d+ bytes"):
        build_trainer(tiny("teacher"), copied / "new")


def test_a_damaged_last_checkpoint_leaves_an_unfinished_run(copied: Path) -> None:
    last = copied / "tokenizer" / "checkpoints" / "step_00000004" / "state.json"
    last.write_text("{}")
    with (
        pytest.warns(checkpoint.CheckpointWarning, match=r"step_00000004: state\.json"),
        pytest.raises(MissingRunError, match="stands at step 2 of 4"),
    ):
        trained_role(copied / "tokenizer", "tokenizer")


def test_a_role_that_is_not_there(chain: Path) -> None:
    with pytest.raises(CheckpointError, match="no model 'student'; there are: tokenizer"):
        trained_role(chain / "tokenizer", "student")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("teacher", "model.vocabulary=64", r"TeacherRun\.model\.vocabulary: must be 16, .* got 64"),
        ("teacher", "model.length=9", r"TeacherRun\.model\.length: must be 16, .* got 9"),
        ("teacher", "model.conditions=1", r"TeacherRun\.model\.conditions: must be 2, .* got 1"),
        ("judge", "model.num_classes=5", r"ClassifierRun\.model\.num_classes: must be 10"),
        ("judge", "model.image_size=16", r"ClassifierRun\.model\.image_size: must be 8"),
        ("tokenizer", "model.grid=3", r"TokenizerRun\.model\.grid: must be 4"),
        ("tokenizer", "trainer.device=xpu:7", r"TokenizerRun\.trainer\.device: .* got 'xpu:7'"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(
    chain: Path, method: str, change: str, message: str
) -> None:
    with pytest.raises(_config.ConfigError, match=message):
        build_trainer(tiny(method, change), chain / "new")
    assert not (chain / "new").exists()


def test_another_tokenizer_than_the_teachers_is_refused(copied: Path) -> None:
    train(copied, "tokenizer", "model.vocabulary=32", name="larger")
    with pytest.raises(_config.ConfigError, match=r"teacher\.model\.vocabulary: must be 32, .*16"):
        build_trainer(tiny("reward", "tokenizer=larger"), copied / "new")


def test_a_resume_with_another_config_is_refused(copied: Path) -> None:
    trainer = build_trainer(tiny("reward", "generator.warmup_steps=0"), copied / "reward")
    with pytest.raises(CheckpointError, match=r"run\.generator\.warmup_steps: 1 -> 0"):
        trainer.run(resume=True)


@pytest.mark.parametrize("method", ["teacher", "adversarial"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(copied: Path, method: str) -> None:
    groups = copy.deepcopy(checkpoint.load(copied / method / "checkpoints").tensors)
    unfinished(copied, method)
    build_trainer(tiny(method), copied / method).run(resume=True)
    again = checkpoint.load(copied / method / "checkpoints").tensors
    assert groups.keys() == again.keys()
    # The trainer's sums since the last log line are empty at both ends.
    assert all(equal(groups[name], again[name]) for name in groups)


def test_inputs_stand_beside_the_folder_wherever_it_is(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: Callable[[str], Path] = lambda text: beside(Path(text), "tokenizer")  # noqa: E731
    monkeypatch.chdir(chain / "teacher" / "checkpoints")
    assert at("..") == chain / "tokenizer"
    assert at("../../teacher") == chain / "tokenizer"
    monkeypatch.chdir(chain / "teacher")
    assert at(".") == chain / "tokenizer"
    assert at("new") == chain / "teacher" / "tokenizer"

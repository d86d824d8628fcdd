"""From a run config to a trainer: data, models and inputs from other runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.data import load_digits, parity, random_affine
from softdimo_fast.data.digits import NUM_DIGITS
from softdimo_fast.data.source import ImageSource, TokenSource, UniformConditions
from softdimo_fast.diffusion import Draws
from softdimo_fast.models import Tokenizer, create, describe, rebuild
from softdimo_fast.models.seeding import seeded
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun
from softdimo_fast.recipes.runs import (
    ClassifierRun,
    DigitsData,
    GeneratorRun,
    TeacherRun,
    TokenizerRun,
    TrainingRun,
)
from softdimo_fast.rewards import ClassifierReward
from softdimo_fast.trainers import (
    Adversarial,
    AdversarialConfig,
    ClassifierMethod,
    DiscriminatorHeads,
    DistributionMatching,
    GeneratorTrainer,
    Objective,
    RewardObjective,
    TeacherMethod,
    TokenizerMethod,
    Trainer,
    TrainerConfig,
    checkpoint,
)
from softdimo_fast.trainers.progress import Progress

# Of the starting run, what a generator's run takes over: not its optimizers.
START_GROUPS = ("student_average", "auxiliary", "heads")


class MissingRunError(FileNotFoundError):
    """A run that another one needs is not there, or not finished."""


# ---------------------------------------------------------------------------------------------------
# finished runs


def trained_role(folder: Path, role: str) -> Any:
    """The module ``role`` of a finished run, frozen and in eval mode: its average where one was kept.

    Raises:
        MissingRunError: there is no run in ``folder``, or it has not reached its last step.
        CheckpointError: its checkpoint is damaged, or has no such role.
    """
    loaded = finished_checkpoint(folder, ())
    models = loaded.config.get("models", {})
    if role not in models:
        there = ", ".join(models) or "none"
        raise checkpoint.CheckpointError(f"{loaded.path}: no model {role!r}; there are: {there}")
    module = rebuild(models[role])
    name = f"{role}_average" if f"{role}_average" in loaded.names else role
    loaded = checkpoint.load(folder / "checkpoints", step=loaded.step, groups=(name,))
    checkpoint.restore(f"{loaded.path}, {name}", module.state_dict(), loaded.group(name))
    return module.eval().requires_grad_(False)


def finished_run(folder: Path) -> Any:
    """The run config of a finished run.

    Raises:
        MissingRunError, CheckpointError: as for :func:`trained_role`.
    """
    loaded = finished_checkpoint(folder, ())
    kinds: dict[str, Any] = {
        kind.__name__: kind
        for kind in (
            ClassifierRun, TokenizerRun, TeacherRun, GeneratorRun, PublishedGeneratorRun,
        )
    }  # fmt: skip
    name = loaded.config.get("kind")
    _config.require_choice(str(loaded.path), "kind", name, tuple(kinds))
    return _config.from_dict(kinds[str(name)], loaded.config["run"])


def finished_checkpoint(
    folder: Path, groups: Collection[str] | None = None
) -> checkpoint.Checkpoint:
    """The last checkpoint of a finished run.

    Args:
        groups: of tensors, as :func:`checkpoint.load` takes them.

    Raises:
        MissingRunError, CheckpointError: as for :func:`trained_role`.
    """
    if not checkpoint.find(folder / "checkpoints"):
        raise MissingRunError(f"{folder} holds no trained run (no checkpoint was found)")
    loaded = checkpoint.load(folder / "checkpoints", groups=groups)
    steps = loaded.config.get("run", {}).get("trainer", {}).get("steps")
    if loaded.step != steps:
        raise MissingRunError(
            f"the run in {folder} stands at step {loaded.step} of {steps}: finish it first, by a resume"
        )
    return loaded


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a run whose last step is saved."""
    try:
        finished_checkpoint(folder)
    except (MissingRunError, checkpoint.CheckpointError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------
# data


@torch.no_grad()
def digits_tokens(tokenizer: Tokenizer, data: DigitsData, trainer: TrainerConfig) -> TokenSource:
    """The encoded training images under their parity: plain copies, then augmented ones."""
    train = load_digits().train
    copies: list[Tensor] = [train.images] * data.plain_copies
    for copy_number in range(data.augmented_copies):
        draws = Draws.of(trainer.seed, copy_number, len(train)).fork("data/copies")
        copies.append(random_affine(train.images, draws))
    tokens = torch.cat([tokenizer.encode(images) for images in copies])
    conditions = train.parity.repeat(len(copies))
    return TokenSource(tokens, conditions, trainer.batch_size).to(torch.device(trainer.device))


def _digit_images(trainer: TrainerConfig) -> ImageSource:
    train, device = load_digits().train, torch.device(trainer.device)
    return ImageSource(train.images.to(device), train.digits.to(device), trainer.batch_size)


# ---------------------------------------------------------------------------------------------------
# trainers


def build_trainer(
    run: TrainingRun | PublishedGeneratorRun, folder: Path, progress: Progress | None = None
) -> Trainer:
    """The trainer of a run whose own folder is ``folder``; nothing is written yet.

    Raises:
        MissingRunError, CheckpointError: a run that this one needs is missing or damaged.
        ConfigError: the model does not fit the data or the tokenizer, or the device is not there.
    """
    if isinstance(run, PublishedGeneratorRun):
        from softdimo_fast.recipes.published_build import build_published_trainer

        return build_published_trainer(run, folder, progress)
    _require_device(run)
    _require_sizes(run)
    if isinstance(run, GeneratorRun):
        return _generator_trainer(run, folder, progress)
    if isinstance(run, ClassifierRun):
        model = create(run.model, seed=run.trainer.seed)
        method: Any = ClassifierMethod(model, _digit_images(run.trainer), run.method)
    elif isinstance(run, TokenizerRun):
        model = create(run.model, seed=run.trainer.seed)
        method = TokenizerMethod(model, _digit_images(run.trainer), run.method)
    else:
        method = _teacher_method(run, folder)
    return Trainer(
        method, run.trainer, folder=folder, run_config=run_record(run, method.roles),
        progress=progress,
    )  # fmt: skip


# What the digits ask of a model. A condition too many would not even fail: it is the unconditional one.
_SIZES: dict[type, dict[str, int]] = {
    ClassifierRun: {"image_size": 8, "channels": 1, "num_classes": NUM_DIGITS},
    TokenizerRun: {"grid": 4, "channels": 1},
    TeacherRun: {"conditions": 2},
}


def _require_sizes(run: TrainingRun) -> None:
    """Said before any work, not by an index error."""
    for name, size in _SIZES.get(type(run), {}).items():
        value = getattr(run.model, name)  # type: ignore[union-attr]
        _config.require(
            value == size, run, f"model.{name}", value, f"{size}, as the digits have it"
        )


def _require_device(run: TrainingRun) -> None:
    # No check of the config's: a config is as valid where the device is not.
    try:
        torch.empty(0, device=run.trainer.device)
    except (RuntimeError, AssertionError) as error:
        _config.require(
            False, run, "trainer.device", run.trainer.device,
            f"a device of this machine ({str(error).splitlines()[0]})",
        )  # fmt: skip


def run_record(run: Any, roles: Any) -> dict[str, Any]:
    """What a checkpoint says about its run: the config, and how to build each trained model again."""
    models = {}
    for role, module in roles.items():
        if not isinstance(module, DiscriminatorHeads):  # built from the run config and the teacher
            models[role] = describe(module)
    return {"kind": type(run).__name__, "run": _config.to_dict(run), "models": models}


def _teacher_method(run: TeacherRun, folder: Path) -> TeacherMethod:
    tokenizer = trained_role(beside(folder, run.tokenizer), "tokenizer")
    _require_match("TeacherRun", run.model, tokenizer)
    teacher = create(run.model, seed=run.trainer.seed)
    return TeacherMethod(teacher, digits_tokens(tokenizer, run.data, run.trainer), run.method)


def _require_match(owner: str, model: Any, tokenizer: Tokenizer) -> None:
    """The model predicts the tokenizer's tokens: said before any work, not by an index error."""
    vocabulary, (length,) = tokenizer.codebook.shape[-2], tokenizer.token_shape
    for name, expected in (("vocabulary", vocabulary), ("length", length)):
        value = getattr(model, name)
        _config.require(
            value == expected, owner, f"model.{name}", value, f"{expected}, the tokenizer's"
        )


def beside(folder: Path, name: str) -> Path:
    """The folder of another run, named relative to where ``folder`` is; "." and ".." are places too."""
    return Path(os.path.abspath(folder)).parent / name


def _generator_trainer(
    run: GeneratorRun, folder: Path, progress: Progress | None
) -> GeneratorTrainer:
    device = torch.device(run.trainer.device)
    teacher = trained_role(beside(folder, run.teacher), "teacher").to(device)
    start = starting_checkpoint(run, folder)
    student = copy.deepcopy(teacher)
    if start is not None:  # one that made no generator is refused; the other roles it may lack
        average = start.group("student_average")
        checkpoint.restore(f"{start.path}, student_average", student.state_dict(), average)
    objectives: list[Objective] = []
    if run.distillation is not None:
        auxiliary = started(copy.deepcopy(teacher), start, "auxiliary")
        objectives.append(DistributionMatching(teacher, auxiliary, run.distillation))
    if run.adversarial is not None or run.reward is not None:
        tokenizer = trained_role(beside(folder, run.tokenizer), "tokenizer")
        _require_match("GeneratorRun: teacher", teacher.config, tokenizer)
        if run.adversarial is not None:
            real = digits_tokens(tokenizer, run.data, run.trainer)
            heads = started(_heads(run.adversarial, teacher, run.trainer.seed), start, "heads")
            objectives.append(Adversarial(teacher, heads.to(device), real, run.adversarial))
        if run.reward is not None:
            reward = parity_reward(beside(folder, run.reward_classifier)).to(device)
            objectives.append(RewardObjective(tokenizer.to(device), reward, run.reward))
    conditions = UniformConditions(teacher.config.conditions)
    trainer = GeneratorTrainer(
        student, conditions, tuple(objectives), generator=run.generator, config=run.trainer,
        folder=folder, progress=progress,
    )  # fmt: skip
    trainer.run_config = run_record(run, trainer.method.roles)
    return trainer


def starting_checkpoint(
    run: GeneratorRun | PublishedGeneratorRun, folder: Path
) -> checkpoint.Checkpoint | None:
    """What a generator's run starts from: weights without optimizers; None where it starts anew.

    Raises:
        MissingRunError, CheckpointError: as for :func:`trained_role`.
    """
    if run.start is None:
        return None
    return finished_checkpoint(beside(folder, run.start), START_GROUPS)


def started(module: Any, start: checkpoint.Checkpoint | None, name: str) -> Any:
    """``module`` with the weights that the starting run has under ``name``, where it has any."""
    if start is not None and name in start.tensors:
        checkpoint.restore(f"{start.path}, {name}", module.state_dict(), start.group(name))
    return module


def _heads(config: AdversarialConfig, teacher: Any, seed: int) -> DiscriminatorHeads:
    with seeded(seed):
        return DiscriminatorHeads(
            config.heads, width=teacher.config.width, positions=teacher.config.length + 1,
            layers=len(config.heads.layers_of(teacher.depth)), conditions=teacher.config.conditions,
        )  # fmt: skip


def parity_reward(folder: Path) -> ClassifierReward:
    """log p(the wanted parity) of a trained digit classifier."""
    return ClassifierReward(trained_role(folder, "classifier"), parity(torch.arange(10)))


def digit_reward(folder: Path) -> ClassifierReward:
    """log p(the wanted digit) of a trained digit classifier."""
    return ClassifierReward(trained_role(folder, "classifier"), None)

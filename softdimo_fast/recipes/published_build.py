"""From a published run's config to its trainer: models, data, text and rewards from files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softdimo_fast import _config
from softdimo_fast.data.prompts import prompts_digest
from softdimo_fast.models import describe
from softdimo_fast.models.seeding import seeded
from softdimo_fast.recipes.build import run_record, started, starting_checkpoint
from softdimo_fast.recipes.published_inputs import Captioned, Inputs, load_rewards
from softdimo_fast.recipes.published_models import (
    classes_of,
    feature_shape,
    load_model,
    load_tokenizer,
    require_device,
    require_given,
    require_same,
    require_tokens,
    twin,
    weights_digest,
)
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun
from softdimo_fast.rewards import Reward
from softdimo_fast.trainers import (
    Adversarial,
    DiscriminatorHeads,
    DistributionMatching,
    GeneratorTrainer,
    Objective,
    RewardObjective,
    checkpoint,
)
from softdimo_fast.trainers.progress import Progress


@dataclass(frozen=True)
class _Models:
    """What was read, on the CPU and checked."""

    teacher: Any
    student: Any
    tokenizer: Any
    start: checkpoint.Checkpoint | None


def build_published_trainer(
    run: PublishedGeneratorRun,
    folder: Path,
    progress: Progress | None = None,
    *,
    encoder: Any = None,
    reward: Reward | None = None,
) -> GeneratorTrainer:
    """The trainer of a run whose own folder is ``folder``; nothing is written yet.

    Everything is checked before the trained copies of the teacher, their averages and optimizer states are
    made: what must be given and is not, files that are not there, tokens that do not fit each other.

    Args:
        encoder: a text encoder in place of the one in ``text.encoder``: prompts to a condition.
        reward: in place of ``rewards``: of images and the generator's condition.

    Raises:
        ConfigError: an input is missing, or does not fit the others.
        MissingRunError, CheckpointError: ``start`` is missing, not finished or damaged.
        FileNotFoundError, ModelFileError, TokenFileError, ImportError: a file cannot be read.
    """
    require_given(run, but=_given_otherwise(encoder, reward))
    device = require_device(run, "trainer.device", run.trainer.device)
    models = _read(run, folder)
    digests = {"teacher": weights_digest(models.teacher)}
    if models.tokenizer is not None:
        digests["tokenizer"] = weights_digest(models.tokenizer)
    inputs = Inputs.of(
        run, models.teacher, run.text, batch_size=run.trainer.batch_size,
        device=device, encoder=encoder,
    )  # fmt: skip
    real = _real_tokens(run, models.teacher, inputs)
    if run.rewards is not None and reward is None:
        reward = load_rewards(run.rewards, inputs.prompts or (), device)
    trainer = GeneratorTrainer(
        models.student, inputs.conditions(), _objectives(run, models, real, reward, device),
        generator=run.generator, config=run.trainer, folder=folder, progress=progress,
    )  # fmt: skip
    # A resume on other weights under the same paths is refused, as one with another config.
    trainer.run_config = run_record(run, trainer.method.roles) | {"sha256": digests}
    return trainer


def _given_otherwise(encoder: Any, reward: Reward | None) -> tuple[str, ...]:
    names: tuple[str, ...] = () if encoder is None else ("text.encoder",)
    return names if reward is None else (*names, "rewards.")


def _read(run: PublishedGeneratorRun, folder: Path) -> _Models:
    start = starting_checkpoint(run, folder)
    teacher = load_model(run, "teacher", str(run.teacher))
    tokenizer = None if run.tokenizer is None else load_tokenizer(run, teacher, run.tokenizer)
    if start is not None:
        description = start.config.get("models", {}).get("student")
        _config.require(
            description is not None, run, "start", run.start, "a run that trained a generator"
        )
        require_same(run, "start", teacher, description)
    if run.student is not None:
        student = load_model(run, "student", run.student)
        require_same(run, "student", teacher, describe(student))
    else:
        student = twin(teacher)
    if start is not None:
        average = start.group("student_average")
        checkpoint.restore(f"{start.path}, student_average", student.state_dict(), average)
    for model in (teacher, student):
        model.checkpoint_blocks = run.checkpoint_blocks
    return _Models(teacher, student, tokenizer, start)


def _real_tokens(run: PublishedGeneratorRun, teacher: Any, inputs: Inputs) -> Any:
    """Tokens and conditions of real images; None where no GAN asks for them."""
    if run.adversarial is None:
        return None
    from softdimo_fast.data.token_file import PROMPTS_DIGEST, TokenFile

    file = TokenFile.open(str(run.real_tokens))
    header = file.header
    require_tokens(
        run, "real_tokens", teacher, vocabulary=header.vocabulary, token_shape=header.token_shape
    )
    text, labels = classes_of(teacher) is None, inputs.count
    if text:
        expected = f"of images whose labels are numbers of the {labels} prompts in text.prompts"
    else:
        expected = f"of images of the teacher's {labels} classes"
    _config.require(
        header.classes == labels, run, "real_tokens", f"{header.classes} classes", expected
    )
    _require_prompts(run, header.metadata.get(PROMPTS_DIGEST), inputs, text=text)
    _config.require(len(file) > 0, run, "real_tokens", "0 images", "of at least one image")
    source = file.source(run.trainer.batch_size)
    return Captioned(source, inputs) if text else source


def _require_prompts(
    run: PublishedGeneratorRun, digest: str | None, inputs: Inputs, *, text: bool
) -> None:
    """A token file that was made with captions says whose numbers its labels are; others do not."""
    if digest is None:
        return
    _config.require(
        text, run, "real_tokens", "a file whose labels are numbers of prompts",
        "of images whose labels are the teacher's classes",
    )  # fmt: skip
    _config.require(
        digest == prompts_digest(inputs.prompts or ()), run, "text.prompts", run.text.prompts,
        f"the file of prompts that was made with {run.real_tokens} (sha256 {digest[:12]}...)",
    )  # fmt: skip


def _objectives(
    run: PublishedGeneratorRun,
    models: _Models,
    real: Any,
    reward: Reward | None,
    device: torch.device,
) -> tuple[Objective, ...]:
    teacher = models.teacher.to(device)
    objectives: list[Objective] = []
    if run.distillation is not None:
        auxiliary = started(twin(teacher), models.start, "auxiliary")
        objectives.append(DistributionMatching(teacher, auxiliary, run.distillation))
    if run.adversarial is not None:
        heads = started(discriminator_heads(run, teacher), models.start, "heads")
        objectives.append(Adversarial(teacher, heads.to(device), real, run.adversarial))
    if run.reward is not None:
        assert reward is not None
        tokenizer = models.tokenizer.to(device)
        if run.checkpoint_blocks and hasattr(tokenizer, "checkpoint_blocks"):
            tokenizer.checkpoint_blocks = True
        objectives.append(RewardObjective(tokenizer, reward, run.reward))
    return tuple(objectives)


def discriminator_heads(run: PublishedGeneratorRun, teacher: Any) -> DiscriminatorHeads:
    """New heads on a teacher's features; without a class projection where there is no class."""
    assert run.adversarial is not None
    config, classes = run.adversarial.heads, classes_of(teacher)
    if classes is None:
        config = replace(config, class_projection=False)
    positions, width = feature_shape(teacher)
    with seeded(run.trainer.seed):
        return DiscriminatorHeads(
            config, width=width, positions=positions, layers=len(config.layers_of(teacher.depth)),
            conditions=classes or 1,
        )  # fmt: skip

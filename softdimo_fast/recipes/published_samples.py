"""Images of published teachers, in their samplers' steps, and of one-step generators; test-time search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import (
    MASKBIT_SAMPLERS,
    Draws,
    MaskBitSamplerConfig,
    MaskGitSamplerConfig,
    OneStepConfig,
    SamplerConfig,
    confidence_sample,
    one_step_sample,
)
from softdimo_fast.diffusion.samplers import Decode
from softdimo_fast.diffusion.text_samplers import MaskGenSamplerConfig, MeissonicSamplerConfig
from softdimo_fast.models import describe, from_pretrained
from softdimo_fast.recipes.build import finished_run, trained_role
from softdimo_fast.recipes.published import TEACHERS, Teacher, one_step
from softdimo_fast.recipes.published_inputs import Encoder, Inputs, load_rewards
from softdimo_fast.recipes.published_models import (
    load_model,
    load_tokenizer,
    require_device,
    require_given,
)
from softdimo_fast.recipes.published_runs import (
    PublishedGeneratorRun,
    PublishedTestTimeRun,
)
from softdimo_fast.rewards import Reward
from softdimo_fast.trainers import TestTimeEmbeddingOptimizer, TestTimeResult, checkpoint


def published_sampler(model: Any) -> Any:
    """The sampler that a teacher was published with, in its published settings."""
    family = describe(model)["family"]
    if family == "maskgit":
        return MaskGitSamplerConfig()
    if family == "maskbit":
        return MASKBIT_SAMPLERS.get(model.config.bits, MaskBitSamplerConfig())
    return MaskGenSamplerConfig() if family == "maskgen_vq" else MeissonicSamplerConfig()


def published_one_step(model: Any) -> OneStepConfig:
    """The input that the recipe of a family gives its one-step generator."""
    return one_step(_teacher_of(model))


def _teacher_of(model: Any) -> Teacher:
    family = describe(model)["family"]
    return next(teacher for teacher in TEACHERS.values() if teacher.family == family)


def _published_model(source: str | Path) -> Any:
    model = from_pretrained(source)
    known = tuple(dict.fromkeys(teacher.family for teacher in TEACHERS.values()))
    _config.require_choice("sample", "model", describe(model)["family"], known)
    return model


def is_run(source: str | Path) -> bool:
    """Whether a run's checkpoints are in ``source``."""
    return bool(checkpoint.find(Path(source) / "checkpoints"))


@dataclass(frozen=True)
class ImageMaker:
    """A model with all that it needs to make images.

    Attributes:
        model: a teacher, or a one-step generator, on the device.
        tokenizer: its.
        sampler: :class:`OneStepConfig` for a generator, else a teacher's.
        inputs: labels or prompts.
    """

    model: Any
    tokenizer: Any
    sampler: SamplerConfig | OneStepConfig
    inputs: Inputs

    @classmethod
    def of(
        cls, source: str | Path, *, tokenizer: str | None = None, one_step: bool = False,
        prompts: str | Path | None = None, text_encoder: str | None = None, device: str = "cpu",
        encoder: Encoder | None = None,
    ) -> ImageMaker:  # fmt: skip
        """From a finished run of a published recipe, or from a model source.

        Args:
            tokenizer: model source; None takes the run's.
            one_step: the model source is a one-step generator; a run always is.
            prompts, text_encoder: a file and a folder; None takes the run's.
            encoder: in place of ``text_encoder``.

        Raises:
            ConfigError: what is needed is not given, or does not fit.
            MissingRunError, CheckpointError, FileNotFoundError, ModelFileError, ImportError: a file cannot
                be read.
        """
        place = require_device("sample", "device", device)
        run = finished_run(Path(source)) if is_run(source) else None
        if run is not None:
            is_ours = isinstance(run, PublishedGeneratorRun)
            _config.require(is_ours, "sample", "run", type(run).__name__, "of a published recipe")
            tokenizer = tokenizer or run.tokenizer
        _config.require(  # before gigabytes are read
            tokenizer is not None, "sample", "tokenizer", None,
            "given: a file, a folder or a hub id",
        )  # fmt: skip
        if run is not None:
            model, sampler = trained_role(Path(source), "student"), run.generator.one_step
            text = run.text
        else:
            model = _published_model(source)
            sampler = published_one_step(model) if one_step else published_sampler(model)
            text = _teacher_of(model).text
        text = replace(
            text, prompts=text.prompts if prompts is None else str(prompts),
            encoder=text.encoder if text_encoder is None else text_encoder,
        )  # fmt: skip
        inputs = Inputs.of("sample", model, text, batch_size=1, device=place, encoder=encoder)
        decoder = load_tokenizer("sample", model, str(tokenizer))
        return cls(model.to(place), decoder.to(place), sampler, inputs)

    def with_settings(self, changes: Sequence[str]) -> ImageMaker:
        """With settings of its sampler changed, as ``steps=4``."""
        return replace(self, sampler=_config.override(self.sampler, list(changes)))  # type: ignore[type-var]

    def numbers(self, count: int, condition: int | None = None) -> Tensor:
        """Of classes or prompts, int64 ``[count]``: all in turn, or always ``condition``."""
        if condition is None:
            return torch.arange(count) % self.inputs.count
        _config.require_range(
            "sample", "condition", condition, minimum=0, maximum=self.inputs.count - 1
        )
        return torch.full((count,), condition)

    @torch.no_grad()
    def images(
        self, numbers: Tensor, *, seed: int = 0, decode: Decode = "sample", batch_size: int = 16
    ) -> Tensor:
        """Images ``[B, 3, height, width]`` in [-1, 1] on the CPU, each a function of seed and place.

        Args:
            numbers: of classes or prompts, int64 ``[B]``.
            decode: of a one-step generator's logits.
            batch_size: bounds memory, changes no draw.
        """
        draws = Draws.of(seed, 0, len(numbers), device=self.inputs.device).fork("sample")
        parts = []
        for first in range(0, len(numbers), batch_size):
            condition = self.inputs.numbered(numbers[first : first + batch_size])
            part = draws.part(first, batch_size)
            if isinstance(self.sampler, OneStepConfig):
                images = one_step_sample(
                    self.model, self.tokenizer, condition, part, self.sampler, decode=decode
                )
            else:
                tokens = confidence_sample(self.model, condition, part, self.sampler)
                images = self.tokenizer.decode(tokens, condition=condition)
            parts.append(images.cpu())
        return torch.cat(parts)


def search(
    run: PublishedTestTimeRun,
    *,
    encoder: Encoder | None = None,
    reward: Reward | None = None,
    ready: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[TestTimeResult, Tensor]:
    """Best-of-N and TTEO for every class or prompt in turn.

    Args:
        encoder, reward: in place of those in the run.
        ready: called when everything is read and checked, before the search.
        stop: True raises :class:`InterruptedError`.

    Returns:
        What was found, and the numbers of the classes or prompts, int64 ``[samples]``.

    Raises:
        ConfigError: an input is missing or does not fit.
        MissingRunError, CheckpointError, FileNotFoundError, ModelFileError, ImportError: a file cannot be
            read.
    """
    given: tuple[str, ...] = () if encoder is None else ("text.encoder",)
    require_given(run, but=given if reward is None else (*given, "rewards."))
    device = require_device(run, "device", run.device)
    generator = _generator(run)
    tokenizer = load_tokenizer(run, generator, str(run.tokenizer))
    inputs = Inputs.of(run, generator, run.text, batch_size=1, device=device, encoder=encoder)
    reward = reward or load_rewards(run.rewards, inputs.prompts or (), device)
    optimizer = TestTimeEmbeddingOptimizer(
        generator.to(device), tokenizer.to(device), reward, run.search
    )
    numbers = torch.arange(run.samples) % inputs.count
    condition = inputs.numbered(numbers)
    draws = Draws.of(run.seed, 0, run.samples, device=device).fork("search")
    ready()
    return optimizer(condition, condition, draws, stop=stop), numbers


def _generator(run: PublishedTestTimeRun) -> Any:
    source = str(run.generator)
    if not is_run(source):
        return load_model(run, "generator", source)
    finished = finished_run(Path(source))
    kind = type(finished).__name__
    _config.require(
        isinstance(finished, PublishedGeneratorRun), run, "generator", kind,
        "a run of a published recipe",
    )  # fmt: skip
    _config.require(
        finished.family == run.family, run, "generator", finished.family,
        f"of the family {run.family}",
    )  # fmt: skip
    _config.require(
        finished.bits == run.bits, run, "generator", f"{finished.bits} bits",
        f"of bits = {run.bits}",
    )  # fmt: skip
    return trained_role(Path(source), "student")

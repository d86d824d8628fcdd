"""What a published run's generator and rewards are told: class labels, or prompts through a text encoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.data.prompts import PromptConditions, PromptFile
from softdimo_fast.data.source import UniformConditions
from softdimo_fast.diffusion.draws import Draws, send
from softdimo_fast.models import describe
from softdimo_fast.models.conditions import Condition
from softdimo_fast.recipes.published_models import classes_of
from softdimo_fast.recipes.published_runs import PromptInputs, RewardSource, RewardSources
from softdimo_fast.rewards import Reward, WeightedRewards

Encoder = Callable[[Sequence[str]], Condition]
CHUNK = 16  # prompts that are encoded at a time
ENCODED_AT_ONCE = 65_536  # prompts that a reward keeps on a GPU, 4 KB each


@dataclass(frozen=True)
class Inputs:
    """The conditions of samples by number: of a class, or of a prompt.

    Attributes:
        classes: of a class-conditional model; None where prompts are the condition.
        prompts: texts by number, for class labels one each; None where nothing reads text.
        encoded: prompts as the model's condition; None for class labels.
        device: where conditions go.
    """

    classes: int | None
    prompts: Sequence[str] | None
    encoded: PromptConditions | None
    device: torch.device

    @classmethod
    def of(
        cls, owner: object, model: Any, text: PromptInputs, *, batch_size: int,
        device: torch.device, encoder: Encoder | None = None,
    ) -> Inputs:  # fmt: skip
        """The inputs of a model.

        Args:
            owner: named in errors.
            batch_size: the trainer's.
            encoder: in place of the one in ``text``.

        Raises:
            ConfigError: the prompts cannot be read, or are not one a class.
            FileNotFoundError, ModelFileError, ImportError: the text encoder cannot be read.
        """
        classes = classes_of(model)
        prompts = None if text.prompts is None else _read_prompts(owner, text.prompts)
        if classes is not None:
            fits = prompts is None or len(prompts) == classes
            shown = None if prompts is None else f"{len(prompts)} prompts"
            _config.require(
                fits, owner, "text.prompts", shown, f"one prompt for each of {classes} classes"
            )
            return cls(classes, prompts, None, device)
        _config.require(prompts is not None, owner, "text.prompts", None, "a file of prompts")
        assert prompts is not None
        if encoder is None:
            _config.require(
                text.encoder is not None, owner, "text.encoder", None,
                "given: the folder of the text encoder",
            )  # fmt: skip
            encoder = load_encoder(describe(model)["family"], text, device)
        encoded = PromptConditions(prompts, encoder, batch_size, chunk=min(CHUNK, len(prompts)))
        return cls(None, prompts, encoded, device)

    @property
    def count(self) -> int:
        """How many classes or prompts there are."""
        return self.classes if self.classes is not None else len(self.prompts or ())

    def conditions(self) -> Callable[[Draws], Condition]:
        """Of a micro-batch's samples: uniform labels, or every prompt once an epoch."""
        return self.encoded or UniformConditions(self.count)

    def numbered(self, numbers: Tensor) -> Condition:
        """Of classes or prompts number ``numbers``, int64 ``[B]`` on the CPU."""
        if self.encoded is None:
            return numbers.to(self.device)
        return self.encoded.of(numbers, self.device)


@dataclass(frozen=True)
class Captioned:
    """Real tokens with their caption's condition in place of its number.

    Attributes:
        source: tokens and labels of a micro-batch's draws; label i is prompt i.
        inputs: with prompts.
    """

    source: Callable[[Draws], tuple[Tensor, Tensor]]
    inputs: Inputs

    def __call__(self, draws: Draws) -> tuple[Tensor, Condition]:
        """Tokens ``[B, *token_shape]`` and conditions."""
        # Drawn on the host, which must read the numbers: reading them back would wait for the device.
        tokens, labels = self.source(draws.on_host)
        return send(tokens, draws.samples.device), self.inputs.numbered(labels)


def _read_prompts(owner: object, path: str) -> PromptFile:
    try:
        return PromptFile(path)
    except ValueError as error:
        _config.require(False, owner, "text.prompts", path, f"a file of prompts ({error})")
        raise


def load_encoder(family: str, text: PromptInputs, device: torch.device) -> Encoder:
    """The text encoder that a family was trained with, from a local folder.

    Raises:
        FileNotFoundError, ModelFileError: a file is missing or damaged.
        ImportError: the ``rewards`` extra, which brings the encoders, is missing.
    """
    from softdimo_fast.models.text_encoders import MaskGenTextEncoder, MeissonicTextEncoder

    folder = str(text.encoder)
    if family == "maskgen_vq":
        return MaskGenTextEncoder.load(folder, score=text.score).to(device)
    return MeissonicTextEncoder.load(
        folder, negative_prompt=text.negative_prompt, micro=text.micro
    ).to(device)


def load_rewards(
    sources: RewardSources, prompts: Sequence[str], device: torch.device
) -> WeightedRewards:
    """The rewards of a run, summed with their weights.

    On a GPU up to ``ENCODED_AT_ONCE`` prompts are encoded here; with more, each reward waits for it in every
    micro-batch.

    Args:
        prompts: that conditions count; with class labels, one for each class.

    Raises:
        FileNotFoundError, ModelFileError: a file is missing or damaged.
        ImportError: an extra, or the package ``image-reward``, is missing.
    """
    named = sources.named()
    rewards: dict[str, Reward] = {}
    for name, source in named.items():
        reward = _load_reward(name, source, prompts).to(device)
        # On a GPU, finding out which prompts are still to be encoded would wait for it in every step.
        if device.type != "cpu" and len(prompts) <= ENCODED_AT_ONCE:
            reward.encode_prompts()
        rewards[name] = reward
    return WeightedRewards(rewards, {name: source.weight for name, source in named.items()})


def _load_reward(name: str, source: RewardSource, prompts: Sequence[str]) -> Any:
    from softdimo_fast.rewards.clip import ClipReward, HpsReward, PickScoreReward

    path = str(source.path)
    if name == "clip":
        return ClipReward.load(path, prompts, tokenizer=source.tokenizer)
    if name == "pick_score":
        return PickScoreReward.load(path, prompts, tokenizer=source.tokenizer)
    return HpsReward.load(path, prompts) if name == "hps" else _image_reward(Path(path), prompts)


def _image_reward(path: Path, prompts: Sequence[str]) -> Any:
    from softdimo_fast.rewards.clip import ImageRewardReward

    weights = path / "ImageReward.pt" if path.is_dir() else path
    config = weights.with_name("med_config.json")
    for file in (weights, config):
        if not file.is_file():
            raise FileNotFoundError(f"rewards.image_reward.path: there is no file {file}")
    try:
        package = importlib.import_module("ImageReward")
    except ImportError as error:
        raise ImportError(
            "rewards.image_reward needs the package image-reward, whose pins do not go with this package's "
            "extras: pip install --no-deps image-reward, or rewards.image_reward=none"
        ) from error
    return ImageRewardReward(package.load(str(weights), med_config=str(config)), prompts)

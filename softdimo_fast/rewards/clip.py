"""Differentiable rewards of text-to-image models: CLIP score, PickScore, HPS v2 and ImageReward.

All but the last are a cosine between CLIP's embeddings of image and prompt. ReNO (arXiv 2406.04312,
ExplainableML/ReNO) minimises ``weight * (offset - score)`` for each; :data:`RENO_WEIGHTS` and
:data:`RENO_OFFSETS` hold its numbers, and :func:`reno_rewards` its sum. An offset changes no gradient, so the
rewards here are the plain scores, which are the numbers that papers report.

Weights come from local files (or a hub id), through transformers or open_clip: extra ``rewards``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.models import clip_files
from softdimo_fast.models.clip_files import Tokenize
from softdimo_fast.models.conditions import Condition
from softdimo_fast.rewards.prompted import PromptedReward, clip_pixels, prompt_numbers
from softdimo_fast.rewards.protocol import Reward
from softdimo_fast.rewards.weighted import WeightedRewards

# ReNO's defaults.
RENO_WEIGHTS = {"clip": 0.01, "pick_score": 0.05, "hps": 5.0, "image_reward": 1.0}
RENO_OFFSETS = {"clip": 100.0, "pick_score": 30.0, "hps": 1.0, "image_reward": 2.0}
HPS_ARCHITECTURE = "ViT-H-14"
IMAGE_REWARD_SIZE, IMAGE_REWARD_LENGTH = 224, 35


def reno_rewards(rewards: Mapping[str, Reward]) -> WeightedRewards:
    """The sum that ReNO maximises, of some of its rewards.

    Args:
        rewards: by ReNO's names, the keys of :data:`RENO_WEIGHTS`.

    Raises:
        ValueError: there is no reward, or a name is another.
    """
    unknown = sorted(set(rewards) - set(RENO_WEIGHTS))
    if unknown:
        raise ValueError(
            f"reno_rewards: names must be of {', '.join(RENO_WEIGHTS)}, got {', '.join(unknown)}"
        )
    return WeightedRewards(rewards, {name: RENO_WEIGHTS[name] for name in rewards})


# ---------------------------------------------------------------------------------------------------
# CLIP's two towers


class ClipTowers(nn.Module, ABC):
    """Image and text tower of a frozen CLIP model with its tokenizer.

    Attributes:
        size: height and width of the images it takes.
    """

    size: int

    def __init__(self, model: nn.Module, tokenize: Tokenize) -> None:
        super().__init__()
        self.model, self.tokenize = clip_files.frozen(model), tokenize

    @property
    def scale(self) -> Tensor:
        """What the cosine is multiplied by in the model's logits (100 in most models)."""
        model: Any = self.model
        scale: Tensor = model.logit_scale.float().exp()
        return scale

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """The embeddings ``[B, P]`` of pixels ``[B, 3, size, size]``, as :func:`clip_pixels` gives them."""

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings ``[B, P]`` of prompts."""
        ids = self.tokenize(prompts)
        return self.ids(ids.to(next(self.model.parameters()).device))

    @abstractmethod
    def ids(self, ids: Tensor) -> Tensor:
        """The embeddings ``[B, P]`` of token ids ``[B, T]``."""


class TransformersTowers(ClipTowers):
    """transformers' ``CLIPModel``."""

    def __init__(self, model: nn.Module, tokenize: Tokenize) -> None:
        super().__init__(model, tokenize)
        config: Any = model.config
        self.size = config.vision_config.image_size

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
    ) -> TransformersTowers:
        """
        Args:
            source: a folder with ``config.json``, weights and tokenizer files; if there is no such path, a
                hub id ``owner/name`` or ``owner/name/path``.
            tokenizer: another folder with the tokenizer files.
            revision: of ``source`` on the hub: a commit.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: transformers or a file is missing, or the file is
                damaged; the message says which.
        """
        folder = clip_files.local_path(source, revision)
        words = folder if tokenizer is None else clip_files.local_path(tokenizer)
        model = clip_files.load_transformers("CLIPModel", folder)
        length = model.config.text_config.max_position_embeddings
        return cls(model, clip_files.transformers_tokenizer(words, length))

    # Tower by tower: what get_image_features and get_text_features return differs between versions.

    def images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        found: Tensor = model.visual_projection(
            model.vision_model(pixel_values=pixels).pooler_output
        )
        return found

    def ids(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        found: Tensor = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        return found


class OpenClipTowers(ClipTowers):
    """open_clip's ``CLIP``."""

    def __init__(self, model: nn.Module, tokenize: Tokenize) -> None:
        super().__init__(model, tokenize)
        visual: Any = model.visual
        size = visual.image_size
        self.size = size if isinstance(size, int) else int(size[0])

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        architecture: str = HPS_ARCHITECTURE,
        revision: str | None = None,
    ) -> OpenClipTowers:
        """
        Args:
            source: a file of weights, a folder with ``open_clip_config.json``, or a hub id ``owner/name`` or
                ``owner/name/path``.
            architecture: open_clip's name of what a file holds.
            revision: of ``source`` on the hub: a commit.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: open_clip or a file is missing, or the file is
                damaged; the message says which.
        """
        model = clip_files.load_open_clip(clip_files.local_path(source, revision), architecture)
        return cls(model, clip_files.open_clip_tokenizer(model.context_length))

    def images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        found: Tensor = model.encode_image(pixels)
        return found

    def ids(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        found: Tensor = model.encode_text(ids)
        return found


# ---------------------------------------------------------------------------------------------------
# cosines


class CosineReward(PromptedReward):
    r"""The cosine between CLIP's embeddings of image and prompt, times the model's scale if ``scaled``."""

    scaled = True

    def __init__(self, towers: ClipTowers, prompts: Sequence[str], **options: Any) -> None:
        """
        Args:
            towers: of a CLIP model.
            prompts: that the conditions count.
            options: ``capacity`` and ``chunk`` of :class:`PromptedReward`.
        """
        super().__init__(prompts, self._directions, **options)
        self.towers = towers

    def _directions(self, prompts: Sequence[str]) -> Tensor:
        return F.normalize(self.towers.prompts(prompts).float(), dim=-1)

    def forward(self, images: Tensor, condition: Condition) -> Tensor:
        """The rewards ``[B]``, float32, of images ``[B, 3, h, w]`` in [-1, 1].

        Raises:
            TypeError, ValueError: an argument is wrong, or there is no such prompt (on a GPU, after
                :meth:`encode_prompts`, such a row is NaN).
        """
        words: Tensor = self.words(condition, images)
        found = self.towers.images(clip_pixels(images, self.towers.size))
        cosine = (F.normalize(found.float(), dim=-1) * words).sum(-1)
        value = self.towers.scale * cosine if self.scaled else cosine
        return value.where(self.known(prompt_numbers(condition)).to(value.device), torch.nan)


class ClipReward(CosineReward):
    """The CLIP score, scale times cosine, about 20 to 40.

    Published files: ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``. ReNO's loss is 0.01 * (100 - score).
    """

    @classmethod
    def load(
        cls,
        source: str | Path,
        prompts: Sequence[str],
        *,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> ClipReward:
        """
        Args:
            source: a transformers folder; see :meth:`TransformersTowers.load`.
            prompts: that the conditions count.
            tokenizer: another folder with the tokenizer files.
            revision: of ``source`` on the hub: a commit.
            options: ``capacity`` and ``chunk`` of :class:`PromptedReward`.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: see :meth:`TransformersTowers.load`.
        """
        towers = TransformersTowers.load(source, tokenizer=tokenizer, revision=revision)
        return cls(towers, prompts, **options)


class PickScoreReward(ClipReward):
    """PickScore (arXiv 2305.01569): a CLIP model tuned on choices of people, about 17 to 24.

    Published files: ``yuvalkirstain/PickScore_v1``; its tokenizer is that of
    ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``. ReNO's loss is 0.05 * (30 - score).
    """


class HpsReward(CosineReward):
    """HPS v2 (arXiv 2306.09341): the cosine of a CLIP model tuned on choices of people, about 0.2 to 0.35.

    Published file: ``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2``. ReNO's loss is 5 * (1 - score).
    """

    scaled = False

    @classmethod
    def load(
        cls,
        source: str | Path,
        prompts: Sequence[str],
        *,
        architecture: str = HPS_ARCHITECTURE,
        **options: Any,
    ) -> HpsReward:
        """
        Args:
            source: the file; its state dict stands under ``state_dict``.
            prompts: that the conditions count.
            architecture: open_clip's name of what it holds.
            options: ``capacity`` and ``chunk`` of :class:`PromptedReward`.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: see :meth:`OpenClipTowers.load`.
        """
        return cls(OpenClipTowers.load(source, architecture=architecture), prompts, **options)


# ---------------------------------------------------------------------------------------------------
# ImageReward


class _Words(NamedTuple):
    ids: Tensor
    mask: Tensor


class ImageRewardReward(PromptedReward):
    """ImageReward (arXiv 2304.05977), for those who have the package ``image-reward``.

    Its pins exclude current versions of what this package needs, so it is no extra. Where it can be
    imported::

        import ImageReward

        reward = ImageRewardReward(ImageReward.load("ImageReward.pt", med_config="med_config.json"), prompts)

    The score is standardised: 0 is average, 1 one standard deviation better. ReNO's loss is 2 - score.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[str], **options: Any) -> None:
        """
        Args:
            model: what ``ImageReward.load`` gives; it is frozen in place.
            prompts: that the conditions count.
            options: ``capacity`` and ``chunk`` of :class:`PromptedReward`.

        Raises:
            TypeError: the model is another.
        """
        missing = [name for name in ("blip", "mlp", "mean", "std") if not hasattr(model, name)]
        if missing:
            raise TypeError(
                f"ImageRewardReward: model must be what ImageReward.load gives; {type(model).__name__} has "
                f"no {', '.join(missing)}"
            )
        super().__init__(prompts, self._tokens, **options)
        self.model = clip_files.frozen(model)

    def _tokens(self, prompts: Sequence[str]) -> _Words:
        model: Any = self.model
        found = model.blip.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=IMAGE_REWARD_LENGTH,
            return_tensors="pt",
        )  # fmt: skip
        return _Words(found.input_ids, found.attention_mask)

    def forward(self, images: Tensor, condition: Condition) -> Tensor:
        """The rewards ``[B]``, float32, of images ``[B, 3, h, w]`` in [-1, 1].

        Raises:
            TypeError, ValueError: see :meth:`CosineReward.forward`.
        """
        model: Any = self.model
        words: _Words = self.words(condition, images)
        # As the package's score_gard, the one of its scores that has a gradient.
        seen = model.blip.visual_encoder(clip_pixels(images, IMAGE_REWARD_SIZE))
        text = model.blip.text_encoder(
            words.ids, attention_mask=words.mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.int64, device=seen.device),
            return_dict=True,
        )  # fmt: skip
        score = (model.mlp(text.last_hidden_state[:, 0]).float() - model.mean) / model.std
        value: Tensor = score[:, 0]
        return value.where(self.known(prompt_numbers(condition)).to(value.device), torch.nan)

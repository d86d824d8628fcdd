"""What the text-to-image families make of prompts: CLIP's text towers, and the conditions built of them.

MaskGen and TA-TiTok read CLIP ViT-L/14-336 (OpenAI), Meissonic reads CLIP ViT-H/14 (LAION)::

    encoder = MaskGenTextEncoder.load("clip-vit-large-patch14-336")
    condition = encoder(["a lighthouse at night"])

Sources: ``open_clip_text_encoding`` of bytedance/1d-tokenizer; ``Pipeline`` of viiika/Meissonic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from softdimo_fast.models import clip_files
from softdimo_fast.models.clip_files import Library, Tokenize
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.text_conditions import MeissonicCondition, TextCondition

# What the published Meissonic samplers put in the unconditional branch; "signature" stands there twice.
NEGATIVE_PROMPT = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, "
    "jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark"
)
MASKGEN_ARCHITECTURE, MEISSONIC_ARCHITECTURE = "ViT-L-14-336-quickgelu", "ViT-H-14"
OPEN_CLIP_PADDING = 0


class TextEncoder(Protocol):
    """Prompts to the condition of a family."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts; row b depends on prompt b alone, up to rounding."""
        ...


class TextFeatures(NamedTuple):
    """What a CLIP text tower makes of B prompts.

    Attributes:
        penultimate: ``[B, T, W]``, the output of the last block but one, without the final norm.
        last: ``[B, T, W]``, the output of the last block after the final norm.
        pooled: ``[B, P]``, the end token's row of ``last``, projected.
    """

    penultimate: Tensor
    last: Tensor
    pooled: Tensor


class ClipText(nn.Module, ABC):
    """A frozen CLIP text tower with its tokenizer; make one with :meth:`load`."""

    def __init__(self, model: nn.Module, tokenize: Tokenize) -> None:
        super().__init__()
        self.model, self.tokenize = clip_files.frozen(model), tokenize

    @staticmethod
    def load(
        source: str | Path,
        *,
        library: Library | None = None,
        architecture: str = MASKGEN_ARCHITECTURE,
        pad: int | None = None,
        quick_gelu: bool | None = None,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
    ) -> ClipText:
        """
        Args:
            source: a transformers folder, or a diffusers folder with ``text_encoder`` and ``tokenizer`` in
                it; an open_clip folder or weight file; if there is no such path, a hub id ``owner/name`` or
                ``owner/name/path``.
            library: that reads it; None: transformers, unless the files are open_clip's.
            architecture: open_clip's name of what a weight file holds.
            pad: the token id behind the end, in transformers; None: the tokenizer's own. open_clip's is 0.
            quick_gelu: True: OpenAI's approximation of GELU, False: GELU; None: as the files say.
            tokenizer: another folder (or hub id) with transformers' tokenizer files.
            revision: of ``source`` on the hub: a commit.

        Raises:
            ImportError: the library is missing; the message names the extra.
            FileNotFoundError: a file is missing; the message names it.
            ModelFileError: the weights are damaged or incomplete.
        """
        path = clip_files.local_path(source, revision)
        words = path if tokenizer is None else clip_files.local_path(tokenizer)
        words = words / "tokenizer" if (words / "tokenizer").is_dir() else words
        path = path / "text_encoder" if (path / "text_encoder").is_dir() else path
        if (library or clip_files.library_of(path)) == "open_clip":
            model = clip_files.load_open_clip(
                path, architecture, text_only=True, quick_gelu=quick_gelu
            )
            return OpenClipText(model, clip_files.open_clip_tokenizer(model.context_length))
        config = (
            {} if quick_gelu is None else {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
        )
        model = clip_files.load_transformers("CLIPTextModelWithProjection", path, **config)
        length = model.config.max_position_embeddings
        return TransformersText(model, clip_files.transformers_tokenizer(words, length, pad=pad))

    def train(self, mode: bool = True) -> Self:
        """Keeps the tower in eval mode, whatever mode a trainer sets."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextFeatures:
        """The features of B prompts."""
        ids = self.tokenize(prompts)
        return self.features(ids.to(next(self.model.parameters()).device))

    @abstractmethod
    def features(self, ids: Tensor) -> TextFeatures:
        """The features of token ids ``[B, T]``."""


class TransformersText(ClipText):
    """``CLIPTextModelWithProjection``. As in the published samplers, it is told of no padding."""

    def features(self, ids: Tensor) -> TextFeatures:
        found = self.model(input_ids=ids, output_hidden_states=True)
        # The embeddings count as a hidden state: the last but one is that of the last block but one.
        return TextFeatures(found.hidden_states[-2], found.last_hidden_state, found.text_embeds)


class OpenClipText(ClipText):
    """The text tower of open_clip's ``CLIP``."""

    def features(self, ids: Tensor) -> TextFeatures:
        model: Any = self.model
        rows = model.token_embedding(ids) + model.positional_embedding
        mask = model.attn_mask.to(rows.dtype)
        for block in model.transformer.resblocks[:-1]:
            rows = block(rows, attn_mask=mask)
        last = model.ln_final(model.transformer.resblocks[-1](rows, attn_mask=mask))
        # The end token has the largest id.
        end = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return TextFeatures(rows, last, end @ model.text_projection)


class MaskGenTextEncoder(nn.Module):
    """Prompts to the :class:`TextCondition` of MaskGen and TA-TiTok.

    MaskGen takes the penultimate block's rows and the pooled output; TA-TiTok the full tower's rows after the
    final norm. The unconditional branch is told the empty prompt.
    """

    null_text: Tensor
    null_pooled: Tensor

    def __init__(self, tower: ClipText, *, score: float = 6.5, guidance: bool = True) -> None:
        """
        Args:
            tower: CLIP ViT-L/14-336, whose texts are padded with 0, as open_clip does.
            score: the aesthetic score asked for; the published sampler always asks for 6.5.
            guidance: keep the rows that TA-TiTok's decoder reads.
        """
        super().__init__()
        self.tower, self.score, self.guidance = tower, score, guidance
        null = tower([""])
        self.register_buffer("null_text", null.penultimate[0].clone(), persistent=False)
        self.register_buffer("null_pooled", null.pooled[0].clone(), persistent=False)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        score: float = 6.5,
        guidance: bool = True,
        quick_gelu: bool | None = None,
        library: Library | None = None,
        revision: str | None = None,
    ) -> MaskGenTextEncoder:
        """
        Args:
            source: a folder as ``openai/clip-vit-large-patch14-336`` (transformers), or the weights of
                open_clip's ViT-L-14-336; see :meth:`ClipText.load`. transformers' tokenizer neither unescapes
                HTML nor mends broken Unicode, as open_clip's, with which MaskGen was trained, does.
            score, guidance: see the constructor.
            quick_gelu: None: as the files say, which for OpenAI's weights is QuickGELU. The published code
                names the tower in a way (``ViT-L-14-336``, ``openai``) that open_clip built with QuickGELU up
                to 2.28 and builds with GELU since; with which one MaskGen was trained is not known.
            library: that reads it; None: transformers, unless the files are open_clip's.
            revision: of a hub repository: a commit.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: see :meth:`ClipText.load`.
        """
        tower = ClipText.load(
            source, library=library, architecture=MASKGEN_ARCHITECTURE, pad=OPEN_CLIP_PADDING,
            quick_gelu=quick_gelu, revision=revision,
        )  # fmt: skip
        return cls(tower, score=score, guidance=guidance)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """The condition of B prompts."""
        found: TextFeatures = self.tower(prompts)
        return TextCondition.of(
            found.penultimate, found.pooled, score=self.score, null_text=self.null_text,
            null_pooled=self.null_pooled, guidance=found.last if self.guidance else None,
        )  # fmt: skip


class MeissonicTextEncoder(nn.Module):
    """Prompts to the :class:`MeissonicCondition`.

    Rows are the penultimate block's, the pooled output is projected. The unconditional branch is told a fixed
    negative prompt.
    """

    null_text: Tensor
    null_pooled: Tensor

    def __init__(
        self,
        tower: ClipText,
        *,
        negative_prompt: str = NEGATIVE_PROMPT,
        micro: Sequence[float] = (1024, 1024, 0, 0, 6.0),
        time: float = 0.0,
    ) -> None:
        """
        Args:
            tower: CLIP ViT-H/14.
            negative_prompt: of the unconditional branch.
            micro: width, height, two crop offsets, aesthetic score.
            time: the timestep, until a sampler or a trainer sets it.
        """
        super().__init__()
        self.tower, self.micro, self.time = tower, tuple(micro), time
        null = tower([negative_prompt])
        self.register_buffer("null_text", null.penultimate[0].clone(), persistent=False)
        self.register_buffer("null_pooled", null.pooled[0].clone(), persistent=False)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        library: Library | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> MeissonicTextEncoder:
        """
        Args:
            source: a folder as ``MeissonFlow/Meissonic`` (with ``text_encoder`` and ``tokenizer``), or as
                ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, whose tower the published sampler takes instead;
                see :meth:`ClipText.load`.
            tokenizer: another folder for the tokenizer; the published sampler's is Meissonic's own.
            library: that reads it; None: transformers, unless the files are open_clip's.
            revision: of a hub repository: a commit.
            options: see the constructor.

        Raises:
            ImportError, FileNotFoundError, ModelFileError: see :meth:`ClipText.load`.
        """
        tower = ClipText.load(
            source, library=library, architecture=MEISSONIC_ARCHITECTURE, tokenizer=tokenizer,
            revision=revision,
        )  # fmt: skip
        return cls(tower, **options)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> MeissonicCondition:
        """The condition of B prompts."""
        found: TextFeatures = self.tower(prompts)
        return MeissonicCondition.of(
            found.penultimate, found.pooled, micro=self.micro, time=self.time,
            null_text=self.null_text, null_pooled=self.null_pooled,
        )  # fmt: skip

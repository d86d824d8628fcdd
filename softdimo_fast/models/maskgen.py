"""MaskGen-VQ, the text-to-image generator over the 128 one-dimensional tokens of TA-TiTok.

Source: "Democratizing text-to-image masked generative models with compact text-aware one-dimensional tokens"
(arXiv 2501.07730). Parameter names are the published ones; the checkpoints ``maskgen_vq_l`` and
``maskgen_vq_xl`` fit :meth:`MaskGenConfig.large` and :meth:`MaskGenConfig.extra_large`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.joint_blocks import (
    ContinuousNorm,
    JointBlock,
    require_shape,
    run_block,
    sinusoid,
)
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.models.text_conditions import TextCondition

MAX_PERIOD = 1000.0  # of the sinusoid of the aesthetic score
SCORE_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class MaskGenConfig:
    """Sizes of a :class:`MaskGenTransformer`, under the names of the published constructor.

    Attributes:
        codebook_size: V. The table has V + 1 + (condition_num_classes + 1) rows: codes, [MASK], unused ones.
        num_latent_tokens: tokens of an image.
        text_embed_dim: width of text tokens and pooled text.
        condition_num_classes: only makes the table larger; the published files count 1000.
        decoder_embed_dim: width of the rows.
        decoder_depth: blocks.
        decoder_num_heads: of each attention; the weights do not tell.
        micro_condition: whether the aesthetic score is a condition.
        micro_condition_embed_dim: width of its sinusoid.
        sample_aesthetic_score: that the published sampler asks for, whatever score it is given.
        text_drop_prob: share of unconditional samples the published model was trained with.
    """

    codebook_size: int = 8192
    num_latent_tokens: int = 128
    text_embed_dim: int = 768
    condition_num_classes: int = 1000
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    micro_condition: bool = True
    micro_condition_embed_dim: int = 256
    sample_aesthetic_score: float = 6.5
    text_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "codebook_size", "num_latent_tokens", "text_embed_dim", "decoder_embed_dim",
            "decoder_depth", "decoder_num_heads",
        ):  # fmt: skip
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require_range(self, "condition_num_classes", self.condition_num_classes, minimum=0)
        _config.require(
            self.micro_condition_embed_dim > 0 and self.micro_condition_embed_dim % 2 == 0, self,
            "micro_condition_embed_dim", self.micro_condition_embed_dim, "a positive even number",
        )  # fmt: skip
        _config.require(
            self.decoder_embed_dim % self.decoder_num_heads == 0, self, "decoder_num_heads",
            self.decoder_num_heads, f"a divisor of decoder_embed_dim = {self.decoder_embed_dim}",
        )  # fmt: skip

    @classmethod
    def large(cls) -> MaskGenConfig:
        """``maskgen_vq_l``."""
        return cls()

    @classmethod
    def extra_large(cls) -> MaskGenConfig:
        """``maskgen_vq_xl``."""
        return cls(decoder_embed_dim=1280, decoder_depth=20)

    @classmethod
    def from_published(cls, published: Mapping[str, Any]) -> MaskGenConfig:
        """The sizes in a published ``config.json``, or in a flat dict of the same names.

        The published file holds the tokenizer's, the data's and the optimizer's settings too: of ``model``'s
        sections ``vq_model`` and ``maskgen`` only the fields of this config are read.

        Raises:
            ConfigError: a value is of another type or out of range.
        """
        config: MaskGenConfig = published_config(cls, published, ("vq_model", "maskgen"))
        return config


def published_config(cls: Any, published: Mapping[str, Any], sections: tuple[str, ...]) -> Any:
    """A config from ``published["model"]``'s sections, or from a flat dict, which may hold nothing else."""
    if "model" not in published:
        return _config.from_dict(cls, published)
    model = published["model"]
    missing = [name for name in sections if name not in model]
    _config.require(
        not missing, cls, "model", sorted(model), f"a dict with {' and '.join(sections)}"
    )
    known = cls.__dataclass_fields__
    found = {k: v for section in sections for k, v in model[section].items() if k in known}
    return _config.from_dict(cls, found)


class MaskGenTransformer(MaskedDiffusionModel):
    """Predicts the tokens of an image given a :class:`TextCondition`.

    The head is tied to the first V rows of the table, without bias. The published ``.bin`` files hold the
    table a second time as ``lm_head.weight``: :attr:`TIED_KEYS` names it; loading takes a state dict with or
    without it and refuses one whose copies differ. The state dict of the module has it not, as the published
    ``.safetensors``.

    Where this differs from the published code: in train mode that masks its own input at random, and draws
    unconditional samples; here masking and dropping are the trainer's, and both modes compute the same.

    Attributes:
        checkpoint_blocks: recompute each block in backward instead of keeping what is inside it.
    """

    Config = MaskGenConfig
    TIED_KEYS: Mapping[str, str] = {"lm_head.weight": "embeddings.weight"}

    def __init__(self, config: MaskGenConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary, self.mask_id = config.codebook_size, config.codebook_size
        self.token_shape = (config.num_latent_tokens,)
        self.checkpoint_blocks = False
        width, text = config.decoder_embed_dim, config.text_embed_dim
        micro = config.micro_condition_embed_dim if config.micro_condition else 0
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_latent_tokens, width))
        self.text_embed_proj = nn.Linear(text, width)
        self.cond_pooled_proj = nn.Linear(text + micro, width)
        self.blocks = nn.ModuleList(
            JointBlock(
                width, config.decoder_num_heads, normalized=False,
                last=i + 1 == config.decoder_depth,
            )
            for i in range(config.decoder_depth)
        )  # fmt: skip
        self.norm = ContinuousNorm(width)
        self.embeddings = nn.Embedding(
            config.codebook_size + 1 + config.condition_num_classes + 1, width
        )
        self._initialize()
        self.register_load_state_dict_pre_hook(_drop_tied_keys)  # type: ignore[no-untyped-call]

    def _initialize(self) -> None:
        """For training from nothing; a checkpoint replaces all of it."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.04, b=0.04)

    # -----------------------------------------------------------------------------------------------
    # tokens

    def embed(self, tokens: Tensor) -> Tensor:
        # The rows after [MASK] are no tokens.
        return F.embedding(tokens, self.embeddings.weight[: self.mask_id + 1])

    @property
    def token_table(self) -> Tensor:
        return self.embeddings.weight[: self.vocabulary]

    @property
    def mask_embedding(self) -> Tensor:
        return self.embeddings.weight[self.mask_id]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The table, and the head with it."""
        return list(self.embeddings.parameters())

    # -----------------------------------------------------------------------------------------------
    # the network

    def unconditional(self, condition: TextCondition) -> TextCondition:
        """The empty prompt's text in place of the text, with the same score.

        Raises:
            ValueError: the condition holds no text of the empty prompt.
        """
        if condition.null_text.shape != condition.text.shape:
            raise ValueError(
                "MaskGenTransformer: condition.null_text must have the shape of condition.text, "
                f"{list(condition.text.shape)}, got {list(condition.null_text.shape)}; give "
                "TextCondition.of the empty prompt's null_text and null_pooled"
            )
        return condition._replace(text=condition.null_text, pooled=condition.null_pooled)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(self, embeddings: Tensor, condition: TextCondition) -> Tensor:
        vector = self.conditioning_vector(condition)
        image, _ = self._run(embeddings, condition, vector, self.depth)
        normed: Tensor = self.norm(image, vector)
        return normed

    def features(
        self, embeddings: Tensor, condition: TextCondition, layers: tuple[int, ...]
    ) -> list[Tensor]:
        """The image rows ``[B, N, D]`` after the named blocks; the last block has no text rows left.

        Raises:
            ValueError: there is no such block.
        """
        if any(not 0 <= layer < self.depth for layer in layers):
            raise ValueError(
                f"features: layers must be numbers from 0 to {self.depth - 1}, got {layers}"
            )
        vector = self.conditioning_vector(condition)
        _, outputs = self._run(embeddings, condition, vector, max(layers, default=-1) + 1)
        return [outputs[layer] for layer in layers]

    def conditioning_vector(self, condition: TextCondition) -> Tensor:
        """``[B, D]``, the vector that modulates every block: pooled text and aesthetic score, no timestep."""
        pooled, config = condition.pooled, self.config
        require_shape(self, "condition.pooled", pooled, len(pooled), config.text_embed_dim)
        if config.micro_condition:
            require_shape(self, "condition.score", condition.score, len(pooled))
            score = sinusoid(
                condition.score.float() * SCORE_SCALE, config.micro_condition_embed_dim,
                max_period=MAX_PERIOD, sine_first=True,
            )  # fmt: skip
            pooled = torch.cat([pooled, score.to(pooled.dtype)], dim=-1)
        vector: Tensor = self.cond_pooled_proj(pooled)
        return vector

    def _run(
        self, embeddings: Tensor, condition: TextCondition, vector: Tensor, blocks: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The image rows after the first ``blocks`` blocks, and after each of them."""
        config = self.config
        rows = (*self.token_shape, config.decoder_embed_dim)
        require_shape(self, "embeddings", embeddings, len(embeddings), *rows)
        require_shape(
            self, "condition.text", condition.text, len(embeddings), None, config.text_embed_dim
        )
        image = embeddings + self.pos_embed
        text = self.text_embed_proj(condition.text)
        outputs = []
        for block in self.blocks[:blocks]:
            text, image = run_block(block, self.checkpoint_blocks, text, image, vector, None)
            outputs.append(image)
        return image, outputs

    # -----------------------------------------------------------------------------------------------
    # the head

    def head_input(self, hidden: Tensor) -> Tensor:
        """``hidden`` itself: the last norm depends on the condition, so it ends :meth:`forward`."""
        return hidden

    @property
    def head_weight(self) -> Tensor:
        return self.token_table

    @property
    def head_bias(self) -> None:
        return None


def _drop_tied_keys(
    module: MaskGenTransformer, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Takes the copies of tied tensors out of a state dict that is being loaded."""
    errors: list[str] = rest[-1]
    for copy, original in module.TIED_KEYS.items():
        tensor, kept = state_dict.pop(prefix + copy, None), state_dict.get(prefix + original)
        if tensor is None or kept is None or tensor is kept:
            continue
        same = tensor.shape == kept.shape and (tensor.is_meta or torch.equal(tensor, kept))
        if not same:
            errors.append(f"{prefix}{copy} must equal {prefix}{original}, to which it is tied")

"""The Meissonic text-to-image transformer: 64 x 64 tokens, worked on as 32 x 32 rows.

Source: Meissonic (arXiv 2410.08261). Parameter names are those of the published diffusers folder
``MeissonFlow/Meissonic/transformer``, which fits the default sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.models.joint_blocks import (
    JointBlock,
    RmsNorm,
    Rotation,
    SingleBlock,
    require_shape,
    rotation,
    run_block,
    sinusoid,
)
from softdimo_fast.models.meissonic_layers import (
    SINUSOID,
    Head,
    Resample,
    TimeText,
    TokenEmbedding,
    TwoLayers,
)
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.models.text_conditions import MICRO_CONDITIONS, MeissonicCondition

MAX_PERIOD = 10000.0
THETA = 10000.0  # of the rotary positions
TIME_SCALE = 1000.0  # the network multiplies the timestep by it


@dataclass(frozen=True, kw_only=True)
class MeissonicConfig:
    """Sizes of a :class:`MeissonicTransformer`, under the names of the published constructor.

    Attributes:
        num_layers: blocks with a text and an image stream.
        num_single_layers: blocks over both as one sequence, after these.
        attention_head_dim, num_attention_heads: of each attention; their product D is the width of the rows.
        joint_attention_dim: width of text tokens.
        pooled_projection_dim: width of the pooled text; it must be D.
        axes_dims_rope: how many of a head's channels turn by (0, row, column).
        vocab_size: rows of the token table; [MASK] is the last, those before it after the codes are unused.
        codebook_size: V.
        downsample, upsample: halve the grid before the blocks and double it after, or neither (the models
            for 512 pixels).
        patch_size, in_channels, guidance_embeds: of the published config; they change nothing here, and
            guidance embeddings are refused.
        token_grid: height and width (h, w) of the tokens; no argument of the published constructor.
        timestep: ``"condition"``: the network's timestep is the condition's (0 where it is not set, which is
            what an integer cast leaves of every timestep in the public Di[M]O recipe); ``"mask_ratio"``:
            trainers set it to 1000 x the share of masked positions, as the published model was trained.
    """

    num_layers: int = 14
    num_single_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 8
    joint_attention_dim: int = 1024
    pooled_projection_dim: int = 1024
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    vocab_size: int = 8256
    codebook_size: int = 8192
    downsample: bool = True
    upsample: bool = True
    patch_size: int = 1
    in_channels: int = 64
    guidance_embeds: bool = False
    token_grid: tuple[int, int] = (64, 64)
    timestep: Literal["condition", "mask_ratio"] = "condition"

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "attention_head_dim", "num_attention_heads", "joint_attention_dim", "codebook_size",
        ):  # fmt: skip
            _config.require_range(self, name, getattr(self, name), minimum=1)
        for name in ("num_layers", "num_single_layers"):
            _config.require_range(self, name, getattr(self, name), minimum=0)
        head = self.attention_head_dim
        requirements: dict[str, tuple[bool, str]] = {
            "pooled_projection_dim": (
                self.pooled_projection_dim == self.width,
                f"num_attention_heads * attention_head_dim = {self.width}",
            ),
            "axes_dims_rope": (
                sum(self.axes_dims_rope) == head
                and all(n % 2 == 0 <= n for n in self.axes_dims_rope),
                f"even numbers with the sum attention_head_dim = {head}",
            ),
            "vocab_size": (self.vocab_size > self.codebook_size, f"above {self.codebook_size}"),
            "upsample": (self.upsample == self.downsample, f"{self.downsample}, as downsample"),
            "guidance_embeds": (not self.guidance_embeds, "False"),
            "token_grid": (
                all(n > 0 and n % self.stride == 0 for n in self.token_grid),
                f"positive multiples of {self.stride}",
            ),
        }
        for name, (holds, expected) in requirements.items():
            _config.require(holds, self, name, getattr(self, name), expected)

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def stride(self) -> int:
        """Tokens per row of the network, in each direction."""
        return 2 if self.downsample else 1

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **own: Any) -> MeissonicConfig:
        """The sizes in a published ``config.json``; ``own`` are ``token_grid`` and ``timestep``.

        Raises:
            ConfigError: an unknown field, a value of another type or out of range.
        """
        # _class_name, _diffusers_version, _name_or_path
        sizes = {name: value for name, value in published.items() if not name.startswith("_")}
        return _config.from_dict(cls, sizes | own)


class MeissonicTransformer(MaskedDiffusionModel):
    """Predicts the tokens of an image given a :class:`MeissonicCondition`.

    Tokens are ``[B, h * w]`` in row-major order. Wherever tokens, embeddings, hidden states or logits have
    the shape ``[B, L, ...]`` they may be given as ``[B, h, w, ...]`` too, also with another grid than
    ``config.token_grid``, and the results have that shape.

    The token embedding is a table, an RMSNorm and a 1x1 convolution. The norm is not linear, so an
    expectation over tokens is one of table rows: :attr:`embed`, :attr:`token_table` and :meth:`soft_embed`
    give table rows, and :meth:`forward` goes on from there. A one-step generator's noise comes after the
    convolution, as in the public Di[M]O code: :meth:`generator_input`.

    The head is not tied to the table and has no bias. Only codes can be predicted.

    Attributes:
        checkpoint_blocks: recompute each block in backward instead of keeping what is inside it.
    """

    Config = MeissonicConfig

    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary, self.mask_id = config.codebook_size, config.vocab_size - 1
        self.token_shape = (config.token_grid[0] * config.token_grid[1],)
        self.checkpoint_blocks = False
        width, heads = config.width, config.num_attention_heads
        pooled = config.pooled_projection_dim
        self.time_text_embed = TimeText(width, pooled)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, heads, normalized=True) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads) for _ in range(config.num_single_layers)
        )
        self._modules["embed"] = TokenEmbedding(config.vocab_size, width)
        self.mlm_layer = Head(width, config.codebook_size)
        self.cond_embed = TwoLayers(pooled + MICRO_CONDITIONS * SINUSOID, pooled, bias=False)
        self.encoder_proj_layer_norm = RmsNorm(width)
        self.project_to_hidden_norm = RmsNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.project_from_hidden_norm = RmsNorm(width)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.down_block, self.up_block = nn.ModuleDict(), nn.ModuleDict()
        if config.downsample:
            self.down_block["downsample"] = Resample(width, nn.Conv2d)
            self.up_block["upsample"] = Resample(width, nn.ConvTranspose2d)
        self._initialize()

    def _initialize(self) -> None:
        """For training from nothing; a checkpoint replaces all of it."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    # -----------------------------------------------------------------------------------------------
    # tokens

    @property
    def embed(self) -> TokenEmbedding:
        """``embed(tokens)``: the table rows ``[B, L, D]``; ``[B, h, w, D]`` of tokens ``[B, h, w]``."""
        # A module, because the published files name its parameters "embed.*".
        module = self._modules["embed"]
        assert isinstance(module, TokenEmbedding)
        return module

    @property
    def token_table(self) -> Tensor:
        return self.embed.embeddings.weight[: self.vocabulary]

    @property
    def mask_embedding(self) -> Tensor:
        return self.embed.embeddings.weight[self.mask_id]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Table, norm, convolution and the whole head: what the public Di[M]O code freezes."""
        return [*self.embed.parameters(), *self.mlm_layer.parameters()]

    def generator_input(self, embeddings: Tensor) -> Tensor:
        """Table rows, or mixtures of them, after RMSNorm and 1x1 convolution."""
        return self.embed.enter(embeddings)

    # -----------------------------------------------------------------------------------------------
    # conditions

    def unconditional(self, condition: MeissonicCondition) -> MeissonicCondition:
        """The negative prompt's text in place of the text, with the same micro-conditions and timestep.

        Raises:
            ValueError: the condition holds no negative prompt.
        """
        if condition.null_text.shape != condition.text.shape:
            raise ValueError(
                "MeissonicTransformer: condition.null_text must have the shape of condition.text, "
                f"{list(condition.text.shape)}, got {list(condition.null_text.shape)}; give "
                "MeissonicCondition.of the negative prompt's null_text and null_pooled"
            )
        return condition._replace(text=condition.null_text, pooled=condition.null_pooled)

    def masked_condition(self, condition: MeissonicCondition, mask: Tensor) -> MeissonicCondition:
        """The condition at the timestep of the mask, where ``config.timestep`` is ``"mask_ratio"``."""
        if self.config.timestep == "condition":
            return condition
        return condition._replace(time=TIME_SCALE * mask.flatten(1).float().mean(1))

    def timed_condition(self, condition: MeissonicCondition, time: float) -> MeissonicCondition:
        """The condition at a timestep."""
        return condition._replace(time=torch.full_like(condition.time, time))

    def conditioning_vector(self, condition: MeissonicCondition) -> Tensor:
        """``[B, D]``, the vector that modulates every block: pooled text, micro-conditions, timestep."""
        pooled = condition.pooled
        batch = len(pooled)
        require_shape(self, "condition.pooled", pooled, batch, self.config.pooled_projection_dim)
        require_shape(self, "condition.micro", condition.micro, batch, MICRO_CONDITIONS)
        require_shape(self, "condition.time", condition.time, batch)
        micro = _waves(condition.micro).flatten(1).to(pooled.dtype)
        text = self.cond_embed(torch.cat([pooled, micro], dim=-1))
        # In float32: the arguments reach 1e6.
        time = _waves(condition.time.float() * TIME_SCALE).to(pooled.dtype)
        vector: Tensor = self.time_text_embed(time, text)
        return vector

    # -----------------------------------------------------------------------------------------------
    # the network

    @property
    def depth(self) -> int:
        """Double blocks, then single blocks."""
        return len(self.transformer_blocks) + len(self.single_transformer_blocks)

    def forward(self, embeddings: Tensor, condition: MeissonicCondition) -> Tensor:
        return self.forward_entered(self.generator_input(embeddings), condition)

    def generator_logits(self, inputs: Tensor, condition: MeissonicCondition) -> Tensor:
        return self.head(self.forward_entered(inputs, condition))

    def forward_entered(self, inputs: Tensor, condition: MeissonicCondition) -> Tensor:
        """Hidden states of what :meth:`generator_input` gave."""
        grid = self._grid(inputs)
        rows, _ = self._run(grid, condition, self.depth)
        height, width = (n // self.config.stride for n in grid.shape[1:3])
        rows = self.project_from_hidden(self.project_from_hidden_norm(rows))
        hidden = self._resampled(rows.unflatten(1, (height, width)), self.up_block)
        return hidden.reshape(inputs.shape)

    def features(
        self, embeddings: Tensor, condition: MeissonicCondition, layers: tuple[int, ...]
    ) -> list[Tensor]:
        """The image rows ``[B, h w / stride^2, D]`` after the named blocks, on the network's grid.

        Raises:
            ValueError: there is no such block.
        """
        if any(not 0 <= layer < self.depth for layer in layers):
            raise ValueError(
                f"features: layers must be numbers from 0 to {self.depth - 1}, got {layers}"
            )
        grid = self._grid(self.generator_input(embeddings))
        _, outputs = self._run(grid, condition, max(layers, default=-1) + 1)
        return [outputs[layer] for layer in layers]

    def _grid(self, rows: Tensor) -> Tensor:
        """``[B, h, w, D]``."""
        if rows.dim() == 4:
            return rows
        require_shape(self, "embeddings", rows, None, *self.token_shape, self.config.width)
        grid: Tensor = rows.unflatten(1, self.config.token_grid)
        return grid

    def _run(
        self, grid: Tensor, condition: MeissonicCondition, blocks: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The image rows after the first ``blocks`` blocks, and after each of them."""
        config = self.config
        require_shape(self, "embeddings", grid, None, None, None, config.width)
        require_shape(
            self, "condition.text", condition.text, len(grid), None, config.joint_attention_dim
        )
        if grid.shape[1] % config.stride or grid.shape[2] % config.stride:
            raise ValueError(
                f"MeissonicTransformer: the token grid must be multiples of {config.stride}, got "
                f"{list(grid.shape[1:3])}"
            )
        vector = self.conditioning_vector(condition)
        text: Tensor = self.encoder_proj_layer_norm(self.context_embedder(condition.text))
        grid = self._resampled(grid, self.down_block)
        angles = self.rotation(text.shape[1], grid.shape[1], grid.shape[2], grid)
        image = self.project_to_hidden(self.project_to_hidden_norm(grid.flatten(1, 2)))
        outputs = []
        for block in self.transformer_blocks[:blocks]:
            text, image = run_block(block, self.checkpoint_blocks, text, image, vector, angles)
            outputs.append(image)
        rows: Tensor = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks[: max(0, blocks - len(outputs))]:
            rows = run_block(block, self.checkpoint_blocks, rows, vector, angles)
            outputs.append(rows[:, text.shape[1] :])
        return rows[:, text.shape[1] :], outputs

    @staticmethod
    def _resampled(grid: Tensor, block: nn.ModuleDict) -> Tensor:
        for layer in block.values():
            grid = layer(grid)
        return grid

    def rotation(self, text: int, height: int, width: int, like: Tensor) -> Rotation:
        """The angles of ``text`` rows, all at (0, 0, 0), then of image rows at (0, row, column).

        On the device of ``like``, in float32, or its dtype if that is wider.
        """
        steps = [torch.arange(n, device=like.device) for n in (height, width)]
        row, column = (axis.flatten() for axis in torch.meshgrid(*steps, indexing="ij"))
        image = torch.stack([torch.zeros_like(row), row, column], dim=-1)
        positions = torch.cat([image.new_zeros(text, 3), image])
        return rotation(
            positions, self.config.axes_dims_rope, theta=THETA,
            dtype=torch.promote_types(like.dtype, torch.float32),
        )  # fmt: skip

    # -----------------------------------------------------------------------------------------------
    # the head

    def head_input(self, hidden: Tensor) -> Tensor:
        rows: Tensor = self.mlm_layer(hidden)
        return rows

    @property
    def head_weight(self) -> Tensor:
        return self.mlm_layer.conv2.weight.flatten(1)

    @property
    def head_bias(self) -> None:
        return None


def _waves(values: Tensor) -> Tensor:
    return sinusoid(values, SINUSOID, max_period=MAX_PERIOD, sine_first=False)

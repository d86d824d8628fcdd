"""The MaskBit generator: masked diffusion on the bits of a lookup-free tokenizer, no token table.

Source: Weber et al., "MaskBit: embedding-free image generation via bit tokens" (arXiv 2409.16211).
Parameter names are those of the published checkpoints (10, 12, 14, 16 and 18 bits).

A position holds ``bits`` bits in ``codebook_splits`` tokens. Bit k of a token, lowest first, is -1 or +1; the
splits follow each other, so the joint id is the sum of split_s << (s bits / splits). Since the network and
the decoder take the bits themselves, the soft embedding of a position is its expected bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.models.class_token import (
    BlockStack,
    ClassTokenTransformer,
    SelfAttention,
    initialize,
)

EPS = 1e-12  # of every norm in the generator


def join_splits(tokens: Tensor, bits: int) -> Tensor:
    """The joint ids, int64 ``[...]``, of tokens ``[..., splits]`` that have ``bits`` bits each.

    The published function returns float32, exact up to 2^24.
    """
    shift = bits * torch.arange(tokens.shape[-1], device=tokens.device)
    return (tokens << shift).sum(-1)


def split_joint(joint: Tensor, splits: int, bits: int) -> Tensor:
    """The tokens ``[..., splits]`` of joint ids: the inverse of :func:`join_splits`."""
    shift = bits * torch.arange(splits, device=joint.device)
    return joint[..., None] >> shift & (1 << bits) - 1


def token_signs(tokens: Tensor, weights: Tensor) -> Tensor:
    """Bits as True for +1, ``[..., bits]``, of tokens ``[...]``; ``weights`` are 1, 2, 4, ..."""
    return tokens[..., None] & weights != 0


def bit_weights(bits: int) -> Tensor:
    """1, 2, 4, ..., int32: the buffer ``bits_to_indices`` of the checkpoints."""
    return 2 ** torch.arange(bits, dtype=torch.int32)


@dataclass(frozen=True, kw_only=True)
class MaskBitGeneratorConfig:
    """Sizes of a :class:`MaskBitGenerator`; the defaults are those of the published 14-bit checkpoint.

    Attributes:
        img_size: height and width of the images; there are (img_size / input_stride)^2 positions.
        hidden_dim: width of the rows.
        codebook_size: 2^bits, of the splits of a position together.
        codebook_splits: tokens of a position.
        depth: blocks.
        heads: of each attention; the weights do not tell.
        mlp_dim: width inside the feed-forward layers.
        dropout: that the published model was trained with. It is accepted, and never applied.
        nclass: classes; the null class is one more.
        input_stride: pixels of an image per position, in each direction.
        use_prenorm: False; no published checkpoint has the other form.
    """

    img_size: int = 256
    hidden_dim: int = 1024
    codebook_size: int = 2**14
    codebook_splits: int = 2
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    dropout: float = 0.0
    nclass: int = 1000
    input_stride: int = 16
    use_prenorm: bool = False

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "img_size", "hidden_dim", "codebook_splits", "depth", "heads", "mlp_dim", "nclass",
            "input_stride",
        ):  # fmt: skip
            _config.require_range(self, name, getattr(self, name), minimum=1)
        size = self.codebook_size
        _config.require(
            size >= 2 and size & (size - 1) == 0, self, "codebook_size", size, "a power of two"
        )
        for name, whole, divisor in (
            ("codebook_splits", self.bits, self.codebook_splits),
            ("input_stride", self.img_size, self.input_stride),
            ("heads", self.hidden_dim, self.heads),
        ):
            _config.require(
                whole % divisor == 0, self, name, divisor, f"a number that divides {whole}"
            )
        _config.require_range(self, "dropout", self.dropout, minimum=0, below=1)
        _config.require(not self.use_prenorm, self, "use_prenorm", self.use_prenorm, "False")

    @property
    def bits(self) -> int:
        """Of a position."""
        return self.codebook_size.bit_length() - 1

    @property
    def split_bits(self) -> int:
        """Of a token."""
        return self.bits // self.codebook_splits


class _Attention(nn.Module):
    """norm(x + attention(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = SelfAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x + self.mha(x))
        return normed


class _FeedForward(nn.Module):
    """norm(x + net(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x + self.net(x))
        return normed


class MaskBitGenerator(ClassTokenTransformer):
    """Predicts 16 x 16 positions of ``bits`` bits (at the default sizes) given a class.

    Tokens are ``[B, N, splits]``, embeddings the bits themselves, ``[B, N, bits]``, split 0 first: -1 and
    +1, or 0 in a [MASK] split. ``bits_to_indices`` (1, 2, 4, ...) is a buffer, as checkpoints hold it.

    Where this differs from the published code: a call there without a drop mask means the null class for
    every sample, and writes it into the caller's labels. Here labels mean what they say, are never written
    to, and the null class is asked for (:meth:`unconditional`); nothing is dropped out in any mode.
    """

    Config = MaskBitGeneratorConfig
    bits_to_indices: Tensor

    def __init__(self, config: MaskBitGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = self.mask_id = 1 << config.split_bits
        self.classes = config.nclass
        length, width = (config.img_size // config.input_stride) ** 2, config.hidden_dim
        self.token_shape = (length, config.codebook_splits)
        self.pos_emb = nn.Parameter(torch.empty(1, length + 1, width))
        self.register_buffer("bits_to_indices", bit_weights(config.split_bits))
        self.class_emb = nn.Embedding(config.nclass + 1, width)
        self.input_proj = nn.Linear(config.bits, width)
        self.first_layer = nn.Sequential(nn.LayerNorm(width, eps=EPS))
        self.transformer = BlockStack(
            nn.Sequential(_Attention(width, config.heads), _FeedForward(width, config.mlp_dim))
            for _ in range(config.depth)
        )
        self.last_layer = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=EPS)
        )
        self.prediction_layer = nn.Linear(width, config.codebook_splits * self.vocabulary)
        initialize(self)
        nn.init.trunc_normal_(self.pos_emb, std=0.02, a=-0.04, b=0.04)

    def embed(self, tokens: Tensor) -> Tensor:
        signs = token_signs(tokens, self.bits_to_indices)
        bits = (2 * signs - 1).masked_fill((tokens == self.mask_id)[..., None], 0)
        return bits.flatten(-2).to(self.input_proj.weight.dtype)

    @property
    def token_table(self) -> Tensor:
        codes = torch.arange(self.vocabulary, device=self.bits_to_indices.device)
        table = 2 * token_signs(codes, self.bits_to_indices) - 1
        grouped = table.to(self.input_proj.weight.dtype)
        return grouped.expand(self.token_shape[1], -1, -1)

    @property
    def mask_embedding(self) -> Tensor:
        shape = (self.token_shape[1], self.config.split_bits)
        return self.input_proj.weight.new_zeros(shape)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Projection of the bits, class table and positions: as in MaskGIT, but for the untied head."""
        return [*self.input_proj.parameters(), *self.class_emb.parameters(), self.pos_emb]

    def first_rows(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        self.check_rows(embeddings, condition, self.config.bits)
        visual = self.input_proj(embeddings)
        label = self.class_emb(condition)[:, None].to(visual.dtype)
        entered: Tensor = self.first_layer(torch.cat([visual, label], dim=1) + self.pos_emb)
        return entered

    def head_input(self, hidden: Tensor) -> Tensor:
        last: Tensor = self.last_layer(hidden)
        return last

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self.prediction_layer.weight.unflatten(0, (self.token_shape[1], -1))
        return weight

    @property
    def head_bias(self) -> Tensor:
        bias: Tensor = self.prediction_layer.bias.unflatten(0, (self.token_shape[1], -1))
        return bias

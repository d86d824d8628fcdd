"""The MaskGIT transformer of Halton-MaskGIT v1.0, the ImageNet teacher of Di[M]O and Soft-Di[M]O.

Sources: MaskGIT (arXiv 2202.04200); the open reproduction (arXiv 2310.14400), whose checkpoint
``MaskGIT_ImageNet_256.pth`` loads into the default sizes. Parameter names are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.class_token import (
    BlockStack,
    ClassTokenTransformer,
    SelfAttention,
    initialize,
)

STRIDE = 16  # pixels of an image per token, in each direction
OUTER_EPS = 1e-12  # of the norms in first_layer and last_layer; those in the blocks have 1e-5


@dataclass(frozen=True, kw_only=True)
class MaskGitConfig:
    """Sizes of a :class:`MaskGitTransformer`; the defaults are those of the published checkpoint.

    Attributes:
        img_size: height and width of the images, a multiple of 16; there are (img_size / 16)^2 tokens.
        hidden_dim: width of the rows.
        codebook_size: V.
        depth: blocks.
        heads: of each attention; the weights do not tell.
        mlp_dim: width inside the feed-forward layers.
        dropout: that the published model was trained with. It is accepted, and never applied.
        nclass: classes; the null class is one more.
    """

    img_size: int = 256
    hidden_dim: int = 768
    codebook_size: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 3072
    dropout: float = 0.0
    nclass: int = 1000

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("hidden_dim", "codebook_size", "depth", "heads", "mlp_dim", "nclass"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require_range(self, "img_size", self.img_size, minimum=STRIDE)
        _config.require(
            self.img_size % STRIDE == 0, self, "img_size", self.img_size, f"a multiple of {STRIDE}"
        )
        _config.require(
            self.hidden_dim % self.heads == 0, self, "heads", self.heads,
            f"a divisor of hidden_dim = {self.hidden_dim}",
        )  # fmt: skip
        _config.require_range(self, "dropout", self.dropout, minimum=0, below=1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = SelfAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.mha(x)
        return attended


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        # Identity where the published model has dropout, which counts in the parameter names.
        self.net = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.Identity(), nn.Linear(inner, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.net(x)
        return mixed


class _PreNorm(nn.Module):
    """x + fn(norm(x))."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.fn(self.norm(x))
        return added


def _outer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=OUTER_EPS)


class MaskGitTransformer(ClassTokenTransformer):
    """Predicts 16 x 16 codes (at the default sizes) of a 256 x 256 image given a class.

    The rows of ``tok_emb``: V codes, [MASK], the classes, the null class. The head is tied to it, with a bias
    of its own for each position. :meth:`head` computes the V columns of real codes alone; the published
    model computes all, and lets its sampler draw the [MASK] column too: :meth:`head_with_mask`.

    Where this differs from the published code: it has dropout, which the public Di[M]O code leaves on in
    the teacher's targets; here nothing is drawn, in any mode.
    """

    Config = MaskGitConfig

    def __init__(self, config: MaskGitConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary, self.mask_id = config.codebook_size, config.codebook_size
        self.classes = config.nclass
        length, width = (config.img_size // STRIDE) ** 2, config.hidden_dim
        self.token_shape = (length,)
        table_rows = config.codebook_size + 2 + config.nclass
        self.pos_emb = nn.Parameter(torch.empty(1, length + 1, width))
        self.bias = nn.Parameter(torch.zeros(length + 1, table_rows))
        self.tok_emb = nn.Embedding(table_rows, width)
        self.first_layer = nn.Sequential(
            _outer_norm(width), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            _outer_norm(width), nn.Identity(), nn.Linear(width, width),
        )  # fmt: skip
        self.transformer = BlockStack(
            nn.Sequential(
                _PreNorm(width, _Attention(width, config.heads)),
                _PreNorm(width, _FeedForward(width, config.mlp_dim)),
            )
            for _ in range(config.depth)
        )
        self.last_layer = nn.Sequential(
            _outer_norm(width), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            _outer_norm(width),
        )  # fmt: skip
        initialize(self)
        nn.init.trunc_normal_(self.pos_emb, std=0.02, a=-0.04, b=0.04)

    def embed(self, tokens: Tensor) -> Tensor:
        # The rows after [MASK] are classes, and no tokens.
        return F.embedding(tokens, self.tok_emb.weight[: self.mask_id + 1])

    @property
    def token_table(self) -> Tensor:
        return self.tok_emb.weight[: self.vocabulary]

    @property
    def mask_embedding(self) -> Tensor:
        return self.tok_emb.weight[self.mask_id]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Table, positions and head bias: what the public Di[M]O code freezes (the tied head with them)."""
        return [*self.tok_emb.parameters(), self.pos_emb, self.bias]

    def first_rows(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        self.check_rows(embeddings, condition, self.config.hidden_dim)
        label = F.embedding(condition, self.tok_emb.weight[self.mask_id + 1 :])
        rows = torch.cat([embeddings, label[:, None].to(embeddings.dtype)], dim=1)
        entered: Tensor = self.first_layer(rows + self.pos_emb)
        return entered

    def head_input(self, hidden: Tensor) -> Tensor:
        last: Tensor = self.last_layer(hidden)
        return last

    @property
    def head_weight(self) -> Tensor:
        return self.token_table

    @property
    def head_bias(self) -> Tensor:
        return self.bias[: self.token_shape[0], : self.vocabulary]

    def head_with_mask(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """The published logits ``[B, N, V + 1]``: the last column is [MASK]. ``rows`` as for :meth:`head`."""
        columns = self.vocabulary + 1
        bias = self.bias[: self.token_shape[0], :columns]
        return self.head_columns(hidden, self.tok_emb.weight[:columns], bias, rows)

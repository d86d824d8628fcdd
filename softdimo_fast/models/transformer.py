"""A small class-conditional masked-diffusion transformer: pre-norm, learned positions, a class token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.protocol import MaskedDiffusionModel


@dataclass(frozen=True, kw_only=True)
class TokenTransformerConfig:
    """Sizes of a :class:`TokenTransformer`."""

    vocabulary: int
    length: int
    conditions: int
    width: int = 64
    depth: int = 3
    heads: int = 4
    mlp_ratio: int = 3

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "vocabulary",
            "length",
            "conditions",
            "width",
            "depth",
            "heads",
            "mlp_ratio",
        ):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require(
            self.width % self.heads == 0,
            self,
            "heads",
            self.heads,
            f"a divisor of width = {self.width}",
        )


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, each added."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand = nn.Linear(width, mlp_ratio * width)
        self.contract = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))
        return mixed


class TokenTransformer(MaskedDiffusionModel):
    """Predicts a short token grid given a class; label ``conditions`` is the unconditional one.

    There is no dropout: student, auxiliary and teacher draw nothing (the public Di[M]O code leaves the
    teacher's dropout on in its targets).
    """

    Config = TokenTransformerConfig

    def __init__(self, config: TokenTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary, self.mask_id = config.vocabulary, config.vocabulary
        self.token_shape = (config.length,)
        self.token_embedding = nn.Embedding(config.vocabulary + 1, config.width)
        self.class_embedding = nn.Embedding(config.conditions + 1, config.width)
        self.positions = nn.Parameter(torch.randn(1, config.length + 1, config.width) * 0.3)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocabulary)
        nn.init.normal_(self.token_embedding.weight, std=0.3)
        nn.init.normal_(self.class_embedding.weight, std=0.3)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.token_embedding(tokens)
        return embedded

    @property
    def token_table(self) -> Tensor:
        return self.token_embedding.weight[: self.vocabulary]

    @property
    def mask_embedding(self) -> Tensor:
        return self.token_embedding.weight[self.mask_id]

    def embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.token_embedding.parameters())

    def unconditional(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.config.conditions)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        last: Tensor = self._layers(embeddings, condition)[-1]
        return last[:, 1:]

    def features(
        self, embeddings: Tensor, condition: Tensor, layers: tuple[int, ...]
    ) -> list[Tensor]:
        outputs = self._layers(embeddings, condition)
        return [outputs[layer] for layer in layers]

    def _layers(self, embeddings: Tensor, condition: Tensor) -> list[Tensor]:
        x = torch.cat([self.class_embedding(condition)[:, None], embeddings], dim=1)
        x = x + self.positions
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def head_input(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden)
        return normed

    @property
    def head_weight(self) -> Tensor:
        return self.output.weight

    @property
    def head_bias(self) -> Tensor:
        return self.output.bias

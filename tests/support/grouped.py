"""A model and a tokenizer whose positions hold several tokens each, as MaskBit's splits of bits do.

Tiny beside it, these two show that nothing in diffusion and trainers is made for one token a position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from softdimo_fast.models.protocol import MaskedDiffusionModel, Tokenizer
from softdimo_fast.models.transformer import Block

GROUPS, BITS, LENGTH, CONDITIONS = 2, 3, 4, 2
VOCABULARY = 2**BITS


def bit_table() -> Tensor:
    """``[G, V, bits]``: token v as bits of -1 and +1, the lowest first."""
    bits = torch.arange(VOCABULARY)[:, None] >> torch.arange(BITS) & 1
    return (2.0 * bits - 1).expand(GROUPS, -1, -1).contiguous()


class GroupedTransformer(MaskedDiffusionModel):
    """Tokens ``[B, L, G]``; a [MASK] split is a zero vector."""

    table: Tensor

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.vocabulary, self.mask_id, self.token_shape = VOCABULARY, VOCABULARY, (LENGTH, GROUPS)
        self.register_buffer("table", bit_table())
        self.project = nn.Linear(GROUPS * BITS, width)
        self.classes = nn.Embedding(CONDITIONS + 1, width)
        self.positions = nn.Parameter(torch.randn(1, LENGTH + 1, width) * 0.3)
        self.blocks = nn.ModuleList(Block(width, 2, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(GROUPS, VOCABULARY, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(GROUPS, VOCABULARY))

    def embed(self, tokens: Tensor) -> Tensor:
        group = torch.arange(GROUPS)
        codes = self.table[group, tokens.clamp(max=VOCABULARY - 1)]
        return codes.masked_fill((tokens == self.mask_id)[..., None], 0.0).flatten(-2)

    @property
    def token_table(self) -> Tensor:
        return self.table

    @property
    def mask_embedding(self) -> Tensor:
        return torch.zeros(GROUPS, BITS)

    def embedding_parameters(self) -> list[nn.Parameter]:
        return list(self.project.parameters())

    def unconditional(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, CONDITIONS)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        return self._layers(embeddings, condition)[-1][:, 1:]

    def features(
        self, embeddings: Tensor, condition: Tensor, layers: tuple[int, ...]
    ) -> list[Tensor]:
        outputs = self._layers(embeddings, condition)
        return [outputs[layer] for layer in layers]

    def _layers(self, embeddings: Tensor, condition: Tensor) -> list[Tensor]:
        x = torch.cat([self.classes(condition)[:, None], self.project(embeddings)], dim=1)
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
        return self.weight

    @property
    def head_bias(self) -> Tensor:
        return self.bias


class GroupedTokenizer(Tokenizer):
    """Images ``[B, 1, 4, 4]`` in patches of 2 x 2: bits are signs of a linear map, the decoder is affine."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token_shape = (LENGTH, GROUPS)
        self.register_buffer("table", bit_table())
        self.encoder = nn.Linear(4, GROUPS * BITS)
        self.decoder = nn.Linear(GROUPS * BITS, 4)

    def encode(self, images: Tensor) -> Tensor:
        patches = functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
        bits = (self.encoder(patches) > 0).unflatten(-1, (GROUPS, BITS)).long()
        return (bits << torch.arange(BITS)).sum(-1)

    @property
    def codebook(self) -> Tensor:
        return self.table

    def decode_codes(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        patches = self.decoder(codes).transpose(1, 2).unflatten(2, (2, 2))
        return functional.pixel_shuffle(patches, 2)

    def decode(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.decode_codes(self.table[torch.arange(GROUPS), tokens].flatten(-2))

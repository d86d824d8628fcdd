"""Small text encoders and a small CLIP, which know a prompt by its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.data.prompts import PromptConditions
from softdimo_fast.models.text_encoders import (
    ClipText,
    MaskGenTextEncoder,
    MeissonicTextEncoder,
    TextFeatures,
)
from softdimo_fast.rewards.clip import ClipTowers
from support.text_families import TEXT, meissonic_vq, tatitok

WIDTH, SIZE = 10, 8
# Name -> text encoder, tokenizer, width of the pooled text.
FAMILIES: dict[str, tuple[Any, Any, int]] = {
    "maskgen": (MaskGenTextEncoder, tatitok, 10),
    "meissonic": (MeissonicTextEncoder, meissonic_vq, 16),
}


def _bytes(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([[*p.encode()[-TEXT:].rjust(TEXT, b" ")] for p in prompts])


def _table(width: int, seed: int) -> nn.Embedding:
    weight = torch.randn(256, width, generator=torch.Generator().manual_seed(seed))
    return nn.Embedding.from_pretrained(weight)


class Tower(ClipText):
    """Text features of the widths that the small models have."""

    def __init__(self, pooled: int) -> None:
        model = nn.ModuleDict({"rows": _table(WIDTH, 0), "pooled": _table(pooled, 1)})
        super().__init__(model, _bytes)

    def features(self, ids: Tensor) -> TextFeatures:
        model: Any = self.model
        rows = model["rows"](ids)
        return TextFeatures(rows, rows.cumsum(1), model["pooled"](ids).sum(1))


class Towers(ClipTowers):
    """Of a reward; remembers the prompts it is asked about."""

    size = SIZE

    def __init__(self) -> None:
        model: Any = nn.Module()
        model.words = _table(7, 2)
        image = torch.randn(3 * SIZE * SIZE, 7, generator=torch.Generator().manual_seed(3))
        model.image, model.logit_scale = nn.Parameter(image), nn.Parameter(torch.tensor(1.0))
        super().__init__(model, _bytes)

    def images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        return pixels.flatten(1) @ model.image

    def ids(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        return F.normalize(model.words(ids).sum(1), dim=-1)


def conditions(
    family: str, prompts: Sequence[str], batch_size: int, **options: Any
) -> PromptConditions:
    encoder, _, pooled = FAMILIES[family]
    return PromptConditions(prompts, encoder(Tower(pooled)), batch_size, **options)

"""One small transformer of every family, with weights far from zero, and conditions for samples of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softdimo_fast.diffusion import Draws
from softdimo_fast.models.conditions import rows
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.seeding import seeded
from support.text_families import TRANSFORMERS
from support.training import CONDITIONS, transformer

SIZES: dict[str, Any] = {
    "img_size": 48, "hidden_dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "nclass": CONDITIONS,
}  # fmt: skip


def _maskgit() -> Any:
    return MaskGitTransformer(MaskGitConfig(codebook_size=8, **SIZES))


def _maskbit() -> Any:
    return MaskBitGenerator(MaskBitGeneratorConfig(codebook_size=64, **SIZES))


_BUILD: dict[str, Callable[[], Any]] = {
    "token": lambda: transformer("token"),
    "grouped": lambda: transformer("grouped"),
    "maskgit": _maskgit,
    "maskbit": _maskbit,
    "maskgen": TRANSFORMERS["maskgen"][0],
    "meissonic": TRANSFORMERS["meissonic"][0],
}
FAMILIES = tuple(_BUILD)


def build(family: str, seed: int = 0) -> Any:
    """A model whose logits differ from those of another seed."""
    with seeded(seed), torch.no_grad():
        model = _BUILD[family]()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def conditions(family: str, draws: Draws) -> Any:
    """Labels, or numbered prompts."""
    if family in TRANSFORMERS:
        return rows(TRANSFORMERS[family][1](16), draws.integers("condition", 16))
    return draws.integers("condition", CONDITIONS)

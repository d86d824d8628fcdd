"""What a published run holds in the device's memory for good: an estimate before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softdimo_fast.models import (
    MaskBitGeneratorConfig,
    MaskBitTokenizerConfig,
    MaskGenConfig,
    MaskGitConfig,
    MeissonicConfig,
    MeissonicVqConfig,
    TaTiTokConfig,
    VqGanConfig,
    create,
)
from softdimo_fast.models.maskbit_tokenizer import MaskBitTokenizerSizes
from softdimo_fast.recipes.published_build import discriminator_heads
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun

BYTES = 4  # of a float32
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that stay, by use. Activations, rewards and text encoders come on top.

    Attributes:
        weights: role -> bytes; the student's average is one of them.
        adam: role -> bytes of the two moments of what is trained.
        gradients: of the largest role: each phase frees its own.
        parameters: role -> how many; without the average.
    """

    weights: dict[str, int]
    adam: dict[str, int]
    gradients: int
    parameters: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.weights.values()) + sum(self.adam.values()) + self.gradients

    def lines(self) -> list[str]:
        """As a table for a terminal."""
        rows = [(f"weights: {role}", size) for role, size in self.weights.items()]
        rows += [(f"Adam: {role}", size) for role, size in self.adam.items()]
        rows += [("gradients of one phase", self.gradients), ("together", self.total)]
        width = max(len(name) for name, _ in rows)
        return [f"{name:{width}}  {size / GIB:6.2f} GiB" for name, size in rows]


def published_models(recipe: str, bits: int | None = None) -> tuple[Any, Any]:
    """Teacher and tokenizer of a recipe at their published sizes, on the meta device: without memory."""
    with torch.device("meta"):
        teacher, tokenizer = published_configs(recipe, bits)
        return create(teacher), create(tokenizer)


def published_configs(recipe: str, bits: int | None = None) -> tuple[Any, Any]:
    """The configs of teacher and tokenizer of a recipe, at their published sizes."""
    if recipe == "maskgit":
        return MaskGitConfig(), VqGanConfig()
    if recipe == "maskbit":
        bits = bits or 14
        sizes = MaskBitTokenizerSizes(codebook_size=2**bits, token_size=bits)
        return MaskBitGeneratorConfig(codebook_size=2**bits), MaskBitTokenizerConfig(config=sizes)
    if recipe == "meissonic":
        return MeissonicConfig(), MeissonicVqConfig()
    large = recipe == "maskgen_l"
    return MaskGenConfig.large() if large else MaskGenConfig.extra_large(), TaTiTokConfig()


def estimate(run: PublishedGeneratorRun, teacher: Any, tokenizer: Any = None) -> MemoryEstimate:
    """What a run on this teacher holds; only the shapes of the models are looked at.

    Args:
        tokenizer: counted where a reward decodes images.
    """
    whole = _size(teacher)
    frozen = sum(p.numel() for p in _frozen(run, teacher))
    parameters, trained = {"teacher": whole, "student": whole}, {"student": whole - frozen}
    if run.distillation is not None:
        parameters["auxiliary"] = trained["auxiliary"] = whole
    if run.adversarial is not None:
        with torch.device("meta"):
            heads = discriminator_heads(run, teacher)
        parameters["heads"] = trained["heads"] = _size(heads)
    if run.reward is not None and tokenizer is not None:
        parameters["tokenizer"] = _size(tokenizer)
    weights = {role: BYTES * count for role, count in parameters.items()}
    weights["student's average"] = weights["student"]
    return MemoryEstimate(
        weights,
        {role: 2 * BYTES * count for role, count in trained.items()},
        BYTES * max(trained.values()),
        parameters,
    )


def _frozen(run: PublishedGeneratorRun, teacher: Any) -> list[Any]:
    return list(teacher.embedding_parameters()) if run.generator.freeze_embeddings else []


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

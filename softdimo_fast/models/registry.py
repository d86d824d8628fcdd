"""Models by family name: from a config, a published constructor's sizes, or a checkpoint's description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.models.classifier import (
    ConvClassifier,
    ConvClassifierConfig,
    MlpClassifier,
    MlpClassifierConfig,
)
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskbit_tokenizer import MaskBitTokenizer, MaskBitTokenizerConfig
from softdimo_fast.models.maskgen import MaskGenConfig, MaskGenTransformer
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.meissonic import MeissonicConfig, MeissonicTransformer
from softdimo_fast.models.meissonic_vq import MeissonicVq, MeissonicVqConfig
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.tatitok import TaTiTok, TaTiTokConfig
from softdimo_fast.models.transformer import TokenTransformer, TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizer, VectorQuantizerConfig
from softdimo_fast.models.vqgan import VqGan, VqGanConfig

# Family -> (module class, config class).
FAMILIES: dict[str, tuple[Any, Any]] = {
    "token_transformer": (TokenTransformer, TokenTransformerConfig),
    "vector_quantizer": (VectorQuantizer, VectorQuantizerConfig),
    "conv_classifier": (ConvClassifier, ConvClassifierConfig),
    "mlp_classifier": (MlpClassifier, MlpClassifierConfig),
    "maskgit": (MaskGitTransformer, MaskGitConfig),
    "maskgit_vqgan": (VqGan, VqGanConfig),
    "maskbit": (MaskBitGenerator, MaskBitGeneratorConfig),
    "maskbit_tokenizer": (MaskBitTokenizer, MaskBitTokenizerConfig),
    "maskgen_vq": (MaskGenTransformer, MaskGenConfig),
    "tatitok_vq": (TaTiTok, TaTiTokConfig),
    "meissonic": (MeissonicTransformer, MeissonicConfig),
    "meissonic_vqvae": (MeissonicVq, MeissonicVqConfig),
}


def build(
    family: str,
    sizes: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
) -> Any:
    """A transformer, tokenizer or classifier of a family.

    Args:
        family: one of :data:`FAMILIES`.
        sizes: under the names of the published constructor (for TA-TiTok with ``vit_sizes``, where its
            transformers are not the published ones); what is left out is as published.
        state_dict: under the published keys, loaded strictly. None leaves initial weights, which depend on
            ``seed`` alone.

    Returns:
        The model, on the CPU; in eval mode if weights were loaded.

    Raises:
        ConfigError: the family is unknown, or a size is unknown, of another type or out of range.
        RuntimeError: a key of the state dict is missing, unexpected or of another shape; all are listed.
    """
    _config.require_choice("build", "family", family, tuple(FAMILIES))
    _, config_class = FAMILIES[family]
    published = getattr(config_class, "from_published", None)
    config = published(sizes) if published else _config.from_dict(config_class, sizes)
    model = create(config, seed=seed)
    if state_dict is not None:
        model.load_state_dict(dict(state_dict), strict=True)
        model.eval()
    return model


def create(config: Any, *, seed: int = 0) -> Any:
    """The model of a config, with initial weights that depend on ``seed`` alone."""
    for module, config_class in FAMILIES.values():
        if isinstance(config, config_class):
            with seeded(seed):
                return module(config)
    known = ", ".join(config_class.__name__ for _, config_class in FAMILIES.values())
    raise TypeError(f"create: config must be one of {known}, got {type(config).__name__}")


def describe(model: nn.Module) -> dict[str, Any]:
    """``{"family": ..., "config": {...}}`` of a model, as JSON."""
    for family, (module, _) in FAMILIES.items():
        if isinstance(model, module):
            return {"family": family, "config": _config.to_dict(model.config)}
    raise TypeError(
        f"describe: model must be of a family {', '.join(FAMILIES)}, got {type(model).__name__}"
    )


def rebuild(description: Any) -> Any:
    """The model that :func:`describe` described, with initial weights.

    Raises:
        ConfigError: the family is unknown, or the sizes are not what the family takes.
    """
    family = description.get("family") if isinstance(description, dict) else None
    _config.require_choice("model", "family", family, tuple(FAMILIES))
    _, config_class = FAMILIES[str(family)]
    return create(_config.from_dict(config_class, description.get("config", {})))

"""Models by family name: what a checkpoint says of a model, so that it can be built again."""

from __future__ import annotations

from typing import Any

from torch import nn

from softdimo_fast import _config
from softdimo_fast.models.classifier import (
    ConvClassifier,
    ConvClassifierConfig,
    MlpClassifier,
    MlpClassifierConfig,
)
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.transformer import TokenTransformer, TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizer, VectorQuantizerConfig

# Family -> (module class, config class).
FAMILIES: dict[str, tuple[Any, Any]] = {
    "token_transformer": (TokenTransformer, TokenTransformerConfig),
    "vector_quantizer": (VectorQuantizer, VectorQuantizerConfig),
    "conv_classifier": (ConvClassifier, ConvClassifierConfig),
    "mlp_classifier": (MlpClassifier, MlpClassifierConfig),
}


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
    module, config_class = FAMILIES[str(family)]
    with seeded(0):
        return module(_config.from_dict(config_class, description.get("config", {})))

"""Masked-diffusion transformers, tokenizers and classifiers, behind one small protocol."""

from softdimo_fast.models.classifier import (
    ConvClassifier,
    ConvClassifierConfig,
    MlpClassifier,
    MlpClassifierConfig,
)
from softdimo_fast.models.protocol import MaskedDiffusionModel, Tokenizer
from softdimo_fast.models.registry import create, describe, rebuild
from softdimo_fast.models.transformer import TokenTransformer, TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "ConvClassifier",
    "ConvClassifierConfig",
    "MaskedDiffusionModel",
    "MlpClassifier",
    "MlpClassifierConfig",
    "TokenTransformer",
    "TokenTransformerConfig",
    "Tokenizer",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "create",
    "describe",
    "rebuild",
]

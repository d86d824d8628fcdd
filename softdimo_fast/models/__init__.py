"""Masked-diffusion transformers, tokenizers and classifiers, behind one small protocol."""

from softdimo_fast.models.classifier import (
    ConvClassifier,
    ConvClassifierConfig,
    MlpClassifier,
    MlpClassifierConfig,
)
from softdimo_fast.models.files import (
    ModelFileError,
    from_pretrained,
    save_pretrained,
    save_published,
)
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskbit_tokenizer import MaskBitTokenizer, MaskBitTokenizerConfig
from softdimo_fast.models.maskgen import MaskGenConfig, MaskGenTransformer
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.meissonic import MeissonicConfig, MeissonicTransformer
from softdimo_fast.models.meissonic_vq import MeissonicVq, MeissonicVqConfig
from softdimo_fast.models.protocol import MaskedDiffusionModel, Tokenizer
from softdimo_fast.models.registry import build, create, describe, rebuild
from softdimo_fast.models.tatitok import TaTiTok, TaTiTokConfig
from softdimo_fast.models.transformer import TokenTransformer, TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizer, VectorQuantizerConfig
from softdimo_fast.models.vqgan import VqGan, VqGanConfig

__all__ = [
    "ConvClassifier",
    "ConvClassifierConfig",
    "MaskBitGenerator",
    "MaskBitGeneratorConfig",
    "MaskBitTokenizer",
    "MaskBitTokenizerConfig",
    "MaskGenConfig",
    "MaskGenTransformer",
    "MaskGitConfig",
    "MaskGitTransformer",
    "MaskedDiffusionModel",
    "MeissonicConfig",
    "MeissonicTransformer",
    "MeissonicVq",
    "MeissonicVqConfig",
    "MlpClassifier",
    "MlpClassifierConfig",
    "ModelFileError",
    "TaTiTok",
    "TaTiTokConfig",
    "TokenTransformer",
    "TokenTransformerConfig",
    "Tokenizer",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "VqGan",
    "VqGanConfig",
    "build",
    "create",
    "describe",
    "from_pretrained",
    "rebuild",
    "save_pretrained",
    "save_published",
]

"""Masked diffusion: random numbers, mask schedules, generator inputs, guidance, samplers."""

from softdimo_fast.diffusion.decoding import (
    DecodingPlan,
    DecodingStep,
    InjectedNoise,
    SamplerConfig,
)
from softdimo_fast.diffusion.draws import Draws
from softdimo_fast.diffusion.guidance import (
    GuidedLogits,
    branch_logits,
    guidance_from_weight,
    guided_logits,
)
from softdimo_fast.diffusion.initial import initial_embeddings, initial_tokens, perturb
from softdimo_fast.diffusion.masking import (
    MASK_SCHEDULES,
    MaskedRows,
    draw_mask,
    draw_masked_count,
    mask_ratio,
    masked_count,
    random_mask,
)
from softdimo_fast.diffusion.published_samplers import (
    MASKBIT_SAMPLERS,
    MaskBitSamplerConfig,
    MaskGitSamplerConfig,
    sampling_ratio,
)
from softdimo_fast.diffusion.samplers import (
    ConfidenceSamplerConfig,
    OneStepConfig,
    confidence_sample,
    decode_logits,
    draw_tokens,
    one_step_input,
    one_step_logits,
    one_step_sample,
)
from softdimo_fast.diffusion.text_samplers import MaskGenSamplerConfig, MeissonicSamplerConfig

__all__ = [
    "MASKBIT_SAMPLERS",
    "MASK_SCHEDULES",
    "ConfidenceSamplerConfig",
    "DecodingPlan",
    "DecodingStep",
    "Draws",
    "GuidedLogits",
    "InjectedNoise",
    "MaskBitSamplerConfig",
    "MaskGenSamplerConfig",
    "MaskGitSamplerConfig",
    "MaskedRows",
    "MeissonicSamplerConfig",
    "OneStepConfig",
    "SamplerConfig",
    "branch_logits",
    "confidence_sample",
    "decode_logits",
    "draw_mask",
    "draw_masked_count",
    "draw_tokens",
    "guidance_from_weight",
    "guided_logits",
    "initial_embeddings",
    "initial_tokens",
    "mask_ratio",
    "masked_count",
    "one_step_input",
    "one_step_logits",
    "one_step_sample",
    "perturb",
    "random_mask",
    "sampling_ratio",
]

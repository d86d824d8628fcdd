"""A wrong setting is refused when it is written down, by name, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training import METHODS, trainer

from softdimo_fast._config import ConfigError
from softdimo_fast.diffusion import ConfidenceSamplerConfig, OneStepConfig
from softdimo_fast.models.transformer import TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizerConfig
from softdimo_fast.trainers import (
    AdversarialConfig,
    ClassifierConfig,
    DistillationConfig,
    EmaConfig,
    GeneratorConfig,
    HeadsConfig,
    OptimizerConfig,
    RewardConfig,
    ScheduleConfig,
    TeacherConfig,
    TokenizerConfig,
    TrainerConfig,
)

SIZES = {"vocabulary": 8, "length": 4, "conditions": 2}

# Config, its fields, and how the message begins: the field's name, and what was expected.
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (TrainerConfig, {"steps": 0}, r"steps: must be a number >= 1, got 0"),
    (TrainerConfig, {"steps": 1.5}, r"steps: must be an int"),
    (TrainerConfig, {"batch_size": 10, "accumulation": 4}, r"accumulation: .*divisor of batch_size = 10"),
    (TrainerConfig, {"nan_policy": "ignore"}, r"nan_policy: must be .*'raise'.*'skip'"),
    (TrainerConfig, {"nan_limit": -1}, r"nan_limit"),
    (TrainerConfig, {"autocast": "float16"}, r"autocast: must be .*bfloat16"),
    (TrainerConfig, {"device": "gpu0"}, r"device: must be a device such as .*got 'gpu0'"),
    (TrainerConfig, {"sinks": ("tensorbord",)}, r"sinks.*tensorboard"),
    (TrainerConfig, {"keep_checkpoints": 0}, r"keep_checkpoints"),
    (EmaConfig, {"decay": 1.5}, r"decay: must be a number >= 0 and <= 1, got 1.5"),
    (EmaConfig, {"profile": "cosine"}, r"profile"),
    (OptimizerConfig, {"learning_rate": -1e-4}, r"learning_rate: must be a number >= 0"),
    (OptimizerConfig, {"learning_rate": float("nan")}, r"learning_rate"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, r"betas: must be two numbers in \[0, 1\)"),
    (OptimizerConfig, {"clip_norm": 0.0}, r"clip_norm: must be a number > 0, got 0.0"),
    (OptimizerConfig, {"name": "adam"}, r"name: must be .*adamw"),
    (ScheduleConfig, {"decay_start": 2.0}, r"decay_start"),
    (ScheduleConfig, {"warmup_steps": -5}, r"warmup_steps"),
    (OneStepConfig, {"initial_ratio": 1.2}, r"initial_ratio: must be a number in \[0, 1\]"),
    (OneStepConfig, {"initial_ratio": (0.8, 0.2)}, r"initial_ratio: .*pair low <= high"),
    (OneStepConfig, {"sigma": 1.01}, r"sigma"),
    (OneStepConfig, {"temperature": 0.0}, r"temperature: must be a number > 0"),
    (ConfidenceSamplerConfig, {"steps": 0}, r"steps"),
    (GeneratorConfig, {"sigma_steps": 5}, r"sigma_steps: must be positive where"),
    (GeneratorConfig, {"warmup_steps": -1}, r"warmup_steps"),
    (DistillationConfig, {"divergence": "jeffreys"}, r"beta: must be a number with"),
    (DistillationConfig, {"beta": 0.5}, r"beta: must be .*None otherwise"),
    (DistillationConfig, {"path": "soft_gradient"}, r"soft_gradient_weight: must be non-zero"),
    (DistillationConfig, {"normalization": "mean"}, r"normalization: must be .*'masked'"),
    (DistillationConfig, {"auxiliary_steps": 0}, r"auxiliary_steps"),
    (DistillationConfig, {"auxiliary_label_smoothing": 1.0}, r"auxiliary_label_smoothing: .*< 1"),
    (DistillationConfig, {"auxiliary_soft_weight": -1.0}, r"auxiliary_soft_weight"),
    (DistillationConfig, {"mask_schedule": "sine"}, r"mask_schedule: must be .*cosine"),
    (AdversarialConfig, {"mask_range": (0.0, 1.5)}, r"mask_range: must be a pair low <= high"),
    (AdversarialConfig, {"r1_weight": 1.0}, r"r1_weight: must be positive where r1 is on"),
    (AdversarialConfig, {"r1": "exact", "r1_weight": -1.0}, r"r1_weight"),
    (AdversarialConfig, {"relaxation": "hard"}, r"relaxation: must be .*gumbel_hard"),
    (HeadsConfig, {"token_heads": False, "global_head": False}, r"global_head: must be True where"),
    (HeadsConfig, {"global_hidden": (64, 0)}, r"global_hidden: must be two numbers >= 1"),
    (RewardConfig, {"weight": -1.0}, r"weight: must be a number >= 0"),
    (RewardConfig, {"temperature": -1.0}, r"temperature"),
    (TeacherConfig, {"condition_drop": 1.5}, r"condition_drop"),
    (TeacherConfig, {"label_smoothing": 1.0}, r"label_smoothing"),
    (TokenizerConfig, {"codebook_decay": 1.1}, r"codebook_decay"),
    (TokenizerConfig, {"revive_every": 0}, r"revive_every"),
    (ClassifierConfig, {"input_noise": -0.1}, r"input_noise"),
    (VectorQuantizerConfig, {"grid": 0}, r"grid"),
    (TokenTransformerConfig, {**SIZES, "width": 10, "heads": 4}, r"heads: must be a divisor of width = 10"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "fields", "message"), WRONG, ids=[f"{c.__name__}-{'-'.join(f)}" for c, f, _ in WRONG]
)
def test_wrong_values_are_named(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{config.__name__}\.{message}"):
        config(**fields)


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda"):
        trainer("teacher", device="cuda:0")


def test_defaults_are_right() -> None:
    """Nothing that the package proposes is refused, and no test method is missing."""
    configs = {config for config, _, _ in WRONG} - {TokenTransformerConfig}
    for config in configs:
        config()
    assert len(METHODS) >= 10

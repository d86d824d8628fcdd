"""Tiny models, data and methods: everything real, and small enough for hundreds of steps a second."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdimo_fast.data.source import ImageSource, TokenSource, UniformConditions
from softdimo_fast.diffusion import Draws, OneStepConfig
from softdimo_fast.models.classifier import MlpClassifierConfig
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.models.registry import create
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.transformer import TokenTransformerConfig
from softdimo_fast.models.vector_quantizer import VectorQuantizerConfig
from softdimo_fast.rewards import ClassifierReward
from softdimo_fast.trainers import (
    Adversarial,
    AdversarialConfig,
    ClassifierConfig,
    ClassifierMethod,
    DiscriminatorHeads,
    DistillationConfig,
    DistributionMatching,
    GeneratorConfig,
    GeneratorMethod,
    HeadsConfig,
    Method,
    MicroBatch,
    Objective,
    OptimizerConfig,
    RewardConfig,
    RewardObjective,
    Rollout,
    TeacherConfig,
    TeacherMethod,
    TokenizerConfig,
    TokenizerMethod,
    Trainer,
    TrainerConfig,
)
from softdimo_fast.trainers.checkpoint import optimizer_tensors
from softdimo_fast.trainers.trainer import EmaConfig
from support.grouped import GroupedTokenizer, GroupedTransformer

VOCABULARY, LENGTH, CONDITIONS, BATCH = 8, 4, 2, 8
SIZES = {"vocabulary": VOCABULARY, "length": LENGTH, "conditions": CONDITIONS}
FAMILIES = ("token", "grouped")
FAST = OptimizerConfig(learning_rate=1e-2)


# ---- models and data ---------------------------------------------------------------------------------------


def transformer(family: str = "token", *, seed: int = 0, sharpness: float = 20.0) -> Any:
    """A teacher, or a student; ``sharpness`` scales its fresh head, whose logits are nearly zero."""
    if family == "grouped":
        with seeded(seed):
            model: Any = GroupedTransformer()
    else:
        model = create(
            TokenTransformerConfig(**SIZES, width=16, depth=2, heads=2, mlp_ratio=2), seed=seed
        )
    with torch.no_grad():
        model.head_weight.mul_(sharpness)
    return model


def tokenizer(family: str = "token", *, seed: int = 0) -> Any:
    """4 x 4 images as 4 positions; the fresh decoder's contrast is raised to that of images."""
    if family == "grouped":
        with seeded(seed):
            return GroupedTokenizer()
    config = VectorQuantizerConfig(vocabulary=VOCABULARY, code_width=4, width=8, grid=2)
    vq = create(config, seed=seed)
    with torch.no_grad():
        vq.decoder[-1].weight.mul_(5)
    return vq


def classifier(*, seed: int = 5) -> nn.Module:
    module: nn.Module = create(MlpClassifierConfig(image_size=4, num_classes=4, width=8), seed=seed)
    return module


def reward() -> ClassifierReward:
    """Of a sharpened classifier: a fresh one says the same of all images."""
    judge: Any = classifier()
    with torch.no_grad():
        judge.head.weight.mul_(20)
    return ClassifierReward(judge, torch.arange(4) % 2)


def heads(teacher: MaskedDiffusionModel, *, seed: int = 3, **options: Any) -> DiscriminatorHeads:
    config = HeadsConfig(**{"hidden": 8, "squeeze": 4, "global_hidden": (8, 8)} | options)
    with seeded(seed):
        return DiscriminatorHeads(
            config, width=16, positions=LENGTH + 1, layers=len(config.layers_of(teacher.depth)),
            conditions=CONDITIONS,
        )  # fmt: skip


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and their classes, 0 to 3: a bright quarter and noise."""
    draws = Draws.of(11, 0, count)
    classes = torch.arange(count) % 4
    quarter = torch.zeros(count, 1, 2, 2).flatten(2).scatter_(2, classes[:, None, None], 1.0)
    bright = quarter.view(count, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = 0.5 * draws.uniform("images", 1, 4, 4)
    return (bright + noise).clamp(0, 1) * 2 - 1, classes


def token_source(family: str = "token", *, batch_size: int = BATCH) -> TokenSource:
    pictures, classes = images()
    with torch.no_grad():
        tokens = tokenizer(family).encode(pictures)
    return TokenSource(tokens, classes % CONDITIONS, batch_size)


# ---- objectives and methods --------------------------------------------------------------------------------


def distillation(
    family: str = "token", *, teacher: Any = None, auxiliary: Any = None, **options: Any
) -> DistributionMatching:
    """The auxiliary is another model than the teacher, so that the divergence is not zero."""
    return DistributionMatching(
        teacher if teacher is not None else transformer(family),
        auxiliary if auxiliary is not None else transformer(family, seed=1),
        DistillationConfig(**{"auxiliary_optimizer": FAST} | options),
    )


def adversarial(family: str = "token", *, teacher: Any = None, **options: Any) -> Adversarial:
    teacher = teacher if teacher is not None else transformer(family)
    config = AdversarialConfig(
        **{"heads_optimizer": FAST, "heads": heads(teacher).config} | options
    )
    return Adversarial(teacher, heads(teacher), token_source(family), config)


def reward_objective(family: str = "token", **options: Any) -> RewardObjective:
    return RewardObjective(tokenizer(family), reward(), RewardConfig(**options))


def generator(
    *objectives: Objective,
    family: str = "token",
    student: Any = None,
    conditions: Any = None,
    **options: Any,
) -> GeneratorMethod:
    one_step = OneStepConfig(initial_ratio=(0.3, 0.8), sigma=0.2)
    return GeneratorMethod(
        student if student is not None else transformer(family, seed=2),
        conditions or UniformConditions(CONDITIONS),
        objectives,
        GeneratorConfig(**{"optimizer": FAST, "one_step": one_step} | options),
    )


def _classifier(optimizer: OptimizerConfig) -> Method:
    source = ImageSource(*images(), BATCH)
    return ClassifierMethod(classifier(), source, ClassifierConfig(optimizer=optimizer))


def _tokenizer(optimizer: OptimizerConfig) -> Method:
    config = TokenizerConfig(
        start_step=3, revive_every=2, revive_until=20, revive_below=0.9, optimizer=optimizer
    )
    return TokenizerMethod(tokenizer(), ImageSource(*images(), BATCH), config)


def _teacher(optimizer: OptimizerConfig, family: str = "token") -> Method:
    config = TeacherConfig(label_smoothing=0.1, optimizer=optimizer)
    return TeacherMethod(transformer(family, sharpness=1.0), token_source(family), config)


def _distillation(optimizer: OptimizerConfig, *, reuse: bool = True, **options: Any) -> Method:
    objective = distillation(auxiliary_optimizer=optimizer, **options)
    return generator(objective, optimizer=optimizer, reuse_rollout=reuse)


def _adversarial(optimizer: OptimizerConfig, **options: Any) -> Method:
    return generator(adversarial(heads_optimizer=optimizer, **options), optimizer=optimizer)


def _reward(optimizer: OptimizerConfig) -> Method:
    return generator(reward_objective(relaxation="gumbel_hard"), optimizer=optimizer)


def _all(optimizer: OptimizerConfig, family: str = "token", **options: Any) -> Method:
    matching = {"guidance_scale": 2.0, "adaptive_guidance": True, "weighting": 0.5}
    return generator(
        distillation(family, auxiliary_optimizer=optimizer, **matching),
        adversarial(family, heads_optimizer=optimizer, weight=0.5, heads_steps=2),
        reward_objective(family, weight=0.5),
        family=family,
        optimizer=optimizer,
        **options,
    )


SOFT_PATH = {
    "path": "soft_gradient", "soft_gradient_weight": 0.5, "divergence": "jeffreys", "beta": 0.3
}  # fmt: skip

# Name -> a method of new objects, with one optimizer for all its roles.
METHODS: Mapping[str, Callable[[OptimizerConfig], Method]] = {
    "classifier": _classifier,
    "tokenizer": _tokenizer,
    "teacher": _teacher,
    "distillation": partial(_distillation, guidance_scale=2.0),
    "distillation, two rollouts": partial(_distillation, auxiliary_steps=2),
    "distillation, two fresh rollouts": partial(_distillation, auxiliary_steps=2, reuse=False),
    "distillation, soft path": partial(_distillation, **SOFT_PATH),
    "adversarial": _adversarial,
    "adversarial, estimated R1": partial(_adversarial, r1="finite_difference", r1_weight=0.1),
    "adversarial, exact R1": partial(_adversarial, r1="exact", r1_weight=0.1),
    "reward": _reward,
    "all": _all,
    "all, warm-up": partial(_all, warmup_steps=3),
    "grouped teacher": partial(_teacher, family="grouped"),
    "grouped all": partial(_all, family="grouped"),
}


# ---- running -----------------------------------------------------------------------------------------------


def trainer(
    method: str | Method,
    folder: Path | None = None,
    *,
    optimizer: OptimizerConfig = FAST,
    run_config: Any = None,
    progress: Any = None,
    **options: Any,
) -> Trainer:
    """A trainer of 6 steps with short intervals."""
    defaults: dict[str, Any] = {
        "steps": 6, "batch_size": BATCH, "log_every": 2, "checkpoint_every": 3,
        "ema": EmaConfig(decay=0.9),
    }  # fmt: skip
    method = METHODS[method](optimizer) if isinstance(method, str) else method
    config = TrainerConfig(**defaults | options)
    return Trainer(method, config, folder=folder, run_config=run_config, progress=progress)


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a step changes: weights, averages, optimizer states."""
    state: dict[str, Tensor] = {}
    for role, module in trainer.method.roles.items():
        optimizer = trainer.optimizers[role]
        state |= {f"{role}/{name}": value for name, value in module.state_dict().items()}
        tensors = optimizer_tensors(optimizer.optimizer, optimizer.names)
        state |= {f"{role}_optimizer/{name}": value for name, value in tensors.items()}
    for role, average in trainer.averages.items():
        weights = average.module.state_dict()
        state |= {f"{role}_average/{name}": value for name, value in weights.items()}
    return {name: value.clone() for name, value in state.items()}


def micro_batch(*, seed: int = 0, step: int = 0, count: int = BATCH) -> MicroBatch:
    draws = Draws.of(seed, step, count)
    return MicroBatch(draws, draws)


def rollout(
    family: str = "token", *, count: int = BATCH, step: int = 0, scale: float = 2.0
) -> Rollout:
    """Free logits in place of a generator's, as a leaf that takes gradients."""
    draws = Draws.of(0, step, count)
    shape = transformer(family).token_shape
    logits = (scale * draws.normal("logits", *shape, VOCABULARY)).requires_grad_(True)
    tokens = draws.integers("tokens", VOCABULARY, *shape)
    return Rollout(draws, draws, draws.integers("condition", CONDITIONS), logits, tokens)


def gradient(objective: Objective, rollout: Rollout) -> Tensor:
    """The gradient of the student's term with respect to the logits."""
    rollout = replace(rollout, memory={})
    (result,) = torch.autograd.grad(objective.student_loss(rollout).value, rollout.logits)
    return result


def twin(module: nn.Module) -> Any:
    return copy.deepcopy(module)

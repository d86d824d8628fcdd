"""The digits recipes: Soft-Di[M]O on scikit-learn's 8x8 digits, in minutes on two CPU cores.

The condition is the digit's parity: given it, five digits are open, so that a one-step teacher mixes them and
a one-step generator must turn its input noise into a choice.
"""

from __future__ import annotations

from dataclasses import replace

from softdimo_fast.diffusion import ConfidenceSamplerConfig, OneStepConfig
from softdimo_fast.models import (
    ConvClassifierConfig,
    MlpClassifierConfig,
    TokenTransformerConfig,
    VectorQuantizerConfig,
)
from softdimo_fast.recipes.runs import (
    ClassifierRun,
    GeneratorRun,
    TeacherRun,
    TestTimeRun,
    TokenizerRun,
)
from softdimo_fast.trainers.adversarial import AdversarialConfig
from softdimo_fast.trainers.classifier import ClassifierConfig
from softdimo_fast.trainers.distillation import DistillationConfig
from softdimo_fast.trainers.ema import EmaConfig
from softdimo_fast.trainers.generator import GeneratorConfig
from softdimo_fast.trainers.optimization import OptimizerConfig, ScheduleConfig
from softdimo_fast.trainers.reward import RewardConfig
from softdimo_fast.trainers.teacher import TeacherConfig
from softdimo_fast.trainers.test_time import TestTimeConfig
from softdimo_fast.trainers.tokenizer import TokenizerConfig
from softdimo_fast.trainers.trainer import TrainerConfig

CONDITIONS = 2  # even, odd
VOCABULARY, LENGTH = 64, 16


def _cosine(warmup_steps: int) -> ScheduleConfig:
    return ScheduleConfig(warmup_steps=warmup_steps, decay="cosine")


def _classifier(model: ConvClassifierConfig | MlpClassifierConfig, seed: int) -> ClassifierRun:
    optimizer = OptimizerConfig(
        learning_rate=2e-3, weight_decay=1e-2, clip_norm=None, schedule=_cosine(100)
    )
    return ClassifierRun(
        model=model,
        method=ClassifierConfig(optimizer=optimizer),
        trainer=TrainerConfig(seed=seed, steps=800, batch_size=128, checkpoint_every=400),
    )


def judge(seed: int = 0) -> ClassifierRun:
    """The classifier that measures; nothing is ever trained against it."""
    return _classifier(ConvClassifierConfig(), seed)


def reward_classifier(seed: int = 0) -> ClassifierRun:
    """The classifier that rewards; another network than the judge."""
    return _classifier(MlpClassifierConfig(), seed)


def tokenizer(seed: int = 0) -> TokenizerRun:
    """4x4 tokens of a vocabulary of 64."""
    optimizer = OptimizerConfig(
        learning_rate=2e-3, weight_decay=1e-4, clip_norm=None, schedule=_cosine(100)
    )
    return TokenizerRun(
        model=VectorQuantizerConfig(vocabulary=VOCABULARY),
        # The usual 0.25 leaves the encoder's vectors far from their codes: coarser reconstructions.
        method=TokenizerConfig(commitment_weight=2.0, optimizer=optimizer),
        trainer=TrainerConfig(seed=seed, steps=1500, batch_size=96),
    )


def teacher(seed: int = 0) -> TeacherRun:
    """Three layers of width 64, conditioned on parity."""
    optimizer = OptimizerConfig(
        learning_rate=3e-3, betas=(0.9, 0.98), weight_decay=0.05, schedule=_cosine(150)
    )
    return TeacherRun(
        model=TokenTransformerConfig(vocabulary=VOCABULARY, length=LENGTH, conditions=CONDITIONS),
        method=TeacherConfig(condition_drop=0.15, optimizer=optimizer),
        sampler=ConfidenceSamplerConfig(steps=16, confidence_temperature=4.0),
        trainer=TrainerConfig(seed=seed, steps=3000, batch_size=128, ema=EmaConfig(decay=0.999)),
    )


def _generator(
    learning_rate: float, *, beta1: float = 0.9, warmup_steps: int = 0, decay_start: float = 0.6,
    final: float = 0.1,
) -> GeneratorConfig:  # fmt: skip
    return GeneratorConfig(
        one_step=OneStepConfig(initial_ratio=0.6, sigma=0.1, noise_scale="embedding"),
        warmup_steps=warmup_steps,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            betas=(beta1, 0.99),
            schedule=ScheduleConfig(
                warmup_steps=20, decay="linear", decay_start=decay_start, final=final
            ),
        ),
    )


def _matching(
    *, auxiliary_rate: float, guidance_scale: float = 1.0, teacher_temperature: float = 1.0
) -> DistillationConfig:
    """The auxiliary learns four times as fast as the generator, and never slows: the target must not lag."""
    return DistillationConfig(
        guidance_scale=guidance_scale,
        teacher_temperature=teacher_temperature,
        auxiliary_label_smoothing=0.0,
        auxiliary_optimizer=OptimizerConfig(
            learning_rate=auxiliary_rate, betas=(0.9, 0.99), clip_norm=None
        ),
    )


def _trainer(seed: int, steps: int) -> TrainerConfig:
    return TrainerConfig(
        seed=seed, steps=steps, batch_size=64, checkpoint_every=200, ema=EmaConfig(decay=0.99)
    )


def distillation(seed: int = 0) -> GeneratorRun:
    """Di[M]O from the teacher."""
    return GeneratorRun(
        generator=_generator(6e-4, decay_start=0.4, final=0.02),
        distillation=_matching(auxiliary_rate=2.4e-3),
        trainer=_trainer(seed, 1400),
    )


def control(seed: int = 0) -> GeneratorRun:
    """More Di[M]O, with guidance 2 in its target, which biases it: the control of :func:`adversarial`."""
    return GeneratorRun(
        start="distillation",
        generator=_generator(3e-4, beta1=0.5, warmup_steps=60),
        distillation=_matching(auxiliary_rate=1.2e-3, guidance_scale=2.0, teacher_temperature=0.8),
        trainer=_trainer(seed, 300),
    )


def adversarial(seed: int = 0) -> GeneratorRun:
    """:func:`control` with the GAN term."""
    heads = OptimizerConfig(
        learning_rate=1e-3, betas=(0.5, 0.99), weight_decay=1e-3, clip_norm=None
    )
    return replace(control(seed), adversarial=AdversarialConfig(weight=1.0, heads_optimizer=heads))


def reward(seed: int = 0) -> GeneratorRun:
    """Di[M]O with the reward that the image shows the wanted parity."""
    return GeneratorRun(
        start="distillation",
        generator=_generator(3e-4, warmup_steps=30),
        distillation=_matching(auxiliary_rate=1.2e-3),
        reward=RewardConfig(weight=1.0),
        trainer=_trainer(seed, 180),
    )


def tteo(seed: int = 0) -> TestTimeRun:
    """The paper's setting: SGD at 0.2, four iterations."""
    one_step = distillation().generator.one_step
    return TestTimeRun(search=TestTimeConfig(one_step=one_step), seed=seed)

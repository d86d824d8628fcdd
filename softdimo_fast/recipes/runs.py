"""Run configs: everything that decides what a run computes, typed, frozen and stored with its checkpoints.

Inputs made by other runs are named by their folders, relative to the folder that the run's own one is in:
``teacher`` next to ``distillation``. A tree of runs can thus be moved as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from softdimo_fast import _config
from softdimo_fast.diffusion import ConfidenceSamplerConfig
from softdimo_fast.models import (
    ConvClassifierConfig,
    MlpClassifierConfig,
    TokenTransformerConfig,
    VectorQuantizerConfig,
)
from softdimo_fast.trainers.adversarial import AdversarialConfig
from softdimo_fast.trainers.classifier import ClassifierConfig
from softdimo_fast.trainers.distillation import DistillationConfig
from softdimo_fast.trainers.generator import GeneratorConfig
from softdimo_fast.trainers.reward import RewardConfig
from softdimo_fast.trainers.teacher import TeacherConfig
from softdimo_fast.trainers.test_time import TestTimeConfig
from softdimo_fast.trainers.tokenizer import TokenizerConfig
from softdimo_fast.trainers.trainer import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class DigitsData:
    """The bundled digits under their parity.

    Attributes:
        plain_copies, augmented_copies: of every training image, in what a tokenizer encodes for the
            teacher and for the GAN's real side.
    """

    plain_copies: int = 3
    augmented_copies: int = 15

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "plain_copies", self.plain_copies, minimum=0)
        _config.require_range(self, "augmented_copies", self.augmented_copies, minimum=0)
        _config.require(
            self.plain_copies + self.augmented_copies > 0, self, "plain_copies", self.plain_copies,
            "at least 1 where augmented_copies is 0",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """Trains an image classifier on the digits themselves."""

    model: ConvClassifierConfig | MlpClassifierConfig
    method: ClassifierConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        _config.require_types(self)


@dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """Trains a tokenizer."""

    model: VectorQuantizerConfig
    method: TokenizerConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        _config.require_types(self)


@dataclass(frozen=True, kw_only=True)
class TeacherRun:
    """Trains a masked-diffusion teacher on a tokenizer's tokens."""

    tokenizer: str = "tokenizer"
    data: DigitsData = field(default_factory=DigitsData)
    model: TokenTransformerConfig
    method: TeacherConfig
    sampler: ConfidenceSamplerConfig = field(default_factory=ConfidenceSamplerConfig)
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        _config.require_types(self)


@dataclass(frozen=True, kw_only=True)
class GeneratorRun:
    """Trains a one-step generator: any of distillation, adversarial and reward, added up.

    Attributes:
        start: a run whose generator (its average), auxiliary and heads this one starts from; None starts
            the first two from the teacher.
        distillation, adversarial, reward: the terms; None leaves one out.
    """

    teacher: str = "teacher"
    tokenizer: str = "tokenizer"
    reward_classifier: str = "reward_classifier"
    start: str | None = None
    data: DigitsData = field(default_factory=DigitsData)
    generator: GeneratorConfig
    distillation: DistillationConfig | None = None
    adversarial: AdversarialConfig | None = None
    reward: RewardConfig | None = None
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        _config.require_types(self)
        terms = (self.distillation, self.adversarial, self.reward)
        _config.require(
            any(term is not None for term in terms), self, "distillation", self.distillation,
            "set where adversarial and reward are None: a run needs a loss",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TestTimeRun:
    """Searches generator inputs for images of a wanted digit, which the condition does not say."""

    __test__ = False

    generator: str = "distillation"
    tokenizer: str = "tokenizer"
    reward_classifier: str = "reward_classifier"
    search: TestTimeConfig = field(default_factory=TestTimeConfig)
    samples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "samples", self.samples, minimum=1)


TrainingRun = ClassifierRun | TokenizerRun | TeacherRun | GeneratorRun

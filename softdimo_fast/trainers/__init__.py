"""One training loop, the methods it runs, and test-time embedding optimisation."""

from softdimo_fast.trainers.adversarial import Adversarial, AdversarialConfig
from softdimo_fast.trainers.checkpoint import CheckpointError, CheckpointWarning
from softdimo_fast.trainers.classifier import ClassifierConfig, ClassifierMethod
from softdimo_fast.trainers.distillation import DistillationConfig, DistributionMatching
from softdimo_fast.trainers.ema import Ema, EmaConfig
from softdimo_fast.trainers.generator import GeneratorConfig, GeneratorMethod
from softdimo_fast.trainers.generator_trainers import (
    AdversarialTrainer,
    DistillationTrainer,
    GeneratorTrainer,
    RewardTrainer,
)
from softdimo_fast.trainers.heads import DiscriminatorHeads, HeadsConfig
from softdimo_fast.trainers.method import Loss, Method, MicroBatch, Phase
from softdimo_fast.trainers.objective import Objective, Rollout
from softdimo_fast.trainers.optimization import OptimizerConfig, ScheduleConfig
from softdimo_fast.trainers.reward import RewardConfig, RewardObjective
from softdimo_fast.trainers.teacher import TeacherConfig, TeacherMethod
from softdimo_fast.trainers.test_time import (
    TestTimeConfig,
    TestTimeEmbeddingOptimizer,
    TestTimeResult,
)
from softdimo_fast.trainers.tokenizer import TokenizerConfig, TokenizerMethod
from softdimo_fast.trainers.trainer import NonFiniteError, Stopped, Trainer, TrainerConfig

__all__ = [
    "Adversarial",
    "AdversarialConfig",
    "AdversarialTrainer",
    "CheckpointError",
    "CheckpointWarning",
    "ClassifierConfig",
    "ClassifierMethod",
    "DiscriminatorHeads",
    "DistillationConfig",
    "DistillationTrainer",
    "DistributionMatching",
    "Ema",
    "EmaConfig",
    "GeneratorConfig",
    "GeneratorMethod",
    "GeneratorTrainer",
    "HeadsConfig",
    "Loss",
    "Method",
    "MicroBatch",
    "NonFiniteError",
    "Objective",
    "OptimizerConfig",
    "Phase",
    "RewardConfig",
    "RewardObjective",
    "RewardTrainer",
    "Rollout",
    "ScheduleConfig",
    "Stopped",
    "TeacherConfig",
    "TeacherMethod",
    "TestTimeConfig",
    "TestTimeEmbeddingOptimizer",
    "TestTimeResult",
    "TokenizerConfig",
    "TokenizerMethod",
    "Trainer",
    "TrainerConfig",
]

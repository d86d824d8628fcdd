"""The trainers of a one-step generator: the :class:`Trainer` with the right objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softdimo_fast.diffusion import Draws
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.trainers.adversarial import Adversarial
from softdimo_fast.trainers.distillation import DistributionMatching
from softdimo_fast.trainers.generator import GeneratorConfig, GeneratorMethod
from softdimo_fast.trainers.objective import Objective
from softdimo_fast.trainers.reward import RewardObjective
from softdimo_fast.trainers.trainer import Trainer, TrainerConfig

Conditions = Callable[[Draws], Condition]


class GeneratorTrainer(Trainer):
    """L = the sum of ``objectives``, each with its own weight (Soft-Di[M]O, arXiv 2509.22925).

    ``options`` are those of :class:`Trainer`: folder, run_config, progress.
    """

    method: GeneratorMethod

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        objectives: tuple[Objective, ...],
        *,
        generator: GeneratorConfig,
        config: TrainerConfig,
        **options: Any,
    ) -> None:
        method = GeneratorMethod(student, conditions, objectives, generator)
        super().__init__(method, config, **options)


class DistillationTrainer(GeneratorTrainer):
    """Di[M]O: distribution matching, and whatever other objectives are given."""

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        matching: DistributionMatching,
        *others: Objective,
        **options: Any,
    ) -> None:
        super().__init__(student, conditions, (matching, *others), **options)


class AdversarialTrainer(GeneratorTrainer):
    """The GAN objective; with a :class:`DistributionMatching` beside it, as alone it degrades."""

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        adversarial: Adversarial,
        *others: Objective,
        **options: Any,
    ) -> None:
        super().__init__(student, conditions, (*others, adversarial), **options)


class RewardTrainer(GeneratorTrainer):
    """The reward objective; with a :class:`DistributionMatching` beside it as the regulariser."""

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        reward: RewardObjective,
        *others: Objective,
        **options: Any,
    ) -> None:
        super().__init__(student, conditions, (*others, reward), **options)

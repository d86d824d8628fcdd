"""The trainers of a one-step generator: the :class:`Trainer` with the right objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Required, TypedDict, Unpack

from softdimo_fast.diffusion import Draws
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.trainers.adversarial import Adversarial
from softdimo_fast.trainers.distillation import DistributionMatching
from softdimo_fast.trainers.generator import GeneratorConfig, GeneratorMethod
from softdimo_fast.trainers.objective import Objective
from softdimo_fast.trainers.progress import Progress
from softdimo_fast.trainers.reward import RewardObjective
from softdimo_fast.trainers.trainer import Trainer, TrainerConfig

Conditions = Callable[[Draws], Condition]


class GeneratorOptions(TypedDict, total=False):
    """The keywords of :class:`GeneratorTrainer`."""

    generator: Required[GeneratorConfig]
    config: Required[TrainerConfig]
    folder: Path | None
    run_config: Mapping[str, Any] | None
    progress: Progress | None


class GeneratorTrainer(Trainer):
    """L = the sum of ``objectives``, each with its own weight (Soft-Di[M]O, arXiv 2509.22925)."""

    method: GeneratorMethod

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        objectives: tuple[Objective, ...],
        *,
        generator: GeneratorConfig,
        config: TrainerConfig,
        folder: Path | None = None,
        run_config: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Args:
        conditions: the condition of each sample, a function of its draws.
        generator, config: of the method and of the loop.
        folder, run_config, progress: see :class:`Trainer`.
        """
        method = GeneratorMethod(student, conditions, objectives, generator)
        super().__init__(method, config, folder=folder, run_config=run_config, progress=progress)


class DistillationTrainer(GeneratorTrainer):
    """Di[M]O: distribution matching, and whatever other objectives are given."""

    def __init__(
        self,
        student: MaskedDiffusionModel,
        conditions: Conditions,
        matching: DistributionMatching,
        *others: Objective,
        **options: Unpack[GeneratorOptions],
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
        **options: Unpack[GeneratorOptions],
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
        **options: Unpack[GeneratorOptions],
    ) -> None:
        super().__init__(student, conditions, (*others, reward), **options)

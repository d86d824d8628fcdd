"""The recipes of the published teachers: MaskGIT, MaskBit, MaskGen-L and -XL, Meissonic.

Every number that is known is from Di[M]O's public code (arXiv 2503.15457) or from what is told of Soft-Di[M]O
(arXiv 2509.22925); the others are our defaults, and :func:`open_settings` names them. Guidance is s of
u + s (c - u) throughout; MaskBit's and MaskGen's own w of c + w (c - u) is s - 1.

The student's loss weights belong to ``normalization="batch"``, the public code's: L_DiMO is summed over all
[MASK] positions of a sample, so that weights of the other terms are large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from softdimo_fast.diffusion import OneStepConfig, guidance_from_weight
from softdimo_fast.diffusion.initial import NoiseScale
from softdimo_fast.diffusion.masking import MaskSchedule
from softdimo_fast.models.text_encoders import NEGATIVE_PROMPT
from softdimo_fast.recipes.published_runs import (
    TEXT_FAMILIES,
    Family,
    PromptInputs,
    PublishedGeneratorRun,
    PublishedTestTimeRun,
    RewardSource,
    RewardSources,
)
from softdimo_fast.rewards.clip import RENO_WEIGHTS
from softdimo_fast.trainers.adversarial import AdversarialConfig
from softdimo_fast.trainers.distillation import DistillationConfig
from softdimo_fast.trainers.ema import EmaConfig
from softdimo_fast.trainers.generator import GeneratorConfig
from softdimo_fast.trainers.heads import HeadsConfig
from softdimo_fast.trainers.optimization import OptimizerConfig, ScheduleConfig
from softdimo_fast.trainers.reward import RewardConfig
from softdimo_fast.trainers.test_time import TestTimeConfig
from softdimo_fast.trainers.trainer import TrainerConfig

LONGER = "adversarial_longer"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What differs between the recipes.

    Attributes:
        guidance_scale: s, of the teacher in the divergence.
        distillation_known: batch size and steps of Di[M]O are known; they are used for all methods.
        student_known: so are guidance, divergence, generator input and learning rates.
    """

    family: Family
    bits: int | None = None
    learning_rate: float = 1e-5
    initial_ratio: float = 0.6
    sigma: float = 0.1
    noise_scale: NoiseScale = "unit"
    guidance_scale: float = 2.0
    mask_schedule: MaskSchedule = "arccos"
    batch_size: int = 128
    accumulation: int = 2
    steps: int = 50_000
    seed: int = 3407
    text: PromptInputs = field(default_factory=PromptInputs)
    checkpoint_blocks: bool = False
    distillation_known: bool = False
    student_known: bool = False


MASKGIT = Teacher(family="maskgit", steps=50_001, distillation_known=True, student_known=True)
MASKBIT = Teacher(family="maskbit", bits=14, guidance_scale=guidance_from_weight(1.0))
MASKGEN_L = Teacher(
    family="maskgen_vq", noise_scale="embedding", guidance_scale=guidance_from_weight(3.0),
    batch_size=64, text=PromptInputs(score=6.5),
)  # fmt: skip
MASKGEN_XL = replace(MASKGEN_L, accumulation=4, checkpoint_blocks=True)
MEISSONIC = Teacher(
    family="meissonic", learning_rate=1e-6, initial_ratio=0.5, sigma=0.3, guidance_scale=4.0,
    mask_schedule="cosine", batch_size=16, accumulation=8, steps=20_000, seed=42,
    text=PromptInputs(negative_prompt=NEGATIVE_PROMPT), checkpoint_blocks=True,
    distillation_known=True, student_known=True,
)  # fmt: skip
TEACHERS = {
    "maskgit": MASKGIT, "maskbit": MASKBIT, "maskgen_l": MASKGEN_L, "maskgen_xl": MASKGEN_XL,
    "meissonic": MEISSONIC,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# methods


def _adam(
    learning_rate: float, *, clip_norm: float | None = None, weight_decay: float = 0.0
) -> OptimizerConfig:
    """Adam, which AdamW without weight decay is; epsilon is the public code's under bfloat16."""
    return OptimizerConfig(
        learning_rate=learning_rate, betas=(0.9, 0.999), epsilon=1e-6, weight_decay=weight_decay,
        clip_norm=clip_norm, schedule=ScheduleConfig(warmup_steps=100),
    )  # fmt: skip


def one_step(teacher: Teacher) -> OneStepConfig:
    """The input of a teacher's one-step generator."""
    return OneStepConfig(
        initial_ratio=teacher.initial_ratio, sigma=teacher.sigma, noise_scale=teacher.noise_scale
    )


def distillation(teacher: Teacher, seed: int | None = None) -> PublishedGeneratorRun:
    """Di[M]O."""
    return PublishedGeneratorRun(
        family=teacher.family,
        bits=teacher.bits,
        text=teacher.text,
        generator=GeneratorConfig(
            one_step=one_step(teacher),
            freeze_embeddings=True,
            reuse_rollout=False,
            optimizer=_adam(teacher.learning_rate, clip_norm=1.0),
        ),
        distillation=DistillationConfig(
            divergence="forward_kl",
            guidance_scale=teacher.guidance_scale,
            normalization="batch",
            mask_schedule=teacher.mask_schedule,
            auxiliary_steps=1,
            auxiliary_label_smoothing=0.1,
            auxiliary_optimizer=_adam(teacher.learning_rate),
        ),
        checkpoint_blocks=teacher.checkpoint_blocks,
        trainer=TrainerConfig(
            seed=teacher.seed if seed is None else seed,
            steps=teacher.steps,
            batch_size=teacher.batch_size,
            accumulation=teacher.accumulation,
            checkpoint_every=1000,
            autocast="bfloat16",
            device="cuda",
            ema=EmaConfig(profile="constant", decay=0.9999, warm_start=True),
        ),
    )


def adversarial(teacher: Teacher, seed: int | None = None) -> PublishedGeneratorRun:
    """Soft-Di[M]O: Di[M]O and the GAN term."""
    heads = HeadsConfig(class_projection=teacher.family not in TEXT_FAMILIES)
    term = AdversarialConfig(
        weight=100.0, loss="non_saturating", mask_range=(0.0, 0.95), relaxation="soft",
        heads=heads, heads_optimizer=_adam(1e-4),
    )  # fmt: skip
    return replace(distillation(teacher, seed), adversarial=term)


def longer(teacher: Teacher, seed: int | None = None) -> PublishedGeneratorRun:
    """:func:`adversarial` gone on with from its checkpoint: a larger weight, a smaller learning rate.

    Its optimizers are fresh, so that the generator waits until the others have found their scales.
    """
    run = adversarial(teacher, seed)
    assert run.adversarial is not None
    assert run.distillation is not None
    rate = 5e-7
    return replace(
        run,
        start="adversarial",
        generator=replace(
            run.generator,
            warmup_steps=100,
            optimizer=_adam(rate, clip_norm=1.0, weight_decay=0.01),
        ),
        distillation=replace(run.distillation, auxiliary_optimizer=_adam(rate, weight_decay=0.01)),
        adversarial=replace(run.adversarial, weight=200.0),
    )


def _rewards(*names: str) -> RewardSources:
    """With ReNO's weights, the nearest that are public."""
    return RewardSources(**{name: RewardSource(weight=RENO_WEIGHTS[name]) for name in names})


def reward(teacher: Teacher, seed: int | None = None) -> PublishedGeneratorRun:
    """Soft-Di[M]O: Di[M]O, with rewards of the softly decoded images."""
    return replace(
        distillation(teacher, seed),
        reward=RewardConfig(weight=100.0, relaxation="soft"),
        rewards=_rewards("clip", "image_reward"),
    )


def tteo(teacher: Teacher, seed: int | None = None) -> PublishedTestTimeRun:
    """Best of four inputs, then four steps of SGD at 0.2."""
    return PublishedTestTimeRun(
        family=teacher.family,
        bits=teacher.bits,
        text=teacher.text,
        rewards=_rewards("clip", "image_reward", "hps", "pick_score"),
        search=TestTimeConfig(
            candidates=4, iterations=4, optimizer="sgd", learning_rate=0.2,
            one_step=one_step(teacher), batch_size=4,
        ),
        seed=teacher.seed if seed is None else seed,
    )  # fmt: skip


METHODS: Mapping[str, Callable[..., Any]] = {
    "distillation": distillation, "adversarial": adversarial, "reward": reward, "tteo": tteo,
}  # fmt: skip


def recipes() -> dict[str, dict[str, Callable[..., Any]]]:
    """Recipe -> method -> function of the seed; without one, the published seed."""
    found: dict[str, dict[str, Callable[..., Any]]] = {
        name: {method: partial(function, teacher) for method, function in METHODS.items()}
        for name, teacher in TEACHERS.items()
    }
    found["maskbit"][LONGER] = partial(longer, MASKBIT)
    return found


# ---------------------------------------------------------------------------------------------------
# what the sources leave open

_OPTIMIZER_RATES = (
    "generator.optimizer.learning_rate", "distillation.auxiliary_optimizer.learning_rate"
)  # fmt: skip
_REWARD_WEIGHTS = tuple(
    f"rewards.{name}.weight" for name in ("clip", "image_reward", "hps", "pick_score")
)

# Topic -> dotted names; a group's name stands for all below it.
OPEN: Mapping[str, tuple[str, ...]] = {
    "weights": ("adversarial.weight", "reward.weight", *_REWARD_WEIGHTS),
    "discriminator": (
        "adversarial.loss", "adversarial.heads", "adversarial.heads_steps",
        "adversarial.heads_optimizer", "adversarial.r1", "adversarial.r1_weight",
        "adversarial.r1_sigma",
    ),
    "scale": ("trainer.batch_size", "trainer.accumulation", "trainer.steps"),
    "students": (
        "bits", "distillation.divergence", "distillation.beta", "distillation.guidance_scale",
        "distillation.mask_schedule", "generator.one_step", "search.one_step", *_OPTIMIZER_RATES,
        "trainer.seed", "seed",
    ),
    "search": (
        "search.candidates", "search.momentum", "search.regularization",
        "search.regularization_weight", "search.decode",
    ),
    "relaxation": ("adversarial.temperature", "reward.temperature"),
    "real images": ("real_tokens",),
    "prompts": ("text.prompts",),
    "class rewards": ("reward", "rewards"),
    "restart": ("generator.warmup_steps",),
}  # fmt: skip


def open_settings(recipe: str, method: str) -> tuple[str, ...]:
    """The settings of a recipe's method that no source gives; ours are defaults, to be questioned.

    Dotted names; a group's name stands for all below it. Empty for other recipes.
    """
    teacher = TEACHERS.get(recipe)
    if teacher is None:
        return ()
    topics = ["weights", "discriminator", "search", "relaxation"]
    text = teacher.family in TEXT_FAMILIES
    # Of Di[M]O's own runs more is known than of Soft-Di[M]O's.
    known = teacher.distillation_known and method == "distillation"
    topics += [] if known else ["scale"]
    topics += [] if teacher.student_known else ["students"]
    topics += ["prompts"] if text and not known else []
    topics += ["restart"] if method == LONGER else []
    topics += ["real images"] if method in ("adversarial", LONGER) else []
    # Only text-to-image generators were trained with rewards.
    topics += ["class rewards"] if not text and method in ("reward", "tteo") else []
    names = [name for topic in topics for name in OPEN[topic]]
    if method == LONGER:
        told = ("adversarial.weight", "generator.optimizer.learning_rate")
        names = [name for name in names if name not in told]
    return tuple(names)


def is_open(name: str, settings: tuple[str, ...]) -> bool:
    """Whether ``name``, or a group that it is in, is among ``settings``."""
    return any(name == setting or name.startswith(f"{setting}.") for setting in settings)

"""Run configs for the published teachers: what trains or searches a one-step generator, from which files.

A *model source* is what :func:`softdimo_fast.models.from_pretrained` takes: a folder of ours, a published
file or folder, or a hub id ``owner/name`` or ``owner/name/path``. Paths are absolute or relative to the
working directory, as on every command line. ``start`` alone names another run's folder, beside the run's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softdimo_fast import _config
from softdimo_fast.trainers.adversarial import AdversarialConfig
from softdimo_fast.trainers.distillation import DistillationConfig
from softdimo_fast.trainers.generator import GeneratorConfig
from softdimo_fast.trainers.reward import RewardConfig
from softdimo_fast.trainers.test_time import TestTimeConfig
from softdimo_fast.trainers.trainer import TrainerConfig

Family = Literal["maskgit", "maskbit", "maskgen_vq", "meissonic"]
CLASS_FAMILIES, TEXT_FAMILIES = ("maskgit", "maskbit"), ("maskgen_vq", "meissonic")
TOKENIZER_OF = {
    "maskgit": "maskgit_vqgan", "maskbit": "maskbit_tokenizer", "maskgen_vq": "tatitok_vq",
    "meissonic": "meissonic_vqvae",
}  # fmt: skip
MICRO = (1024.0, 1024.0, 0.0, 0.0, 6.0)  # width, height, two crop offsets, aesthetic score


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """What text is asked for.

    Attributes:
        prompts: a file of prompts. A class-conditional teacher needs it for rewards that read text: one line
            a class, in the order of the labels.
        encoder: the folder of the teacher's text encoder.
        negative_prompt: of Meissonic's unconditional branch of guidance; the other families have a class or
            the empty prompt there, and take none.
        score: the aesthetic score that MaskGen is asked for.
        micro: Meissonic's micro-conditions: width, height, two crop offsets, aesthetic score.
    """

    prompts: str | None = None
    encoder: str | None = None
    negative_prompt: str = ""
    score: float = 6.5
    micro: tuple[float, float, float, float, float] = MICRO

    def __post_init__(self) -> None:
        _config.require_types(self)


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One reward.

    Attributes:
        path: its published file, folder or hub id; of ImageReward the file, with med_config.json beside it.
        weight: lambda.
        tokenizer: another folder with the tokenizer's files, of CLIP and PickScore (whose own has none).
    """

    path: str | None = None
    weight: float = 1.0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """The rewards that are summed; None leaves one out."""

    clip: RewardSource | None = None
    image_reward: RewardSource | None = None
    hps: RewardSource | None = None
    pick_score: RewardSource | None = None

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require(
            bool(self.named()), self, "clip", self.clip, "set where all other rewards are None"
        )
        for name in ("image_reward", "hps"):
            source = getattr(self, name)
            tokenizer = None if source is None else source.tokenizer
            _config.require(
                tokenizer is None, self, f"{name}.tokenizer", tokenizer, "None: it has its own"
            )

    def named(self) -> dict[str, RewardSource]:
        """Those that are set."""
        sources = {name: getattr(self, name) for name in REWARD_NAMES}
        return {name: source for name, source in sources.items() if source is not None}


REWARD_NAMES = ("clip", "image_reward", "hps", "pick_score")


@dataclass(frozen=True, kw_only=True)
class PublishedGeneratorRun:
    """Trains a one-step generator from a published teacher: distillation, GAN and reward, added up.

    Attributes:
        family: of the teacher.
        bits: of a MaskBit teacher and its tokenizer; None for the other families.
        teacher: model source; must be given.
        tokenizer: model source; a reward needs it, and sampling uses it.
        student: model source of a one-step generator to start from, in place of the teacher's weights.
        start: a run, beside this one's folder, whose generator (its average), auxiliary and heads this one
            starts from.
        real_tokens: a file of encoded images, which the GAN needs (softdimo pretokenize makes it). Labels
            are the teacher's classes, or where it reads text, numbers of the prompts in ``text.prompts``.
        text: prompts and text encoder.
        timestep: of Meissonic: ``"condition"`` tells every network timestep 0, as the public Di[M]O code
            does by an integer cast; ``"mask_ratio"`` 1000 x the share of [MASK], as in its training.
        generator, distillation, adversarial, reward: the terms; None leaves one out.
        rewards: what ``reward`` sums.
        checkpoint_blocks: recompute each block in backward: less memory, about a third more time.
        trainer: the loop.
    """

    family: Family
    bits: int | None = None
    teacher: str | None = None
    tokenizer: str | None = None
    student: str | None = None
    start: str | None = None
    real_tokens: str | None = None
    text: PromptInputs = field(default_factory=PromptInputs)
    timestep: Literal["condition", "mask_ratio"] = "condition"
    generator: GeneratorConfig
    distillation: DistillationConfig | None = None
    adversarial: AdversarialConfig | None = None
    reward: RewardConfig | None = None
    rewards: RewardSources | None = None
    checkpoint_blocks: bool = False
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        _config.require_types(self)
        _require_bits(self, self.family, self.bits)
        _require_prompt(self, self.family, self.text)
        terms = (self.distillation, self.adversarial, self.reward)
        _config.require(
            any(term is not None for term in terms), self, "distillation", self.distillation,
            "set where adversarial and reward are None: a run needs a loss",
        )  # fmt: skip
        _config.require(
            (self.reward is None) == (self.rewards is None), self, "rewards", self.rewards,
            "set where reward is, and None otherwise",
        )  # fmt: skip
        _config.require(
            self.student is None or self.start is None, self, "student", self.student,
            "None where start is set: both say where the generator starts",
        )  # fmt: skip
        _config.require(
            self.timestep == "condition" or self.family == "meissonic", self, "timestep",
            self.timestep, "'condition': only meissonic takes a timestep",
        )  # fmt: skip
        if self.adversarial is not None and self.family in TEXT_FAMILIES:
            _config.require(
                not self.adversarial.heads.class_projection, self,
                "adversarial.heads.class_projection", True, "false where the condition is a text",
            )  # fmt: skip

    def missing(self) -> dict[str, str]:
        """What must be given and is not: name -> what it is."""
        needs = {"teacher": ("the teacher's weights", self.teacher)}
        if self.reward is not None:
            needs["tokenizer"] = ("the tokenizer's weights", self.tokenizer)
        if self.adversarial is not None:
            needs["real_tokens"] = ("a file of encoded images", self.real_tokens)
        return _unset(needs) | _missing_text(self.family, self.text, self.rewards)


@dataclass(frozen=True, kw_only=True)
class PublishedTestTimeRun:
    """Searches the inputs of a one-step generator for images with a higher reward.

    Attributes:
        family: of the generator.
        bits: of a MaskBit generator and its tokenizer; None for the other families.
        generator: the folder of a finished run, or a model source of a one-step generator; must be given.
        tokenizer: model source; must be given.
        text: prompts and text encoder.
        timestep: see :class:`PublishedGeneratorRun`; a finished run has its own.
        rewards: what the search raises.
        search: how.
        samples: prompts (or classes) are taken in turn.
        device: where.
    """

    __test__ = False

    family: Family
    bits: int | None = None
    generator: str | None = None
    tokenizer: str | None = None
    text: PromptInputs = field(default_factory=PromptInputs)
    timestep: Literal["condition", "mask_ratio"] = "condition"
    rewards: RewardSources
    search: TestTimeConfig = field(default_factory=TestTimeConfig)
    samples: int = 16
    seed: int = 0
    device: str = "cuda"

    def __post_init__(self) -> None:
        _config.require_types(self)
        _require_bits(self, self.family, self.bits)
        _require_prompt(self, self.family, self.text)
        _config.require_range(self, "samples", self.samples, minimum=1)
        _config.require(
            self.timestep == "condition" or self.family == "meissonic", self, "timestep",
            self.timestep, "'condition': only meissonic takes a timestep",
        )  # fmt: skip

    def missing(self) -> dict[str, str]:
        """What must be given and is not: name -> what it is."""
        needs = {
            "generator": ("a finished run, or a one-step generator's weights", self.generator),
            "tokenizer": ("the tokenizer's weights", self.tokenizer),
        }
        return _unset(needs) | _missing_text(self.family, self.text, self.rewards)


def _require_bits(owner: object, family: str, bits: int | None) -> None:
    _config.require(
        (bits is not None) == (family == "maskbit"), owner, "bits", bits,
        "a number for maskbit, and None for the other families",
    )  # fmt: skip
    if bits is not None:
        _config.require(bits >= 2 and bits % 2 == 0, owner, "bits", bits, "an even number >= 2")


def _require_prompt(owner: object, family: str, text: PromptInputs) -> None:
    _config.require(
        text.negative_prompt == "" or family == "meissonic", owner, "text.negative_prompt",
        text.negative_prompt, f"'' for {family}",
    )  # fmt: skip


def _missing_text(family: str, text: PromptInputs, rewards: RewardSources | None) -> dict[str, str]:
    needs: dict[str, tuple[str, str | None]] = {}
    if family in TEXT_FAMILIES:
        needs["text.encoder"] = ("the folder of the text encoder", text.encoder)
        needs["text.prompts"] = ("a file of prompts", text.prompts)
    if rewards is not None:
        needs["text.prompts"] = (
            "a file of prompts" if family in TEXT_FAMILIES else "a file of prompts, one a class",
            text.prompts,
        )
        for name, source in rewards.named().items():
            needs[f"rewards.{name}.path"] = (f"the weights of {name}", source.path)
    return _unset(needs)


def _unset(needs: dict[str, tuple[str, str | None]]) -> dict[str, str]:
    return {name: what for name, (what, value) in needs.items() if value is None}

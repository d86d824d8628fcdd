"""The samplers that came with the published ImageNet teachers, as plans for ``confidence_sample``.

Sources: MaskGIT (arXiv 2202.04200) as in the open reproduction (arXiv 2310.14400); MaskBit
(arXiv 2409.16211). Both are told by tables of their schedules, which the tests hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion.decoding import DecodingPlan, DecodingStep
from softdimo_fast.diffusion.guidance import guidance_from_weight

SamplingSchedule = Literal["arccos", "cosine", "linear", "square", "root"]


def sampling_ratio(schedule: SamplingSchedule, progress: Tensor) -> Tensor:
    """The share of positions that are [MASK] after a share ``progress`` in [0, 1] of the sampling.

    ``arccos`` arccos(p) / (pi / 2), ``cosine`` cos(pi p / 2), ``linear`` 1 - p, ``square`` 1 - p^2, ``root``
    1 - sqrt(p): all fall from 1 to 0. MaskBit masks its training data with these too; MaskGIT's training
    masks (:func:`softdimo_fast.diffusion.mask_ratio`) rise with r where they are linear or square.

    Raises:
        ValueError: ``schedule`` is none of these.
    """
    match schedule:
        case "arccos":
            angle: Tensor = torch.arccos(progress)
            return angle / (math.pi / 2)
        case "cosine":
            return torch.cos(math.pi / 2 * progress)
        case "linear":
            return 1 - progress
        case "square":
            return 1 - progress.square()
        case "root":
            return 1 - progress.sqrt()
    raise ValueError(
        f"sampling_ratio: schedule must be arccos, cosine, linear, square or root, got {schedule!r}"
    )


def unmask_counts(schedule: SamplingSchedule, steps: int, positions: int) -> list[int]:
    """How many positions MaskGIT's sampler fixes in each of ``steps`` >= 2 passes; the sum is ``positions``.

    In proportion to the ratio at ``steps`` points from 1 to 0, rounded half to even, at least one each; the
    last takes the difference (and is negative where the others are more than there are positions).
    """
    share = sampling_ratio(schedule, torch.linspace(1, 0, steps))
    counts = [max(1, int(count)) for count in (share / share.sum() * positions).round()]
    counts[-1] += positions - sum(counts)
    return counts


@dataclass(frozen=True, kw_only=True)
class MaskGitSamplerConfig:
    """The confidence sampler of the MaskGIT checkpoint; 8 steps are what its authors report.

    Attributes:
        steps: forward passes, at least two.
        guidance_scale: s of u + s (c - u) in the last pass; it rises linearly from 1 in the first. The
            published w is s - 1.
        temperature: of the tokens' softmax.
        confidence_temperature: of the Gumbel noise on the confidences, annealed linearly to 0.
        schedule: how many positions each pass fixes.
        mask_column: draw [MASK] among the tokens, as the published sampler does; such a position counts as
            fixed and shows the last code in the end. Off, only codes are drawn.
    """

    steps: int = 8
    guidance_scale: float = guidance_from_weight(3.0)
    temperature: float = 1.0
    confidence_temperature: float = 4.5
    schedule: SamplingSchedule = "arccos"
    mask_column: bool = False

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "steps", self.steps, minimum=2)
        _config.require_range(self, "temperature", self.temperature, above=0)
        _config.require_range(
            self, "confidence_temperature", self.confidence_temperature, minimum=0
        )

    def plan(self, positions: int) -> DecodingPlan:
        """The passes; fewer than ``steps`` where there are fewer positions."""
        steps: list[DecodingStep] = []
        left = positions
        for i, count in enumerate(unmask_counts(self.schedule, self.steps, positions)):
            fixed = min(count, left)
            left -= fixed
            share = i / (self.steps - 1)
            steps.append(
                DecodingStep(
                    number=i,
                    fixed=fixed,
                    left=left,
                    guidance=1 + (self.guidance_scale - 1) * share,
                    temperature=self.temperature,
                    heat=self.confidence_temperature * (1 - share),
                )
            )
            if left == 0:
                break
        return DecodingPlan(steps=tuple(steps), ties="fixed", mask_column=self.mask_column)


@dataclass(frozen=True, kw_only=True)
class MaskBitSamplerConfig:
    """The sampler of the MaskBit checkpoints; the defaults are for 14 bits.

    Attributes:
        steps: forward passes.
        guidance_scale: s of u + s (c - u), towards which guidance rises from 1. The published w is s - 1.
        guidance_power: p of the rise (1 - cos(pi (i / steps)^p)) / 2 (published as ``scale_pow``).
        temperature: of the tokens' softmax.
        temperature_annealing: 0.5 + 0.8 (1 - progress) instead (published as ``use_sampling_annealing``).
        confidence_temperature: of the Gumbel noise on the confidences, annealed linearly to 0 (published
            as ``randomize_temperature``).
        schedule: how many splits stay [MASK] after each pass.
    """

    steps: int = 64
    guidance_scale: float = guidance_from_weight(7.1)
    guidance_power: float = 3.0
    temperature: float = 1.0
    temperature_annealing: bool = False
    confidence_temperature: float = 7.8
    schedule: SamplingSchedule = "arccos"

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "steps", self.steps, minimum=1)
        for name in ("guidance_power", "temperature"):
            _config.require_range(self, name, getattr(self, name), above=0)
        _config.require_range(
            self, "confidence_temperature", self.confidence_temperature, minimum=0
        )

    def plan(self, positions: int) -> DecodingPlan:
        """The passes over ``positions`` splits; fewer than ``steps`` where there are fewer splits."""
        steps: list[DecodingStep] = []
        before = positions
        progress = torch.tensor([(i + 1) / self.steps for i in range(self.steps)])
        ratio = sampling_ratio(self.schedule, progress).clamp(1e-6, 1.0)
        counts = (ratio * positions).floor().long().tolist()
        for i, count in enumerate(counts):
            # Guidance is that of the pass's beginning; all else that of its end.
            rise = (1 - math.cos(math.pi * (i / self.steps) ** self.guidance_power)) / 2
            done = (i + 1) / self.steps
            # The last pass decodes what it draws, whatever its count.
            left = 0 if i + 1 == self.steps else min(max(count, 1), before - 1)
            steps.append(
                DecodingStep(
                    number=i,
                    fixed=before - left,
                    left=left,
                    guidance=1 + (self.guidance_scale - 1) * rise,
                    temperature=0.5 + 0.8 * (1 - done)
                    if self.temperature_annealing
                    else self.temperature,
                    heat=self.confidence_temperature * (1 - done),
                )
            )
            before = left
            if left == 0:
                break
        return DecodingPlan(steps=tuple(steps), ties="masked")


def _published(w: float, heat: float, power: float) -> MaskBitSamplerConfig:
    return MaskBitSamplerConfig(
        guidance_scale=guidance_from_weight(w), confidence_temperature=heat, guidance_power=power
    )


# Bits -> the 64-step settings of that checkpoint.
MASKBIT_SAMPLERS: dict[int, MaskBitSamplerConfig] = {
    10: _published(6.4, 10.5, 2.5),
    12: _published(7.1, 8.2, 3.0),
    14: _published(7.1, 7.8, 3.0),
    16: _published(6.5, 7.5, 2.5),
    18: _published(5.7, 8.5, 2.5),
}

"""The samplers that came with the published text-to-image teachers, as plans for ``confidence_sample``.

Sources: MaskGen (arXiv 2501.07730); Meissonic (arXiv 2410.08261). Both are told by tables of their schedules,
which the tests hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from softdimo_fast import _config
from softdimo_fast.diffusion.decoding import DecodingPlan, DecodingStep
from softdimo_fast.diffusion.guidance import guidance_from_weight
from softdimo_fast.diffusion.published_samplers import SamplingSchedule, sampling_ratio

GuidanceRise = Literal["cosine", "linear", "flippedcosine", "none"]


def _masked_after(schedule: SamplingSchedule, steps: int, positions: int) -> list[int]:
    """How many positions are [MASK] after each pass: the schedule's floor, but some fewer than before.

    At least one until the last pass, which fixes all that are left.
    """
    progress = torch.tensor([(i + 1) / steps for i in range(steps)])
    counts = (sampling_ratio(schedule, progress) * positions).floor().long().tolist()
    left, before = [], positions
    for count in counts[:-1]:
        before = max(1, min(before - 1, count))
        left.append(before)
    return [*left, 0]


@dataclass(frozen=True, kw_only=True)
class MaskGenSamplerConfig:
    """MaskGen's sampler; the defaults are the published ones for L and XL.

    The published sampler ignores the aesthetic score that it is given and asks for the configured one (6.5);
    here the score is the condition's.

    Attributes:
        steps: forward passes.
        guidance_scale: s of u + s (c - u) in the last pass. The published w of c + w (c - u) is s - 1.
        guidance_rise: of w, with the progress p = ((i + 1) / steps) ^ guidance_power: ``"cosine"`` from 1 by
            (1 - cos(pi p)) / 2, ``"linear"`` from 1 by the progress itself, ``"flippedcosine"`` 1 + (w - 1)
            cos(pi p) / 2 (which ends below 1), ``"none"`` constant (published as ``guidance_decay``).
        guidance_power: published as ``guidance_decay_scale_pow``.
        temperature_annealing: divide the logits by 0.5 + 0.8 (1 - progress). Off, they are divided by the
            Gumbel noise's own factor, as published (published as ``softmax_temperature_annealing``).
        confidence_temperature: of the Gumbel noise, annealed linearly to 0. It is added to the divided
            logits for the draw, and anew to the drawn token's for the order (published as
            ``randomize_temperature``).
        schedule: how many positions stay [MASK] after each pass.
    """

    steps: int = 16
    guidance_scale: float = guidance_from_weight(12.0)
    guidance_rise: GuidanceRise = "cosine"
    guidance_power: float = 1.0
    temperature_annealing: bool = True
    confidence_temperature: float = 2.0
    schedule: SamplingSchedule = "arccos"

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "steps", self.steps, minimum=1)
        _config.require_range(self, "guidance_power", self.guidance_power, above=0)
        _config.require_range(
            self, "confidence_temperature", self.confidence_temperature, minimum=0
        )

    def guidance(self, progress: float) -> float:
        """s of a pass that ends at a share ``progress`` of the sampling."""
        weight = self.guidance_scale - 1
        angle = math.pi * progress**self.guidance_power
        rise = {
            "cosine": (1 - math.cos(angle)) / 2,
            "linear": progress,
            "flippedcosine": math.cos(angle) / 2,
            "none": 1.0,
        }[self.guidance_rise]
        return guidance_from_weight(1 + (weight - 1) * rise)

    def plan(self, positions: int) -> DecodingPlan:
        """The passes; fewer than ``steps`` where there are fewer positions."""
        steps: list[DecodingStep] = []
        before = positions
        for i, left in enumerate(_masked_after(self.schedule, self.steps, positions)):
            progress = (i + 1) / self.steps
            heat = self.confidence_temperature * (1 - progress)
            # Without heat the likeliest token is drawn, at any temperature: the published division by 0 in
            # the last pass is left out.
            temperature = 0.5 + 0.8 * (1 - progress) if self.temperature_annealing else heat or 1.0
            if left < before:
                steps.append(
                    DecodingStep(
                        number=i, fixed=before - left, left=left, guidance=self.guidance(progress),
                        temperature=temperature, heat=heat, draw_heat=heat,
                    )
                )  # fmt: skip
            before = left
        return DecodingPlan(steps=tuple(steps), ties="masked", confidence="logit")


@dataclass(frozen=True, kw_only=True)
class MeissonicSamplerConfig:
    """Meissonic's sampler; the defaults are the published ones for 1024 pixels.

    Attributes:
        steps: forward passes.
        guidance_scale: s of u + s (c - u); up to 1 there is no guidance.
        confidence_temperature: of the Gumbel noise on the confidences, in the first pass and the last; a
            single number falls to 0.01. The tokens are drawn at temperature 1.
        schedule: how many positions stay [MASK] after each pass.
        timestep: what the network is told in each pass: ``"step"``: how many passes follow, as published;
            ``"mask_ratio"``: 1000 x the share of [MASK], as in its training; ``"condition"``: the time of the
            condition in all passes.
    """

    steps: int = 64
    guidance_scale: float = 9.0
    confidence_temperature: float | tuple[float, float] = (2.0, 0.0)
    schedule: Literal["cosine", "linear"] = "cosine"
    timestep: Literal["step", "mask_ratio", "condition"] = "step"

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "steps", self.steps, minimum=1)
        for value in self.heat_range:
            _config.require_range(self, "confidence_temperature", value, minimum=0)

    @property
    def heat_range(self) -> tuple[float, float]:
        """``confidence_temperature`` in the first and the last pass."""
        heat = self.confidence_temperature
        return heat if isinstance(heat, tuple) else (heat, 0.01)

    def plan(self, positions: int) -> DecodingPlan:
        """The passes; fewer than ``steps`` where there are fewer positions."""
        first, last = self.heat_range
        heats = torch.linspace(first, last, self.steps).tolist()
        steps: list[DecodingStep] = []
        before = positions
        for i, left in enumerate(_masked_after(self.schedule, self.steps, positions)):
            times = {
                "step": float(self.steps - 1 - i),
                "mask_ratio": 1000 * before / positions,
                "condition": None,
            }
            if left < before:
                steps.append(
                    DecodingStep(
                        number=i, fixed=before - left, left=left,
                        guidance=max(1.0, self.guidance_scale), heat=heats[i],
                        time=times[self.timestep],
                    )
                )  # fmt: skip
            before = left
        return DecodingPlan(steps=tuple(steps), ties="masked")

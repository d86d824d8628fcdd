"""Calls of token_divergence as its operator takes them: kernel, float64, and what a user would write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops.reference import divergence as reference
from softdimo_fast.ops.reference.common import mean_divisor
from support.checks import assert_same_bits
from support.divergence import composed_rows

NAMES = ("teacher", "model", "uncond")
# Weights of KL(p || q) and KL(q || p).
KINDS = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (1.2, -0.2))


class Result(NamedTuple):
    """A value, and the gradients to the teacher's, the model's and the unconditional logits."""

    value: Tensor
    grads: tuple[Tensor, ...]
    statistics: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One call of token_divergence, and the gradient of its value."""

    teacher: Tensor
    model: Tensor
    uncond: Tensor | None = None
    guidance: float | Tensor = 1.0
    temperatures: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, float] = (1.0, 0.0)
    mask: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "none"
    upstream: Tensor | None = None

    def change(self, **options: Any) -> Call:
        return replace(self, **options)

    def rows(self, chosen: Any) -> Call:
        """The same of some rows."""
        fields = (*NAMES, "guidance", "mask", "weight", "upstream")
        values = {name: getattr(self, name) for name in fields}
        per_row = {n: v[chosen] for n, v in values.items() if isinstance(v, Tensor) and v.dim()}
        return self.change(**per_row)

    def arguments(self) -> tuple[Any, ...]:
        scalar = 1.0 if isinstance(self.guidance, Tensor) else self.guidance
        per_row = self.guidance if isinstance(self.guidance, Tensor) else None
        return (
            self.teacher, self.model, self.uncond, scalar, per_row, *self.temperatures, *self.weights,
            self.mask, self.weight, self.reduction,
        )  # fmt: skip

    def wanted(self) -> list[bool]:
        return [True, True, self.uncond is not None]

    def grad(self) -> Tensor:
        if self.upstream is not None:
            return self.upstream
        rows = self.model.shape[:-1] if self.reduction == "none" else ()
        return torch.ones(rows, dtype=torch.float32, device=self.model.device)

    def run(self, operators: Any, wanted: list[bool] | None = None) -> Result:
        """On ``torch.ops.softdimo``, or ``softdimo_emulated``."""
        arguments, wanted = self.arguments(), self.wanted() if wanted is None else wanted
        value, statistics = operators.token_divergence(*arguments)
        grads = operators.token_divergence_backward(self.grad(), *arguments, statistics, wanted)
        return Result(value, tuple(grads), statistics)

    def exact(self) -> Result:
        """The specification, in float64."""
        arguments = tuple(a.double() if is_float(a) else a for a in self.arguments())
        value = reference.token_divergence(*arguments)
        grads = reference.token_divergence_backward(self.grad().double(), *arguments, self.wanted())
        return Result(value, tuple(grads))

    def composed(self) -> Result:
        """What a user would write, in float32, and torch's own gradients."""
        leaves = [
            None if t is None else t.detach().float().requires_grad_() for t in self.arguments()[:3]
        ]
        teacher, model, uncond = leaves
        assert teacher is not None
        assert model is not None
        settings: dict[str, Any] = {
            "guidance_scale": self.guidance,
            "teacher_temperature": self.temperatures[0],
            "model_temperature": self.temperatures[1],
        }
        forward, reverse = (
            composed_rows(teacher, model, uncond, kind=kind, **settings)
            for kind in ("forward_kl", "reverse_kl")
        )
        value = self.weights[0] * forward + self.weights[1] * reverse
        value = value if self.weight is None else value * self.weight
        value = value if self.mask is None else torch.where(self.mask, value, 0.0)
        if self.reduction != "none":
            divisor = mean_divisor(value, self.mask) if self.reduction == "mean" else 1
            value = value.sum() / divisor
        found = torch.autograd.grad(
            value, [leaf for leaf in leaves if leaf is not None], self.grad(), allow_unused=True
        )
        originals = [t for t in self.arguments()[:3] if t is not None]
        grads = [
            torch.zeros_like(t) if g is None else g.to(t.dtype)
            for t, g in zip(originals, found, strict=True)
        ]
        return Result(value.detach(), tuple(grads))


def assert_same(first: Result, second: Result) -> None:
    assert_same_bits(first.value, second.value)
    for name, one, two in zip(NAMES, first.grads, second.grads, strict=True):
        assert_same_bits(one, two, name)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def rows_of_every_sort(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Teacher, model and unconditional logits: far apart, nearly equal, nearly one-hot, with -inf."""
    model, noise, uncond = 2 * torch.randn(3, rows, vocabulary)
    distance = torch.tensor([3.0, 1e-3, 0.1, 1.0])[torch.arange(rows) % 4, None]
    teacher = model + distance * noise
    for row in range(0, rows, 5):
        teacher[row, row % vocabulary] += 20
        model[row, row % vocabulary] += 20
    if vocabulary > 2:
        for logits in (teacher, model, uncond):
            logits[3::7, 0] = -torch.inf
        uncond[4::11, 1] = teacher[4::11, 1] = -torch.inf
    return [t.to(dtype) for t in (teacher, model, uncond)]

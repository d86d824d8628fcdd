"""Cases of the divergences, and what a user would write in their place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softdimo_fast.ops.token_divergence import token_divergence
from support.checks import (
    gradients,
)
from support.contract import FLOORS, assert_contract

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": 0.3},
    {"kind": "jeffreys", "beta": -0.2},
    {"kind": "jeffreys", "beta": 1.7},
)


def composed_rows(
    teacher: Tensor,
    model: Tensor,
    uncond: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    model_temperature: float = 1.0,
) -> Tensor:
    """What a user would write, row by row, in the inputs' own dtype."""
    if uncond is not None:
        scale = guidance_scale
        if isinstance(scale, Tensor):
            scale = scale.unsqueeze(-1).to(teacher.dtype)
        teacher = uncond + scale * (teacher - uncond)
    log_p = torch.log_softmax(teacher / teacher_temperature, dim=-1)
    log_q = torch.log_softmax(model / model_temperature, dim=-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)
    if kind == "jeffreys":
        assert beta is not None
        return (1 - beta) * forward + beta * reverse
    return forward if kind == "forward_kl" else reverse


class Case(NamedTuple):
    """One call: tensors that get gradients, and the options."""

    teacher: Tensor
    model: Tensor
    uncond: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None]

    def call(self, backend: str | None = None, reduction: str = "none") -> Any:
        """The operator as a function of :meth:`tensors`."""

        def run(teacher: Tensor, model: Tensor, uncond: Tensor | None = None) -> Tensor:
            return token_divergence(
                teacher, model, teacher_uncond_logits=uncond, reduction=reduction, backend=backend,
                **self.options,
            )  # fmt: skip

        return run

    def composed(self, *tensors: Tensor) -> Tensor:
        options = dict(self.options)
        mask, weight = options.pop("mask", None), options.pop("weight", None)
        if mask is not None:
            tensors = tuple(torch.where(mask.unsqueeze(-1), t, 0.0) for t in tensors)
        rows = composed_rows(*tensors, **options)
        rows = rows if weight is None else rows * weight
        return rows if mask is None else torch.where(mask, rows, 0.0)

    def double(self) -> Case:
        """The same values in float64; a weight in the inputs' own dtype is exact already."""
        tensors = [None if t is None else t.double() for t in self[:3]]
        return Case(*tensors, self.options)


def strided(logits: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "padded":
        wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 3), torch.nan, dtype=logits.dtype)
        wide[..., : logits.shape[-1]] = logits
        return wide[..., : logits.shape[-1]]
    if layout == "columns":
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    return logits


def assert_close_to_float64(case: Case, backend: str) -> None:
    """The rows and every gradient keep the numerics contract."""
    truth, truth_grads = gradients(case.double().call("reference"), case.double().tensors())
    value, grads = gradients(case.call(backend), case.tensors())
    yardstick, yardstick_grads = gradients(case.composed, case.tensors())
    wide = any(t.dtype == torch.float64 for t in case.tensors())
    assert value.dtype == (torch.float64 if wide else torch.float32)
    narrowest = max(FLOORS[t.dtype] for t in case.tensors())
    floor = 2e-6 if narrowest == FLOORS[torch.float32] else narrowest
    assert_contract(value, yardstick, truth, floor=2e-6 if value.dtype == torch.float32 else 1e-12)
    for name, mine, theirs, true in zip(
        ("teacher", "model", "uncond"), grads, yardstick_grads, truth_grads, strict=False
    ):
        assert_contract(mine, theirs, true, floor=floor, what=f"gradient of {name}")


def small_case(options: dict[str, Any], infinite: bool = False) -> Case:
    tensors = [torch.randn(3, 4, 6, dtype=torch.double) for _ in range(3)]
    if infinite:
        for tensor in tensors:
            tensor[0, :, 2:4] = -torch.inf
    rows = {
        "guidance_scale": 0.5 + 2 * torch.rand(3, 1).double(),
        "mask": torch.rand(3, 4) < 0.7,
        "weight": torch.rand(4).double(),
    }
    return Case(*tensors, options | rows | {"teacher_temperature": 0.8, "model_temperature": 1.4})

"""Errors against float64: the lean expression on the same inputs, made wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.benchmark.workloads.common import Implementation, Workload


@dataclass(frozen=True)
class Exact:
    """What float64 gives.

    Attributes:
        values: one tensor, or several.
        gradients: of the wanted inputs, for the upstream gradient of the case.
    """

    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Errors:
    """Norm-relative errors: of the worst value, and of the worst gradient; None where it has no meaning."""

    value: float | None
    gradient: float | None


def exact(workload: Workload) -> Exact | None:
    """The float64 results; None where values are random."""
    if workload.exact is None:
        return None
    wide = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in workload.inputs.items()
    }
    leaves = [wide[name].requires_grad_() for name in workload.wanted]
    with torch.set_grad_enabled(bool(leaves)):
        value = workload.exact(wide)
    values = _tuple(value)
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        gradients = torch.autograd.grad(value, leaves, _upstream(workload, value).double())
    return Exact(tuple(one.detach() for one in values), gradients)


def errors(workload: Workload, implementation: Implementation, true: Exact) -> Errors:
    """Of one implementation."""
    training = bool(workload.wanted)
    with torch.set_grad_enabled(training):
        value = workload.forward(implementation)
    gradients: tuple[Tensor, ...] = ()
    if training:
        gradients = workload.gradients(value, _upstream(workload, value).to(value.dtype))
    of_value = None
    if implementation.same_value:
        pairs = zip(_tuple(value), true.values, strict=True)
        of_value = max(relative_error(got.detach(), wanted) for got, wanted in pairs)
    pairs = zip(gradients, true.gradients, strict=True)
    of_gradient = max((relative_error(*pair) for pair in pairs), default=None)
    return Errors(of_value, of_gradient)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in the 2-norm of all entries."""
    norm = float(torch.linalg.vector_norm(wanted))
    distance = float(torch.linalg.vector_norm(got.double() - wanted))
    return distance / norm if norm else distance


def _upstream(workload: Workload, value: Tensor) -> Tensor:
    """Rounded as the implementations of the case get it, so that all see the same numbers."""
    half = workload.case.dtype != "float32" and value.dim() > 0
    return workload.upstream(value.to(torch.bfloat16) if half else value.float())


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)

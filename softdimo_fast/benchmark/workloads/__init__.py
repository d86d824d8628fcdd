"""Each operator's cases as runnable code: ours, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.workloads import (
    distribution_matching_loss,
    linear_soft_embedding,
    masked_attention,
    masked_cross_entropy,
    sample_tokens,
    soft_embedding,
    token_divergence,
    token_statistics,
)
from softdimo_fast.benchmark.workloads.common import Maker, ShapeMaker, Work, Workload

_BUILDERS: dict[str, Callable[[Maker], Workload]] = {
    "soft_embedding": soft_embedding.build,
    "linear_soft_embedding": linear_soft_embedding.build,
    "token_divergence": token_divergence.build,
    "distribution_matching_loss": distribution_matching_loss.build,
    "masked_cross_entropy": masked_cross_entropy.build,
    "sample_tokens": sample_tokens.build,
    "token_statistics": token_statistics.build,
    "masked_attention": masked_attention.build,
}


def build(case: Case, device: str = "cpu", *, tiny: bool = False) -> Workload:
    """Draws a case's tensors (the same ones every time) and collects its implementations.

    Args:
        case: what to build.
        device: "cpu" or "cuda".
        tiny: small sizes, for tests.
    """
    # What explain says of a call depends on autocast too.
    with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "autocast"):
        workload = _BUILDERS[case.operator](Maker(case, device, tiny=tiny))
    for name in workload.wanted:
        workload.inputs[name].requires_grad_()
    return workload


def least_work(case: Case, kind: str, *, tiny: bool = False) -> dict[str, Work]:
    """The least work of a case by phase, with the sizes on a kind of device that need not be here."""
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast"):
        return _BUILDERS[case.operator](ShapeMaker(case, kind, tiny=tiny)).work

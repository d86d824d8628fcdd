"""``token_divergence`` and the same from log-softmax and ``kl_div``; the model's logits get the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softdimo_fast import explain, token_divergence
from softdimo_fast.benchmark.workloads import peers
from softdimo_fast.benchmark.workloads.common import (
    GUIDANCE,
    Absent,
    Function,
    Implementation,
    Inputs,
    Maker,
    Workload,
    loss_work,
)
from softdimo_fast.benchmark.workloads.names import EAGER, OURS

BETA = 0.3
WANTED = ("model",)


def build(maker: Maker) -> Workload:
    """The workload of a case; a variant that is no kind of divergence is a forward KL."""
    case, shape = maker.case, (maker.sizes["N"], maker.sizes["V"])
    teacher = maker.normal(*shape, scale=3)
    inputs = {"teacher": teacher, "model": maker.normal(*shape, scale=3)}
    if case.variant == "near-equal":
        inputs["model"] = teacher + maker.normal(*shape, scale=1e-3)
    if case.variant == "guided":
        inputs["uncond"] = maker.normal(*shape, scale=3)
    kind = case.variant if case.variant in ("reverse_kl", "jeffreys") else "forward_kl"
    options: dict[str, Any] = {"kind": kind}
    if kind == "jeffreys":
        options["beta"] = BETA
    if "uncond" in inputs:
        options["guidance_scale"] = GUIDANCE

    def ours(given: Inputs) -> Tensor:
        return token_divergence(
            given["teacher"], given["model"], teacher_uncond_logits=given.get("uncond"), **options
        )

    lean = _lean(kind)
    found: list[Implementation | Absent] = [Implementation(OURS, ours), Implementation(EAGER, lean)]
    if case.compiled:
        found.append(peers.compiled(lean))
    if kind == "forward_kl" and "uncond" not in inputs:
        found.append(peers.liger(maker.device.type, _liger))
    implementations, absent = peers.sort(found)
    explanation = explain(
        token_divergence, inputs["teacher"], inputs["model"], teacher_uncond_logits=inputs.get("uncond"),
        **options,
    )  # fmt: skip
    return Workload(
        case, inputs, WANTED, implementations, lean, loss_work(explanation, inputs, WANTED), explanation,
        absent,
    )  # fmt: skip


def _lean(kind: str) -> Function:
    def lean(given: Inputs) -> Tensor:
        teacher = given["teacher"]
        if "uncond" in given:
            teacher = given["uncond"] + GUIDANCE * (teacher - given["uncond"])
        log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(given["model"], -1)
        forward, reverse = (log_q, log_p), (log_p, log_q)
        if kind == "jeffreys":
            return (1 - BETA) * _kl(*forward) + BETA * _kl(*reverse)
        return _kl(*(reverse if kind == "reverse_kl" else forward))

    return lean


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q), mean over rows."""
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _liger(module: Any) -> Function:
    divergence = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def function(given: Inputs) -> Tensor:
        log_p = torch.log_softmax(given["teacher"], -1)
        return divergence(torch.log_softmax(given["model"], -1), log_p)  # type: ignore[no-any-return]

    return function

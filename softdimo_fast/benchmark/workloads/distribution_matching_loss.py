"""``distribution_matching_loss``, the same in lean PyTorch, and as the public loop writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdimo_fast import distribution_matching_loss, explain
from softdimo_fast.benchmark.workloads import peers
from softdimo_fast.benchmark.workloads.common import (
    GUIDANCE,
    MASKED,
    Implementation,
    Inputs,
    Maker,
    Workload,
    loss_work,
)
from softdimo_fast.benchmark.workloads.names import EAGER, OURS, PUBLISHED
from softdimo_fast.benchmark.workloads.published import generator_loss

LENGTH = 256
WANTED = ("student",)


def build(maker: Maker) -> Workload:
    """The workload of a case: forward KL with guidance, over the masked positions."""
    case, rows = maker.case, maker.sizes["N"]
    length = min(LENGTH, rows // 2)
    shape = (rows // length, length, maker.sizes["V"])
    inputs = {
        name: maker.normal(*shape, scale=3) for name in ("student", "teacher", "uncond", "auxiliary")
    }  # fmt: skip
    inputs["mask"] = maker.mask(*shape[:2], share=MASKED)
    implementations = [
        Implementation(OURS, _ours),
        Implementation(EAGER, _lean),
        Implementation(PUBLISHED, _published, same_value=False),
    ]
    if case.compiled:
        implementations.append(peers.compiled(_lean))
    explanation = explain(distribution_matching_loss, *_arguments(inputs), **_options(inputs))
    counted = float(inputs["mask"].float().mean())
    work = loss_work(explanation, inputs, WANTED, counted)
    return Workload(case, inputs, WANTED, implementations, _lean, work, explanation)


def _arguments(given: Inputs) -> tuple[Tensor, ...]:
    return given["student"], given["teacher"], given["auxiliary"], given["mask"]


def _options(given: Inputs) -> dict[str, Any]:
    return {"teacher_uncond_logits": given["uncond"], "guidance_scale": GUIDANCE}


def _ours(given: Inputs) -> Tensor:
    return distribution_matching_loss(*_arguments(given), **_options(given))


def _lean(given: Inputs) -> Tensor:
    """The divergence as the value, the row gradient q - p to the student."""
    student, mask, batch = given["student"], given["mask"], len(given["student"])
    with torch.no_grad():
        guided = given["uncond"] + GUIDANCE * (given["teacher"] - given["uncond"])
        log_p, log_q = torch.log_softmax(guided, -1), torch.log_softmax(given["auxiliary"], -1)
        p = log_p.exp()
        divergence = ((p * (log_p - log_q)).sum(-1) * mask).sum() / batch
        gradient = (log_q.exp() - p) * (mask[..., None] / batch)
    carrier = (student * gradient.to(student.dtype)).sum()
    return carrier + (divergence - carrier).detach()


def _published(given: Inputs) -> Tensor:
    return generator_loss(
        given["student"], given["teacher"], given["uncond"], given["auxiliary"], given["mask"], GUIDANCE
    )  # fmt: skip

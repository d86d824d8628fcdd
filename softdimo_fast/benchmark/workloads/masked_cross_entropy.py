"""``masked_cross_entropy`` and ``F.cross_entropy`` with ignored targets; with the head's product too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softdimo_fast import explain, masked_cross_entropy
from softdimo_fast.benchmark.workloads import peers
from softdimo_fast.benchmark.workloads.common import (
    LABEL_SMOOTHING,
    MASKED,
    Absent,
    Function,
    Implementation,
    Inputs,
    Maker,
    Work,
    Workload,
    loss_work,
    nbytes,
)
from softdimo_fast.benchmark.workloads.names import CROSS_ENTROPY, OURS

IGNORED = -100


def build(maker: Maker) -> Workload:
    """The workload of a case: the auxiliary's loss, over the masked positions."""
    if maker.case.variant == "head":
        return _with_head(maker)
    rows, vocabulary = maker.sizes["N"], maker.sizes["V"]
    inputs = {"logits": maker.normal(rows, vocabulary, scale=3), **_targets(maker)}
    found: list[Implementation | Absent] = [
        Implementation(OURS, _ours),
        Implementation(CROSS_ENTROPY, _lean),
    ]
    if maker.case.compiled:
        found.append(peers.compiled(_lean))
    found.append(peers.liger(maker.device.type, _liger))
    implementations, absent = peers.sort(found)
    explanation = explain(
        masked_cross_entropy, inputs["logits"], inputs["targets"], inputs["mask"],
        label_smoothing=LABEL_SMOOTHING,
    )  # fmt: skip
    counted = float(inputs["mask"].float().mean())
    work = loss_work(explanation, inputs, ("logits",), counted)
    return Workload(
        maker.case, inputs, ("logits",), implementations, _lean, work, explanation, absent
    )


def _targets(maker: Maker) -> Inputs:
    rows, vocabulary = maker.sizes["N"], maker.sizes["V"]
    mask = maker.mask(rows, share=MASKED)
    targets = maker.tokens(rows, vocabulary=vocabulary)
    return {"targets": targets.where(mask, IGNORED), "mask": mask}


def _ours(given: Inputs) -> Tensor:
    return masked_cross_entropy(
        given["logits"], given["targets"], given["mask"], label_smoothing=LABEL_SMOOTHING
    )


def _lean(given: Inputs) -> Tensor:
    return functional.cross_entropy(
        given["logits"], given["targets"], ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING
    )


def _liger(module: Any) -> Function:
    loss = module.LigerCrossEntropyLoss(ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING)
    return lambda given: loss(given["logits"], given["targets"])


# ---------------------------------------------------------------------------------------------------
# from hidden states, where others fuse the product; they do not smooth, so nobody does


def _with_head(maker: Maker) -> Workload:
    hidden_width = maker.sizes["H"]
    inputs = {
        "hidden": maker.normal(maker.sizes["N"], hidden_width),
        "weight": maker.normal(
            maker.sizes["V"], hidden_width, scale=3 / hidden_width**0.5, parameter=True
        ),
        **_targets(maker),
    }
    wanted = ("hidden", "weight")
    device = maker.device.type
    implementations, absent = peers.sort(
        [
            Implementation(f"{OURS} after F.linear", _head_ours),
            Implementation(f"{CROSS_ENTROPY} after F.linear", _head_lean),
            peers.liger(device, _head_liger),
            peers.cut_cross_entropy(device, _head_cce),
        ]
    )
    logits = functional.linear(inputs["hidden"], inputs["weight"])
    explanation = explain(masked_cross_entropy, logits, inputs["targets"], inputs["mask"])
    tensors = inputs["hidden"], inputs["weight"]
    flops = 2 * logits.numel() * hidden_width
    forward = Work(nbytes(*tensors), 0, flops, logits.numel())
    backward = Work(nbytes(*tensors), nbytes(*tensors), 2 * flops, logits.numel())
    work = {"forward": forward, "backward": backward, "both": forward + backward}
    return Workload(
        maker.case, inputs, wanted, implementations, _head_lean, work, explanation, absent
    )


def _head_ours(given: Inputs) -> Tensor:
    logits = functional.linear(given["hidden"], given["weight"])
    return masked_cross_entropy(logits, given["targets"], given["mask"])


def _head_lean(given: Inputs) -> Tensor:
    logits = functional.linear(given["hidden"], given["weight"])
    return functional.cross_entropy(logits, given["targets"], ignore_index=IGNORED)


def _head_liger(module: Any) -> Function:
    loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda given: loss(given["weight"], given["hidden"], given["targets"])


def _head_cce(module: Any) -> Function:
    def function(given: Inputs) -> Tensor:
        return torch.as_tensor(
            module.linear_cross_entropy(
                given["hidden"], given["weight"], given["targets"], ignore_index=IGNORED
            )
        )

    return function

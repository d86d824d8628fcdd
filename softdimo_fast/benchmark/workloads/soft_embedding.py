"""``soft_embedding`` and what a user writes without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softdimo_fast import explain, soft_embedding
from softdimo_fast.benchmark.workloads import peers
from softdimo_fast.benchmark.workloads.common import (
    TEMPERATURE,
    Function,
    Implementation,
    Inputs,
    Maker,
    Work,
    Workload,
    nbytes,
)
from softdimo_fast.benchmark.workloads.names import EAGER, GUMBEL_SOFTMAX, OURS
from softdimo_fast.ops import Explanation


def build(maker: Maker) -> Workload:
    """The workload of a case."""
    case, sizes = maker.case, maker.sizes
    groups = (sizes["G"],) if "G" in sizes else ()
    vocabulary, width = sizes["V"], sizes["D"]
    inputs = {
        "logits": maker.normal(sizes["N"], *groups, vocabulary, scale=3),
        "codebook": maker.normal(*groups, vocabulary, width, parameter=True),
    }
    wanted = ("logits",) if case.variant == "frozen" else ("logits", "codebook")
    temperature = 1.0 if case.variant == "t1" else TEMPERATURE
    options: dict[str, Any] = {"temperature": temperature}
    gumbel = case.variant == "gumbel"
    if gumbel:
        options["noise"] = "gumbel"

    def ours(given: Inputs) -> Tensor:
        return soft_embedding(given["logits"], given["codebook"], **options)

    lean = _gumbel(temperature) if gumbel else _lean(temperature)
    name = GUMBEL_SOFTMAX if gumbel else EAGER
    implementations = [
        Implementation(OURS, ours, random=gumbel),
        Implementation(name, lean, random=gumbel),
    ]
    if case.compiled:
        implementations.append(peers.compiled(lean))
    explanation = explain(soft_embedding, inputs["logits"], inputs["codebook"], **options)
    return Workload(
        case, inputs, wanted, implementations, None if gumbel else lean,
        _work(explanation, inputs, wanted, case.dtype), explanation,
    )  # fmt: skip


def _lean(temperature: float) -> Function:
    def lean(given: Inputs) -> Tensor:
        logits = given["logits"] if temperature == 1 else given["logits"] / temperature
        return _product(torch.softmax(logits, -1), given["codebook"])

    return lean


def _gumbel(temperature: float) -> Function:
    def gumbel(given: Inputs) -> Tensor:
        p = functional.gumbel_softmax(given["logits"], tau=temperature, dim=-1)
        return _product(p, given["codebook"])

    return gumbel


def _product(p: Tensor, codebook: Tensor) -> Tensor:
    return torch.einsum("ngv,gvd->ngd", p, codebook) if codebook.dim() == 3 else p @ codebook


def _work(
    explanation: Explanation, inputs: Inputs, wanted: tuple[str, ...], dtype: str
) -> dict[str, Work]:
    """Backward reads inputs and the arriving gradient, and makes one product for each gradient it writes."""
    logits, codebook = inputs["logits"], inputs["codebook"]
    item = 4 if dtype == "float32" else 2
    written = logits.numel() // logits.shape[-1] * codebook.shape[-1] * item
    read = explanation.bytes - written
    gradients = nbytes(*(inputs[name] for name in wanted))
    forward = Work(read, written, explanation.flops, explanation.exponentials)
    backward = Work(
        read + written, gradients, len(wanted) * explanation.flops, explanation.exponentials
    )
    return {"forward": forward, "backward": backward, "both": forward + backward}

"""``linear_soft_embedding`` and the two products with a softmax between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from softdimo_fast import explain, linear_soft_embedding
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
from softdimo_fast.benchmark.workloads.names import EAGER, OURS

WANTED = ("hidden", "weight", "codebook")


def build(maker: Maker) -> Workload:
    """The workload of a case: the head's weight and the codebook train too."""
    case, sizes = maker.case, maker.sizes
    hidden_width, vocabulary = sizes["H"], sizes["V"]
    inputs = {
        "hidden": maker.normal(sizes["N"], hidden_width),
        # So that logits have a standard deviation of 3.
        "weight": maker.normal(
            vocabulary, hidden_width, scale=3 / hidden_width**0.5, parameter=True
        ),
        "codebook": maker.normal(vocabulary, sizes["D"], parameter=True),
    }
    implementations = [
        Implementation(OURS, _ours("auto")),
        Implementation(f"{OURS}, recompute", _ours("recompute")),
        Implementation(EAGER, _lean),
    ]
    if case.compiled:
        implementations.append(peers.compiled(_lean))
    tensors = (inputs[name] for name in WANTED)
    explanation = explain(linear_soft_embedding, *tensors, temperature=TEMPERATURE)
    half = case.dtype != "float32"
    return Workload(
        case, inputs, WANTED, implementations, _lean, _work(explanation.flops, inputs, half),
        explanation,
        accumulators=4 * (inputs["weight"].numel() + inputs["codebook"].numel()) if half else 0,
    )  # fmt: skip


def _ours(memory: str) -> Function:
    def ours(given: Inputs) -> Tensor:
        return linear_soft_embedding(
            given["hidden"], given["weight"], given["codebook"], temperature=TEMPERATURE, memory=memory
        )  # fmt: skip

    return ours


def _lean(given: Inputs) -> Tensor:
    logits = functional.linear(given["hidden"], given["weight"])
    return torch.softmax(logits / TEMPERATURE, -1) @ given["codebook"]


def _work(flops: int, inputs: Inputs, half: bool) -> dict[str, Work]:
    """Backward makes two products for each of forward's two. Recomputing the logits is not counted."""
    hidden, weight, codebook = (inputs[name] for name in WANTED)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    written = rows * codebook.shape[-1] * (2 if half else 4)
    read, exponentials = nbytes(hidden, weight, codebook), rows * vocabulary
    forward = Work(read, written, flops, exponentials)
    backward = Work(read + written, read, 2 * flops, exponentials)
    return {"forward": forward, "backward": backward, "both": forward + backward}

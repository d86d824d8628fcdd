"""``token_statistics`` and the same from one log-softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast import explain, token_statistics
from softdimo_fast.benchmark.workloads import peers
from softdimo_fast.benchmark.workloads.common import (
    TEMPERATURE,
    Implementation,
    Inputs,
    Maker,
    Work,
    Workload,
)
from softdimo_fast.benchmark.workloads.names import EAGER, OURS


def build(maker: Maker) -> Workload:
    """The workload of a case."""
    rows, vocabulary = maker.sizes["N"], maker.sizes["V"]
    inputs = {"logits": maker.normal(rows, vocabulary, scale=3)}
    implementations = [Implementation(OURS, _ours), Implementation(EAGER, _lean)]
    if maker.case.compiled:
        implementations.append(peers.compiled(_lean))
    explanation = explain(token_statistics, inputs["logits"], temperature=TEMPERATURE)
    written = 3 * rows * 4
    work = Work(explanation.bytes - written, written, explanation.flops, explanation.exponentials)
    return Workload(maker.case, inputs, (), implementations, _lean, {"forward": work}, explanation)


def _ours(given: Inputs) -> tuple[Tensor, ...]:
    return token_statistics(given["logits"], temperature=TEMPERATURE)


def _lean(given: Inputs) -> tuple[Tensor, ...]:
    scaled = given["logits"] / TEMPERATURE
    log_normalizer = torch.logsumexp(scaled, -1)
    log_p = scaled - log_normalizer[..., None]
    p = log_p.exp()
    return log_normalizer, -(p * log_p).sum(-1), p.amax(-1)

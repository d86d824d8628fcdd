"""``sample_tokens`` and the usual ways to draw from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast import explain, sample_tokens
from softdimo_fast.benchmark.workloads.common import (
    TEMPERATURE,
    Implementation,
    Inputs,
    Maker,
    Work,
    Workload,
)
from softdimo_fast.benchmark.workloads.names import GUMBEL_MAX, MULTINOMIAL, OURS, PUBLISHED


def build(maker: Maker) -> Workload:
    """The workload of a case."""
    rows, vocabulary = maker.sizes["N"], maker.sizes["V"]
    inputs = {"logits": maker.normal(rows, vocabulary, scale=3)}
    implementations = [
        Implementation(OURS, _ours, random=True),
        Implementation(MULTINOMIAL, _multinomial, random=True),
        Implementation(GUMBEL_MAX, _gumbel_max, random=True),
        Implementation(PUBLISHED, _published, random=True),
    ]
    explanation = explain(sample_tokens, inputs["logits"], temperature=TEMPERATURE)
    written = rows * 8
    work = Work(explanation.bytes - written, written, explanation.flops, explanation.exponentials)
    return Workload(maker.case, inputs, (), implementations, None, {"forward": work}, explanation)


def _ours(given: Inputs) -> Tensor:
    return sample_tokens(given["logits"], temperature=TEMPERATURE)


def _multinomial(given: Inputs) -> Tensor:
    return torch.multinomial(torch.softmax(given["logits"] / TEMPERATURE, -1), 1).squeeze(-1)


def _gumbel_max(given: Inputs) -> Tensor:
    """Exponential noise: the argmax of p / noise is a draw from p."""
    p = torch.softmax(given["logits"] / TEMPERATURE, -1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def _published(given: Inputs) -> Tensor:
    """The public loop's: a Categorical, which normalises the probabilities again."""
    p = torch.softmax(given["logits"] / TEMPERATURE, -1)
    drawn: Tensor = torch.distributions.Categorical(probs=p).sample()
    return drawn

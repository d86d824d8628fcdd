"""Calls of soft_embedding's emulated CUDA backward, and what they are compared with."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops.reference import soft_embedding as reference
from softdimo_fast.ops.reference.random import default_row_ids, gumbel
from support.checks import assert_same_bits
from support.contract import assert_contract

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = [True, True, True, True]
NAMES = ("logits", "codebook", "row_temperature", "mask_embedding")


class Call(NamedTuple):
    logits: Tensor
    codebook: Tensor
    grad: Tensor
    temperature: float | Tensor = 1.0
    mask: Tensor | None = None
    mask_embedding: Tensor | None = None
    seed: Tensor | None = None
    row_ids: Tensor | None = None
    high_precision: bool = False

    def scalar(self) -> float:
        return 1.0 if isinstance(self.temperature, Tensor) else self.temperature

    def row_temperature(self) -> Tensor | None:
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def double(self) -> Call:
        wide = {
            name: value.double()
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self._replace(**wide)


class Saved(NamedTuple):
    row_max: Tensor
    row_sum: Tensor
    soft: Tensor


def saved(call: Call) -> Saved:
    """What a perfect forward would save."""
    wide = call.double()
    rows = call.logits.shape[:-1]
    temperature = wide.row_temperature()
    per_row = None if temperature is None else temperature.expand(rows)
    y = reference.noised_logits(
        wide.logits, wide.scalar(), per_row, wide.mask, None, None, wide.seed, wide.row_ids, torch.float64
    )  # fmt: skip
    divisor = reference.temperature_divisor(wide.scalar(), per_row, torch.float64)
    top = y.amax(-1)
    row_sum = torch.exp((y - top.unsqueeze(-1)) / divisor).sum(-1)
    soft = reference.soft_embedding(
        wide.logits, wide.codebook, wide.scalar(), per_row, wide.mask, wide.mask_embedding, wide.seed,
        wide.row_ids, False, None, None,
    )  # fmt: skip
    return Saved(top, row_sum.float(), soft.float())


def backward(
    emulated: ModuleType, call: Call, kept: Saved | None = None, *, wanted: list[bool] = ALL,
    schedule: str = "greedy",
) -> tuple[Tensor, ...]:  # fmt: skip
    kept = saved(call) if kept is None else kept
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    nothing = call.logits.new_empty(0, dtype=torch.float32)
    return tuple(
        torch.ops.softdimo_emulated.soft_embedding_backward(
            call.grad, call.logits, call.codebook, call.scalar(), call.row_temperature(), call.mask,
            call.mask_embedding, call.seed, call.row_ids, None, None, call.high_precision, *kept, nothing,
            nothing.long(), wanted,
        )
    )  # fmt: skip


def truth(call: Call) -> tuple[Tensor, ...]:
    wide = call.double()
    temperature = wide.row_temperature()
    return reference.soft_embedding_backward(
        wide.grad, wide.logits, wide.codebook, wide.scalar(), temperature, wide.mask, wide.mask_embedding,
        wide.seed, wide.row_ids, False, None, None, ALL,
    )  # fmt: skip


def composed(call: Call) -> list[Tensor]:
    """What autograd makes of the expression that a user would write, in the inputs' own dtype."""
    leaves = [
        None if t is None else t.clone().requires_grad_()
        for t in (call.logits, call.codebook, call.row_temperature(), call.mask_embedding)
    ]
    logits, codebook, temperature, embedding = leaves
    assert logits is not None
    assert codebook is not None
    dtype = torch.promote_types(logits.dtype, codebook.dtype)
    z = logits.to(dtype)
    if call.mask is not None:
        z = torch.where(call.mask.unsqueeze(-1), 0.0, z)
    if call.seed is not None:
        ids = default_row_ids(call.row_ids, z.shape[:-1], z.device)
        z = z + gumbel(call.seed, ids, z.shape[-1], torch.float32).to(dtype)
    scale = call.scalar() if temperature is None else temperature.unsqueeze(-1).to(dtype)
    p = torch.softmax(z / scale, dim=-1)
    if codebook.dtype == torch.bfloat16 and dtype == torch.float32:  # as autocast
        p, dtype = p.bfloat16(), torch.bfloat16
    table = codebook.to(dtype)
    out = torch.einsum("...gv,gvd->...gd", p, table) if codebook.dim() == 3 else p @ table
    if call.mask is not None and embedding is not None:
        out = torch.where(call.mask.unsqueeze(-1), embedding.to(dtype), out)
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(out.to(codebook.dtype), present, call.grad))
    return [logits.new_empty(0) if leaf is None else next(found) for leaf in leaves]


def assert_accurate(found: tuple[Tensor, ...], call: Call) -> None:
    inputs = (call.logits, call.codebook, call.row_temperature(), call.mask_embedding)
    for name, tensor, ours, theirs, true in zip(
        NAMES, inputs, found, composed(call), truth(call), strict=True
    ):
        if tensor is None:
            assert ours.numel() == 0, name
            continue
        assert ours.dtype == tensor.dtype, name
        assert_contract(ours, theirs, true, what=f"gradient of {name}")


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert_same_bits(a, b, name)


def example(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32, scale: float = 3.0, groups: int | None = None, **options: Any,
) -> Call:  # fmt: skip
    shape = (rows,) if groups is None else (rows, groups)
    codebook = torch.randn(*(() if groups is None else (groups,)), vocabulary, width).to(table)
    return Call(
        (scale * torch.randn(*shape, vocabulary)).to(dtype), codebook,
        torch.randn(*shape, width).to(table), **options,
    )  # fmt: skip

"""Calls of soft_embedding for the tests: cases, layouts, and the comparison with float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from softdimo_fast import explain, soft_embedding
from softdimo_fast.ops.reference.random import default_row_ids, gumbel
from support.checks import gradients
from support.contract import assert_contract

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One call: tensors that get gradients, and the options."""

    logits: Tensor
    codebook: Tensor
    temperature: Tensor | None
    mask_embedding: Tensor | None
    options: dict[str, Any]
    autocast: bool = (
        False  # the yardstick multiplies a bfloat16 codebook in bfloat16, as autocast does
    )

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]

    def call(self, backend: str | None) -> Any:
        """The operator as a function of :meth:`tensors`."""

        def run(*tensors: Tensor) -> Tensor:
            # Not `*rest`: the Dynamo of torch 2.11 makes that a tuple, which has no pop.
            logits, codebook, rest = tensors[0], tensors[1], list(tensors[2:])
            options = dict(self.options)
            if self.temperature is not None:
                options["temperature"] = rest.pop(0)
            if self.mask_embedding is not None:
                options["mask_embedding"] = rest.pop(0)
            return soft_embedding(logits, codebook, backend=backend, **options)

        return run

    def composed(self, *tensors: Tensor) -> Tensor:
        """What a user would write in the inputs' own dtype, or in autocast's."""
        logits, codebook, *rest = tensors
        temperature = rest.pop(0).unsqueeze(-1) if self.temperature is not None else None
        mask, dtype = self.options.get("mask"), torch.promote_types(logits.dtype, codebook.dtype)
        z = logits.to(dtype)
        if mask is not None:
            z = torch.where(mask.unsqueeze(-1), 0.0, z)
        if self.options.get("noise"):
            rows = default_row_ids(self.options.get("row_ids"), z.shape[:-1], z.device)
            seed = torch.tensor([self.options["seed"], 0], device=z.device)
            z = z + gumbel(seed, rows, z.shape[-1], torch.float32).to(dtype)
        scale = (
            self.options.get("temperature", 1.0) if temperature is None else temperature.to(dtype)
        )
        p = torch.softmax(z / scale, dim=-1)
        if self.autocast and codebook.dtype == torch.bfloat16 and p.dtype == torch.float32:
            p, dtype = p.bfloat16(), torch.bfloat16
        if codebook.dim() == 3:
            out = torch.einsum("...gv,gvd->...gd", p, codebook.to(dtype))
        else:
            out = p @ codebook.to(dtype)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), rest.pop(0).to(dtype), out)
        return out.to(codebook.dtype)


def multiplies_bfloat16(case: Case, backend: str = "cpp") -> bool:
    """Whether the backend's kernel multiplies this call in bfloat16 here."""
    options = dict(case.options) | {"backend": backend, "mask_embedding": case.mask_embedding}
    if case.temperature is not None:
        options["temperature"] = case.temperature
    return "bfloat16" in str(explain(soft_embedding, case.logits, case.codebook, **options).kernel)


def strided(logits: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "padded":
        wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 3), torch.nan, dtype=logits.dtype)
        wide[..., : logits.shape[-1]] = logits
        return wide[..., : logits.shape[-1]]
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns":
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    return logits


def small_case(noise: bool = False, grouped: bool = False, **options: Any) -> Case:
    rows = (2, 2, 2) if grouped else (2, 3)
    shape = (2, 6, 3) if grouped else (6, 3)
    if noise:
        options |= {"noise": "gumbel", "seed": 11}
    return Case(
        torch.randn(*rows, 6, dtype=torch.double),
        torch.randn(shape, dtype=torch.double),
        torch.rand(rows[-1], dtype=torch.double) + 0.5,
        torch.randn(shape[:-2] + shape[-1:], dtype=torch.double),
        options | {"mask": torch.rand(rows) < 0.3},
    )


def assert_close_to_float64(case: Case, backend: str) -> None:
    """Value and every gradient keep the numerics contract."""
    tensors = case.tensors()
    upstream = torch.randn(case.call(backend)(*tensors).shape, device=case.logits.device)
    case = case._replace(autocast=multiplies_bfloat16(case, backend))
    wide = case._replace(
        **{
            name: None if t is None else t.double()
            for name, t in zip(case._fields[:4], case[:4], strict=True)
        }
    )
    truth, truth_grads = gradients(
        wide.call("reference"), wide.tensors(), upstream.to(case.codebook.dtype)
    )
    value, grads = gradients(case.call(backend), tensors, upstream)
    yardstick, yardstick_grads = gradients(case.composed, tensors, upstream)
    assert value.dtype == case.codebook.dtype
    assert_contract(value, yardstick, truth)
    names = ("logits", "codebook", "temperature", "mask_embedding")
    present = [name for name, t in zip(names, case[:4], strict=True) if t is not None]
    for name, tensor, mine, theirs, true in zip(
        present, tensors, grads, yardstick_grads, truth_grads, strict=True
    ):
        assert mine.dtype == tensor.dtype, name
        assert_contract(mine, theirs, true, what=f"gradient of {name}")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes, layouts, masks, temperatures and scales up to nearly one-hot rows."""
    groups = draw(st.sampled_from([None, 1, 2, 3]))
    vocabulary = draw(st.integers(1, 70) | st.sampled_from([128, 255, 257, 520]))
    width = draw(st.integers(1, 40) | st.sampled_from([7, 64, 65]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows = (16, 18) if groups is None else (16, 18, groups)
    dtype, table = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    temperature = 10.0 ** draw(st.floats(-3, 3))
    logits = (torch.randn(*rows, vocabulary) * min(scale * max(temperature, 1e-2), 1e4)).to(dtype)
    logits = strided(
        logits, draw(st.sampled_from(["contiguous", "padded", "transposed", "columns"]))
    )
    shape = (vocabulary, width) if groups is None else (groups, vocabulary, width)
    options: dict[str, Any] = {}
    per_row = mask_embedding = None
    if draw(st.booleans()):
        per_row = temperature * (0.5 + torch.rand(rows))
    else:
        options["temperature"] = temperature
    if draw(st.booleans()):
        options["mask"] = torch.rand(rows) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        mask_embedding = torch.randn(shape[:-2] + shape[-1:]).to(table)
    if draw(st.booleans()):
        options |= {"noise": "gumbel", "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    return Case(logits, torch.randn(shape).to(table), per_row, mask_embedding, options)

"""Cases for the tests of ``linear_soft_embedding``: random calls, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from softdimo_fast.ops.linear_soft_embedding import linear_soft_embedding
from support.contract import FLOORS

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden", "weight", "codebook", "bias", "temperature", "mask_embedding")


class Case(NamedTuple):
    """One call: tensors that get gradients, in the order of NAMES, and the other options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def values(self) -> list[Tensor]:
        return list(self.tensors.values())

    def call(self, **more: Any) -> Callable[..., Tensor]:
        """The operator as a function of :attr:`values`."""

        def run(*values: Tensor) -> Tensor:
            named = dict(zip(self.tensors, values, strict=True))
            return linear_soft_embedding(**named, **(self.options | more))

        return run

    def composed(self, *values: Tensor) -> Tensor:
        """What a user would write, in the inputs' own dtype."""
        named = dict(zip(self.tensors, values, strict=True))
        dtype = self.values[0].dtype
        for value in self.values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        named = {
            name: value.to(torch.promote_types(dtype, value.dtype)) for name, value in named.items()
        }
        hidden, weight, codebook = (named[name] for name in NAMES[:3])
        mask = self.options.get("mask")
        if weight.dim() == 3:
            z = torch.einsum("...h,gvh->...gv", hidden, weight)
        else:
            z = hidden @ weight.T
        if "bias" in named:
            z = z + named["bias"]
        temperature = self.options.get("temperature", 1.0)
        if "temperature" in named:
            temperature = named["temperature"].unsqueeze(-1)
        if mask is not None:
            z = torch.where(mask.unsqueeze(-1), 0, z)
        p = torch.softmax(z / temperature, -1)
        if weight.dim() == 3:
            out = torch.einsum("...gv,gvd->...gd", p, codebook)
        else:
            out = p @ codebook
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), named["mask_embedding"], out)
        return out.to(self.tensors["codebook"].dtype)


def make(
    lead: tuple[int, ...] = (3, 4), groups: int | None = None, vocabulary: int = 7, hidden_width: int = 5,
    width: int = 3, dtype: torch.dtype = torch.float64, bias: str | None = None, scale: float = 1.0,
    rows_temperature: bool = False, masked: float | None = None, **options: Any,
) -> Case:  # fmt: skip
    """A random case; ``scale`` is the largest size of logits, and rows go from flat to that size."""
    grouped = () if groups is None else (groups,)
    rows = lead + grouped
    hidden = torch.randn(*lead, hidden_width)
    hidden = hidden * torch.logspace(-1, math.log10(scale), math.prod(lead)).reshape(*lead, 1)
    tensors = {
        "hidden": hidden,
        "weight": torch.randn(*grouped, vocabulary, hidden_width) / math.sqrt(hidden_width),
        "codebook": torch.randn(*grouped, vocabulary, width),
    }
    shapes = {
        "vocabulary": (vocabulary,),
        "all": (*rows, vocabulary),
        "one": (1,),
        "positions": (*lead[-1:], *grouped, vocabulary),
        "samples": (*lead[:1], *[1] * (len(rows) - 1), vocabulary),
    }
    if bias is not None:
        tensors["bias"] = torch.randn(shapes[bias])
    if rows_temperature:
        tensors["temperature"] = torch.rand(rows) + 0.5
    if masked is not None:
        options["mask"] = torch.rand(rows) < masked
        tensors["mask_embedding"] = torch.randn(*grouped, width)
    return Case({name: tensor.to(dtype) for name, tensor in tensors.items()}, options)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "vocabulary", "temperature": 0.7},
    "positions": {"bias": "positions", "rows_temperature": True, "masked": 0.4},
    "samples": {"bias": "samples", "masked": 0.4},
    "grouped": {"groups": 2, "bias": "positions", "rows_temperature": True, "masked": 0.4},
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    case = make(
        lead=draw(st.sampled_from([(300,), (16, 18), (4, 8, 9)])),
        groups=draw(st.sampled_from([None, 1, 3])),
        vocabulary=draw(st.sampled_from([1, 2, 33, 128, 257])),
        hidden_width=draw(st.sampled_from([1, 7, 64])),
        width=draw(st.sampled_from([1, 5, 64])),
        bias=draw(st.sampled_from([None, "vocabulary", "all", "one", "positions", "samples"])),
        scale=draw(st.sampled_from([1.0, 10.0, 50.0])),
        rows_temperature=draw(st.booleans()),
        masked=draw(st.sampled_from([None, 0.0, 0.4])),
        memory=draw(st.sampled_from(["keep", "recompute", "auto"])),
    )
    if "temperature" not in case.tensors:
        temperature = draw(st.sampled_from([1e-3, 0.5, 1.0, 1e3]))
        case.options["temperature"] = temperature
        # Logits that suit the temperature: neither all one-hot nor all flat.
        case.tensors["hidden"].mul_(min(temperature, 100.0))
    mixed = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    for name, tensor in case.tensors.items():
        case.tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)) if mixed else dtype)
    if draw(st.booleans()):
        hidden = case.tensors["hidden"]
        wide = torch.full((*hidden.shape[:-1], hidden.shape[-1] + 3), math.nan, dtype=hidden.dtype)
        wide[..., :-3] = hidden
        case.tensors["hidden"] = wide[..., :-3]
        case.tensors["weight"] = case.tensors["weight"].mT.contiguous().mT
    return case


def floor(case: Case) -> float:
    dtypes = [value.dtype for value in case.values]
    return max(FLOORS[dtype] if dtype != torch.float32 else 1e-6 for dtype in dtypes)

"""``masked_attention`` and ``scaled_dot_product_attention``, which computes what the mask leaves out too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast import explain, masked_attention
from softdimo_fast.benchmark.workloads.common import (
    Function,
    Implementation,
    Inputs,
    Maker,
    Work,
    Workload,
    nbytes,
)
from softdimo_fast.benchmark.workloads.names import EAGER, GATHERED, OURS, SDPA

WANTED = ("query", "key", "value")
KEPT = 0.5


def build(maker: Maker) -> Workload:
    """The workload of a case; every sample keeps the same number of keys or queries."""
    sizes, variant = maker.sizes, maker.case.variant
    shape = sizes["B"], sizes["H"], sizes["L"], sizes["d"]
    inputs = {name: maker.normal(*shape) for name in WANTED}
    if variant != "dense":
        inputs["mask"] = maker.mask(sizes["B"], sizes["L"], share=KEPT)
    ours, lean, gathered, math = _FUNCTIONS[variant]
    implementations = [Implementation(OURS, ours), Implementation(SDPA, lean)]
    if gathered is not None:
        implementations.append(Implementation(GATHERED, gathered))
    implementations.append(Implementation(EAGER, math))
    mask = {"keys": "key_mask", "queries": "query_mask"}.get(variant)
    options = {} if mask is None else {mask: inputs["mask"]}
    explanation = explain(masked_attention, *(inputs[name] for name in WANTED), **options)
    work = _work(inputs, variant)
    return Workload(maker.case, inputs, WANTED, implementations, math, work, explanation)


def _work(inputs: Inputs, variant: str) -> dict[str, Work]:
    """Only what takes part; backward makes five products (the scores again, and four gradients) for two."""
    query = inputs["query"]
    batch, heads, length, width = query.shape
    kept = length if variant == "dense" else int(inputs["mask"][0].sum())
    weights = batch * heads * length * kept
    whole, part = nbytes(query), nbytes(query) * kept // length
    read = whole + 2 * part if variant == "keys" else part + 2 * whole
    forward = Work(read, whole, 4 * weights * width, weights)
    backward = Work(read + 2 * whole, 3 * whole, 10 * weights * width, weights)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _qkv(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return given["query"], given["key"], given["value"]


def _dense(given: Inputs) -> Tensor:
    return masked_attention(*_qkv(given))


def _keys(given: Inputs) -> Tensor:
    return masked_attention(*_qkv(given), key_mask=given["mask"])


def _queries(given: Inputs) -> Tensor:
    return masked_attention(*_qkv(given), query_mask=given["mask"])


def _dense_sdpa(given: Inputs) -> Tensor:
    return scaled_dot_product_attention(*_qkv(given))


def _keys_sdpa(given: Inputs) -> Tensor:
    return scaled_dot_product_attention(*_qkv(given), attn_mask=given["mask"][:, None, None, :])


def _queries_sdpa(given: Inputs) -> Tensor:
    """Without a mask, which would not change the wanted rows; the others are made zero."""
    return scaled_dot_product_attention(*_qkv(given)) * given["mask"][:, None, :, None]


def _kept(tensor: Tensor, mask: Tensor) -> Tensor:
    """The kept tokens of ``[B, H, L, d]``, equally many in every sample."""
    batch, heads, _, width = tensor.shape
    return tensor.transpose(1, 2)[mask].reshape(batch, -1, heads, width).transpose(1, 2)


def _keys_gathered(given: Inputs) -> Tensor:
    query, key, value = _qkv(given)
    key, value = _kept(key, given["mask"]), _kept(value, given["mask"])
    return scaled_dot_product_attention(query, key, value)


def _queries_gathered(given: Inputs) -> Tensor:
    query, key, value = _qkv(given)
    rows = scaled_dot_product_attention(_kept(query, given["mask"]), key, value)
    output = torch.zeros_like(query).transpose(1, 2)
    flat = rows.transpose(1, 2).reshape(-1, *output.shape[2:])
    return output.masked_scatter(given["mask"][..., None, None], flat).transpose(1, 2)


def _dense_math(given: Inputs) -> Tensor:
    query, key, value = _qkv(given)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ value


def _keys_math(given: Inputs) -> Tensor:
    query, key, value = _qkv(given)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~given["mask"][:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1) @ value


def _queries_math(given: Inputs) -> Tensor:
    return _dense_math(given) * given["mask"][:, None, :, None]


# For each variant: ours, SDPA, SDPA after gathering what takes part, and the products with a softmax.
_FUNCTIONS: dict[str, tuple[Function, Function, Function | None, Function]] = {
    "dense": (_dense, _dense_sdpa, None, _dense_math),
    "keys": (_keys, _keys_sdpa, _keys_gathered, _keys_math),
    "queries": (_queries, _queries_sdpa, _queries_gathered, _queries_math),
}

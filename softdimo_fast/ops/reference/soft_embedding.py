"""Specification of ``soft_embedding``: e = softmax((truncate(z) + noise) / T) @ E, and its gradients.

Soft-Di[M]O (arXiv 2509.22925), equation of the soft embedding; Gumbel noise: the Concrete relaxation
(Maddison et al. 2017, Jang et al. 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdimo_fast.ops.reference.common import (
    compute_dtype,
    ieee_float32,
    sum_to_shape,
    wanted_or_empty,
)
from softdimo_fast.ops.reference.random import default_row_ids, gumbel

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def kept_entries(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """Which entries survive truncation, bool like ``scaled`` (logits / T, no noise); None keeps all.

    top_k keeps exactly min(k, V) entries, ties to the lowest index. top_p then keeps the shortest prefix,
    in (value descending, index ascending) order, whose mass under the law left by top_k reaches p.
    """
    if top_k is None and top_p is None:
        return None
    order = scaled.argsort(dim=-1, descending=True, stable=True)
    ranked = scaled.gather(-1, order)
    rank = torch.arange(scaled.shape[-1], device=scaled.device).expand(scaled.shape)
    keep = torch.ones_like(rank, dtype=torch.bool)
    if top_k is not None:
        keep = rank < top_k
    if top_p is not None and top_p < 1:
        mass = torch.softmax(ranked.masked_fill(~keep, -torch.inf), dim=-1)
        before = mass.cumsum(dim=-1) - mass
        keep = keep & ((before < top_p) | (rank == 0))
    return torch.zeros_like(keep).scatter(-1, order, keep)


def temperature_divisor(
    temperature: float, row_temperature: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """The divisor; a temperature tensor holds one per row, and NaN where it is not positive."""
    if row_temperature is None:
        return temperature
    wide = row_temperature.to(dtype).unsqueeze(-1)
    return torch.where(wide > 0, wide, torch.nan)


def noised_logits(
    logits: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    top_k: int | None, top_p: float | None, seed: Tensor | None, row_ids: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Truncated logits plus noise, before the division by T; masked rows read as zeros.

    With noise in float64: beside large logits float32 cannot hold it, and near ties decide the gradients
    of nearly one-hot rows.
    """
    z = logits.to(dtype)
    if mask is not None:
        z = torch.where(mask.unsqueeze(-1), 0.0, z)
    keep = kept_entries(
        z.detach() / temperature_divisor(temperature, row_temperature, dtype), top_k, top_p
    )
    if seed is not None:
        rows = default_row_ids(row_ids, logits.shape[:-1], logits.device)
        z = z.double() + gumbel(seed, rows, logits.shape[-1], torch.float64)
    if keep is not None:
        z = z.masked_fill(~keep, -torch.inf)
    return z


def _softmax(shifted: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(shifted / T) for a row whose maximum was subtracted before the division: no cancellation.

    Entries at -inf stay out of the division, or its derivative by T would be -inf * 0.
    """
    gone = shifted == -torch.inf
    scaled = torch.where(gone, 0.0, shifted) / temperature
    return torch.softmax(scaled.masked_fill(gone, -torch.inf), dim=-1)


def _shift(y: Tensor, dtype: torch.dtype) -> Tensor:
    return (y - y.detach().amax(dim=-1, keepdim=True)).to(dtype)


# The widest codebook whose products with p are summed in float64. So few columns may all cancel, and then
# the error of one float32 sum is the error of the result.
NARROW_WIDTH = 8


def _for_sums(p: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a product with a narrow codebook or its gradient, in the dtype it is summed in."""
    narrow = other.shape[-1] <= NARROW_WIDTH
    return (p.double(), other.double()) if narrow else (p, other)


def _expectation(p: Tensor, codebook: Tensor) -> Tensor:
    """p @ E, grouped when the codebook is ``[G, V, D]``."""
    p, codebook = _for_sums(p, codebook)
    with ieee_float32(p):
        if codebook.dim() == 3:
            return torch.einsum("...gv,gvd->...gd", p, codebook)
        return p @ codebook


def soft_embedding(
    logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None, mask: Tensor | None,
    mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None, hard: bool,
    top_k: int | None, top_p: float | None,
) -> Tensor:  # fmt: skip
    """The expected embedding of every row, ``[..., D]`` (grouped ``[..., G, D]``), in the codebook's dtype.

    ``mask``, ``row_ids``: already of the rows' shape. ``seed``: noise is added exactly when it is given.
    """
    dtype = compute_dtype(logits, codebook, row_temperature, mask_embedding)
    y = noised_logits(
        logits, temperature, row_temperature, mask, top_k, top_p, seed, row_ids, dtype
    )
    if hard:
        out = _hard(y, codebook)
        if row_temperature is not None:
            out = torch.where(row_temperature.unsqueeze(-1) > 0, out, torch.nan)
    else:
        p = _softmax(_shift(y, dtype), temperature_divisor(temperature, row_temperature, dtype))
        out = _expectation(p, codebook.to(dtype)).to(codebook.dtype)
    if mask is not None and mask_embedding is not None:
        out = torch.where(mask.unsqueeze(-1), mask_embedding.to(out.dtype), out)
    return out


def _hard(y: Tensor, codebook: Tensor) -> Tensor:
    """codebook[argmax], the lowest index on ties; NaN for a row that holds no distribution."""
    top, index = y.amax(dim=-1, keepdim=True), y.argmax(dim=-1)
    if codebook.dim() == 3:
        groups = torch.arange(codebook.shape[0], device=codebook.device)
        out = codebook[groups, index]
    else:
        out = codebook[index]
    return torch.where(top.isfinite(), out, torch.nan)


def soft_embedding_backward(
    grad: Tensor, logits: Tensor, codebook: Tensor, temperature: float, row_temperature: Tensor | None,
    mask: Tensor | None, mask_embedding: Tensor | None, seed: Tensor | None, row_ids: Tensor | None,
    hard: bool, top_k: int | None, top_p: float | None, wanted: list[bool],
) -> Gradients:  # fmt: skip
    """Gradients to (logits, codebook, row_temperature, mask_embedding); empty tensors where not wanted.

    With p = softmax(y / T), g the upstream gradient and delta = g . e:
        dlogits[v] = p[v] (g . E[v] - delta) / T        (sums to zero over v)
        dE[v]      = sum over rows of p[v] g
        dT         = -(1 / T) sum_v dlogits[v] (y[v] - mean y),  mean y under p

    About the mean, because the rounding of delta is common to a row's dlogits: there it cancels.
    """
    dtype = compute_dtype(logits, codebook, row_temperature, mask_embedding)
    t = temperature_divisor(temperature, row_temperature, dtype)
    shifted = _shift(
        noised_logits(
            logits, temperature, row_temperature, mask, top_k, top_p, seed, row_ids, dtype
        ),
        dtype,
    )
    p = _softmax(shifted, t)
    g = grad.to(dtype)
    soft = g if mask is None else torch.where(mask.unsqueeze(-1), 0.0, g)
    table = codebook.to(dtype)
    dlogits = logits_gradient(p, soft, table, t)
    if mask is not None:
        dlogits = torch.where(mask.unsqueeze(-1), 0.0, dlogits)

    dcodebook, dtemperature, dmask = (logits.new_empty(0) for _ in range(3))
    if wanted[1]:
        dcodebook = _codebook_gradient(p, soft, mask, table).to(codebook.dtype)
    if row_temperature is not None and wanted[2]:
        # An entry with no mass has y = -inf, and takes no part.
        distance = torch.where(p > 0, shifted, 0.0)
        mean = (p * distance).sum(dim=-1, keepdim=True)
        per_row = -(dlogits * (distance - mean)).sum(dim=-1) / t.squeeze(-1)  # type: ignore[union-attr]
        dtemperature = sum_to_shape(per_row, row_temperature).to(row_temperature.dtype)
    if mask_embedding is not None and mask is not None and wanted[3]:
        masked = torch.where(mask.unsqueeze(-1), g, 0.0)
        dmask = sum_to_shape(masked, mask_embedding).to(mask_embedding.dtype)
    return wanted_or_empty(wanted[0], dlogits, logits), dcodebook, dtemperature, dmask


def logits_gradient(p: Tensor, g: Tensor, table: Tensor, t: float | Tensor) -> Tensor:
    """p (g . E - g . e) / T, with the dominant entry written as minus the sum of the others.

    Where one probability is nearly 1, ``g . E[v] - g . e`` cancels for that entry; the row sum is zero, so
    the sum of the other entries says the same without cancellation.
    """
    with ieee_float32(g):
        if table.dim() == 3:
            dp = torch.einsum("...gd,gvd->...gv", g, table)
        else:
            dp = g @ table.transpose(-1, -2)
    delta = (p * dp).sum(dim=-1, keepdim=True)
    dlogits = p * (dp - delta) / t
    dominant = p > 0.5
    others = torch.where(dominant, 0.0, dlogits)
    return torch.where(dominant, -others.sum(dim=-1, keepdim=True), dlogits)


def _codebook_gradient(p: Tensor, g: Tensor, mask: Tensor | None, table: Tensor) -> Tensor:
    """sum over rows of p[v] g[d]; masked rows take no part."""
    if mask is not None:
        p = torch.where(mask.unsqueeze(-1), 0.0, p)
    vocabulary, width = table.shape[-2:]
    p, g = _for_sums(p, g)
    with ieee_float32(g):
        if table.dim() == 3:
            groups = table.shape[0]
            return torch.einsum(
                "ngv,ngd->gvd", p.reshape(-1, groups, vocabulary), g.reshape(-1, groups, width)
            )
        return p.reshape(-1, vocabulary).transpose(0, 1) @ g.reshape(-1, width)

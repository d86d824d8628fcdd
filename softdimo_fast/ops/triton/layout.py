"""How the Triton kernels see tensors: lists of rows, one value a row, the device they are launched on."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from softdimo_fast.ops._backends import TRITON_INTERPRETED


class Rows(NamedTuple):
    """Logits as the kernels walk them: row n starts at (n // inner) outer + (n % inner) within."""

    data: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(logits: Tensor) -> Rows:
    """``logits`` as they are, or one contiguous copy where the kernels cannot walk them."""
    if copy_reason(logits) is not None:
        # Not contiguous(), which leaves a contiguous tensor at an odd address where it is.
        logits = logits.clone(memory_format=torch.contiguous_format)
    merged = _merged(logits)
    if len(merged) < 2:
        return Rows(logits, 2**62, 0, merged[0][1] if merged else 0)
    (_, outer), (inner, within) = merged
    return Rows(logits, inner, outer, within)


def copy_reason(logits: Tensor) -> str | None:
    """Why logits have to be copied, or None.

    Triton reads and sums aligned and other rows in different orders. So that a row's bits do not depend on
    where it lies, rows whose length allows for alignment have to be aligned.
    """
    vocabulary = logits.shape[-1]
    if vocabulary > 1 and logits.stride(-1) != 1:
        return f"stride {logits.stride(-1)} along V"
    merged = _merged(logits)
    if len(merged) > 2:
        return f"{len(merged)} different strides between their rows"
    strides = [stride for _, stride in merged]
    odd = logits.storage_offset() * logits.element_size() % 16 or any(s % 16 for s in strides)
    return "rows that are not aligned" if vocabulary % 16 == 0 and odd else None


def copy_notes(**logits: Tensor | None) -> list[str]:
    """What ``explain`` says of logits that have to be copied."""
    reasons = {name: copy_reason(t) for name, t in logits.items() if t is not None}
    return [
        f"{name} have {why}: one contiguous copy is made" for name, why in reasons.items() if why
    ]


def _merged(logits: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, with those merged that lie as one."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def row_values(values: Tensor | None, rows: torch.Size) -> Tensor | None:
    """One value for each row, contiguous, from a tensor that broadcasts to the rows."""
    if values is None:
        return None
    values = values.expand(rows).contiguous()
    return values.view(torch.uint8) if values.dtype == torch.bool else values


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return TRITON_INTERPRETED


def capability(tensor: Tensor) -> int:
    """The device's compute capability times ten; 80 where there is none."""
    if tensor.device.type != "cuda" or torch.version.cuda is None:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def float32(number: float) -> float:
    """``number`` as float32 holds it."""
    return float(torch.tensor(number, dtype=torch.float32))


def two_term_inverse(temperature: float) -> tuple[float, float]:
    """1 / T as a sum of two float32 numbers; NaN where float32 has no such T but 0."""
    if float32(temperature) == 0:
        return float("nan"), 0.0
    inverse = min(1 / temperature, 3.4e38)
    high = float32(inverse)
    return high, inverse - high

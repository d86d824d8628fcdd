"""Argument checks of all operators: an error names the argument, what it was and what it should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softdimo_fast.ops._backends import DEBUG

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def require_tensor(operator: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")


def require_floating(operator: str, name: str, value: object) -> None:
    """``value`` is a dense tensor of one of the four floating dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{operator}: {name} must have dtype float64, float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{operator}: {name} must be a dense (strided) tensor, got {value.layout}")
    # No level, no tangents: this is asked for every argument of every call.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{operator}: {name} carries a forward-mode tangent (jvp), which this operator does not "
            "propagate; use reverse mode (backward, vjp)"
        )


def require_dim(operator: str, name: str, value: Tensor, minimum: int, pattern: str) -> None:
    if value.dim() < minimum:
        raise ValueError(
            f"{operator}: {name} must have shape {pattern}, got {value.dim()}-d shape {shape(value)}"
        )


def require_vocabulary(operator: str, name: str, value: Tensor) -> None:
    """Logits: at least one dimension, and a vocabulary that is not empty."""
    require_dim(operator, name, value, 1, "[..., V]")
    if value.shape[-1] < 1:
        raise ValueError(
            f"{operator}: {name} must have a vocabulary V >= 1 in its last dimension, got shape "
            f"{shape(value)}"
        )


def require_shape(
    operator: str, name: str, value: Tensor, expected: Sequence[int], pattern: str
) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{operator}: {name} must have shape {pattern} = {list(expected)}, got {shape(value)}"
        )


def require_same_device(
    operator: str, first: str, device: torch.device, **others: Tensor | None
) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device}, but {first} is on {device}: all tensors "
                "must be on one device"
            )


def require_choice(operator: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{operator}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def require_positive(operator: str, name: str, value: object) -> None:
    """``value`` is a Python number, positive and finite."""
    require_number(operator, name, value)
    if not value > 0:  # type: ignore[operator]
        raise ValueError(f"{operator}: {name} must be positive and finite, got {value!r}")


def require_number(operator: str, name: str, value: object) -> None:
    """``value`` is a finite Python number (an int, a float; no bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a float, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{operator}: {name} must be finite, got {value!r}")


def require_no_gradient(operator: str, **tensors: Tensor | None) -> None:
    """Refuses a tensor whose gradient would silently be missing."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{operator}: {name} gets no gradient from this operator, but requires_grad is set; "
                f"pass {name}.detach()"
            )


def rows_tensor(
    operator: str, name: str, value: Tensor, rows: Sequence[int], pattern: str = "logits.shape[:-1]"
) -> Tensor:
    """``value`` as a view over the rows: broadcast, never copied."""
    try:
        return value.expand(rows)
    except RuntimeError:
        raise ValueError(
            f"{operator}: {name} must broadcast to the rows {pattern} = {list(rows)}, got shape "
            f"{shape(value)}"
        ) from None


def rows_mask(
    operator: str, name: str, mask: object, rows: Sequence[int], device: torch.device,
    pattern: str = "logits.shape[:-1]",
) -> Tensor | None:  # fmt: skip
    """A boolean mask over the rows, broadcast; None passes through."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{operator}: {name} must be a bool tensor or None, got {type(mask).__name__}"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"{operator}: {name} must have dtype bool, got {mask.dtype}")
    require_same_device(operator, "the input", device, **{name: mask})
    return rows_tensor(operator, name, mask, rows, pattern)


def require_truncation(operator: str, top_k: object, top_p: object) -> None:
    """``top_k`` is an int >= 1 or None, ``top_p`` a number in (0, 1] or None."""
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"{operator}: top_k must be an int or None, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"{operator}: top_k must be at least 1, got {top_k}")
        if top_k >= 2**63:
            raise ValueError(f"{operator}: top_k must fit int64, got {top_k}")
    if top_p is not None:
        require_number(operator, "top_p", top_p)
        if not 0 < top_p <= 1:  # type: ignore[operator]
            raise ValueError(f"{operator}: top_p must be in (0, 1], got {top_p}")


def require_mask_embedding(
    operator: str, mask: Tensor | None, mask_embedding: object, codebook: Tensor
) -> None:
    """``mask`` and ``mask_embedding`` come together, the latter as wide as the codebook ``[(G,) V, D]``."""
    if mask is None:
        if mask_embedding is not None:
            raise ValueError(
                f"{operator}: mask_embedding is given, but mask is None; pass both or neither"
            )
        return
    if mask_embedding is None:
        raise ValueError(f"{operator}: mask_embedding is required when mask is given, got None")
    require_floating(operator, "mask_embedding", mask_embedding)
    pattern = "[D]" if codebook.dim() == 2 else "[G, D]"
    expected = codebook.shape[:-2] + codebook.shape[-1:]
    require_shape(operator, "mask_embedding", mask_embedding, expected, pattern)  # type: ignore[arg-type]


def number_or_rows(
    operator: str, name: str, value: object, rows: Sequence[int], device: torch.device, *, positive: bool,
    dtype: torch.dtype | None = None, pattern: str = "logits.shape[:-1]",
) -> tuple[float, Tensor | None]:  # fmt: skip
    """Splits a setting, a number or a tensor over the rows, into ``(number, None)`` or ``(1.0, tensor)``.

    The tensor keeps its own (broadcastable) shape, so that its gradient is reduced inside the operator.
    ``dtype`` is that of the computation; None leaves a number a number also under torch.compile.
    """
    if not isinstance(value, Tensor):
        if positive:
            require_positive(operator, name, value)
        else:
            require_number(operator, name, value)
        if dtype is not None and torch.compiler.is_compiling() and value != 1:
            # A compiled operator takes a number as a constant: one that changes from call to call, an
            # annealed temperature, would compile anew each time. In a tensor it may change.
            return 1.0, torch.ones((), dtype=dtype, device=device) * value  # type: ignore[operator]
        return float(value), None  # type: ignore[arg-type]
    require_floating(operator, name, value)
    require_same_device(operator, "the input", device, **{name: value})
    rows_tensor(operator, name, value, rows, pattern)
    if positive and checks_values(value) and not bool((value > 0).all()):
        raise ValueError(
            f"{operator}: {name} must be positive everywhere, its smallest value is {value.min().item()}"
        )
    return 1.0, value


def checks_values(tensor: Tensor) -> bool:
    """Whether values inside tensors are checked: on the CPU in eager, elsewhere with SOFTDIMO_DEBUG=1.

    Looking at a CUDA value would wait for the device, and a compiled graph cannot raise.
    """
    if torch.compiler.is_compiling() or _is_traced(tensor):
        return False
    return tensor.device.type == "cpu" or DEBUG


def _is_traced(tensor: Tensor) -> bool:
    """Fake, meta and functorch tensors have no values to look at."""
    return (
        tensor.device.type == "meta"
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def autocast(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` in the autocast dtype where autocast is on for its device; float64 is left as it is."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    # meta has no autocast; torch.amp.is_autocast_available, which says so, breaks the graph of torch 2.11.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def copy_notes(logits: Tensor) -> list[str]:
    """What ``explain`` says where the kernels copy logits that they cannot walk in place."""
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return []
    return [f"logits have stride {logits.stride(-1)} along V: one contiguous copy is made"]

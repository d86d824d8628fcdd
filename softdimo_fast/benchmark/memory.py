"""Peak memory of one call, beyond its inputs and what it returns."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class MemoryUnavailable(Exception):
    """This system does not tell; the message says why."""


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``call`` held at its worst moment beyond what lay there before and what it returns.

    On CUDA from torch's allocator. On the CPU the process's largest resident size, after the kernel's counter
    was reset and freed memory given back: pages, so small calls are told to about 0.1 MiB only. Call it once
    before, so that buffers which stay are there already.

    Raises:
        MemoryUnavailable: the counter cannot be read or reset here.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _nbytes(kept))
    _trim()
    try:
        RESET.write_text("5")
        before = _resident("VmRSS")
        kept = call()
        peak = _resident("VmHWM")
    except (OSError, KeyError) as error:
        raise MemoryUnavailable(f"the peak resident size cannot be reset here: {error}") from error
    return max(0, peak - before - _nbytes(kept))


def _nbytes(kept: Any) -> int:
    """Of the tensors in nested tuples."""
    if isinstance(kept, Tensor):
        return kept.untyped_storage().nbytes()
    if isinstance(kept, tuple | list):
        return sum(map(_nbytes, kept))
    return 0


def _trim() -> None:
    """Gives freed memory back to the system: a heap that is reused would hide what a call needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)

"""Which backend runs a call: asked for, preferred by SOFTDIMO_BACKEND, or the first that can."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

BACKENDS = ("cuda", "cpp", "triton", "reference")

# Read once: torch.compile would otherwise have to guard on the environment in every call.
PREFERRED = os.environ.get("SOFTDIMO_BACKEND") or None
DEBUG = os.environ.get("SOFTDIMO_DEBUG", "0") not in ("", "0")

if PREFERRED is not None and PREFERRED not in BACKENDS:
    raise ImportError(f"SOFTDIMO_BACKEND={PREFERRED!r} is none of {', '.join(BACKENDS)}")


class Choice(NamedTuple):
    """The backend that runs a call, and why it is that one."""

    backend: str
    reason: str


def choose(operator: str, backend: str | None, obstacles: Mapping[str, str]) -> Choice:
    """Picks a backend.

    ``obstacles`` says for each backend that cannot run this call why not; a backend that is absent
    from it can. The reference always can.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"{operator}: backend must be None or one of {', '.join(map(repr, BACKENDS))}, "
                f"got {backend!r}"
            )
        if backend in obstacles:
            raise ValueError(f"{operator}: backend={backend!r} cannot run: {obstacles[backend]}")
        return Choice(backend, "asked for with backend=")
    if PREFERRED is not None and PREFERRED not in obstacles:
        return Choice(PREFERRED, "preferred by SOFTDIMO_BACKEND")
    for name in BACKENDS:
        # Triton is a portable alternative that has to be asked for.
        if name not in obstacles and name != "triton":
            if name == "reference":
                why = "; ".join(
                    f"{other}: {obstacles[other]}" for other in BACKENDS if other in obstacles
                )
                return Choice(name, f"no kernel takes this call ({why})")
            return Choice(name, "fastest backend that takes this call")
    raise AssertionError("the reference backend has no obstacles")


def device_obstacles(tensor: torch.Tensor) -> dict[str, str]:
    """The obstacles that follow from the device alone; an operator adds its own."""
    obstacles = {"triton": "this operator has no Triton kernel"}
    if tensor.device.type != "cpu":
        obstacles["cpp"] = f"the C++ kernels need CPU tensors, these are on {tensor.device}"
    if tensor.device.type != "cuda":
        obstacles["cuda"] = f"the CUDA kernels need CUDA tensors, these are on {tensor.device}"
    return obstacles

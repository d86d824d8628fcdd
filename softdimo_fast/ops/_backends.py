"""Which backend runs a call: asked for, preferred by SOFTDIMO_BACKEND, or the first that can."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

BACKENDS = ("cuda", "cpp", "triton", "reference")

# Read once: torch.compile would otherwise have to guard on the environment in every call.
PREFERRED = os.environ.get("SOFTDIMO_BACKEND") or None
DEBUG = os.environ.get("SOFTDIMO_DEBUG", "0") not in ("", "0")

# As triton reads it: its interpreter runs kernels on the CPU, slowly, to test them.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1",
    "true",
    "yes",
    "on",
    "y",
)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

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


# What each kernel backend is called, and the devices whose tensors it takes.
_KERNELS = {
    "cpp": ("C++", ("cpu",)),
    "cuda": ("CUDA", ("cuda",)),
    "triton": ("Triton", ("cpu", "cuda")),
}


def obstacles(tensor: torch.Tensor, *kernels: str) -> dict[str, str]:
    """What keeps each backend from a call on ``tensor``'s device, where the operator has ``kernels``."""
    found = {}
    for backend, (label, devices) in _KERNELS.items():
        if backend not in kernels:
            found[backend] = f"this operator has no {label} kernel"
        elif tensor.device.type not in devices:
            needed = " or ".join(device.upper() for device in devices)
            found[backend] = (
                f"the {label} kernels need {needed} tensors, these are on {tensor.device}"
            )
        elif backend == "triton":
            found |= _triton_obstacle(tensor)
    return found


def _triton_obstacle(tensor: torch.Tensor) -> dict[str, str]:
    if not TRITON_INSTALLED:
        why = "triton is not installed; pip install 'softdimo-fast[triton]' brings it"
    elif tensor.device.type == "cpu" and not TRITON_INTERPRETED:
        why = (
            "the Triton kernels need CUDA tensors, these are on the CPU, where TRITON_INTERPRET=1 in the "
            "environment runs them in Triton's interpreter, slowly"
        )
    elif tensor.device.type != "cpu" and TRITON_INTERPRETED:
        why = "TRITON_INTERPRET is set, and Triton's interpreter takes CPU tensors"
    else:
        return {}
    return {"triton": why}

"""Small calls, one for each path through each CUDA kernel.

compute-sanitizer watches them, and a thousand repeats agree.

A branch is a call that takes another path through a kernel: element types, vectorised and scalar rows,
masks, row temperatures, rows of one or of many threads. A module here, named as its operator, has
``branches()``: names, and functions of a device.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor

Results = tuple[Tensor, ...]
Branch = tuple[str, Callable[[str], Results]]


def branches() -> list[Branch]:
    """Every branch of every kernel, by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Branch] = []
    for name in modules:
        found += importlib.import_module(f"{__name__}.{name}").branches()
    return found

"""Comparators that other packages provide. None of them is imported unless it is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from softdimo_fast.benchmark.workloads.common import (
    Absent,
    Function,
    Implementation,
)
from softdimo_fast.benchmark.workloads.names import CCE, COMPILED, LIGER


def compiled(lean: Function) -> Implementation:
    """``torch.compile`` of the lean expression; it compiles in its first call.

    Earlier compilations are forgotten: expressions of one source line would otherwise count as recompilations
    of each other, of which there is a limit.
    """
    torch.compiler.reset()
    return Implementation(
        COMPILED, torch.compile(lean, dynamic=False, fullgraph=True), compiled=True
    )


def liger(device: str, make: Callable[[Any], Function]) -> Implementation | Absent:
    """A function of ``liger_kernel.transformers``, made by ``make`` of that module."""
    return _peer(LIGER, "liger_kernel", "liger_kernel.transformers", device, make)


def cut_cross_entropy(device: str, make: Callable[[Any], Function]) -> Implementation | Absent:
    """A function of ``cut_cross_entropy``, made by ``make`` of that module."""
    return _peer(CCE, "cut_cross_entropy", "cut_cross_entropy", device, make)


def _peer(
    name: str, package: str, module: str, device: str, make: Callable[[Any], Function]
) -> Implementation | Absent:
    if torch.device(device).type != "cuda":
        return Absent(name, "its kernels need a CUDA device")
    if importlib.util.find_spec(package) is None:
        return Absent(name, f"the package {package} is not installed")
    try:
        return Implementation(name, make(importlib.import_module(module)))
    except Exception as error:  # another version of it, or one built for another torch
        return Absent(name, f"{type(error).__name__}: {error}".splitlines()[0])


def sort(found: list[Implementation | Absent]) -> tuple[list[Implementation], list[Absent]]:
    """Those that run, and those that do not."""
    run = [one for one in found if isinstance(one, Implementation)]
    return run, [one for one in found if isinstance(one, Absent)]

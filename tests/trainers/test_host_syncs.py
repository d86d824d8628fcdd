"""A training step never waits for the device.

On a GPU every read of a tensor's value stalls the queue. A dispatch mode sees these reads on the CPU too.
``masked_cross_entropy`` checks its targets there (documented: on the CPU in eager alone), and the
classifier's reward its conditions; whatever else reads a value fails the test.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.training import METHODS, trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softdimo_fast

ROOT = Path(softdimo_fast.__file__).parent

# Operators whose result, or the shape of it, the host needs.
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
}
# Value checks that are made on the CPU alone: targets in range, and conditions that the reward knows.
CPU_CHECKS = ("ops/masked_cross_entropy.py:_check_range", "rewards/classifier.py:_check_condition")


class Reads(TorchDispatchMode):
    """Counts reads by the innermost of our functions that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.found[f"{_caller()} {name}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            return f"{path.relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@pytest.mark.parametrize("name", METHODS)
def test_no_step_reads_a_value(name: str) -> None:
    run = trainer(name, steps=10)
    for _ in range(3):  # optimizer states exist, the data order is cached, the codebook has started
        run.train_step()
    with Reads() as reads:
        for _ in range(3):
            run.train_step()
    other = {where: n for where, n in reads.found.items() if not where.startswith(CPU_CHECKS)}
    assert other == {}


def test_reads_are_seen() -> None:
    x = torch.arange(3.0)
    with Reads() as reads:
        bool((x > 1).any())
        float(x[0])
        x[x > 1]
        x.nonzero()
        torch.equal(x, x)
    names = Counter(where.split()[1] for where in reads.found.elements())
    assert names["aten::_local_scalar_dense"] + names["aten::is_nonzero"] == 2
    assert names["aten::index"] == names["aten::nonzero"] == names["aten::equal"] == 1


def test_the_log_reads_once() -> None:
    """All scalars of an interval come in one transfer."""
    run = trainer("all")
    run.train_step()
    with Reads() as reads:
        scalars = run._read_metrics()
    assert len(scalars) > 10
    assert reads.found == {}  # tolist() copies the one stacked tensor and reads no scalar

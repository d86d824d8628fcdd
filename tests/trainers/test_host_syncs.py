"""A training step never waits for the device.

On a GPU every read of a tensor's value stalls the queue. A dispatch mode sees these reads on the CPU too,
and wrapped methods those copies to the host that are none there. ``masked_cross_entropy`` checks its targets
(documented: on the CPU in eager alone), and rewards their conditions; whatever else reads a value fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Self
from unittest import mock

import pytest
import torch
from support.prompted import FAMILIES, Towers, conditions
from support.text_families import TRANSFORMERS
from support.training import BATCH, METHODS, distillation, generator, trainer, twin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import softdimo_fast
from softdimo_fast.rewards import ClipReward
from softdimo_fast.trainers import Method, RewardConfig, RewardObjective

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
CPU_CHECKS = (
    "ops/masked_cross_entropy.py:_check_range",
    "rewards/classifier.py:_check_condition",
    "rewards/prompted.py:_check_known",
)
# Made on the host from numbers that are there: which prompts a step has, and which positions a mask has.
HOST_DATA = ("data/prompts.py:of ", "diffusion/masking.py:find aten::nonzero")
# Tensor's methods that give the host a copy. On the CPU no operator runs for some of them.
COPIES = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
PROMPTS = [f"number {n}" for n in range(9)]


class Reads(TorchDispatchMode):
    """Counts reads by the innermost of our functions that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for name in COPIES:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._counted(name)))
        self._patches.enter_context(mock.patch.object(Tensor, "to", self._counted("to")))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _counted(self, name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            # The trainer's device, which is the CPU here, is no str.
            if name != "to" or "cpu" in [a for a in (*args, *kwargs.values()) if type(a) is str]:
                self.found[f"{_caller()} Tensor.{name}"] += 1
            return original(tensor, *args, **kwargs)

        return method

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


def reads_of_steps(method: str | Method, **options: Any) -> dict[str, int]:
    """Of three steps, but for those that are no reads on a GPU."""
    run = trainer(method, steps=10, **options)
    for _ in range(3):  # optimizer states exist, the data order is cached, the codebook has started
        run.train_step()
    with Reads() as reads:
        for _ in range(3):
            run.train_step()
    known = (*CPU_CHECKS, *HOST_DATA)
    return {where: n for where, n in reads.found.items() if not where.startswith(known)}


@pytest.mark.parametrize("name", METHODS)
def test_no_step_reads_a_value(name: str) -> None:
    assert reads_of_steps(name) == {}


def prompted(family: str, reward: ClipReward) -> Method:
    """A text-to-image generator and a reward that reads its prompts."""
    student, auxiliary = (TRANSFORMERS[family][0]() for _ in range(2))
    matching = distillation(teacher=student, auxiliary=auxiliary)
    objective = RewardObjective(FAMILIES[family][1](), reward, RewardConfig())
    return generator(
        matching, objective, student=twin(student), conditions=conditions(family, PROMPTS, BATCH)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_reads_a_value_with_prompts(family: str) -> None:
    reward = ClipReward(Towers(), PROMPTS)
    reward.encode_prompts()
    assert reads_of_steps(prompted(family, reward), batch_size=BATCH) == {}


def test_a_reward_with_prompts_still_to_encode_reads_their_numbers() -> None:
    """Documented: once a micro-batch. It shows too that the test above would see it."""
    found = reads_of_steps(prompted("maskgen", ClipReward(Towers(), PROMPTS)), batch_size=BATCH)
    assert found == {"rewards/prompted.py:words Tensor.tolist": 3}


def test_reads_are_seen() -> None:
    x = torch.arange(3.0)
    with Reads() as reads:
        bool((x > 1).any())
        float(x[0])
        x[x > 1]
        x.nonzero()
        torch.equal(x, x)
        x.tolist()
        x.cpu()
        x.numpy()
        x.to("cpu")
        x.to(device="cpu")
        x.to(x.device)
        nn.Parameter(x)[0].item()
    names = Counter(where.split()[1] for where in reads.found.elements())
    assert names["aten::_local_scalar_dense"] + names["aten::is_nonzero"] == 3
    copies = {name: names[f"Tensor.{name}"] for name in (*COPIES, "to")}
    assert copies == dict.fromkeys(COPIES, 1) | {"to": 2, "__int__": 0, "__index__": 0}
    assert "tolist" not in vars(Tensor)
    assert bool(x.any())
    assert names["aten::index"] == names["aten::nonzero"] == names["aten::equal"] == 1


def test_the_log_reads_once() -> None:
    """All scalars of an interval come in one transfer."""
    run = trainer("all")
    run.train_step()
    with Reads() as reads:
        scalars = run._read_metrics()
    assert len(scalars) > 10
    assert reads.found == {"trainers/means.py:read Tensor.tolist": 1}

"""Which devices the CUDA kernels run on, asked without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from softdimo_fast.ops import _library

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torch says of the device; tests change it."""
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, shared_memory_per_block_optin=227 * 1024
    )
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_what_a_device_must_have(device: Any) -> None:
    assert _library.cuda_obstacle(DEVICE) is None
    assert _library.cuda_obstacle(DEVICE, 227) is None
    device.shared_memory_per_block_optin = 99 * 1024
    assert _library.cuda_obstacle(DEVICE) is None
    message = _library.cuda_obstacle(DEVICE, 144)
    assert message is not None
    assert message.endswith("share 144 KB in a block, a GPU allows 99 KB")
    device.major, device.minor = 7, 5
    message = _library.cuda_obstacle(DEVICE)
    assert message == ("the CUDA kernels need compute capability 8.0 or later, a GPU has 7.5")


def test_the_library_comes_first(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", "this build has no CUDA library")
    device.major = 7
    assert _library.cuda_obstacle(DEVICE) == "this build has no CUDA library"


def test_compiled_code_asks_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", "this build has no CUDA library")

    def choose(x: Tensor) -> Tensor:
        kilobytes = 48 if x.shape[0] <= 2 else 144
        return x + 1 if _library.cuda_obstacle(DEVICE, kilobytes) is None else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager", dynamic=True)
    assert compiled(torch.zeros(3)).tolist() == [-1, -1, -1]


def test_compiled_code_takes_the_answer_as_a_constant() -> None:
    """The mark on it is the one that torch's decorator sets, which would import torch._dynamo."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked)
    assert vars(marked).items() <= vars(_library.cuda_obstacle).items()

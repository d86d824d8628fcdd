"""When Triton runs a call, and what is said where it cannot."""

from __future__ import annotations

import pytest
import torch
from support.process import run_python
from support.triton import needs_triton

from softdimo_fast import explain, soft_embedding
from softdimo_fast.ops import _backends

CALL = (
    "import torch, sys; from softdimo_fast import soft_embedding as f; assert 'triton' not in sys.modules; "
    "print(f(torch.zeros(2, 3), torch.ones(3, 1), backend={backend!r}).tolist())"
)


def test_it_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", True)
    monkeypatch.setattr(_backends, "TRITON_INSTALLED", True)
    assert explain(soft_embedding, torch.zeros(2, 3), torch.ones(3, 1)).backend == "cpp"
    assert _backends.choose("f", None, {"cuda": "", "cpp": ""}).backend == "reference"


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed; CPU tensors without the interpreter; the interpreter with others; another device."""
    cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")
    monkeypatch.setattr(_backends, "TRITON_INSTALLED", False)
    missing = _backends.obstacles(cpu, "cpp", "triton")["triton"]
    assert missing == "triton is not installed; pip install 'softdimo-fast[triton]' brings it"
    monkeypatch.setattr(_backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", False)
    assert _backends.obstacles(cpu, "cpp", "triton")["triton"] == (
        "the Triton kernels need CUDA tensors, these are on the CPU, where TRITON_INTERPRET=1 in the "
        "environment runs them in Triton's interpreter, slowly"
    )
    monkeypatch.setattr(_backends, "TRITON_INTERPRETED", True)
    assert "triton" not in _backends.obstacles(cpu, "cpp", "triton")
    assert (
        "need CPU or CUDA tensors, these are on meta"
        in (_backends.obstacles(meta, "cpp", "triton")["triton"])
    )
    assert _backends.obstacles(cpu, "cpp")["triton"] == "this operator has no Triton kernel"


@needs_triton
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a device"
)
def test_environment_decides() -> None:
    """triton is imported by the first call that runs it; without TRITON_INTERPRET the CPU has no kernel."""
    run = run_python("-c", CALL.format(backend="triton"), environment={"TRITON_INTERPRET": "1"})
    assert run.stdout.strip() == "[[1.0], [1.0]]", run.stderr
    refused = run_python("-c", CALL.format(backend="triton"), environment={"TRITON_INTERPRET": "0"})
    assert refused.returncode == 1
    assert (
        "ValueError: soft_embedding: backend='triton' cannot run: the Triton kernels need CUDA"
        in (refused.stderr)
    )

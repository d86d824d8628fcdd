"""The branches that a GPU is asked about (support/branches) can be called, and leave out no operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.branches import Results, branches

from softdimo_fast.benchmark.cases import OPERATORS

ROOT = Path(__file__).resolve().parent.parent.parent
BRANCHES = branches()


def test_every_operator_with_a_kernel_has_branches() -> None:
    """And tests of its own for what only a GPU can show."""
    names = [name for name, _ in BRANCHES]
    assert len(set(names)) == len(names)
    bound = {name for name in OPERATORS if (ROOT / "csrc/bind_cuda" / f"{name}.cpp").is_file()}
    # A backward pass may have a list of its own.
    assert {name.split("-")[0].removesuffix("_backward") for name in names} == bound
    tests = [path.read_text() for path in (ROOT / "tests/gpu").glob("test_*.py")]
    assert {
        name for name in bound if any(re.search(rf"\b{name}\(", text) for text in tests)
    } == bound


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in BRANCHES])
def test_runs_on_the_cpu(call: Callable[[str], Results]) -> None:
    results = call("cpu")
    assert results
    assert all(result.numel() > 0 for result in results)

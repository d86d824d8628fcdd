"""The README's code runs, and its table of kernels is what this build has."""

from __future__ import annotations

import re

import pytest
from support.process import ROOT

import softdimo_fast
from softdimo_fast.cli import doctor
from softdimo_fast.ops import _library

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
# | `operator` | what it computes | C++ (CPU) | CUDA |
ROWS = re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no) \| (yes|no) \|$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert "soft_embedding" in capsys.readouterr().out
    logits = scope["logits"]
    assert logits.grad is not None  # type: ignore[attr-defined]
    assert bool(logits.grad.isfinite().all())  # type: ignore[attr-defined]


def test_there_is_one_example() -> None:
    assert len(BLOCKS) == 1


def test_table_of_kernels_is_that_of_this_build() -> None:
    operators = {operator.name: operator for operator in doctor.examine().operators}
    assert {name for name, *_ in ROWS} == set(operators)
    for name, cpp, cuda in ROWS:
        obstacles = operators[name].obstacles
        assert (cpp == "yes") == (obstacles["cpp"] is None), name
        if _library.CUDA_OBSTACLE is None:
            lacking = (obstacles["cuda"] or "").startswith(doctor.NO_KERNEL)
            assert (cuda == "yes") == (not lacking), name


def test_every_public_operator_is_in_the_table() -> None:
    public = set(softdimo_fast.__all__) - {"Explanation", "__version__", "explain"}
    assert {name for name, *_ in ROWS} == public

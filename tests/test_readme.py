"""The README's code runs, and its table of kernels is what this build has."""

from __future__ import annotations

import json
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


DEMO = json.loads((ROOT / "docs" / "demo" / "metrics.json").read_text(encoding="utf-8"))
# | `row` | images | numbers ... |
NUMBERS = re.findall(r"^\| `(\w+)` \|[^|]*\|((?: [\d.]+ \|)+)$", README, flags=re.MULTILINE)


def test_the_demos_tables_are_what_it_measured() -> None:
    shown = {name: [float(x) for x in cells.strip(" |").split("|")] for name, cells in NUMBERS}
    assert set(shown) == {*DEMO["rows"], *DEMO["search"]}
    columns = ("fd", "accuracy", "precision", "recall", "coverage", "entropy")
    for name, row in DEMO["rows"].items():
        assert shown[name] == pytest.approx([row[column] for column in columns], abs=6e-3), name
    for name, row in DEMO["search"].items():
        assert shown[name] == pytest.approx([row["hit_rate"], row["fd"]], abs=6e-3), name


def test_the_demo_that_is_shown_held_its_bars() -> None:
    assert not DEMO["quick"]
    assert [bar["name"] for bar in DEMO["bars"] if not bar["holds"]] == []


def test_every_picture_and_link_in_the_readme_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target

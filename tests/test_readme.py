"""The README's code runs, its commands parse, and its table of kernels is what this build has."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from typing import Any

import pytest
import torch
from support.process import ROOT

import softdimo_fast
from softdimo_fast.cli import doctor, main
from softdimo_fast.cli.train import load_settings
from softdimo_fast.ops import _library

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
CODE = re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^softdimo .*$", "".join(CODE), flags=re.MULTILINE)
# | `operator` | what it computes | C++ (CPU) | CUDA |
ROWS = re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no) \| (yes|no) \|$", README, flags=re.MULTILINE)


def run_block(word: str) -> dict[str, Any]:
    """The names after running the one block that has ``word`` in it."""
    (block,) = (block for block in BLOCKS if word in block)
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_training_example_trains() -> None:
    scope = run_block("DistillationTrainer")
    assert scope["trainer"].step == 2
    moved, start = scope["one_step"].output.weight, scope["teacher"].output.weight
    assert bool(moved.isfinite().all())
    assert not torch.equal(moved, start)


def test_the_operators_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    logits = run_block("sample_tokens")["logits"]
    assert "soft_embedding" in capsys.readouterr().out
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_there_are_two_examples() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real command line, whose functions are replaced by ones that note their arguments."""
    _, command, *arguments = shlex.split(line, comments=True)
    module = importlib.import_module(f"softdimo_fast.cli.{command}")
    called: list[dict[str, Any]] = []

    @functools.wraps(module.run)
    def note(**values: Any) -> int:
        called.append(values)
        return 0

    monkeypatch.setattr(module, "run", note)
    assert main([command, *arguments]) == 0
    (values,) = called
    recipe, method = values.get("recipe_name"), values.get("method")
    if recipe is not None:  # recipe, method and the names of the settings are known
        method = method or ("tteo" if command == "tteo" else "distillation")
        load_settings(recipe, method, None, None, tuple(values.get("set", ())))


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {"config", "train", "sample", "tteo", "export"}


def test_table_of_kernels_is_that_of_this_build() -> None:
    operators = {operator.name: operator for operator in doctor.examine().operators}
    assert {name for name, *_ in ROWS} == set(operators)
    for name, cpp, cuda in ROWS:
        obstacles = operators[name].obstacles
        assert (cpp == "yes") == (obstacles["cpp"] is None), name
        if _library.CUDA_OBSTACLE is None:
            lacking = (obstacles["cuda"] or "").startswith(doctor.NO_KERNEL)
            assert (cuda == "yes") == (not lacking), name


def test_operators_with_triton_kernels_are_named() -> None:
    """Whatever keeps them from running here: only operators without kernels say that they have none."""
    (paragraph,) = re.findall(
        r"^For devices that the CUDA.*?\n\n", README, re.DOTALL | re.MULTILINE
    )
    operators = doctor.examine().operators
    lacking = {
        o.name for o in operators if (o.obstacles["triton"] or "").startswith(doctor.NO_KERNEL)
    }
    named = {o.name for o in operators if f"`{o.name}`" in paragraph}
    assert named == {o.name for o in operators} - lacking


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

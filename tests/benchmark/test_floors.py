"""Predicted least times: the work of the cases themselves, over assumed ceilings."""

from __future__ import annotations

import re

import pytest

from softdimo_fast import cli
from softdimo_fast.benchmark import arguments, floors
from softdimo_fast.benchmark.cases import CASES, OPERATORS, Case
from softdimo_fast.benchmark.settings import Settings
from softdimo_fast.benchmark.workloads import build, least_work
from softdimo_fast.benchmark.workloads.common import Work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_work_is_that_of_the_tensors(case: Case) -> None:
    assert least_work(case, "cpu", tiny=True) == build(case, tiny=True).work


@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "microseconds", "bound"),
    [
        ("soft_embedding", "maskgit", "bfloat16", (95.4, 36.8, 33.0), "product"),
        ("soft_embedding", "maskgen-64", "bfloat16", (75.7, 45.4, 31.7), "memory"),
        ("token_statistics", "maskgen-64", "bfloat16", (74.6, 44.8, 31.2), "memory"),
    ],
)
def test_known_floors(
    operator: str, shape: str, dtype: str, microseconds: tuple[float, ...], bound: str
) -> None:
    case = Case(operator, shape, dtype)
    work = least_work(case, "cuda")["forward"]
    for chip, expected in zip(floors.CHIPS, microseconds, strict=True):
        seconds, what = chip.floor(work, case)
        assert seconds * 1e6 == pytest.approx(expected, rel=5e-3)
        assert what == bound


def test_each_ceiling_can_bind() -> None:
    chip = floors.Chip("chip", memory=1.0, product=1.0, arithmetic=1.0, exponentials=1.0)
    product = Case("soft_embedding", "maskgit", "float32")
    other = Case("sample_tokens", "maskgit", "float32")
    assert chip.floor(Work(4, 3, 2, 0), product) == (7.0, "memory")
    assert chip.floor(Work(1, 1, 3, 0), product) == (9.0, "product")
    assert chip.floor(Work(1, 1, 3, 0), other) == (3.0, "arithmetic")
    assert chip.floor(Work(1, 1, 3, 5), other) == (5.0, "exp")


def test_every_case_has_a_row() -> None:
    text = floors.predict(Settings(device="cuda"))
    assert "nothing here was measured" in text
    found = re.findall(r"^(\w+), predicted least times:$", text, re.MULTILINE)
    assert found == list(OPERATORS)
    for case in CASES:
        if case.only != "cpu":
            assert f"| {case.title('cuda')} | {case.dtype} | forward |" in text


def test_the_command_prints_them_and_measures_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softdimo_fast.benchmark.command.run", None)
    chosen = ["--floors", "--operator", "token_statistics", "--dtype", "bfloat16"]
    assert cli.main(["bench", *chosen]) == 0
    printed = capsys.readouterr().out
    assert arguments.main(chosen) == 0
    assert capsys.readouterr().out == printed
    assert printed.count("| bfloat16 | forward |") == 2
    assert "soft_embedding" not in printed


def test_an_unknown_filter_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments.main(["--floors", "--operator", "softmax"]) == arguments.WRONG_INPUT
    assert "--operator must be among" in capsys.readouterr().err

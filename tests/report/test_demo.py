"""What a finished demo leaves: three files, made from made-up results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import DESK, PHONE, assert_whole, browser
from support.report import FD, digit_images, log

from softdimo_fast.recipes.demo import demo_stages
from softdimo_fast.recipes.stages import Stage, StageResult
from softdimo_fast.report.demo import PICTURE, demo_metrics, versions, write_demo
from softdimo_fast.trainers.run_log import RunLog

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

ROWS_OF = {
    "teacher_samples": ("floor", "recon", *(f"teacher{n}" for n in (1, 2, 4, 8, 16))),
    "distillation": ("dimo", "dimo_argmax", "dimo_soft"),
    "control": ("cfg2_control",),
    "adversarial": ("cfg2_gan",),
    "reward": ("reward",),
}
COLUMNS = {"fd", "accuracy", "precision", "recall", "coverage", "entropy", "n"}
SEARCHES = ("bon1", "tteo", "bon4", "bon4_tteo", "bon16")


def row(name: str) -> dict[str, float]:
    values = dict.fromkeys(("accuracy", "precision", "recall", "coverage"), 0.95)
    return {"fd": FD[name], **values, "entropy": 2.25, "n": 2000}


def results(stages: list[Stage]) -> dict[str, StageResult]:
    digits = torch.tensor([0, 2, 4, 6, 8, 0, 2, 4, 1, 3, 5, 7, 9, 1, 3, 5])
    pictures = {name: digit_images(digits, 0.1) for name in PICTURE}
    found = {}
    for number, stage in enumerate(stages):
        names = ROWS_OF.get(stage.name, ())
        values: dict[str, Any] = {"rows": {name: row(name) for name in names}} if names else {}
        images = {name: pictures[name] for name in names if name in pictures}
        if stage.name == "teacher_samples":
            images["real"] = pictures["real"]
        if stage.name == "judge":
            values = {"held_out_accuracy": 0.984}
        if stage.name == "search":
            values = {"search": {name: {"hit_rate": 0.5, "fd": 6.0} for name in SEARCHES}}
            images = {"wanted": digits, "before": pictures["dimo"], "after": pictures["real"]}
        found[stage.name] = StageResult(values, images, 1.5 + number)
    return found


def write(out: Path, *, quick: bool = False) -> dict[str, Any]:
    stages = demo_stages(7, quick=quick)
    made = results(stages)
    with RunLog(out / "distillation") as run_log:
        for record in log(60, 10, {"student/entropy": (3.0, 1.5), "auxiliary/loss": (3.0, 2.5)}):
            run_log.write(int(record.pop("step")), **record)
    metrics = demo_metrics(7, 123.5, made, quick=quick, command="softdimo demo --seed 7")
    write_demo(out, stages, made, metrics)
    return metrics


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write(folder)
    return folder


def test_three_files_and_nothing_half_written(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == [
        "distillation", "grid.png", "metrics.json", "report.html"
    ]  # fmt: skip
    assert (out / "grid.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_metrics_file_has_the_promised_form(out: Path) -> None:
    text = (out / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert (metrics["seed"], metrics["seconds"], metrics["quick"]) == (7, 123.5, False)
    assert metrics["command"] == "softdimo demo --seed 7"
    assert metrics["judge_accuracy"] == 0.984
    assert set(metrics["rows"]) == {
        "floor", "recon", "teacher1", "teacher2", "teacher4", "teacher8", "teacher16", "dimo", "dimo_argmax",
        "dimo_soft", "cfg2_control", "cfg2_gan", "reward",
    }  # fmt: skip
    for name, values in metrics["rows"].items():
        assert values.keys() == COLUMNS
        assert values["fd"] == FD[name]
    assert tuple(metrics["search"]) == SEARCHES
    assert all(values.keys() == {"hit_rate", "fd"} for values in metrics["search"].values())
    for bar in (*metrics["bars"], metrics["stretch"]):
        assert {"name", "value", "bound", "holds"} <= bar.keys()
        assert isinstance(bar["name"], str)
        assert isinstance(bar["value"], float)
        assert isinstance(bar["bound"], float)
        assert isinstance(bar["holds"], bool)
    assert metrics["stage_seconds"].keys() == {stage.name for stage in demo_stages(0)}
    assert metrics["versions"] == versions()


def test_the_report_has_the_numbers_the_bars_and_the_command(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "softdimo demo --seed 7" in page
    assert "reconstruction FD / floor FD" in page
    assert "≤ 2" in page
    assert "A quick run" not in page
    assert "40.11" in page


def test_a_quick_run_says_so(tmp_path: Path) -> None:
    metrics = write(tmp_path, quick=True)
    assert metrics["quick"] is True
    assert re.search(r"A quick run: .* images are not good", (tmp_path / "report.html").read_text())


def test_writing_again_replaces_all(tmp_path: Path) -> None:
    write(tmp_path)
    first = (tmp_path / "metrics.json").read_bytes()
    for name in ("grid.png", "metrics.json", "report.html"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "distillation" / "log.jsonl").unlink()
    write(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == first
    assert len((tmp_path / "report.html").read_bytes()) > 10_000


def test_the_page_in_a_browser(out: Path) -> None:
    with browser() as page:
        for size in (PHONE, DESK):
            assert_whole(page, out / "report.html", size, "light", pictures=40, texts=150)

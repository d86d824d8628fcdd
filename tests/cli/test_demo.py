"""``softdimo demo --quick`` as a user runs it: what it leaves, prints, refuses, and how it is stopped."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.browser import DESK, PHONE, assert_whole, browser
from support.command import Command, run

from softdimo_fast import cli
from softdimo_fast.cli import demo as demo_command
from softdimo_fast.cli.errors import UsageError
from softdimo_fast.recipes.build import finished_run, is_finished
from softdimo_fast.recipes.demo import demo_stages
from softdimo_fast.trainers.run_log import RunLog

for package in ("sklearn", "PIL", "matplotlib"):
    pytest.importorskip(package)

STAGES = demo_stages(0, quick=True)
TRAINED = tuple(
    stage.name for stage in STAGES if stage.name not in ("teacher_samples", "search")
)  # fmt: skip
GENERATORS = ("distillation", "control", "adversarial", "reward")
ROWS = (
    "floor", "recon", "teacher1", "teacher2", "teacher4", "teacher8", "teacher16", "dimo", "dimo_argmax",
    "dimo_soft", "cfg2_control", "cfg2_gan", "reward",
)  # fmt: skip


class Finished:
    """A quick demo that ran to its end."""

    def __init__(self, out: Path, command: Command, code: int) -> None:
        self.out, self.command, self.code = out, command, code
        self.metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("demo") / "quick"
    command = Command("demo", "--quick", "--out", str(out))
    code = command.end()
    assert code == 0, command.err
    return Finished(out, command, code)


def messages(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command says."""
    assert cli.main(["demo", *arguments]) == 2
    return capsys.readouterr().err


# ---- what it leaves ----------------------------------------------------------------------------------------


def test_files(demo: Finished) -> None:
    there = {path.name for path in demo.out.iterdir()}
    assert there == {stage.name for stage in STAGES} | {
        "demo.json", "grid.png", "metrics.json", "report.html", "seconds"
    }  # fmt: skip
    left = [path for path in demo.out.rglob("*") if ".tmp" in path.name or ".old" in path.name]
    assert left == []


def test_the_metrics_file(demo: Finished) -> None:
    metrics = demo.metrics
    assert {"seed", "seconds", "rows", "search", "bars"} <= metrics.keys()
    assert metrics["seed"] == 0
    assert metrics["seconds"] > 1
    assert metrics["command"] == "softdimo demo --seed 0 --quick"
    assert 0 < metrics["judge_accuracy"] <= 1
    assert tuple(metrics["rows"]) == ROWS
    for row in metrics["rows"].values():
        assert row.keys() == {"fd", "accuracy", "precision", "recall", "coverage", "entropy", "n"}
    assert tuple(metrics["search"]) == ("bon1", "tteo", "bon4", "bon4_tteo", "bon16")
    assert all(row.keys() == {"hit_rate", "fd"} for row in metrics["search"].values())
    assert len(metrics["bars"]) == 14
    assert all({"name", "value", "bound", "holds"} <= bar.keys() for bar in metrics["bars"])


@pytest.mark.parametrize("stage", TRAINED)
def test_each_training_is_a_normal_run_folder(demo: Finished, stage: str) -> None:
    folder = demo.out / stage
    assert is_finished(folder)
    settings = finished_run(folder)
    (expected,) = (one.config["run"] for one in STAGES if one.name == stage)
    newest = (folder / "checkpoints" / "latest").read_text().strip()
    stored = json.loads((folder / "checkpoints" / newest / "config.json").read_text())
    assert stored["run"] == json.loads(json.dumps(expected))
    assert newest == f"step_{settings.trainer.steps:08d}"
    records = RunLog.read(folder)
    assert records[-1]["step"] == settings.trainer.steps
    assert (folder / "result.json").exists()


def test_the_real_report_in_a_browser(demo: Finished) -> None:
    with browser() as page:
        for size in (PHONE, DESK):
            assert_whole(page, demo.out / "report.html", size, "light", pictures=40, texts=200)
        assert "digits" in page.run("return document.title")
        assert "softdimo demo --seed 0 --quick" in page.run("return document.body.innerText")


# ---- what it prints ----------------------------------------------------------------------------------------


def test_tables_and_times_are_printed(demo: Finished) -> None:
    text = demo.command.out
    lines = text.splitlines()
    for name, row in demo.metrics["rows"].items():
        (line,) = (line for line in lines if line.split()[:1] == [name] and line[0] != " ")
        assert f"{row['fd']:.3f}" in line
    accuracy = demo.metrics["judge_accuracy"]
    assert f"the judge's own accuracy, on held-out scans: {accuracy:.3f}" in lines
    for bar in demo.metrics["bars"]:
        assert f"{'ok    ' if bar['holds'] else 'MISSED'} {bar['name']}: " in text
    seconds = text[text.index("seconds of each stage") :]
    assert all(re.search(rf"  {re.escape(stage.title)} +\d+\.\d\n", seconds) for stage in STAGES)
    assert lines[-1].endswith(f"Open {demo.out / 'report.html'}")


def test_the_budget_comes_first(demo: Finished) -> None:
    head = demo.command.out.splitlines()[:4]
    assert re.fullmatch(
        r"10 stages in 2 processes: about (\d+ min )?\d+ s on this machine", head[1]
    )
    assert "quick run" in head[2]
    assert head[3] == f"seed 0, in {demo.out}"


def test_without_a_terminal_there_are_plain_lines(demo: Finished) -> None:
    for text in (demo.command.out, demo.command.err):
        assert not re.search(r"[\r\x1b\b]", text)
    lines = demo.command.err.splitlines()
    titles = {stage.title for stage in STAGES}
    assert {line.split(":")[0] for line in lines} == titles
    ends = [line for line in lines if re.search(r": done", line)]
    assert sorted(line.split(":")[0] for line in ends) == sorted(titles)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) steps/s", demo.command.err)]
    assert max(rates) < 10_000


# ---- a finished folder -------------------------------------------------------------------------------------


def test_a_finished_demo_is_resumed_in_seconds(demo: Finished) -> None:
    before = (demo.out / "metrics.json").read_bytes()
    (demo.out / "report.html").unlink()
    started = time.monotonic()
    again = run("demo", "--quick", "--resume", "--out", str(demo.out))
    assert time.monotonic() - started < 20
    assert again.process.returncode == 0
    assert (demo.out / "metrics.json").read_bytes() == before
    assert (demo.out / "report.html").stat().st_size > 100_000
    assert again.err.count("done before") == len(STAGES)
    assert "about" not in again.out


def test_an_existing_demo_is_not_overwritten(
    demo: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(demo.out)
    assert f"{out} holds a demo already: --resume goes on" in messages(capsys, "--out", out)
    assert "holds another demo, of {" in messages(
        capsys, "--out", out, "--quick", "--resume", "--seed", "1"
    )
    said = messages(capsys, "--out", out, "--resume")
    assert '"quick": true}: give --seed and --quick as it has them' in said
    assert "holds a demo of one seed" in messages(
        capsys, "--out", out, "--quick", "--resume", "--seeds", "2"
    )


def test_results_of_another_recipe_are_refused_with_the_difference(
    demo: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(demo.out, tmp_path / "copy"))
    path = out / "teacher" / "result.json"
    stored = json.loads(path.read_text())
    stored["config"]["run"]["method"]["condition_drop"] = 0.5
    path.write_text(json.dumps(stored))
    said = messages(capsys, "--out", str(out), "--quick", "--resume")
    assert re.search(r"teacher holds a result of another configuration:\n  run\.method\.", said)
    path.write_text("{")
    said = messages(capsys, "--out", str(out), "--quick", "--resume")
    assert f"{path} is damaged" in said
    assert "remove it to run the stage 'teacher' again" in said
    assert (out / "metrics.json").read_bytes() == (demo.out / "metrics.json").read_bytes()


# ---- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--resume"], "holds no demo to resume: leave out --resume"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in messages(capsys, "--out", str(tmp_path / "new"), *arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        said = messages(capsys, "--quick", "--out", str(tmp_path / out))
        assert re.search(r"--out must be a folder that can be made: .*file", said)
    assert (tmp_path / "file").read_text() == "mine"


# ---- several seeds -----------------------------------------------------------------------------------------


def test_several_seeds_can_be_resumed_before_all_have_begun(tmp_path: Path) -> None:
    folders = {seed: tmp_path / f"seed_{seed}" for seed in (4, 5)}
    folders[4].mkdir()
    (folders[4] / demo_command.MARK).write_bytes(demo_command._mark(4, True))
    demo_command._prepare(tmp_path, folders, quick=True, resume=True)
    with pytest.raises(UsageError, match="holds a demo already"):
        demo_command._prepare(tmp_path, folders, quick=True, resume=False)
    with pytest.raises(UsageError, match="holds a demo of several seeds"):
        demo_command._prepare(tmp_path, {4: tmp_path}, quick=True, resume=True)


def test_the_mean_over_seeds_is_judged_and_kept(
    demo: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = json.loads(json.dumps(demo.metrics))
    worse["rows"]["cfg2_gan"]["fd"] = 3 * worse["rows"]["cfg2_control"]["fd"]
    missed = demo_command._judge_mean(tmp_path, [demo.metrics, worse])
    assert [bar["name"] for bar in missed] == ["GAN FD / its control's FD, mean of 2"]
    assert "MISSED GAN FD / its control's FD, mean of 2" in capsys.readouterr().out
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["seeds"] == [0, 0]
    assert stored["bars"] == missed
    assert stored["runs"] == [demo.metrics, worse]


# ---- stopping ----------------------------------------------------------------------------------------------


def test_ctrl_c_while_the_workers_start(tmp_path: Path) -> None:
    command = Command("demo", "--quick", "--out", str(tmp_path / "out"))
    command.wait_until(lambda: "seed 0, in" in command.out)
    command.interrupt()
    assert command.end() == 75
    assert command.err.splitlines()[-1].startswith("softdimo: stopped, and saved: --resume goes on")
    assert "Traceback" not in command.err
    assert (tmp_path / "out" / demo_command.MARK).exists()


def test_interrupted_twice_and_resumed_it_ends_with_the_same_rows(
    demo: Finished, tmp_path: Path
) -> None:
    """Ctrl-C on a terminal, then SIGTERM to the parent alone, each in the middle of a training.

    To save time, the first stages are those of the other run.
    """
    out = Path(shutil.copytree(demo.out, tmp_path / "out"))
    for name in ("teacher_samples", *GENERATORS, "search"):
        shutil.rmtree(out / name)
    for name in ("grid.png", "metrics.json", "report.html"):
        (out / name).unlink()
    command = Command("demo", "--quick", "--out", str(out), "--resume", terminal=True)
    command.wait_until(lambda: shows_bars(command.out))
    command.interrupt()
    assert command.end() == 75
    assert command.out.count("\r") > 10
    assert re.search(r"softdimo: stopped, and saved: --resume goes on with ", command.out)
    assert "Traceback" not in command.out
    assert not (out / "distillation" / "result.json").exists()
    assert list((out / "distillation" / "checkpoints").glob("step_*"))
    assert not (out / "metrics.json").exists()

    command = Command("demo", "--quick", "--out", str(out), "--resume")
    command.wait_until((out / "reward" / "log.jsonl").exists)
    command.terminate()
    assert command.end() == 75
    assert "softdimo: stopped, and saved: --resume goes on with" in command.err
    assert "Traceback" not in command.err
    assert "tokenizer: done before" in command.err

    command = run("demo", "--quick", "--out", str(out), "--resume")
    assert command.process.returncode == 0, command.err
    assert "Di[M]O: done before" in command.err
    metrics = json.loads((out / "metrics.json").read_text())
    for part in ("rows", "search", "bars"):
        assert metrics[part] == demo.metrics[part]
    # Wall time over all attempts, each of which took more than a second.
    assert metrics["seconds"] == float((out / "seconds").read_text())
    assert metrics["seconds"] > demo.metrics["seconds"] + 3
    for stage in TRAINED:
        steps = [record["step"] for record in RunLog.read(out / stage)]
        assert steps == [record["step"] for record in RunLog.read(demo.out / stage)]


def shows_bars(text: str) -> bool:
    """tqdm's bars, redrawn in place, one for each of two stages at once."""
    bars = (r"Di\[M\]O: +\d+%\|.+\| \d+/\d+ \[\d\d:\d\d<", r"teacher's images: +\d+%\|", r"\x1b\[A")
    return all(re.search(bar, text) for bar in bars)

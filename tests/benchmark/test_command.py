"""The whole run: workers, resume after a kill, filters, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.benchmark import SMALLEST
from support.process import ROOT, run_python

from softdimo_fast import cli
from softdimo_fast.benchmark import arguments, cases, command, display, results, settings
from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.settings import Settings

FIRST, SECOND = (case.key for case in SMALLEST.selected())


def killed_after_the_first_case(folder: Path) -> None:
    """A worker that gets no chance to tidy up."""
    settings.save(folder, SMALLEST)
    worker = subprocess.Popen(
        [sys.executable, "-m", "softdimo_fast.benchmark.worker", str(folder), "default"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith(FIRST):
            worker.kill()
            break
    worker.wait()


def stopped_before_the_next(folder: Path) -> None:
    """Ctrl-C while nothing new was finished: what there is makes a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_run_worker", interrupt)
        with pytest.raises(KeyboardInterrupt):
            command.run(folder, SMALLEST, resume=True)
    found = results.from_csv(folder / command.CSV)
    assert {row.operator for row in found.rows} == {FIRST.partition("+")[0]}
    assert (folder / command.HTML).exists()


def interrupt(*_arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_is_resumed_and_its_report_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killed_after_the_first_case(tmp_path)
    stopped_before_the_next(tmp_path)
    kept = tmp_path / "cases" / "default" / f"{FIRST}.json"
    before = kept.stat().st_mtime_ns
    assert command.run(tmp_path, SMALLEST, resume=True) == 0
    assert kept.stat().st_mtime_ns == before
    found = results.from_csv(tmp_path / command.CSV)
    assert {row.allocator for row in found.rows} == {"default", "thp"}
    assert {row.operator for row in found.rows} == set(SMALLEST.operators)
    ours = found.find(operator="soft_embedding", phase="both", implementation="softdimo_fast")
    assert ours is not None
    assert ours.ratio == 1.0
    assert ours.rounds == 2
    assert ours.error_value is not None
    assert ours.error_value < 1e-6
    assert ours.floor_ms is not None
    eager = found.find(allocator="thp", operator="token_statistics", implementation="eager")
    assert eager is not None
    assert eager.ratio > 0
    assert eager.error_value is None  # measured with the default allocator only
    out, err = capfd.readouterr()
    assert "about" in out
    assert "bars met" in out
    assert "left, done:" in err

    # Finished: nothing is measured again, and the guard compares the run with itself.
    table = tmp_path / command.CSV
    assert command.run(tmp_path, SMALLEST, resume=True, table=table) == 0
    out, err = capfd.readouterr()
    assert "0 fell by more than 15%" in out
    assert "left, done:" not in err

    # A committed table that was better makes it fail.
    better = results.collect(tmp_path, SMALLEST.selected(), SMALLEST.allocators)
    better.rows = [replace(row, ratio=10 * row.ratio) for row in better.rows]
    committed = tmp_path / "committed.csv"
    committed.write_text(results.to_csv(better), encoding="utf-8")
    assert command.run(tmp_path, SMALLEST, resume=True, table=committed) == command.FELL
    assert "-90%" in capfd.readouterr().out


def test_a_run_is_not_overwritten_and_not_mixed(tmp_path: Path) -> None:
    settings.save(tmp_path, SMALLEST)
    with pytest.raises(BenchmarkError, match=r"--out: .* holds a run already: --resume"):
        command.run(tmp_path, SMALLEST)
    with pytest.raises(
        BenchmarkError, match=r"--resume: .* another run: give the options of 'softdimo"
    ):
        command.run(tmp_path, replace(SMALLEST, threads=2), resume=True)
    with pytest.raises(BenchmarkError, match=r"--resume: .* holds no run"):
        command.run(tmp_path / "other", SMALLEST, resume=True)
    (tmp_path / settings.MARK).write_text("[]", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"settings\.json cannot be read"):
        command.run(tmp_path, SMALLEST, resume=True)


def test_a_worker_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTDIMO_BACKEND", "nonsense")
    with pytest.raises(BenchmarkError, match="allocator 'default' ended with code 1"):
        command.run(tmp_path, SMALLEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--operator", "softmax"], "--operator must be among soft_embedding, .*, got 'softmax'"),
        (["--shape", "huge"], "--shape must be among maskgit, .*, got 'huge'"),
        (
            ["--dtype", "float16"],
            "--dtype must be among float32, bfloat16, autocast, got 'float16'",
        ),
        (["--phase", "sideways"], "--phase must be among forward, backward, both, got 'sideways'"),
        (["--operator", "sample_tokens", "--phase", "backward"], "--phase leaves nothing"),
        (["--quick", "--shape", "v16384"], "leave no case of the quick run: leave out --quick"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--tolerance", "1.5"], r"--tolerance must be in \[0, 1\), got 1.5"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--guard", "/nonexistent.csv"], "--guard must be a readable table"),
        (["--resume"], "--resume: .* holds no run"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """The same by both commands; nothing is written."""
    where = ["--out", str(tmp_path / "run")]
    assert cli.main(["bench", *where, *options]) == 2
    said = capsys.readouterr().err.removeprefix("softdimo: ")
    assert re.search(message, said)
    assert arguments.main([*where, *options]) == 2
    assert capsys.readouterr().err.removeprefix("softdimo_fast.benchmark: ") == said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="--out must be a folder that can be written in"):
        command.run(tmp_path / "file" / "run", SMALLEST)


def test_both_commands_have_the_same_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def note(*values: object, **named: object) -> int:
        calls.append((values, named))
        return 0

    monkeypatch.setattr(command, "run", note)
    assert cli.main(["bench"]) == 0
    assert arguments.main([]) == 0
    options = ["--quick", "--operator", "sample_tokens", "--phase", "forward", "--threads", "3"]
    assert cli.main(["bench", *options]) == 0
    assert arguments.main(options) == 0
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]
    assert calls[0] != calls[2]


def test_filters() -> None:
    found = cases.select(operators=["soft_embedding"], shapes=["maskgit"], dtypes=["autocast"])
    assert [case.key for case in found] == ["soft_embedding+maskgit+autocast"]
    assert cases.select_passes(found[0], ["both"]) == ["training"]
    assert cases.select_passes(found[0], []) == ["forward", "training"]
    assert len({case.key for case in cases.CASES}) == len(cases.CASES)
    assert {case.operator for case in cases.select(quick=True)} == set(cases.OPERATORS) - {
        "linear_soft_embedding"
    }
    assert any(case.only == "cuda" for case in cases.select(device="cuda"))
    assert not any(case.only == "cuda" for case in cases.select(device="cpu"))


def test_the_cost_is_about_what_was_promised() -> None:
    for quick, most in ((True, 90), (False, 13 * 60)):
        chosen = Settings(quick=quick, threads=2)
        seconds = sum(
            display.nominal_start(chosen)
            + sum(display.nominal_seconds(case, chosen, one) for case in chosen.selected())
            for one in chosen.allocators
        )
        assert most / 3 < seconds < most


def test_a_gpu_run_has_one_worker_and_the_rows_of_a_training_step() -> None:
    chosen = Settings(device="cuda")
    assert chosen.allocators == ("default",)
    assert SMALLEST.selected()[0].title("cuda") == "MaskGIT, N16384 V1024 D768"
    assert SMALLEST.selected()[0].title("cpu") == "MaskGIT, N4096 V1024 D768"


def test_settings_are_kept_as_they_are(tmp_path: Path) -> None:
    chosen = replace(SMALLEST, phases=("both",))
    settings.save(tmp_path, chosen)
    assert settings.load(tmp_path) == chosen
    assert json.loads((tmp_path / settings.MARK).read_text())["tiny"] is True
    assert chosen.command() == (
        "softdimo bench --quick --threads 1 --operator soft_embedding token_statistics --shape maskgit "
        "--dtype float32 --phase both"
    )


def test_it_starts_where_only_torch_is_installed() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('tyro', 'tqdm', 'matplotlib', 'numpy', 'einops')));"
        "from softdimo_fast.benchmark import arguments, command, worker;"
        "arguments.parser().parse_args([]); print('fine')"
    )
    result = run_python("-c", code)
    assert result.stdout == "fine\n", result.stderr

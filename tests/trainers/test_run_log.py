"""The run's log: strict JSON, whole lines, exact values; sinks that fail do not end a run."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softdimo_fast.trainers.run_log import RunLog


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(
    st.lists(st.dictionaries(st.text().filter(lambda n: n not in ("step", "self")), st.floats()))
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    with RunLog(folder) as log:
        for step, scalars in enumerate(entries):
            log.write(step, **scalars)
    for line in (folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    found = RunLog.read(folder)
    assert [entry.pop("step") for entry in found] == list(range(len(entries)))
    assert [list(map(repr, entry.items())) for entry in found] == [
        list(map(repr, entry.items())) for entry in entries
    ]


def test_lines_as_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run")
    log.write(10, loss=0.1, count=3, bad=math.nan, low=-math.inf, tensor=torch.tensor(0.5))
    assert log.path.read_text() == (
        '{"step": 10, "loss": 0.1, "count": 3, "bad": "nan", "low": "-inf", "tensor": 0.5}\n'
    )  # before it is closed
    log.close()
    log.close()


def test_goes_on_with_an_existing_log_and_mends_a_half_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert RunLog.read(tmp_path) == [{"step": 1, "a": 1}]
    with RunLog(tmp_path) as log:
        log.write(3, a=2)
    assert [entry["step"] for entry in RunLog.read(tmp_path)] == [1, 3]


@pytest.mark.parametrize("half", [b"", b'{"step": 4', b"\0\0\0", b"\xff"])
def test_truncate_after(tmp_path: Path, half: bytes) -> None:
    log = RunLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, a=step)
    with log.path.open("ab") as file:
        file.write(half)
    log.truncate_after(20)
    log.write(25, a=0)
    log.close()
    assert [entry["step"] for entry in RunLog.read(tmp_path)] == [10, 20, 25]
    assert os.listdir(tmp_path) == ["log.jsonl"]
    with RunLog(tmp_path) as again:
        again.truncate_after(-1)
    assert RunLog.read(tmp_path) == []


def test_a_failed_truncation_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path) as log:
        log.write(1, a=1)

        def failing(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="No space left"):
            log.truncate_after(0)
        log.write(2, a=2)
    assert [entry["step"] for entry in RunLog.read(tmp_path)] == [1, 2]
    assert os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": "1"}', "", "[" * 100_000])
def test_a_line_that_is_not_ours_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a JSON object with a step"):
        RunLog.read(tmp_path)
    with (
        RunLog(tmp_path) as log,
        pytest.raises(ValueError, match=r"line 2: not a JSON object"),
    ):
        log.truncate_after(1)


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunLog.read(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="exists"):
        RunLog(tmp_path / "file")


FULL = """
import resource, sys
from softdimo_fast.trainers.run_log import RunLog
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log = RunLog(sys.argv[1])
for step in range(50):
    try:
        log.write(step, loss=0.25)
    except OSError as error:
        print(error)
        break
"""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "File too large: the log" in result.stdout
    assert "log.jsonl" in result.stdout
    content = (tmp_path / "log.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert len(RunLog.read(tmp_path)) == 3


# ---- sinks -------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for the run object of wandb and the writer of tensorboard."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.lines: list[Any] = []
        self.closed = self.fails = False

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.lines.append((step, scalars))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.closed = True

    finish = close


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    """Stand-ins for both packages, which may or may not be installed."""
    made: dict[str, Recorder] = {}

    def maker(name: str) -> Any:
        def make(*args: Any, **options: Any) -> Recorder:
            made[name] = Recorder()
            return made[name]

        return make

    wandb, board = types.ModuleType("wandb"), types.ModuleType("torch.utils.tensorboard")
    wandb.init = maker("wandb")  # type: ignore[attr-defined]
    board.SummaryWriter = maker("tensorboard")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return made


def test_sinks_get_the_scalars(tmp_path: Path, sinks: dict[str, Recorder]) -> None:
    with RunLog(tmp_path, sinks=("tensorboard", "wandb", "wandb")) as log:
        log.write(5, a=1.5, b=math.nan)
    assert sinks["tensorboard"].lines[0] == (5, {"a": 1.5})
    (step, scalars) = sinks["wandb"].lines[0]
    assert (step, scalars["a"], math.isnan(scalars["b"])) == (5, 1.5, True)
    assert all(sink.closed for sink in sinks.values())


def test_a_failing_sink_is_dropped_with_one_warning(
    tmp_path: Path, sinks: dict[str, Recorder]
) -> None:
    with RunLog(tmp_path, sinks=("wandb", "tensorboard")) as log:
        log.write(1, a=1)
        sinks["wandb"].fails = True
        with pytest.warns(RuntimeWarning, match="'wandb' failed and is dropped: Conn.*no network"):
            log.write(2, a=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log.write(3, a=3)
        sinks["tensorboard"].fails = True
        with pytest.warns(RuntimeWarning, match="'tensorboard' failed and is dropped"):
            log.close()
    assert [entry["a"] for entry in RunLog.read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = builtins.__import__

    def without(module: str, *args: Any, **options: Any) -> Any:
        if name in module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'pip install "softdimo-fast\[{name}\]"'):
        RunLog(tmp_path, sinks=(name,))
    assert not (tmp_path / "log.jsonl").exists()


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sinks must be among tensorboard, wandb, got 'mlflow'"):
        RunLog(tmp_path / "run", sinks=("mlflow",))
    assert not (tmp_path / "run").exists()


def test_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, sinks=("tensorboard",)) as log:
        log.write(1, **{"student/loss": 0.5, "bad": math.nan})
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with RunLog(tmp_path, sinks=("wandb",)) as log:
        log.write(1, **{"student/loss": 0.5, "bad": math.nan})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))

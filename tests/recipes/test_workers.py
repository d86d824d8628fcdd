"""Stages in worker processes: order, side by side, and every way that a run can end early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.process import ROOT
from support.stages import stage, wait_for

from softdimo_fast.recipes import workers
from softdimo_fast.recipes.stages import Stage, StageResult
from softdimo_fast.recipes.workers import WorkerError, run_stages
from softdimo_fast.trainers import Stopped
from softdimo_fast.trainers.stopping import StopRequest


class Display:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int]] = []
        self.finished: list[tuple[str, bool]] = []

    def update(self, stage: Stage, done: int, total: int) -> None:
        self.updates.append((stage.name, done, total))

    def finish(self, stage: Stage, result: StageResult, *, earlier: bool) -> None:
        self.finished.append((stage.name, earlier))

    def close(self) -> None:
        pass


def run(
    stages: Sequence[Stage], out: Path, *, stop: Callable[[], bool] = lambda: False,
    display: Display | None = None, jobs: int = 2,
) -> dict[str, StageResult]:  # fmt: skip
    return run_stages(stages, out, jobs=jobs, display=display or Display(), stop=stop)


def times(path: Path) -> list[float]:
    """One for each attempt."""
    return [float(line) for line in path.read_text().split()]


def pid(folder: Path) -> int:
    return int((folder / "pid").read_text().split()[-1])


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_ends(process: int, *, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while is_alive(process):
        assert time.monotonic() < limit, f"process {process} lives on"
        time.sleep(0.05)


def test_side_by_side_in_order_and_only_what_is_missing(tmp_path: Path) -> None:
    # a and b end only if both run at once.
    stages = [
        stage("last", "middle"),
        stage("a", action="meet b"),
        stage("b", action="meet a"),
        stage("middle", "a", "b"),
    ]
    display = Display()
    results = run(stages, tmp_path, display=display)
    assert set(results) == {"a", "b", "middle", "last"}
    pids = {result.values["pid"] for result in results.values()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for first, second in (("a", "middle"), ("b", "middle"), ("middle", "last")):
        assert times(tmp_path / first / "end") < times(tmp_path / second / "begin")
    assert sorted(display.finished[:2]) == [("a", False), ("b", False)]
    assert display.finished[2:] == [("middle", False), ("last", False)]
    assert {total for _, _, total in display.updates} == {2}
    for process in pids:
        assert_ends(process)

    (tmp_path / "last" / "result.json").unlink()
    display = Display()
    again = run(stages, tmp_path, display=display)
    assert sorted(display.finished) == [
        ("a", True), ("b", True), ("last", False), ("middle", True)
    ]  # fmt: skip
    assert len(times(tmp_path / "last" / "begin")) == 2
    assert len(times(tmp_path / "middle" / "begin")) == 1
    assert again["a"].values == results["a"].values

    # Nothing is left: no process starts.
    display = Display()
    assert run(stages, tmp_path, display=display).keys() == results.keys()
    assert all(earlier for _, earlier in display.finished)


def test_one_job_runs_one_stage_at_a_time(tmp_path: Path) -> None:
    run([stage("short", cost=1), stage("long", cost=5)], tmp_path, jobs=1)
    assert times(tmp_path / "long" / "end") <= times(tmp_path / "short" / "begin")


def test_an_error_is_raised_after_the_others_saved_themselves(tmp_path: Path) -> None:
    stages = [stage("wrong", action="fail right"), stage("right", action="stop")]
    with pytest.raises(ValueError, match="wrong failed"):
        run(stages, tmp_path)
    assert (tmp_path / "right" / "saved").exists()
    assert not (tmp_path / "right" / "result.json").exists()
    assert not (tmp_path / "wrong" / "result.json").exists()
    assert float((tmp_path / "wrong" / "seconds").read_text()) >= 0


def test_stop_saves_what_runs_and_a_resume_goes_on(tmp_path: Path) -> None:
    stages = [stage("done"), stage("half", "done", action="stop"), stage("later", "half")]
    begun = tmp_path / "half" / "begin"
    with pytest.raises(Stopped, match="stopped, and saved: --resume goes on with Half"):
        run(stages, tmp_path, stop=begun.exists)
    assert (tmp_path / "half" / "saved").exists()
    assert not (tmp_path / "later").exists()
    stages[1] = stage("half", "done")
    display = Display()
    assert run(stages, tmp_path, display=display).keys() == {"done", "half", "later"}
    assert display.finished == [("done", True), ("half", False), ("later", False)]
    assert len(times(tmp_path / "done" / "begin")) == 1
    assert len(times(begun)) == 2


def test_an_error_while_stopping_is_no_stop(tmp_path: Path) -> None:
    """What could not be saved must not be called saved."""
    stages = [stage("lost", action="lose"), stage("saved", action="stop")]
    begun = [tmp_path / name / "begin" for name in ("lost", "saved")]
    with pytest.raises(ValueError, match="lost is lost"):
        run(stages, tmp_path, stop=lambda: all(path.exists() for path in begun))
    assert (tmp_path / "saved" / "saved").exists()


def test_a_stop_when_all_is_done_changes_nothing(tmp_path: Path) -> None:
    only = tmp_path / "only" / "result.json"
    assert run([stage("only")], tmp_path, stop=only.exists).keys() == {"only"}


def test_a_killed_worker_is_told_and_the_other_one_saves_itself(tmp_path: Path) -> None:
    stages = [stage("victim", action="stop"), stage("other", action="stop"), stage("z", "victim")]

    def kill() -> None:
        wait_for(tmp_path / "victim" / "pid")
        wait_for(tmp_path / "other" / "pid")
        os.kill(pid(tmp_path / "victim"), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(WorkerError, match=r"a worker process died .*Victim.*--resume goes on"):
        run(stages, tmp_path)
    thread.join()
    assert (tmp_path / "other" / "saved").exists()
    assert not (tmp_path / "victim" / "saved").exists()
    assert not (tmp_path / "z").exists()
    assert_ends(pid(tmp_path / "other"), seconds=workers.GRACE + 5)


# Runs two stages that only a stop ends, and would say so.
PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from recipes.test_workers import Display
from support.stages import stage
from softdimo_fast.recipes.workers import run_stages
if __name__ == "__main__":
    stages = [stage("a", action="stop"), stage("b", action="stop")]
    run_stages(stages, Path(sys.argv[2]), jobs=2, display=Display(), stop=lambda: False)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(ROOT / "tests"), str(tmp_path)], env=environment
    )
    try:
        for name in ("a", "b"):
            wait_for(tmp_path / name / "pid")
        pids = [pid(tmp_path / name) for name in ("a", "b")]
        for process in pids:  # a terminal's Ctrl-C reaches them, and is the parent's affair
            os.kill(process, signal.SIGINT)
            os.kill(process, signal.SIGTERM)
            os.kill(process, signal.SIGUSR1)
        time.sleep(0.3)
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    for process in pids:
        assert_ends(process)
    assert not (tmp_path / "a" / "saved").exists()


def test_the_environment_of_workers_is_not_the_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with workers._environment(workers.THREADS), workers._held_back([signal.SIGINT]):
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OMP_WAIT_POLICY" not in os.environ
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_a_stop_request_leaves_ignored_signals_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

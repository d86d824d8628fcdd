"""No failing disk and no dying process loses a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import names, save

from softdimo_fast.trainers import checkpoint
from softdimo_fast.trainers.checkpoint import CheckpointError, CheckpointWarning, load


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match=r"could not be written in .*checkpoints.*no earlier"):
        save(tmp_path / "checkpoints", 1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(CheckpointError, match=r"Permission denied.*step_00000200 is untouched"):
        save(folder, 300)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_any_failing_call_leaves_the_old_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Every single call of a kind fails once; a checkpoint of the same step survives that too."""
    original = getattr(os, failing)
    for step in (300, 200):
        for failing_call in range(20):
            calls = iter(range(100))

            def once(*args: Any, calls: Iterator[int] = calls, bad: int = failing_call) -> Any:
                if next(calls) == bad:
                    raise OSError(5, "Input/output error")
                return original(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, failing, once)
                try:
                    save(folder, step, keep=3)
                    break
                except CheckpointError as error:
                    assert "Input/output error" in str(error)  # noqa: PT017
            assert {"step_00000100", "step_00000200"} <= set(names(folder))
            assert not [name for name in names(folder) if name.endswith(".tmp")]
            load(folder)
            checkpoint.discard_after(folder, 200)
        else:
            pytest.fail("every call was made to fail, but the save never ended")
        checkpoint.discard_after(folder, 200)


def in_subprocess(
    code: str, *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert not check or result.returncode == 0, result.stderr
    return result


SAVE_BIG = """
import sys, torch
from softdimo_fast.trainers import checkpoint
def big(folder, step):
    tensors = {"model": {"weight": torch.full((300_000,), float(step))}}
    checkpoint.save(folder, step, tensors=tensors, state={}, config={})
"""

FILE_TOO_LARGE = (
    SAVE_BIG
    + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
try:
    big(sys.argv[1], 300)
except checkpoint.CheckpointError as error:
    print(error)
"""
)


def test_a_limit_on_the_size_of_files(folder: Path) -> None:
    message = in_subprocess(FILE_TOO_LARGE, folder).stdout
    assert "the checkpoint of step 300 could not be written in" in message
    assert "File too large" in message
    assert "step_00000200 is untouched" in message
    assert names(folder) == ["latest", "step_00000100", "step_00000200"]
    assert load(folder).step == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 100)
    (small_disk / "ballast").write_bytes(bytes(100_000))
    large = {"model": {"weight": torch.zeros(100_000)}}
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"No space left.*step_00000100 is untouched"):
            checkpoint.save(folder, 200, tensors=large, state={}, config={})
        assert names(folder) == ["latest", "step_00000100"]
    with pytest.raises(CheckpointError, match=r"No space left"):
        checkpoint.save(folder, 200, tensors={}, state={"text": "x" * 400_000}, config={})
    assert names(folder) == ["latest", "step_00000100"]
    (small_disk / "ballast").unlink()
    save(folder, 200)
    assert load(folder).step == 200


def test_a_disk_that_fills_up_at_any_point(small_disk: Path) -> None:
    """With every amount of free space, a save either is complete or leaves what was there."""
    folder = small_disk / "checkpoints"
    save(folder, 100)
    outcomes = set()
    for pages in range(64):
        (small_disk / "ballast").unlink(missing_ok=True)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(bytes(max(free - 4096 * pages, 0)))
        try:
            save(folder, 200)
            outcomes.add("saved")
            assert load(folder).step == 200
        except CheckpointError:
            outcomes.add("refused")
            assert not [name for name in names(folder) if "." in name]
            load(folder)
        checkpoint.discard_after(folder, 100)
        if "saved" in outcomes:
            break
    assert outcomes == {"saved", "refused"}


KILLED_AT_EACH_CALL = """
import json, os, shutil, signal, sys
import torch
from pathlib import Path
from softdimo_fast.trainers import checkpoint

root, results = Path(sys.argv[1]), []

def save(folder, step, value):
    tensors = {"model": {"weight": torch.full((3000,), float(value))}}
    checkpoint.save(folder, step, tensors=tensors, state={"value": value}, config={}, keep=2)

def killed_at(call, folder, step):
    count = 0
    def counted(original):
        def wrapper(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        return wrapper
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    save(folder, step, 2)

for step in (300, 200):
    for call in range(1, 100):
        folder = root / f"{step}_{call}"
        save(folder, 100, 0)
        save(folder, 200, 1)
        child = os.fork()
        if child == 0:
            killed_at(call, folder, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        before = checkpoint.load(folder)
        value = float(before.group("model")["weight"].unique())
        save(folder, 400, 9)
        left = sorted(path.name for path in folder.iterdir())
        results.append([step, call, os.WTERMSIG(status), before.step, value, left])
        shutil.rmtree(folder)
        if not os.WIFSIGNALED(status):
            break
print(json.dumps(results))
"""


def test_killed_at_every_call_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before each call that changes the disk, for a new step and for one that is replaced."""
    results = json.loads(in_subprocess(KILLED_AT_EACH_CALL, tmp_path).stdout)
    assert sum(signal == 9 for _, _, signal, *_ in results) > 20
    for step, call, signal, loaded, value, left in results:
        complete = (step, 2.0) if signal == 0 else None
        allowed = {complete} if complete else {(200, 1.0), (step, 2.0)}
        assert (loaded, value) in allowed, (step, call)
        assert left[0] == "latest"
        assert left[-1] == "step_00000400"
        assert not [name for name in left if "." in name], (step, call)
    assert {(step, loaded) for step, _, _, loaded, *_ in results} >= {(300, 200), (300, 300)}


SAVE_FOREVER = (
    SAVE_BIG
    + """
for step in range(1, 10**6):
    big(sys.argv[1], step)
    print(step, flush=True)
"""
)


def test_killed_at_any_time(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.0123)
    process.kill()
    finished = [int(line) for line in process.stdout.read().split()] or [3]
    process.wait()
    loaded = load(tmp_path / "c")
    assert loaded.step >= finished[-1]
    assert torch.equal(loaded.group("model")["weight"], torch.full((300_000,), float(loaded.step)))


def test_a_step_that_was_being_replaced_is_still_there(folder: Path) -> None:
    (folder / "step_00000200").rename(folder / "step_00000200.old")
    assert load(folder).step == 200
    checkpoint.discard_after(folder, 200)
    assert load(folder, step=200).path.name == "step_00000200.old"
    checkpoint.discard_after(folder, 100)
    assert names(folder) == ["latest", "step_00000100"]


def test_an_old_checkpoint_that_cannot_be_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: object, *args: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.warns(CheckpointWarning, match=r"step_00000100 could not be removed: .*busy"):
        save(folder, 300)
    monkeypatch.undo()
    assert load(folder).step == 300
    save(folder, 400)
    assert names(folder) == ["latest", "step_00000300", "step_00000400"]

"""Stages of no training: what the tests of workers let run in processes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softdimo_fast.recipes.stages import Stage, StageContext, StageResult
from softdimo_fast.trainers import Stopped


@dataclass(frozen=True)
class Step:
    """Writes when it began and ended; what it does between says ``action``.

    "end": no more. "meet NAME": waits until the stage NAME has begun. "fail": raises ValueError.
    "stop": works until it is asked to stop, and saves itself; "lose": and then cannot be saved.
    """

    action: str = "end"

    def __call__(self, context: StageContext) -> StageResult:
        folder = context.folder
        _note(folder, "begin")
        _note(folder, "pid", str(os.getpid()))
        context.report(1, 2)
        action, _, other = self.action.partition(" ")
        if action == "meet":
            wait_for(folder.parent / other / "begin")
        elif action == "fail":
            wait_for(folder.parent / other / "begin")
            raise ValueError(f"{folder.name} failed")
        elif action in ("stop", "lose"):
            _until_asked(context)
            if action == "lose":
                raise ValueError(f"{folder.name} is lost")
            _note(folder, "saved")
            raise Stopped("saved")
        context.report(2, 2)
        _note(folder, "end")
        return StageResult({"pid": os.getpid()})


def _until_asked(context: StageContext) -> None:
    limit = time.monotonic() + 60
    while not context.stop():
        if time.monotonic() > limit:
            raise TimeoutError("nobody asked this stage to stop")
        time.sleep(0.02)


def _note(folder: Path, name: str, text: str | None = None) -> None:
    """One line for each attempt, at once whole."""
    path = folder / name
    before = path.read_text() if path.exists() else ""
    temporary = folder / f"{name}.tmp"
    temporary.write_text(f"{before}{time.time() if text is None else text}\n")
    temporary.replace(path)


def wait_for(path: Path, *, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > limit:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.02)


def stage(name: str, *needs: str, action: str = "end", cost: float = 1.0, **config: Any) -> Stage:
    return Stage(name, name.title(), needs, Step(action), config, cost)

"""Work cut into stages that need each other, run side by side in processes, resumed where it stopped.

A finished stage leaves ``result.json`` (and ``images.safetensors``) in its folder and is not run again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from softdimo_fast import _config
from softdimo_fast._files import write_atomically


class Report(Protocol):
    """Takes how far a stage is."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """What a stage's work gets.

    Attributes:
        folder: the stage's own.
        report: to be told of the progress.
        stop: True when the work should save itself and raise :class:`softdimo_fast.trainers.Stopped`.
    """

    folder: Path
    report: Report
    stop: Callable[[], bool]


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves.

    Attributes:
        values: JSON.
        images: for the picture.
        seconds: of work, over all attempts.
    """

    values: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


Work = Callable[[StageContext], StageResult]


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        name: of its folder.
        title: for people.
        needs: names of the stages whose results it reads.
        work: a picklable callable.
        config: what decides the result; a finished stage of another one is refused, not used.
        cost: seconds on one core of the machine that the estimate is scaled to.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    work: Work
    config: dict[str, Any]
    cost: float


class StageMismatchError(RuntimeError):
    """A folder holds results of another configuration."""


def run_stage(stage: Stage, context: StageContext) -> StageResult:
    """The result of a stage: what an earlier run left, or what the work gives now."""
    finished = load_result(stage, context.folder)
    if finished is not None:
        return finished
    context.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(context.folder)
    try:
        result = stage.work(context)
    finally:
        clock.stop()
    result = StageResult(result.values, result.images, clock.seconds)
    _save_result(stage, context.folder, result)
    return result


def load_result(stage: Stage, folder: Path) -> StageResult | None:
    """What a finished stage left, or None.

    Raises:
        StageMismatchError: it was made with another configuration, or cannot be read.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config, values, digest = dict(stored["config"]), dict(stored["values"]), stored["images"]
        seconds = float(stored["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StageMismatchError(
            f"{path} is damaged ({reason}): remove it to run the stage {stage.name!r} again"
        ) from error
    changes = _config.difference(config, stage.config)
    if changes:
        raise StageMismatchError(
            f"{folder} holds a result of another configuration:\n  " + "\n  ".join(changes)
            + "\nUse that configuration, or another folder."
        )  # fmt: skip
    images = {} if digest is None else _load_images(folder, stage, digest)
    return StageResult(values, images, seconds)


def _load_images(folder: Path, stage: Stage, digest: str) -> dict[str, Tensor]:
    from safetensors.torch import load

    path = folder / "images.safetensors"
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("its sha256 differs")
    except (ValueError, OSError) as error:
        raise StageMismatchError(
            f"{path} is damaged ({error}): remove {folder / 'result.json'} to run the stage "
            f"{stage.name!r} again"
        ) from error
    return load(data)


def _save_result(stage: Stage, folder: Path, result: StageResult) -> None:
    """result.json comes last: it says that the stage is finished."""
    from safetensors.torch import save

    digest = None
    if result.images:
        data = save({name: images.contiguous() for name, images in result.images.items()})
        digest = hashlib.sha256(data).hexdigest()
        write_atomically(folder / "images.safetensors", data)
    document = {
        "config": stage.config, "values": result.values, "images": digest,
        "seconds": result.seconds,
    }  # fmt: skip
    write_atomically(folder / "result.json", json.dumps(document, indent=1).encode())


class Clock:
    """Seconds of work in a folder, over all attempts.

    Attributes:
        seconds: of earlier attempts; after :meth:`stop`, of this one too.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seconds"
        self.seconds = 0.0
        with suppress(OSError, ValueError):  # no earlier attempt, or none that was remembered
            self.seconds = float(self._path.read_text())
        self._start = time.monotonic()

    def stop(self) -> None:
        """Adds the time since the start, and remembers the sum for later attempts."""
        self.seconds = round(self.seconds + time.monotonic() - self._start, 3)
        with suppress(OSError):  # a full disk; what ended the work says so, this must not hide it
            write_atomically(self._path, str(self.seconds).encode())


def estimate(stages: Sequence[Stage], jobs: int, *, scale: float = 1.0) -> float:
    """Wall seconds of the stages on ``jobs`` workers, where each takes ``scale`` times its cost."""
    waiting = order({stage.name: stage for stage in stages})
    running: dict[str, float] = {}
    done: set[str] = set()
    now = 0.0
    while waiting or running:
        ready = [stage for stage in waiting if done.issuperset(stage.needs)]
        for stage in ready[: jobs - len(running)]:
            waiting.remove(stage)
            running[stage.name] = now + scale * stage.cost
        name = min(running, key=lambda n: running[n])
        now = running.pop(name)
        done.add(name)
    return now


def order(stages: Mapping[str, Stage]) -> list[Stage]:
    """The stages with the longest chain of work behind them first: what a free worker should take."""
    followers: dict[str, list[Stage]] = {name: [] for name in stages}
    for stage in stages.values():
        for need in stage.needs:
            followers[need].append(stage)

    def remaining(stage: Stage) -> float:
        return stage.cost + max((remaining(s) for s in followers[stage.name]), default=0.0)

    return sorted(stages.values(), key=remaining, reverse=True)

"""Runs stages in worker processes, each on one thread, as soon as what they need is there."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from softdimo_fast.recipes.stages import (
    Stage,
    StageContext,
    StageResult,
    load_result,
    order,
    run_stage,
)
from softdimo_fast.trainers import Stopped

# One thread a process, and idle threads that sleep: spinning ones make small models 5 to 30 times slower
# where two processes share two cores.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


class Display(Protocol):
    """Shows how far the stages are."""

    def update(self, stage: Stage, done: int, total: int) -> None: ...

    def finish(self, stage: Stage, result: StageResult, *, earlier: bool) -> None: ...

    def close(self) -> None: ...


class WorkerError(RuntimeError):
    """A worker process died."""


def run_stages(
    stages: Sequence[Stage], out: Path, *, jobs: int, display: Display, stop: Callable[[], bool]
) -> dict[str, StageResult]:
    """Results by stage name; finished stages are read, not run.

    Raises:
        Stopped: ``stop`` gave True; the stages that were running are saved.
        WorkerError: a worker died, of lack of memory for instance.
        Exception: what a stage raised, once the stages beside it are saved.
    """
    results: dict[str, StageResult] = {}
    for stage in stages:
        earlier = load_result(stage, out / stage.name)
        if earlier is not None:
            results[stage.name] = earlier
            display.finish(stage, earlier, earlier=True)
    if len(results) == len(stages):
        return results
    by_name = {stage.name: stage for stage in stages}
    waiting = [stage for stage in order(by_name) if stage.name not in results]
    with _Workers(jobs, out) as workers:
        _Scheduler(workers, by_name, waiting, results, display, stop).run()
    return results


@dataclass
class _Message:
    stage: str
    done: int
    total: int


class _Workers:
    """The pool, its message queue and its stop flag."""

    def __init__(self, jobs: int, out: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs, self.out = jobs, out
        self.messages: Any = context.Queue()
        self.stopping: Any = context.Event()
        self._pool = ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_start_worker,
            initargs=(self.messages, self.stopping),
        )  # fmt: skip

    def submit(self, stage: Stage) -> Future[StageResult]:
        with _environment(THREADS):  # workers start at the first submissions, and inherit it
            return self._pool.submit(_work, stage, self.out / stage.name)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.messages.close()


class _Scheduler:
    def __init__(
        self, workers: _Workers, stages: dict[str, Stage], waiting: list[Stage],
        results: dict[str, StageResult], display: Display, stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.workers, self.stages, self.waiting, self.results = workers, stages, waiting, results
        self.display, self.stop = display, stop
        self.running: dict[Future[StageResult], Stage] = {}

    def run(self) -> None:
        while self.waiting or self.running:
            self._start()
            done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
            self._show()
            for future in done:
                stage = self.running.pop(future)
                try:
                    self.results[stage.name] = future.result()
                except BrokenProcessPool as error:
                    raise WorkerError(
                        f"the process of the stage {stage.name!r} died (out of memory, or killed); what was "
                        "saved is kept"
                    ) from error
                self.display.finish(stage, self.results[stage.name], earlier=False)
            if self.stop():
                self._stop()

    def _start(self) -> None:
        for stage in list(self.waiting):
            if len(self.running) == self.workers.jobs:
                return
            if all(need in self.results for need in stage.needs):
                self.waiting.remove(stage)
                self.running[self.workers.submit(stage)] = stage

    def _show(self) -> None:
        while True:
            try:
                message = self.workers.messages.get_nowait()
            except queue.Empty:
                return
            self.display.update(self.stages[message.stage], message.done, message.total)

    def _stop(self) -> None:
        self.workers.stopping.set()
        wait(self.running)
        names = ", ".join(stage.title for stage in self.running.values())
        raise Stopped(f"stopped in {names or 'no stage'}; saved, --resume goes on")


# ---------------------------------------------------------------------------------------------------
# in a worker

_MESSAGES: Any = None
_STOPPING: Any = None


def _start_worker(messages: Any, stopping: Any) -> None:
    global _MESSAGES, _STOPPING
    _MESSAGES, _STOPPING = messages, stopping
    # Ctrl-C reaches the whole process group: the parent alone decides, and tells by the flag.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _follow_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(stage: Stage, folder: Path) -> StageResult:
    def report(done: int, total: int) -> None:
        _MESSAGES.put(_Message(stage.name, done, total))

    return run_stage(stage, StageContext(folder, report, _STOPPING.is_set))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

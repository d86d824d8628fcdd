"""Runs stages in worker processes, each on one thread, as soon as what they need is there."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
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
from softdimo_fast.trainers.stopping import SIGNALS

# One thread a process, and idle threads that sleep: spinning ones make small models 5 to 30 times slower
# where two processes share two cores.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
# Seconds that an idle worker lives on after the end was announced, to hand over its last result.
GRACE = 5.0


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
        # Not an Event: its lock, if a worker was killed while it held it, would stop all others.
        self._stopping: Any = context.RawValue("b", 0)
        self._processes: set[Any] = set()
        self._pool = ProcessPoolExecutor(
            jobs, mp_context=context, initializer=_start_worker,
            initargs=(self.messages, self._stopping),
        )  # fmt: skip

    def submit(self, stage: Stage) -> Future[StageResult]:
        # Workers start at the first submissions, and inherit both: the variables, and that a signal waits
        # until they can ignore it.
        before = set(multiprocessing.active_children())
        with _environment(THREADS), _held_back(SIGNALS):
            future = self._pool.submit(_work, stage, self.out / stage.name)
        self._processes |= set(multiprocessing.active_children()) - before
        return future

    def lost(self) -> bool:
        """Whether a worker died.

        The pool does not see it at once where the worker started after the pool's thread had begun to wait:
        the death of the only busy one would never be noticed.
        """
        return bool(wait_for([process.sentinel for process in self._processes], timeout=0))

    def stop(self) -> None:
        """Asks the running stages to save themselves."""
        self._stopping.value = 1

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
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
                self._finish(future)
            self._require_workers()
            if self.stop() and (self.waiting or self.running):
                self._stop()

    def _finish(self, future: Future[StageResult]) -> None:
        try:
            result = future.result()
        except BrokenProcessPool as error:
            raise self._worker_error() from error
        stage = self.running.pop(future)
        self.results[stage.name] = result
        self.display.finish(stage, result, earlier=False)

    def _require_workers(self) -> None:
        if self.running and self.workers.lost():
            raise self._worker_error()

    def _worker_error(self) -> WorkerError:
        titles = ", ".join(stage.title for stage in self.running.values()) or "no stage"
        return WorkerError(
            f"a worker process died (killed, or out of memory) while these ran: {titles}. What was saved is "
            "kept: --resume goes on"
        )

    def _start(self) -> None:
        for stage in list(self.waiting):
            if len(self.running) == self.workers.jobs:
                return
            if all(need in self.results for need in stage.needs):
                self.waiting.remove(stage)
                try:
                    self.running[self.workers.submit(stage)] = stage
                except BrokenProcessPool as error:  # an idle worker died
                    raise self._worker_error() from error

    def _show(self) -> None:
        newest: dict[str, _Message] = {}  # of several at once, earlier ones would spoil the rates
        with suppress(queue.Empty):
            while True:
                message = self.workers.messages.get_nowait()
                newest[message.stage] = message
        for message in newest.values():
            self.display.update(self.stages[message.stage], message.done, message.total)

    def _stop(self) -> None:
        self.workers.stop()
        while wait(self.running, timeout=0.2).not_done:
            self._require_workers()
        for future in list(self.running):
            with suppress(Stopped):  # another error is one: that stage is not saved
                self._finish(future)
        left = [*self.running.values(), *self.waiting]
        if left:
            raise Stopped(f"stopped, and saved: --resume goes on with {left[0].title}")


# ---------------------------------------------------------------------------------------------------
# in a worker

_MESSAGES: Any = None
_STOPPING: Any = None
_WORKING = threading.Lock()


def _start_worker(messages: Any, stopping: Any) -> None:
    global _MESSAGES, _STOPPING
    _MESSAGES, _STOPPING = messages, stopping
    messages.cancel_join_thread()  # the end of a worker does not wait for a reader of its progress
    # Ctrl-C reaches the whole process group: the parent alone decides, and tells by the flag.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_follow_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _follow_parent() -> None:
    """Ends this process when it is of no more use: else it would wait for work for ever.

    At once if the parent was killed. After the end was announced, once the last result is handed over: the
    pool does that itself, but not when another worker died.
    """
    parent = multiprocessing.parent_process()
    while not _stopping():
        if parent is not None and wait_for([parent.sentinel], timeout=0.5):
            os._exit(1)
    with _WORKING:
        pass  # the running stage has saved itself
    time.sleep(GRACE)
    os._exit(0)


def _stopping() -> bool:
    return bool(_STOPPING.value)


def _work(stage: Stage, folder: Path) -> StageResult:
    def report(done: int, total: int) -> None:
        _MESSAGES.put(_Message(stage.name, done, total))

    with _WORKING:
        if _stopping():
            raise Stopped("stopped before it began")
        return run_stage(stage, StageContext(folder, report, _stopping))


@contextmanager
def _held_back(signals: Sequence[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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

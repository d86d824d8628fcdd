"""The whole run: workers, report, guard; called by ``softdimo bench`` and by ``arguments``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from softdimo_fast._files import write_atomically
from softdimo_fast.benchmark import bars, guard, page, results, settings, tables
from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.display import Display, duration, nominal_seconds, nominal_start
from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.results import Results
from softdimo_fast.benchmark.settings import Settings

FELL = 1
CSV, MARKDOWN, HTML = "results.csv", "report.md", "report.html"
ROOT = Path(__file__).resolve().parent.parent.parent
COMPILE_CACHE = "compile-cache"


def run(
    out: Path,
    chosen: Settings,
    *,
    resume: bool = False,
    table: Path | None = None,
    tolerance: float = guard.TOLERANCE,
) -> int:
    """Measures, writes ``results.csv``, ``report.md`` and ``report.html``, and compares with a table.

    Args:
        out: the folder; finished cases are kept in it.
        chosen: what to measure.
        resume: go on with the run in the folder.
        table: a committed ``results.csv`` to hold the ratios against.
        tolerance: how far a ratio may fall, as a share of the committed one.

    Returns:
        0, or 1 where a ratio fell.

    Raises:
        BenchmarkError: an option, a file or the folder is not as it must be, or a worker failed.
        KeyboardInterrupt: it was stopped; what was finished is kept, and in the three files.
    """
    chosen.check()
    if not 0 <= tolerance < 1:
        raise BenchmarkError(f"--tolerance must be in [0, 1), got {tolerance:g}")
    committed = None if table is None else results.from_csv(table)
    _require_device(chosen.device)
    _prepare(out, chosen, resume=resume)
    try:
        _measure(out, chosen)
    finally:  # a run that was stopped has a report too, of what it finished
        found = results.collect(out, chosen.selected(), chosen.allocators)
        if found.rows:
            write_report(out, found)
    print(_summary(found))
    print(f"Open {out / HTML}; the same in {out / MARKDOWN} and {out / CSV}", flush=True)
    if committed is None:
        return 0
    comparison = guard.compare(found, committed, tolerance)
    print(guard.render(comparison, tolerance), flush=True)
    return FELL if comparison.fallen else 0


def write_report(out: Path, found: Results) -> None:
    """The three files, each whole or not at all."""
    write_atomically(out / CSV, results.to_csv(found).encode())
    write_atomically(out / MARKDOWN, tables.markdown(found).encode())
    write_atomically(out / HTML, page.render(found).encode())


def _require_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise BenchmarkError("--device cuda: torch finds no CUDA device here")


def _prepare(out: Path, chosen: Settings, *, resume: bool) -> None:
    """The folder can be written, and holds this very run where one is to be resumed, else none."""
    mark = out / settings.MARK
    if resume:
        if not mark.exists():
            raise BenchmarkError(
                f"--resume: {out} holds no run to go on with: leave --resume out to start one"
            )
        stored = settings.load(out)
        if stored != chosen:
            raise BenchmarkError(
                f"--resume: {out} holds another run: give the options of {stored.command()!r}, or another "
                "folder by --out"
            )
    elif mark.exists():
        raise BenchmarkError(
            f"--out: {out} holds a run already: --resume goes on with it, or name another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        settings.save(out, chosen)
    except OSError as error:
        raise BenchmarkError(f"--out must be a folder that can be written in: {error}") from error


def _measure(out: Path, chosen: Settings) -> None:
    """Starts a worker for every allocator that is not finished."""
    waiting = {
        allocator: left
        for allocator in chosen.allocators
        if (left := _unfinished(out, chosen, allocator))
    }
    if not waiting:
        return
    expected: list[float] = []
    for allocator, left in waiting.items():
        expected.append(nominal_start(chosen))
        expected += [nominal_seconds(case, chosen, allocator) for case in left]
    count = sum(map(len, waiting.values()))
    where = "a GPU" if chosen.device == "cuda" else f"{chosen.threads} threads"
    print(
        f"{count} cases on {where}, about {duration(sum(expected))} (as two cores of a server of 2023 take). "
        "Leave the machine alone meanwhile; Ctrl-C stops, --resume goes on.",
        flush=True,
    )
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(
            f"The machine is busy: {busy:.1f} processes on average in the last minute.", flush=True
        )
    display = Display(expected)
    try:
        for allocator in waiting:
            _run_worker(out, chosen, allocator, display)
    finally:
        display.close()
    shutil.rmtree(out / COMPILE_CACHE, ignore_errors=True)


def _unfinished(out: Path, chosen: Settings, allocator: str) -> list[Case]:
    return [
        case for case in chosen.selected() if not results.case_path(out, allocator, case).exists()
    ]


def _run_worker(out: Path, chosen: Settings, allocator: str, display: Display) -> None:
    """One process to its end; what it has finished is kept whatever happens."""
    command = [sys.executable, "-m", "softdimo_fast.benchmark.worker", str(out), allocator]
    worker = subprocess.Popen(
        command, env=_environment(out, chosen, allocator), stdout=subprocess.PIPE, text=True
    )
    try:
        assert worker.stdout is not None
        for line in worker.stdout:
            key = line.split()[0] if line.strip() else ""
            display.finished(f"{key} ({allocator})")
        code = worker.wait()
    except BaseException:  # Ctrl-C reaches it too, but not every way to end does
        worker.terminate()
        worker.wait()
        raise
    if code:
        raise BenchmarkError(
            f"the process of allocator {allocator!r} ended with code {code}; what it said is above, and "
            "finished cases are kept: --resume goes on"
        )


def _environment(out: Path, chosen: Settings, allocator: str) -> dict[str, str]:
    """The variables of a worker: its allocator, its threads, and compilers that start from nothing."""
    found = {k: v for k, v in os.environ.items() if k != settings.HUGE_PAGES_VARIABLE}
    if allocator == settings.HUGE_PAGES:
        found[settings.HUGE_PAGES_VARIABLE] = "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        found[name] = str(chosen.threads)
    found["TORCHINDUCTOR_CACHE_DIR"] = str((out / COMPILE_CACHE).absolute())
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    return found


def _summary(found: Results) -> str:
    verdicts = bars.judge(found)
    met = sum(bool(one.met) for one in verdicts)
    lines = [f"{met} of {len(verdicts)} bars met"]
    lines += [f"  missed: {tables.bar_line(one)}" for one in verdicts if not one.met]
    return "\n".join(lines)

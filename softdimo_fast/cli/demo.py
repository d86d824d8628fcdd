"""``softdimo demo``: Soft-Di[M]O on real images, from tokenizer to TTEO, offline, in minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softdimo_fast._files import write_atomically
from softdimo_fast.cli.errors import UsageError, require_folder
from softdimo_fast.trainers.progress import TerminalProgress
from softdimo_fast.trainers.stopping import StopRequest

# What the demo imports beyond the core, and where it comes from.
EXTRAS = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib"}
# Seconds of `_probe` on the machine on which the stages' costs were measured.
PROBE_SECONDS = 0.30
FAILED_BARS = 1
# What says that a folder holds a demo, and of what.
MARK = "demo.json"


def run(
    out: Path = Path("runs/demo"),
    seed: int = 0,
    seeds: int = 1,
    quick: bool = False,
    resume: bool = False,
    jobs: int = 2,
) -> int:
    """Trains and measures everything on scikit-learn's 8x8 digits; ends with report.html.

    Args:
        out: the run folder. Stages, checkpoints and logs are kept there.
        seed: of everything random.
        seeds: how many runs, with the seeds from --seed on; their mean is judged too.
        quick: a few steps of everything, in under a minute: shows that all works, judges nothing.
        resume: go on with the demo in the folder; finished stages are kept.
        jobs: processes, of one thread each.
    """
    _require(seeds >= 1, "--seeds", seeds, "at least 1")
    _require(jobs >= 1, "--jobs", jobs, "at least 1")
    _require_extras()
    folders = (
        {seed + i: out / f"seed_{seed + i}" for i in range(seeds)} if seeds > 1 else {seed: out}
    )
    _prepare(out, folders, quick=quick, resume=resume)
    with StopRequest() as stop:
        _announce(folders, quick, jobs)
        finished = [_one_run(folders[seed], seed, quick, jobs, stop) for seed in folders]
    missed = [bar for metrics in finished for bar in metrics["bars"] if not bar["holds"]]
    if seeds > 1:
        missed += _judge_mean(out, finished)
    return FAILED_BARS if missed and not quick else 0


def _one_run(out: Path, seed: int, quick: bool, jobs: int, stop: StopRequest) -> dict[str, Any]:
    """One seed's run: its metrics, which are also in its folder."""
    from softdimo_fast.recipes.demo import demo_stages
    from softdimo_fast.recipes.stages import Clock
    from softdimo_fast.recipes.workers import run_stages
    from softdimo_fast.report.demo import demo_metrics, write_demo

    stages = demo_stages(seed, quick=quick)
    print(f"seed {seed}, in {out}", flush=True)
    write_atomically(out / MARK, _mark(seed, quick))
    display, clock = _Display(), Clock(out)
    try:
        results = run_stages(stages, out, jobs=jobs, display=display, stop=lambda: stop.requested)
    finally:
        display.close()
        if display.worked:  # a finished demo that is only looked at again stays as it is
            clock.stop()
    results = {stage.name: results[stage.name] for stage in stages}
    metrics = demo_metrics(seed, clock.seconds, results, quick=quick, command=_command(seed, quick))
    write_demo(out, stages, results, metrics)
    _print_tables(out, stages, metrics)
    return metrics


# ---------------------------------------------------------------------------------------------------
# before any work


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {value}")


def _require_extras() -> None:
    missing = [package for module, package in EXTRAS.items() if _absent(module)]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}: pip install "softdimo-fast[demo]"')


def _absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def _mark(seed: int, quick: bool) -> bytes:
    return (json.dumps({"seed": seed, "quick": quick}) + "\n").encode()


def _prepare(out: Path, folders: Mapping[int, Path], *, quick: bool, resume: bool) -> None:
    """The folders can be written, and hold this very demo where one is to be resumed, else none."""
    begun = {seed: folder for seed, folder in folders.items() if (folder / MARK).exists()}
    others = out.glob(f"seed_*/{MARK}") if len(folders) == 1 else out.glob(MARK)
    for other in others:
        raise UsageError(
            f"{out} holds a demo of {'several seeds' if len(folders) == 1 else 'one seed'} "
            f"({other}): --out names another folder"
        )
    if begun and not resume:
        raise UsageError(
            f"{out} holds a demo already: --resume goes on with it, --out names another folder"
        )
    if resume and not begun:
        raise UsageError(f"{out} holds no demo to resume: leave out --resume to start one")
    for seed, folder in begun.items():
        stored = (folder / MARK).read_bytes()
        if stored != _mark(seed, quick):
            raise UsageError(
                f"{folder} holds another demo, of {stored.decode(errors='replace').strip()}: give --seed and "
                "--quick as it has them, or another folder by --out"
            )
    for folder in folders.values():
        require_folder("--out", folder)


def _announce(folders: Mapping[int, Path], quick: bool, jobs: int) -> None:
    """What is to do, and about how long it will take."""
    from softdimo_fast.recipes.demo import demo_stages
    from softdimo_fast.recipes.stages import estimate, load_result

    costs, count = [], 0
    for seed, folder in folders.items():
        stages = {stage.name: stage for stage in demo_stages(seed, quick=quick)}
        left = [s for s in stages.values() if load_result(s, folder / s.name) is None]
        done = stages.keys() - {stage.name for stage in left}
        costs.append(estimate([_without(stage, done) for stage in left], jobs))
        count += len(left)
    print("Soft-Di[M]O on handwritten digits")
    if count:
        seconds = sum(costs) * _probe() / PROBE_SECONDS
        print(f"{count} stages in {jobs} processes: about {_duration(seconds)} on this machine")
    if quick:
        print("A quick run: a few steps of everything. Its images are not good.")
    sys.stdout.flush()


def _without(stage: Any, done: set[str]) -> Any:
    return replace(stage, needs=tuple(need for need in stage.needs if need not in done))


def _probe() -> float:
    """Seconds of a small fixed piece of training on one thread: how fast this machine is."""
    import torch

    from softdimo_fast.models import create
    from softdimo_fast.recipes import digits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = create(digits.teacher(0).model)
    tokens = torch.zeros(128, digits.LENGTH, dtype=torch.int64)
    condition = torch.zeros(128, dtype=torch.int64)
    model.logits(model.embed(tokens), condition).sum().backward()
    started = time.perf_counter()
    for _ in range(10):
        model.logits(model.embed(tokens), condition).sum().backward()
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)
    return seconds


# ---------------------------------------------------------------------------------------------------
# while it works


class _Display:
    """A bar for each stage on a terminal, plain lines elsewhere.

    Attributes:
        worked: whether any stage ran now.
    """

    def __init__(self) -> None:
        self.worked = False
        self._bars: dict[str, tuple[TerminalProgress, int]] = {}
        self._finished: set[str] = set()

    def update(self, stage: Any, done: int, total: int) -> None:
        if stage.name in self._finished:  # a message that its result overtook
            return
        self.worked = True
        if stage.name not in self._bars:  # a resumed one does not begin at 0
            self._bars[stage.name] = TerminalProgress(total, stage.title, first=done), total
        self._bars[stage.name][0].update(done)

    def finish(self, stage: Any, result: Any, *, earlier: bool) -> None:
        self.worked = self.worked or not earlier
        self._finished.add(stage.name)
        bar, total = self._bars.pop(stage.name, (None, 0))
        if bar is not None:
            bar.update(total)
            bar.close()
        else:
            when = "done before" if earlier else "done"
            print(f"{stage.title}: {when} ({_duration(result.seconds)})", file=sys.stderr)

    def close(self) -> None:
        for bar, _ in self._bars.values():
            bar.close()
        self._bars.clear()


# ---------------------------------------------------------------------------------------------------
# at the end


def _command(seed: int, quick: bool) -> str:
    return f"softdimo demo --seed {seed}" + (" --quick" if quick else "")


def _judge_mean(out: Path, finished: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars over all seeds, written to ``metrics.json`` beside the runs; those that do not hold."""
    from softdimo_fast.recipes.evaluation import bars_over_seeds

    over_seeds = bars_over_seeds(finished)
    document = {
        "seeds": [metrics["seed"] for metrics in finished],
        "bars": over_seeds,
        "runs": list(finished),
    }
    write_atomically(out / "metrics.json", (json.dumps(document, indent=1) + "\n").encode())
    print(f"\nover {len(finished)} seeds")
    _print_bars(over_seeds)
    return [bar for bar in over_seeds if not bar["holds"]]


def _print_tables(out: Path, stages: Sequence[Any], metrics: Mapping[str, Any]) -> None:
    columns = ("fd", "accuracy", "precision", "recall", "coverage", "entropy")
    print("\n" + " " * 14 + "".join(f"{column:>11}" for column in columns))
    for name, row in metrics["rows"].items():
        print(f"{name:14}" + "".join(f"{row[column]:11.3f}" for column in columns))
    print(f"the judge's own accuracy, on held-out scans: {metrics['judge_accuracy']:.3f}")
    print("\nwanted digit   hit rate        fd")
    for name, row in metrics["search"].items():
        print(f"{name:14}{row['hit_rate']:9.3f} {row['fd']:9.3f}")
    print("\nbars" + (", which a quick run need not reach" if metrics["quick"] else ""))
    _print_bars([*metrics["bars"]])
    extra = metrics["stretch"]
    print(
        f"  beyond the paper: {extra['name']} {extra['value']:.3f} "
        f"(wanted {extra['sense']} {extra['bound']:g})"
    )
    titles = {stage.name: stage.title for stage in stages}
    print("\nseconds of each stage")
    for name, seconds in metrics["stage_seconds"].items():
        print(f"  {titles[name]:24}{seconds:8.1f}")
    print(f"in all {_duration(metrics['seconds'])}. Open {out / 'report.html'}", flush=True)


def _print_bars(bars: Sequence[Mapping[str, Any]]) -> None:
    for bar in bars:
        mark = "ok    " if bar["holds"] else "MISSED"
        print(f"  {mark} {bar['name']}: {bar['value']:.3f} ({bar['sense']} {bar['bound']:g})")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""``softdimo demo``: Soft-Di[M]O on real images, from tokenizer to TTEO, offline, in minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softdimo_fast.cli.errors import UsageError
from softdimo_fast.trainers.progress import TerminalProgress
from softdimo_fast.trainers.stopping import StopRequest

# What the demo imports beyond the core, and where it comes from.
EXTRAS = {"sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib"}
# Seconds of `_probe` on the machine on which the stages' costs were measured.
PROBE_SECONDS = 0.30
FAILED_BARS, STOPPED = 1, 75


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
        seeds: how many runs, with seeds seed, seed + 1, ...; their mean is judged too.
        quick: a few steps of everything, in under a minute: shows that all works, judges nothing.
        resume: go on in a folder that holds a demo; finished stages are kept.
        jobs: processes, of one thread each.
    """
    _require(seeds >= 1, "--seeds", seeds, "at least 1")
    _require(jobs >= 1, "--jobs", jobs, "at least 1")
    _require_extras()
    folders = [out] if seeds == 1 else [out / f"seed_{seed + i}" for i in range(seeds)]
    for folder in folders:
        _prepare(folder, resume=resume)
    with StopRequest() as stop:
        finished = [
            _one_run(folder, seed + i, quick, jobs, stop) for i, folder in enumerate(folders)
        ]
    missed = [bar for metrics in finished for bar in metrics["bars"] if not bar["holds"]]
    if seeds > 1:
        missed += _judge_mean(out, finished)
    if quick:
        print("\nA quick run: its images are not good, and the bars are not judged.")
        return 0
    return FAILED_BARS if missed else 0


def _one_run(out: Path, seed: int, quick: bool, jobs: int, stop: StopRequest) -> dict[str, Any]:
    """One seed's run: its metrics, which are also in its folder."""
    from softdimo_fast.recipes.demo import demo_stages
    from softdimo_fast.recipes.workers import run_stages
    from softdimo_fast.report.demo import demo_metrics, write_demo

    stages = demo_stages(seed, quick=quick)
    display = _Display(len(stages))
    _announce(out, seed, stages, jobs)
    started = time.monotonic()
    try:
        results = run_stages(stages, out, jobs=jobs, display=display, stop=lambda: stop.requested)
    finally:
        display.close()
    results = {stage.name: results[stage.name] for stage in stages}
    seconds = time.monotonic() - started if display.earlier == 0 else _stored_seconds(out, results)
    metrics = demo_metrics(seed, seconds, results, quick=quick)
    write_demo(out, stages, results, metrics, command=_command(seed, quick))
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


def _prepare(out: Path, *, resume: bool) -> None:
    """The folder can be written, and holds a demo only where that is wanted."""
    out.mkdir(parents=True, exist_ok=True)
    begun = any((out / name).exists() for name in ("judge", "tokenizer", "metrics.json"))
    if begun and not resume:
        raise UsageError(
            f"{out} holds a demo already: --resume goes on with it, --out names another folder"
        )
    if resume and not begun:
        raise UsageError(f"{out} holds no demo to resume: leave out --resume to start one")
    probe = out / ".writable"
    probe.touch()
    probe.unlink()


def _announce(out: Path, seed: int, stages: Sequence[Any], jobs: int) -> None:
    from softdimo_fast.recipes.stages import estimate, load_result

    left = [stage for stage in stages if load_result(stage, out / stage.name) is None]
    done = {stage.name for stage in stages} - {stage.name for stage in left}
    print(f"Soft-Di[M]O on the digits: seed {seed}, {out}")
    if left:
        open_needs = [_without(stage, done) for stage in left]
        seconds = estimate(open_needs, jobs, scale=_probe() / PROBE_SECONDS)
        print(
            f"{len(left)} stages, {jobs} processes: about {_duration(seconds)} if the cores are idle"
        )
    sys.stdout.flush()


def _without(stage: Any, done: set[str]) -> Any:
    from dataclasses import replace

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
    """A bar for each stage on a terminal, plain lines elsewhere."""

    def __init__(self, count: int) -> None:
        self.count, self.finished, self.earlier = count, 0, 0
        self._bars: dict[str, TerminalProgress] = {}

    def update(self, stage: Any, done: int, total: int) -> None:
        if stage.name not in self._bars:
            self._bars[stage.name] = TerminalProgress(total, stage.title, first=0)
        self._bars[stage.name].update(done)

    def finish(self, stage: Any, result: Any, *, earlier: bool) -> None:
        self.finished += 1
        self.earlier += earlier
        bar = self._bars.pop(stage.name, None)
        if bar is not None:
            bar.close()
        elif earlier:
            print(f"{stage.title}: done before ({_duration(result.seconds)})", file=sys.stderr)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


# ---------------------------------------------------------------------------------------------------
# at the end


def _stored_seconds(out: Path, results: Mapping[str, Any]) -> float:
    """Of a resumed run: the wall time of the run that finished it, or else the sum of its stages."""
    try:
        stored = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        return float(stored["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return float(sum(result.seconds for result in results.values()))


def _command(seed: int, quick: bool) -> str:
    return f"softdimo demo --seed {seed}" + (" --quick" if quick else "")


def _judge_mean(out: Path, finished: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars over all seeds, written to ``metrics.json`` beside the runs; those that do not hold."""
    from softdimo_fast._files import write_atomically
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
    print("\nwanted digit   hit rate        fd")
    for name, row in metrics["search"].items():
        print(f"{name:14}{row['hit_rate']:9.3f} {row['fd']:9.3f}")
    print()
    _print_bars([*metrics["bars"]])
    extra = metrics["stretch"]
    print(
        f"  beyond the paper: {extra['name']} {extra['value']:.3f} "
        f"(wanted {extra['sense']} {extra['bound']:g})"
    )
    titles = {stage.name: stage.title for stage in stages}
    print("\nseconds: " + ", ".join(
        f"{titles[name]} {seconds:.0f}" for name, seconds in metrics["stage_seconds"].items()
    ))  # fmt: skip
    print(f"in all {_duration(metrics['seconds'])}. Open {out / 'report.html'}")


def _print_bars(bars: Sequence[Mapping[str, Any]]) -> None:
    for bar in bars:
        mark = "ok    " if bar["holds"] else "MISSED"
        print(f"  {mark} {bar['name']}: {bar['value']:.3f} ({bar['sense']} {bar['bound']:g})")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""The process that measures: one for each allocator, which is chosen when a process starts.

    python -m softdimo_fast.benchmark.worker FOLDER ALLOCATOR

It reads the settings in the folder, measures every case that has no file there yet, and prints a line
``KEY SECONDS`` after each; ``command`` starts it and listens.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from softdimo_fast.benchmark import accuracy, ceilings, machine, memory, results, settings, timing
from softdimo_fast.benchmark.cases import PASSES, Case, select_passes
from softdimo_fast.benchmark.ceilings import Ceilings
from softdimo_fast.benchmark.results import Row
from softdimo_fast.benchmark.timing import Budget, Timings
from softdimo_fast.benchmark.workloads import build
from softdimo_fast.benchmark.workloads.common import Absent, Implementation, Workload

FULL = Budget(seconds=0.8, warm_up=0.05, fewest=5, most=200)
QUICK = Budget(seconds=0.6, warm_up=0.02, fewest=3, most=100)
TINY = Budget(seconds=0.0, warm_up=0.0, fewest=2, most=2)


def budget(chosen: settings.Settings) -> Budget:
    """The budget of each pass of a run."""
    if chosen.tiny:
        return TINY
    spent = QUICK if chosen.quick else FULL
    # A GPU takes longer to settle its clocks.
    return replace(spent, warm_up=0.1) if chosen.device == "cuda" else spent


def main(folder: Path, allocator: str) -> None:
    """Measures what is not measured yet."""
    chosen = settings.load(folder)
    torch.set_num_threads(chosen.threads)
    limits = ceilings.measure(
        chosen.device,
        seconds=0.01 if chosen.tiny else 0.3 if chosen.quick else 0.6,
        scale=1e-4 if chosen.tiny else 1.0,
    )
    facts = {
        **machine.facts(chosen.device, chosen.threads),
        "command": chosen.command(),
        "budget": _describe(budget(chosen)),
    }
    results.save_machine(folder, allocator, facts, asdict(limits))
    _say("ceilings", 0.0)
    if not chosen.quick and any(case.compiled for case in chosen.selected()):
        _load_compiler(chosen.device)
    # What lives anyway is not searched again and again by the collections between calls.
    gc.collect()
    gc.freeze()
    for case in chosen.selected():
        path = results.case_path(folder, allocator, case)
        if path.exists():
            continue
        begun = time.perf_counter()
        results.save_case(path, measure_case(case, chosen, allocator, limits))
        _say(case.key, time.perf_counter() - begun)


def measure_case(
    case: Case, chosen: settings.Settings, allocator: str, limits: Ceilings
) -> dict[str, Any]:
    """All passes of a case as the record that its file holds.

    Memory and errors do not depend on the allocator's pages, and are measured with the default one only.
    """
    workload = build(case, chosen.device, tiny=chosen.tiny)
    if chosen.quick:
        _leave_out_compiled(workload)
    rows: list[Row] = []
    missing = [(one.name, one.reason) for one in workload.absent]
    once = allocator == settings.DEFAULT
    ran: set[str] = set()
    for one_pass in select_passes(case, chosen.phases):
        timings = timing.measure(workload, one_pass, budget(chosen))
        missing += [(one.name, one.reason) for one in timings.absent]
        extra, words = _memory(workload, one_pass, timings) if once else ({}, [])
        missing += words
        found = _rows(workload, one_pass, timings, allocator, limits, extra)
        rows += [row for row in found if not chosen.phases or row.phase in chosen.phases]
        ran |= set(timings.seconds)
    if once:
        rows = _with_errors(workload, rows, ran)
    explanation = workload.explanation
    return {
        "rows": [asdict(row) for row in rows],
        "missing": missing,
        "kernel": f"{explanation.kernel} (backend {explanation.backend!r})",
        "accumulators": workload.accumulators,
    }


def _load_compiler(device: str) -> None:
    """So that the first case's seconds of compilation are its own. One that fails is told by the cases."""
    with suppress(Exception):
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))


def _leave_out_compiled(workload: Workload) -> None:
    """Compilation costs seconds, which a quick run does not have."""
    left_out = [one for one in workload.implementations if one.compiled]
    workload.absent += [Absent(one.name, "left out of quick runs") for one in left_out]
    workload.implementations = [one for one in workload.implementations if not one.compiled]


def _memory(
    workload: Workload, one_pass: str, timings: Timings
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Peak extra MiB by implementation, or why there is none."""
    found: dict[str, float] = {}
    for implementation in workload.implementations:
        if implementation.name not in timings.seconds:
            continue
        call = _whole_call(workload, implementation, one_pass)
        try:
            found[implementation.name] = memory.peak_extra_bytes(call, workload.device) / 2**20
        except memory.MemoryUnavailable as error:
            return {}, [("peak extra memory", str(error))]
    return found, []


def _whole_call(
    workload: Workload, implementation: Implementation, one_pass: str
) -> Callable[[], Any]:
    """A call that returns everything it makes for its caller."""

    def forward() -> Any:
        with torch.no_grad():
            return workload.forward(implementation)

    def training() -> Any:
        value = workload.forward(implementation)
        # The graph would keep alive what the backward pass has used up.
        return value.detach(), workload.gradients(value, upstream)

    if one_pass == "forward":
        return forward
    upstream = workload.upstream(forward())
    return training


def _rows(
    workload: Workload,
    one_pass: str,
    timings: Timings,
    allocator: str,
    limits: Ceilings,
    extra: dict[str, float],
) -> list[Row]:
    case, ours = workload.case, workload.implementations[0].name
    rows = []
    for phase in PASSES[one_pass]:
        for name, seconds in timings.seconds.items():
            of_time = timing.spread(seconds[phase])
            of_ratio = timing.ratios(seconds[phase], timings.seconds[ours][phase])
            rows.append(
                Row(
                    allocator=allocator,
                    operator=case.operator,
                    shape=case.shape,
                    variant=case.variant,
                    dtype=case.dtype,
                    phase=phase,
                    implementation=name,
                    backend=workload.explanation.backend if name == ours else "",
                    rounds=len(seconds[phase]),
                    median_ms=1e3 * of_time.median,
                    low_ms=1e3 * of_time.low,
                    high_ms=1e3 * of_time.high,
                    ratio=of_ratio.median,
                    ratio_low=of_ratio.low,
                    ratio_high=of_ratio.high,
                    extra_mib=extra.get(name) if phase != "backward" else None,
                    compile_s=timings.compile_seconds.get(name),
                    **_work_columns(workload, phase, limits, of_time.median),
                )
            )
    return rows


def _work_columns(
    workload: Workload, phase: str, limits: Ceilings, seconds: float
) -> dict[str, Any]:
    """Floor, share and rates; nothing where a phase has no least work of its own."""
    work = workload.work.get(phase)
    if work is None:
        return {}
    floor, bound = limits.floor(work, workload.case.dtype)
    moved = work.read + work.written
    return {
        "floor_ms": 1e3 * floor,
        "bound": bound,
        "share": floor / seconds,
        "bytes": moved,
        "flops": work.flops,
        "exponentials": work.exponentials,
        "gbytes_per_s": moved / seconds / 1e9,
        "gflop_per_s": work.flops / seconds / 1e9,
    }


def _with_errors(workload: Workload, rows: list[Row], ran: set[str]) -> list[Row]:
    """The rows with their errors: of the value everywhere, of gradients where they are."""
    true = accuracy.exact(workload)
    if true is None:
        return rows
    found = {
        one.name: accuracy.errors(workload, one, true)
        for one in workload.implementations
        if one.name in ran
    }
    del true
    return [
        Row(
            **{
                **asdict(row),
                "error_value": found[row.implementation].value,
                "error_gradient": None
                if row.phase == "forward"
                else found[row.implementation].gradient,
            }
        )
        for row in rows
    ]


def _describe(spent: Budget) -> str:
    return (
        f"{spent.seconds:g} s a pass, at least {spent.fewest} and at most {spent.most} rounds, "
        f"{spent.warm_up:g} s of warm-up for each implementation"
    )


def _say(key: str, seconds: float) -> None:
    print(key, f"{seconds:.3f}", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except KeyboardInterrupt:
        sys.exit(130)

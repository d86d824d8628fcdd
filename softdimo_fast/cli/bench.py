"""``softdimo bench``: every operator beside what it replaces, timed on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from softdimo_fast.cli.errors import UsageError

Names = Annotated[tuple[str, ...], arg(metavar="NAME", help_behavior_hint="(default: all)")]


def run(
    out: Path = Path("runs/bench"),
    quick: bool = False,
    device: str = "cpu",
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None,
    operator: Names = (),
    shape: Names = (),
    dtype: Names = (),
    phase: Names = (),
    floors: bool = False,
    resume: bool = False,
    guard: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint="(optional)")] = None,
    tolerance: float = 0.15,
) -> int:
    """Times every operator beside what it replaces, with the machine's own limits; ends with report.html.

    Args:
        out: the folder; finished cases are kept there.
        quick: a few cases, in about 90 s instead of 12 minutes.
        device: cpu or cuda.
        threads: of the CPU.
        operator: only these operators.
        shape: only these shapes, for instance maskgit.
        dtype: only these of float32, bfloat16, autocast.
        phase: only these of forward, backward, both.
        floors: print the predicted least times of the cases on A100, H100 and H200; measures nothing.
        resume: go on with the run in the folder.
        guard: a results.csv, for instance of benchmarks/results; the exit code is 1 if a ratio fell below it.
        tolerance: of the guard: the share that a ratio may fall.
    """
    import torch

    from softdimo_fast.benchmark import command
    from softdimo_fast.benchmark.errors import BenchmarkError
    from softdimo_fast.benchmark.floors import predict
    from softdimo_fast.benchmark.settings import Settings

    chosen = Settings(
        quick=quick,
        device="cuda" if floors else device,
        threads=torch.get_num_threads() if threads is None else threads,
        operators=operator,
        shapes=shape,
        dtypes=dtype,
        phases=phase,
    )
    try:
        if floors:
            print(predict(chosen))
            return 0
        return command.run(out, chosen, resume=resume, table=guard, tolerance=tolerance)
    except BenchmarkError as error:
        raise UsageError(str(error)) from error

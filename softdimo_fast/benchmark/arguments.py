"""``python -m softdimo_fast.benchmark``: the benchmark where only torch is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from softdimo_fast.benchmark.cases import DTYPES, OPERATORS, PHASES
from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.guard import TOLERANCE
from softdimo_fast.benchmark.settings import Settings
from softdimo_fast.benchmark.shapes import SHAPES

OUT = Path("runs/bench")
WRONG_INPUT, INTERRUPTED = 2, 130


def parser() -> argparse.ArgumentParser:
    """The options, the same as those of ``softdimo bench``."""
    found = argparse.ArgumentParser(
        prog="python -m softdimo_fast.benchmark",
        description="Times every operator beside what it replaces, and the machine's own limits.",
    )
    found.add_argument("--out", type=Path, default=OUT, help="the folder (default: %(default)s)")
    found.add_argument("--quick", action="store_true", help="a few cases, in about 90 s")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    found.add_argument("--threads", type=int, help="of the CPU (default: all that torch uses)")
    for name, known in (
        ("operator", OPERATORS),
        ("shape", tuple(SHAPES)),
        ("dtype", DTYPES),
        ("phase", PHASES),
    ):
        found.add_argument(
            f"--{name}", nargs="+", default=[], metavar="NAME", help=f"only {', '.join(known)}"
        )
    found.add_argument(
        "--floors", action="store_true",
        help="print the predicted least times on A100, H100 and H200; measures nothing",
    )  # fmt: skip
    found.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    found.add_argument("--guard", type=Path, help="a table of results that no ratio may fall below")
    found.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help="of the guard: the share that a ratio may fall (default: %(default)s)",
    )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code."""
    import torch

    from softdimo_fast.benchmark import command, floors

    given = parser().parse_args(arguments)
    try:
        chosen = Settings(
            quick=given.quick,
            device="cuda" if given.floors else given.device,
            threads=torch.get_num_threads() if given.threads is None else given.threads,
            operators=tuple(given.operator),
            shapes=tuple(given.shape),
            dtypes=tuple(given.dtype),
            phases=tuple(given.phase),
        )
        if given.floors:
            print(floors.predict(chosen))
            return 0
        return command.run(
            given.out, chosen, resume=given.resume, table=given.guard, tolerance=given.tolerance
        )
    except BenchmarkError as error:
        print(f"softdimo_fast.benchmark: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(
            "softdimo_fast.benchmark: interrupted; what was finished is in the report, and --resume goes on",
            file=sys.stderr,
        )
        return INTERRUPTED

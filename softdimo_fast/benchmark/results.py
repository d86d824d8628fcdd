"""Measured rows: kept case by case while a run works, and as one table afterwards."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from softdimo_fast._files import write_atomically
from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.errors import BenchmarkError

CASES, MACHINE = "cases", "machine"


@dataclass(frozen=True)
class Row:
    """One implementation in one phase of one case.

    Attributes:
        allocator: "default", or "thp": torch asked for huge pages.
        operator, shape, variant, dtype, phase, implementation: what was measured.
        backend: of ours: which one ran.
        rounds: how often.
        median_ms, low_ms, high_ms: time, and its 20 % and 80 % quantiles.
        ratio, ratio_low, ratio_high: this time over ours, the median and quantiles of the rounds' ratios;
            above 1 ours is faster.
        floor_ms: the least time by the measured ceilings; bound: what binds it, "memory" or "product".
        share: floor / median; 1 is the machine's limit.
        bytes, flops, exponentials: the least work.
        gbytes_per_s, gflop_per_s: the rates at which that work was done.
        extra_mib: peak memory beyond inputs and results.
        error_value, error_gradient: norm-relative, against float64.
        compile_s: of a compiled implementation: its first call.
    """

    allocator: str
    operator: str
    shape: str
    variant: str
    dtype: str
    phase: str
    implementation: str
    backend: str
    rounds: int
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    floor_ms: float | None = None
    bound: str = ""
    share: float | None = None
    bytes: int | None = None
    flops: int | None = None
    exponentials: int | None = None
    gbytes_per_s: float | None = None
    gflop_per_s: float | None = None
    extra_mib: float | None = None
    error_value: float | None = None
    error_gradient: float | None = None
    compile_s: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs are compared by."""
        return (
            self.allocator, self.operator, self.shape, self.variant, self.dtype, self.phase,
            self.implementation,
        )  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """A comparator that was not measured, and why."""

    operator: str
    implementation: str
    reason: str


@dataclass
class Results:
    """A run.

    Attributes:
        rows: all of them, in the order of the cases.
        missing: comparators that did not run, each reason once.
        machine: facts about processor, versions, commit, date and settings.
        ceilings: by allocator: the machine's measured limits.
        kernels: operator -> what ran as ours.
        accumulators: case key -> bytes of float32 sums beside half-precision gradients.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    accumulators: dict[str, int] = field(default_factory=dict)

    def find(self, **wanted: str) -> Row | None:
        """The first row whose fields are as wanted."""
        return next(self.matching(**wanted), None)

    def matching(self, **wanted: str) -> Iterator[Row]:
        """All rows whose fields are as wanted."""
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in wanted.items()):
                yield row


def case_path(folder: Path, allocator: str, case: Case) -> Path:
    """Where a case's rows lie while the run works."""
    return folder / CASES / allocator / f"{case.key}.json"


def save_case(path: Path, record: Mapping[str, Any]) -> None:
    """Writes what a worker found: "rows", "missing", "kernel", "accumulators"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record) + "\n").encode())


def save_machine(
    folder: Path, allocator: str, facts: Mapping[str, str], ceilings: Mapping[str, float]
) -> None:
    """Writes what a worker's machine is, and can."""
    document = {"facts": facts, "ceilings": ceilings}
    path = folder / f"{MACHINE}-{allocator}.json"
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def collect(folder: Path, cases: Sequence[Case], allocators: Sequence[str]) -> Results:
    """All finished cases of a run.

    Raises:
        BenchmarkError: a file of it is damaged.
    """
    results = Results()
    for allocator in allocators:
        path = folder / f"{MACHINE}-{allocator}.json"
        if path.exists():
            document = _read(path)
            results.machine = results.machine or document["facts"]
            results.ceilings[allocator] = document["ceilings"]
    for case in cases:
        for allocator in allocators:
            path = case_path(folder, allocator, case)
            if path.exists():
                _add(results, case, _read(path))
    return results


def _add(results: Results, case: Case, record: Mapping[str, Any]) -> None:
    results.rows += [Row(**row) for row in record["rows"]]
    for missing in record["missing"]:
        found = Missing(case.operator, *missing)
        if found not in results.missing:
            results.missing.append(found)
    kernels = results.kernels.setdefault(case.operator, [])
    if record["kernel"] not in kernels:
        kernels.append(record["kernel"])
    results.accumulators[case.key] = record["accumulators"]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is damaged ({error}): remove it, then --resume") from error


# ---------------------------------------------------------------------------------------------------
# the table


def to_csv(results: Results) -> str:
    """One line a row, after lines ``# name: value`` that say where it comes from."""
    text = io.StringIO()
    for name, value in results.machine.items():
        text.write(f"# {name}: {value}\n")
    for allocator, ceilings in results.ceilings.items():
        shown = ", ".join(f"{name} {value / 1e9:.4g} G/s" for name, value in ceilings.items())
        text.write(f"# ceilings, {allocator}: {shown}\n")
    names = [one.name for one in fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow({name: _cell(value) for name, value in asdict(row).items()})
    return text.getvalue()


def from_csv(path: Path) -> Results:
    """A table that ``to_csv`` wrote: rows and machine.

    Raises:
        BenchmarkError: it cannot be read, or is no such table.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--guard must be a readable table of results: {error}") from error
    results = Results()
    for line in lines:
        if line.startswith("# "):
            name, _, value = line[2:].partition(": ")
            results.machine[name] = value
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    wanted = [one.name for one in fields(Row)]
    if table.fieldnames != wanted:
        raise BenchmarkError(
            f"--guard must be a table with the columns {', '.join(wanted)}, got {path}"
        )
    try:
        results.rows = list(map(_row, table))
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"--guard must be an undamaged table, got {path}: {error}") from error
    return results


_TEXTS = {
    "allocator", "operator", "shape", "variant", "dtype", "phase", "implementation", "backend", "bound",
}  # fmt: skip
_COUNTS = {"rounds", "bytes", "flops", "exponentials"}


def _row(cells: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        if name in _TEXTS:
            values[name] = cell
        elif cell == "":
            values[name] = None
        else:
            values[name] = int(cell) if name in _COUNTS else float(cell)
    return Row(**values)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else value


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of its first appearance."""
    return list(dict.fromkeys(names))

"""The regression guard: ratios of a run against those of a committed table. Times are never compared."""

from __future__ import annotations

from dataclasses import dataclass

from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.results import Results, Row

# How far a median ratio may lie below the committed one: medians of quiet runs differ by up to 10 %.
TOLERANCE = 0.15
# What makes two runs comparable; a difference is told, and does not stop the comparison.
CONDITIONS = ("processor", "threads", "device", "torch", "C++ kernels")


@dataclass(frozen=True)
class Fallen:
    """A ratio that is worse than it was by more than the tolerance."""

    row: Row
    before: float

    @property
    def change(self) -> float:
        """Of the ratio: -0.2 has lost a fifth."""
        return self.row.ratio / self.before - 1


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        fallen: the worst first.
        compared: how many ratios.
        differences: conditions that are not the same: (name, committed, now).
        absent: committed ratios that this run did not measure.
    """

    fallen: list[Fallen]
    compared: int
    differences: list[tuple[str, str, str]]
    absent: int


def compare(new: Results, committed: Results, tolerance: float = TOLERANCE) -> Comparison:
    """Every comparator's ratio that both have.

    Raises:
        BenchmarkError: they have none in common.
    """
    before = {row.key: row.ratio for row in committed.rows if not _is_ours(row)}
    now = {row.key: row for row in new.rows if not _is_ours(row)}
    common = [key for key in now if key in before]
    if not common:
        raise BenchmarkError("--guard: the table has no ratio that this run measured")
    fallen = [
        Fallen(now[key], before[key])
        for key in common
        if now[key].ratio < (1 - tolerance) * before[key]
    ]
    differences = [
        (name, committed.machine.get(name, "unknown"), new.machine.get(name, "unknown"))
        for name in CONDITIONS
        if committed.machine.get(name) != new.machine.get(name)
    ]
    fallen.sort(key=lambda one: one.change)
    return Comparison(fallen, len(common), differences, len(before) - len(common))


def _is_ours(row: Row) -> bool:
    """Its ratio is 1 by definition."""
    return bool(row.backend)


def render(found: Comparison, tolerance: float) -> str:
    """For the terminal."""
    lines = [
        f"guard: {found.compared} ratios compared, {len(found.fallen)} fell by more than {tolerance:.0%}"
        + (f"; {found.absent} of the table were not measured now" if found.absent else "")
    ]
    lines += [
        f"  other {name}: {before} when committed, {now} now"
        for name, before, now in found.differences
    ]
    if found.fallen:
        lines.append(f"  {'was':>7} {'is':>7} {'change':>7}  over, phase, case")
    for one in found.fallen:
        row = one.row
        words = [row.operator, row.shape, row.variant, row.dtype]
        where = " ".join(filter(None, words)) + (" [thp]" if row.allocator == "thp" else "")
        lines.append(
            f"  {one.before:7.2f} {row.ratio:7.2f} {one.change:+7.0%}  {row.implementation}, {row.phase}, "
            f"{where}"
        )
    return "\n".join(lines)

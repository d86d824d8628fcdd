"""The table of results, the bars and the guard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from support.benchmark import made_up, row, with_ratio

from softdimo_fast.benchmark import bars, guard, results
from softdimo_fast.benchmark.bars import BARS, judge
from softdimo_fast.benchmark.cases import CASES
from softdimo_fast.benchmark.errors import BenchmarkError
from softdimo_fast.benchmark.results import Results, from_csv, to_csv
from softdimo_fast.benchmark.workloads import build


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(to_csv(made_up()), encoding="utf-8")
    return path


def test_the_table_is_read_back(table: Path) -> None:
    before, after = made_up(), from_csv(table)
    for got, wanted in zip(after.rows, before.rows, strict=True):
        for name, value in asdict(wanted).items():
            found = getattr(got, name)
            assert found == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert before.machine.items() <= after.machine.items()
    assert "64 G/s" in after.machine["ceilings, default"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("operator", "operators"), "must be a table with the columns"),
        (lambda text: text.replace(",both,", ",both"), "must be an undamaged table"),
        (lambda text: "", "must be a table with the columns"),
    ],
)
def test_another_table_is_refused(table: Path, change: object, message: str) -> None:
    assert callable(change)
    table.write_text(change(table.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=f"--guard {message}"):
        from_csv(table)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"--guard must be a readable table.*nothing\.csv"):
        from_csv(tmp_path / "nothing.csv")


# ---------------------------------------------------------------------------------------------------
# bars


def test_every_bar_is_about_something_that_is_measured() -> None:
    cases = {case.key: case for case in CASES}
    for bar in BARS:
        case = cases[bar.case.key]
        workload = build(case, tiny=True)
        names = {one.name for one in workload.implementations}
        wanted = bar.against if bar.metric == bars.RATIO else bar.implementation
        assert wanted in names, bar
        assert bar.phase in ("forward", "backward", "both")
        assert bar.phase == "forward" or workload.wanted
        if bar.metric == bars.SHARE:
            assert bar.phase in workload.work
        if bar.metric == bars.ERROR:
            assert workload.exact is not None


def test_bars_are_met_or_not() -> None:
    verdicts = {
        (
            one.bar.case.operator,
            one.bar.case.shape,
            one.bar.metric,
            one.bar.against,
            one.bar.phase,
        ): one
        for one in judge(made_up())
    }
    maskgit = verdicts["soft_embedding", "maskgit", "ratio", "eager", "both"]
    assert (maskgit.bar.bound, maskgit.measured, maskgit.measured_huge, maskgit.met) == (
        2.3, 4.25, 2.125, True,
    )  # fmt: skip
    assert maskgit.limit == 42.5 / 5.0  # eager's time over the floor
    maskgen = verdicts["soft_embedding", "maskgen-64", "ratio", "eager", "both"]
    assert (maskgen.bar.bound_huge, maskgen.measured_huge, maskgen.met) == (3.6, 4.0625, True)
    sampling = verdicts["sample_tokens", "maskgit", "ratio", "softmax + multinomial", "forward"]
    assert (sampling.measured, sampling.met) == (2.75, False)
    share = verdicts["soft_embedding", "maskgit", "share", "eager", "forward"]
    assert (share.measured, share.met, share.limit) == (0.5, False, None)


def test_the_bound_with_huge_pages_counts_too() -> None:
    rows = [
        row("eager", 7.5, shape="maskgen-64"),
        row("eager", 3.5, shape="maskgen-64", allocator="thp"),
    ]
    (verdict,) = (one for one in judge(Results(rows)) if one.bar.metric == bars.RATIO)
    assert verdict.met is False


def test_memory_is_counted_for_a_thread_and_without_accumulators() -> None:
    name = "softdimo_fast, recompute"
    rows = [row(name, 1.0, operator="linear_soft_embedding", dtype="bfloat16", extra_mib=20.0)]
    found = Results(
        rows,
        machine={"threads": "2"},
        accumulators={"linear_soft_embedding+maskgit+bfloat16": 14 * 2**20},
    )
    (verdict,) = judge(found)
    assert (verdict.measured, verdict.met) == (3.0, True)


def test_nothing_measured_is_no_verdict() -> None:
    assert judge(Results()) == []


# ---------------------------------------------------------------------------------------------------
# guard


def test_the_same_run_passes(table: Path) -> None:
    found = guard.compare(made_up(), from_csv(table))
    assert found.fallen == []
    assert found.compared == 12
    assert found.differences == []


def test_a_fall_within_the_tolerance_passes_and_beyond_it_does_not(table: Path) -> None:
    committed = from_csv(table)
    assert guard.compare(with_ratio(made_up(), 0.86, "eager"), committed).fallen == []
    found = guard.compare(with_ratio(made_up(), 0.5, "eager"), committed)
    assert len(found.fallen) == 6
    assert all(one.change == pytest.approx(-0.5, abs=1e-3) for one in found.fallen)
    text = guard.render(found, guard.TOLERANCE)
    assert "12 ratios compared, 6 fell by more than 15%" in text
    assert "-50%  eager, both, soft_embedding maskgen-64 float32 [thp]" in text


def test_faster_is_no_fall_and_ours_has_no_ratio(table: Path) -> None:
    faster = with_ratio(made_up(), 3.0, "eager")
    assert guard.compare(faster, from_csv(table)).fallen == []
    ours = with_ratio(made_up(), 0.1, "softdimo_fast")
    assert guard.compare(ours, from_csv(table)).fallen == []


def test_other_conditions_are_told(table: Path) -> None:
    other = made_up()
    other.machine["threads"] = "4"
    other.rows = other.rows[:2]
    found = guard.compare(other, from_csv(table))
    assert found.differences == [("threads", "2", "4")]
    assert found.absent == 11
    assert "other threads: 2 when committed, 4 now" in guard.render(found, 0.15)
    assert "11 of the table were not measured now" in guard.render(found, 0.15)


def test_nothing_in_common_is_refused(table: Path) -> None:
    with pytest.raises(BenchmarkError, match="no ratio that this run measured"):
        guard.compare(Results([row("eager", 1.0, shape="digits")]), from_csv(table))


def test_damaged_case_files_are_named(tmp_path: Path) -> None:
    path = results.case_path(tmp_path, "default", CASES[0])
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="is damaged"):
        results.collect(tmp_path, CASES[:1], ["default"])

"""The demo's bars: which they are, and on which side of each bound they hold."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import tiny, train

from softdimo_fast.recipes.evaluation import (
    SEARCHES,
    Evaluator,
    Rows,
    bars,
    bars_over_seeds,
    search_name,
    stretch,
)

FD = {
    "floor": 1.0, "recon": 2.0, "teacher1": 40.0, "teacher2": 16.0, "teacher4": 8.0, "teacher8": 5.0,
    "teacher16": 8.0, "dimo": 9.0, "dimo_argmax": 6.0, "dimo_soft": 18.0, "cfg2_control": 10.0,
    "cfg2_gan": 12.0, "reward": 7.0,
}  # fmt: skip
NAMES = tuple(FD)


def made_up() -> tuple[Rows, Rows]:
    """Every bar holds."""
    rows: Rows = {
        name: {
            "fd": fd, "accuracy": 0.9, "precision": 0.9, "recall": 0.9, "coverage": 0.8, "entropy": 2.25,
            "n": 2000,
        }
        for name, fd in FD.items()
    }  # fmt: skip
    rows["reward"]["accuracy"] = 0.95
    hits = {"bon1": 0.2, "tteo": 0.6, "bon4": 0.5, "bon4_tteo": 0.7, "bon16": 0.9}
    return rows, {name: {"hit_rate": hit, "fd": 7.0} for name, hit in hits.items()}


# Name -> (sense, bound, what sets the value: table, row, column; its values just inside and just outside).
BARS: dict[str, tuple[str, float, tuple[str, str, str], float, float]] = {
    "reconstruction FD / floor FD": ("<=", 2.0, ("rows", "recon", "fd"), 1.99, 2.01),
    "teacher 16-step FD / 1-step FD": ("<=", 0.25, ("rows", "teacher16", "fd"), 9.99, 10.01),
    "one-step FD / teacher 1-step FD": ("<=", 0.30, ("rows", "teacher1", "fd"), 30.01, 29.99),
    "one-step FD / teacher 4-step FD": ("<=", 1.2, ("rows", "teacher4", "fd"), 7.51, 7.49),
    "one-step parity accuracy": (">=", 0.88, ("rows", "dimo", "accuracy"), 0.881, 0.879),
    "one-step entropy of digits": (">=", 2.22, ("rows", "dimo", "entropy"), 2.221, 2.219),
    "one-step recall": (">=", 0.88, ("rows", "dimo", "recall"), 0.881, 0.879),
    "one-step coverage": (">=", 0.70, ("rows", "dimo", "coverage"), 0.701, 0.699),
    "one-step soft FD / hard FD": ("<=", 2.0, ("rows", "dimo_soft", "fd"), 17.99, 18.01),
    "GAN FD / its control's FD": ("<=", 1.2, ("rows", "cfg2_gan", "fd"), 11.99, 12.01),
    "reward parity error / before": ("<=", 0.75, ("rows", "reward", "accuracy"), 0.926, 0.924),
    "TTEO hit rate": (">=", 0.50, ("search", "tteo", "hit_rate"), 0.501, 0.499),
    "TTEO hit rate / base": (">=", 2.0, ("search", "bon1", "hit_rate"), 0.299, 0.301),
    "BoN 4 + TTEO hit rate - BoN 4": (">=", 0.15, ("search", "bon4", "hit_rate"), 0.549, 0.551),
}


def by_name(rows: Rows, search: Rows) -> dict[str, dict[str, Any]]:
    return {bar["name"]: bar for bar in bars(rows, search)}


def test_they_are_the_promised_ones_with_their_bounds() -> None:
    made = bars(*made_up())
    assert [bar["name"] for bar in made] == list(BARS)
    for bar in made:
        assert bar.keys() == {"name", "value", "sense", "bound", "holds"}
        assert (bar["sense"], bar["bound"]) == BARS[bar["name"]][:2]
        assert bar["holds"] is True


@pytest.mark.parametrize("name", BARS)
def test_each_holds_on_its_side_alone(name: str) -> None:
    _, _, (table, row, column), inside, outside = BARS[name]
    for value, holds in ((inside, True), (outside, False)):
        tables = dict(zip(("rows", "search"), copy.deepcopy(made_up()), strict=True))
        tables[table][row][column] = value
        assert by_name(tables["rows"], tables["search"])[name]["holds"] is holds


def test_values_are_the_ratios_that_the_names_say() -> None:
    made = by_name(*made_up())
    assert made["teacher 16-step FD / 1-step FD"]["value"] == 8 / 40
    assert made["one-step FD / teacher 4-step FD"]["value"] == 9 / 8
    assert made["one-step soft FD / hard FD"]["value"] == 2
    assert made["reward parity error / before"]["value"] == pytest.approx(0.5)
    assert made["TTEO hit rate / base"]["value"] == pytest.approx(3)
    assert made["BoN 4 + TTEO hit rate - BoN 4"]["value"] == pytest.approx(0.2)


def test_perfect_and_empty_results_are_no_division_by_zero() -> None:
    rows, search = made_up()
    rows["dimo"]["accuracy"] = rows["reward"]["accuracy"] = 1.0
    search["bon1"]["hit_rate"] = 0.0
    made = by_name(rows, search)
    assert made["reward parity error / before"]["holds"]
    assert made["TTEO hit rate / base"]["holds"]
    rows["dimo"]["fd"] = math.nan
    assert not by_name(rows, search)["one-step FD / teacher 1-step FD"]["holds"]


def test_the_mean_over_seeds() -> None:
    def run(gan: float) -> dict[str, Any]:
        return {"rows": {"cfg2_gan": {"fd": gan}, "cfg2_control": {"fd": 10.0}}}

    (bar,) = bars_over_seeds([run(8.0), run(11.9), run(7.0)])
    assert bar["name"] == "GAN FD / its control's FD, mean of 3"
    assert bar["value"] == pytest.approx(2.69 / 3)
    assert (bar["sense"], bar["bound"], bar["holds"]) == ("<=", 0.9, True)
    assert not bars_over_seeds([run(8.0), run(11.9), run(7.2)])[0]["holds"]


def test_beyond_the_paper() -> None:
    rows, _ = made_up()
    assert not stretch(rows)["holds"]
    rows["dimo"]["fd"] = 8.0
    assert stretch(rows) == {
        "name": "one-step FD / teacher 16-step FD", "value": 1.0, "sense": "<=", "bound": 1.0, "holds": True
    }  # fmt: skip


def test_the_searches_have_the_names_of_the_metrics_file() -> None:
    names = [search_name(candidates, iterations) for candidates, iterations in SEARCHES]
    assert names == ["bon1", "tteo", "bon4", "bon4_tteo", "bon16"]


# ---- measuring ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for method in ("judge", "reward_classifier", "tokenizer", "teacher", "distillation"):
        train(root, method)
    return root


def test_rows_count_their_images_and_depend_on_the_seed_alone(out: Path) -> None:
    first, again, other = (Evaluator(out, seed=seed, samples=40) for seed in (0, 0, 1))
    run = tiny("distillation")
    names: Any = {"dimo": "sample", "dimo_soft": "soft"}
    measured = first.generator("distillation", run, names)
    assert measured.rows.keys() == names.keys()
    for row in measured.rows.values():
        assert row.keys() == {"fd", "accuracy", "precision", "recall", "coverage", "entropy", "n"}
        assert row["n"] == 40
    assert again.generator("distillation", run, names).rows == measured.rows
    assert other.generator("distillation", run, names).rows != measured.rows
    teacher = first.teacher(tiny("teacher"), 4)
    assert teacher.rows["teacher4"]["n"] == 40
    assert teacher.images["teacher4"].shape == (16, 1, 8, 8)


def test_the_references_are_real(out: Path) -> None:
    measured = Evaluator(out, seed=0, samples=40).references()
    assert measured.rows["floor"]["n"] == measured.rows["recon"]["n"] == 1297
    assert measured.rows["floor"]["fd"] < measured.rows["recon"]["fd"]
    assert measured.images["real"].shape == measured.images["recon"].shape == (16, 1, 8, 8)


def test_the_search_asks_for_every_digit_under_its_parity(out: Path) -> None:
    evaluator = Evaluator(out, seed=0, samples=20)
    measured = evaluator.search(tiny("tteo"), 1, 4)
    row = measured.rows["tteo"]
    assert row.keys() == {"hit_rate", "fd"}
    assert 0 <= row["hit_rate"] <= 1
    wanted = measured.images["wanted"]
    assert torch.equal(wanted, wanted.sort().values)
    assert set(wanted.tolist()) == set(range(10))
    assert measured.images["before"].shape == measured.images["after"].shape == (16, 1, 8, 8)

"""Stages in this process: order, estimate, and what a finished one leaves and is read from."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.stages import stage

from softdimo_fast.recipes.demo import demo_stages
from softdimo_fast.recipes.stages import (
    Stage,
    StageContext,
    StageMismatchError,
    StageResult,
    estimate,
    load_result,
    order,
    run_stage,
)
from softdimo_fast.trainers import Stopped

IMAGES = {"real": torch.linspace(-1, 1, 32).view(2, 4, 4).transpose(1, 2)}


def context(folder: Path) -> StageContext:
    return StageContext(folder, lambda done, total: None, lambda: False)


def with_images(work_result: StageResult | Exception, *, seconds: float = 0.0) -> Stage:
    def work(context: StageContext) -> StageResult:
        time.sleep(seconds)
        if isinstance(work_result, Exception):
            raise work_result
        return work_result

    return Stage("s", "S", (), work, {"run": {"steps": 3}, "samples": 5}, 1.0)


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Stage, Path]:
    made = with_images(StageResult({"rows": {"real": {"fd": 0.1}}}, IMAGES))
    run_stage(made, context(tmp_path / "s"))
    return made, tmp_path / "s"


def test_the_longest_chain_comes_first() -> None:
    stages = [
        stage("short", cost=5),
        stage("root", cost=1),
        stage("middle", "root", cost=1),
        stage("leaf", "middle", cost=10),
        stage("side", "root", cost=2),
    ]
    by_name = {one.name: one for one in stages}
    # behind root: 1 + 1 + 10; middle: 1 + 10; leaf: 10; short: 5; side: 2
    assert [one.name for one in order(by_name)] == ["root", "middle", "leaf", "short", "side"]


def test_the_estimate_is_that_of_the_schedule() -> None:
    stages = [
        stage("a", cost=4), stage("b", cost=3), stage("c", "a", cost=2), stage("d", "a", "b", cost=6)
    ]  # fmt: skip
    assert estimate(stages, 1) == 4 + 3 + 2 + 6
    # a 0-4 and b 0-3, then d 4-10 and c 4-6
    assert estimate(stages, 2) == 10
    assert estimate(stages, 9) == 10
    assert estimate(stages, 2, scale=2.5) == 25
    assert estimate([], 2) == 0


def test_the_demo_needs_only_what_it_has() -> None:
    for quick in (False, True):
        stages = demo_stages(3, quick=quick)
        names = [one.name for one in stages]
        assert len(set(names)) == len(names)
        assert {need for one in stages for need in one.needs} <= set(names)
        assert all(one.cost > 0 for one in stages)
    full = estimate(demo_stages(0), 2)
    assert 0 < estimate(demo_stages(0, quick=True), 2) < full / 4
    assert full <= estimate(demo_stages(0), 1)


def test_a_result_is_kept_and_not_made_again(finished: tuple[Stage, Path]) -> None:
    made, folder = finished
    first = load_result(made, folder)
    assert first is not None
    assert first.values == {"rows": {"real": {"fd": 0.1}}}
    assert torch.equal(first.images["real"], IMAGES["real"])
    again = run_stage(replace(made, work=with_images(RuntimeError("ran")).work), context(folder))
    assert again.values == first.values
    assert again.seconds == first.seconds


def test_nothing_is_finished_where_the_work_was_not(tmp_path: Path) -> None:
    assert load_result(with_images(StageResult()), tmp_path / "s") is None
    with pytest.raises(RuntimeError, match="no luck"):
        run_stage(with_images(RuntimeError("no luck")), context(tmp_path / "s"))
    assert load_result(with_images(StageResult()), tmp_path / "s") is None


def test_another_config_is_refused_with_the_difference(finished: tuple[Stage, Path]) -> None:
    made, folder = finished
    other = replace(made, config={"run": {"steps": 4}, "samples": 5})
    with pytest.raises(StageMismatchError, match=r"another configuration:\n  run\.steps: 3 -> 4\n"):
        load_result(other, folder)
    with pytest.raises(StageMismatchError, match=r"samples: 5 -> \(absent\)"):
        run_stage(replace(made, config={"run": {"steps": 3}}), context(folder))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"config": 3}', '{"config": {}, "values": {}, "seconds": 1}', "\xff",
     '{"config": {}, "values": 3, "images": null, "seconds": 1}',
     '{"config": {}, "values": {}, "images": null, "seconds": "long"}'],
)  # fmt: skip
def test_a_damaged_result_is_told(finished: tuple[Stage, Path], text: str) -> None:
    made, folder = finished
    (folder / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StageMismatchError, match=r"result\.json is damaged .* remove it to run"):
        load_result(made, folder)
    assert (folder / "images.safetensors").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_images_are_told(finished: tuple[Stage, Path], damage: str) -> None:
    made, folder = finished
    path = folder / "images.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-4])
    else:
        data[-3] ^= 4
        path.write_bytes(data)
    with pytest.raises(StageMismatchError, match=r"images\.safetensors is damaged .*result\.json"):
        load_result(made, folder)
    # What the message says to do helps.
    (folder / "result.json").unlink()
    run_stage(made, context(folder))
    assert load_result(made, folder) is not None


def test_a_result_without_images_ignores_those_of_an_earlier_one(
    finished: tuple[Stage, Path],
) -> None:
    made, folder = finished
    (folder / "result.json").unlink()
    run_stage(replace(made, work=with_images(StageResult({"x": 1})).work), context(folder))
    result = load_result(made, folder)
    assert result is not None
    assert result.images == {}


def test_seconds_add_up_over_attempts(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with pytest.raises(Stopped):
        run_stage(with_images(Stopped("so far"), seconds=0.3), context(folder))
    first = float((folder / "seconds").read_text())
    assert 0.3 <= first < 2
    result = run_stage(with_images(StageResult(), seconds=0.2), context(folder))
    assert first + 0.2 <= result.seconds < first + 2
    assert json.loads((folder / "result.json").read_text())["seconds"] == result.seconds
    (folder / "seconds").write_text("half a min")
    (folder / "result.json").unlink()
    assert run_stage(with_images(StageResult()), context(folder)).seconds < 2

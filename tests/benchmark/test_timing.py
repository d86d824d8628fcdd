"""Interleaving, its statistics, and what happens to comparators that fail."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from softdimo_fast.benchmark import timing
from softdimo_fast.benchmark.cases import select
from softdimo_fast.benchmark.timing import Budget, CpuStopwatch, interleave, ratios, spread
from softdimo_fast.benchmark.workloads import build
from softdimo_fast.benchmark.workloads.common import Implementation, Inputs, Workload

FIVE = Budget(seconds=0, warm_up=0, fewest=5, most=5)
TWO = Budget(seconds=0, warm_up=0, fewest=2, most=2)


@pytest.fixture
def workload() -> Workload:
    (case,) = select(operators=["soft_embedding"], shapes=["digits"], dtypes=["float32"])
    return build(case, tiny=True)


def test_every_round_calls_everybody_once_and_the_order_rotates() -> None:
    calls: list[str] = []

    def caller(name: str) -> timing.Caller:
        def call() -> dict[str, float]:
            calls.append(name)
            return {"forward": float(len(calls))}

        return call

    found = interleave({name: caller(name) for name in "abc"}, FIVE)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]
    assert {name: len(phases["forward"]) for name, phases in found.items()} == dict.fromkeys(
        "abc", 5
    )
    assert found["a"]["forward"] == [1, 6, 8, 10, 15]


def test_ratios_are_taken_inside_a_round() -> None:
    """A machine that slows down by 10x between rounds changes no ratio."""
    slow = [1.0, 10.0, 1.0, 10.0, 10.0]
    theirs = [3 * one for one in slow]
    assert ratios(theirs, slow) == (3.0, 3.0, 3.0)
    assert spread(theirs).median == 30.0


def test_spread_is_median_and_fifths() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert spread([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("rounds", "seconds", "enough"),
    [
        (4, 2.0, False),
        (5, 0.5, False),
        (5, 1.0, True),
        (3, 4.0, True),
        (2, 9.0, False),
        (20, 0.1, True),
    ],
)
def test_budget(rounds: int, seconds: float, enough: bool) -> None:
    budget = Budget(seconds=1.0, warm_up=0, fewest=5, most=20)
    assert budget.enough(rounds, seconds) is enough


def test_laps_are_told_apart() -> None:
    watch = CpuStopwatch()
    watch.start()
    time.sleep(0.01)
    watch.lap()
    time.sleep(0.03)
    watch.lap()
    first, second = watch.read()
    assert 0.01 <= first < second
    assert second >= 0.03


def test_both_is_forward_with_a_graph_and_backward(workload: Workload) -> None:
    workload.implementations = [one for one in workload.implementations if not one.compiled]
    timings = timing.measure(workload, "training", TWO)
    assert set(timings.seconds) == {"softdimo_fast", "eager"}
    for phases in timings.seconds.values():
        assert set(phases) == {"backward", "both"}
        pairs = zip(phases["backward"], phases["both"], strict=True)
        assert all(0 < backward < both for backward, both in pairs)


def test_forward_builds_no_graph_and_is_not_compiled_again(workload: Workload) -> None:
    graphs: list[bool] = []

    def note(inputs: Inputs) -> torch.Tensor:
        graphs.append(torch.is_grad_enabled())
        return inputs["logits"]

    workload.implementations = [
        Implementation("note", note),
        Implementation("compiled", note, compiled=True),
    ]
    timings = timing.measure(workload, "forward", TWO)
    assert set(timings.seconds) == {"note"}
    assert graphs
    assert not any(graphs)


def _fail(inputs: Inputs) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand more words")


def test_a_comparator_that_fails_is_left_out_with_its_words(workload: Workload) -> None:
    workload.implementations = [workload.implementations[0], Implementation("broken", _fail)]
    timings = timing.measure(workload, "forward", TWO)
    assert set(timings.seconds) == {"softdimo_fast"}
    assert [(one.name, one.reason) for one in timings.absent] == [
        ("broken", "RuntimeError: no such kernel")
    ]


def test_our_own_failure_is_an_error(workload: Workload) -> None:
    workload.implementations = [Implementation("softdimo_fast", _fail)]
    with pytest.raises(RuntimeError, match="no such kernel"):
        timing.measure(workload, "forward", TWO)


@pytest.fixture
def collection() -> Iterator[None]:
    import gc

    assert gc.isenabled()
    yield
    assert gc.isenabled()


@pytest.mark.usefixtures("collection")
def test_garbage_collection_is_on_again_after_an_error() -> None:
    def fail() -> dict[str, float]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fail}, FIVE)

"""The cases of ``softdimo_fast.benchmark`` as pytest benchmarks: one for each implementation and phase.

    pytest --benchmark-only --benchmark-group-by=group benchmarks/test_soft_embedding.py -k maskgit-float32

Rows of one group do the same work; read the ratios of their medians. ``softdimo bench`` measures the same
with interleaved rounds, ceilings, memory and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from softdimo_fast.benchmark.cases import PASSES, Case, select
from softdimo_fast.benchmark.workloads import build
from softdimo_fast.benchmark.workloads.common import Implementation, Workload


class Measured(NamedTuple):
    """What one test times."""

    case: Case
    phase: str
    implementation: str

    def __str__(self) -> str:
        case = self.case
        words = (case.shape, case.dtype, case.variant, self.phase, self.implementation)
        return "-".join(filter(None, words)).replace(" ", "_")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``test_NAME`` gets every case of the operator NAME."""
    if "measured" in metafunc.fixturenames:
        operator = metafunc.function.__name__.removeprefix("test_")
        found = [
            Measured(case, phase, implementation.name)
            for case in select(operators=[operator])
            for phase in (phase for one in case.passes for phase in PASSES[one])
            for implementation in build(case, tiny=True).implementations
            if phase != "forward" or not implementation.compiled or not case.passes[1:]
        ]
        metafunc.parametrize("measured", found, ids=str)


@cache
def _tensors(case: Case) -> Workload:
    """The last case's, which all of its tests share."""
    _tensors.cache_clear()
    return build(case)


@pytest.fixture
def timed(measured: Measured, benchmark: Any) -> Callable[[], None]:
    """Times what the test is about, after one call that is not timed."""
    workload = _tensors(measured.case)
    implementation = next(
        one for one in workload.implementations if one.name == measured.implementation
    )
    benchmark.group = f"{measured.case.key} {measured.phase}"

    def run() -> None:
        if measured.phase == "forward":
            with torch.no_grad():
                workload.forward(implementation)
                benchmark(workload.forward, implementation)
        else:
            _time_training(benchmark, workload, implementation, measured.phase)

    return run


def _time_training(
    benchmark: Any, workload: Workload, implementation: Implementation, phase: str
) -> None:
    upstream = workload.upstream(workload.forward(implementation))

    def forward() -> tuple[tuple[Any, Any], dict[str, Any]]:
        return (workload.forward(implementation), upstream), {}

    def both() -> Any:
        return workload.gradients(workload.forward(implementation), upstream)

    both()
    if phase == "both":
        benchmark(both)
    else:
        benchmark.pedantic(workload.gradients, setup=forward, rounds=10)

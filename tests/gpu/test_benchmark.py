"""The benchmark on a device: events, memory, and a whole small run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.benchmark import SMALLEST

from softdimo_fast.benchmark import command, memory, results
from softdimo_fast.benchmark.timing import CudaStopwatch

pytestmark = pytest.mark.gpu


def test_events_time_the_device() -> None:
    watch = CudaStopwatch()
    x = torch.randn(4096, 4096, device="cuda")
    laps = []
    for repeats in (1, 8):
        watch.start()
        for _ in range(repeats):
            x @ x
        watch.lap()
        laps += watch.read()
    assert 0 < laps[0] < laps[1]


def test_extra_memory_is_torchs_own_count() -> None:
    x = torch.ones(2**20, device="cuda")
    assert memory.peak_extra_bytes(lambda: (x + 1) * 2, x.device) == 4 * 2**20


def test_a_run_on_the_device(tmp_path: Path) -> None:
    chosen = replace(SMALLEST, device="cuda")
    assert command.run(tmp_path, chosen) == 0
    found = results.from_csv(tmp_path / command.CSV)
    assert {row.allocator for row in found.rows} == {"default"}
    assert "device" in found.machine
    assert all(row.median_ms > 0 for row in found.rows)

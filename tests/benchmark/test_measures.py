"""Memory, ceilings and floors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softdimo_fast.benchmark import ceilings, machine, memory
from softdimo_fast.benchmark.accuracy import relative_error
from softdimo_fast.benchmark.ceilings import Ceilings
from softdimo_fast.benchmark.workloads.common import Work

CPU = torch.device("cpu")
MIB = 2**20
LIMITS = Ceilings(copy=64e9, read=68e9, sgemm=1e11, bf16_gemm=4e11, exp=6e9)


def test_extra_memory_is_what_a_call_needs_beyond_its_result() -> None:
    x = torch.ones(16 * MIB)

    def call() -> torch.Tensor:
        return (x + 1) * 2  # one intermediate of 64 MiB beside the result

    call()
    extra = memory.peak_extra_bytes(call, CPU)
    assert 63 * MIB < extra < 70 * MIB


def test_results_and_inputs_are_not_extra() -> None:
    x = torch.ones(16 * MIB)
    assert memory.peak_extra_bytes(lambda: (x + 1, None), CPU) < 4 * MIB


def test_a_system_that_does_not_tell_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "RESET", tmp_path / "none" / "clear_refs")
    with pytest.raises(memory.MemoryUnavailable, match="cannot be reset here"):
        memory.peak_extra_bytes(lambda: None, CPU)


def test_ceilings_are_measured() -> None:
    found = ceilings.measure("cpu", seconds=0.01, scale=1e-4)
    for name in ("copy", "read", "sgemm", "bf16_gemm", "exp"):
        assert getattr(found, name) > 1e6, name


def test_a_copy_takes_what_it_was_measured_to_take() -> None:
    size = 10**9
    copied = Work(read=size, written=size, flops=0, exponentials=0)
    assert LIMITS.memory_seconds(copied) == pytest.approx(2 * size / LIMITS.copy)
    read = Work(read=size, written=0, flops=0, exponentials=0)
    assert LIMITS.memory_seconds(read) == pytest.approx(size / LIMITS.read)


def test_the_floor_is_what_binds() -> None:
    assert LIMITS.floor(Work(68 * 10**9, 0, 10**9, 0), "float32") == (1.0, "memory")
    assert LIMITS.floor(Work(10**6, 0, 10**11, 0), "float32") == (1.0, "product")
    assert LIMITS.floor(Work(10**6, 0, 10**11, 0), "bfloat16") == (0.25, "product")


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5, 0.0]), torch.zeros(2, dtype=torch.float64)) == 0.5


@pytest.mark.parametrize(
    ("vendor", "sets", "expected"),
    [
        ("AMD", "AVX2, AVX-512", "This processor is AMD's: it is so here."),
        ("AMD", "AVX2", "This processor is AMD's, without AVX-512."),
        ("Intel", "AVX2, AVX-512", "with AVX-512: it is not so here."),
        ("Intel", "AVX2, AVX-512, AMX BF16", "It has AMX"),
        ("ARM", "unknown", "vendor is ARM"),
    ],
)
def test_a_reader_learns_which_part_is_mkl(vendor: str, sets: str, expected: str) -> None:
    said = machine.mkl_sentence({"vendor": vendor, "instruction sets": sets})
    assert expected in said
    assert "MKL runs float32 products on AVX2" in said


def test_facts_name_machine_versions_and_commit() -> None:
    found = machine.facts("cpu", 3)
    assert found["threads"] == "3"
    assert found["torch"] == torch.__version__
    assert {"processor", "vendor", "instruction sets", "commit", "date", "C++ kernels"} <= set(
        found
    )
    assert all(isinstance(value, str) and value for value in found.values())


def test_features_are_read_from_flags() -> None:
    assert machine.features({"flags": "fpu avx2 avx512f amx_bf16"}) == [
        "AVX2",
        "AVX-512",
        "AMX BF16",
    ]
    assert machine.vendor({"vendor_id": "AuthenticAMD"}) == "AMD"

"""What the CPU kernels stand on, checked in C++ under every instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from softdimo_fast.ops import _library

ROOT = Path(__file__).resolve().parent.parent.parent
V4 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
BF16 = [*V4, "-mavx512bf16"]
FLAGS = {
    "amx-bf16": (64, [*BF16, "-mamx-tile", "-mamx-bf16"]),
    "avx512-bf16": (64, BF16),
    "x86-64-v4": (64, V4),
    "x86-64-v3": (32, ["-march=x86-64-v3"]),
    "baseline": (16, []),
}


@pytest.mark.parametrize("isa", _library.compiled_cpu_isas())
@pytest.mark.parametrize("name", ["product", "convert"])
def test_program(name: str, isa: str, tmp_path: Path) -> None:
    best_first = _library.compiled_cpu_isas()
    if best_first.index(isa) < best_first.index(_library.cpu_isa()):
        pytest.skip("this processor, or the environment, does not allow it")
    vector_bytes, flags = FLAGS[isa]
    program = tmp_path / name
    subprocess.run(
        [
            *os.environ.get("CXX", "g++").split(),
            "-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *flags,
            "-Wall", "-Wextra", "-Werror",
            f"-DSOFTDIMO_ISA={isa.replace('-', '_')}", f"-DSOFTDIMO_SIMD_BYTES={vector_bytes}",
            f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}",
            str(ROOT / "tests" / "cpu" / f"{name}.cpp"), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

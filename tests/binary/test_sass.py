"""What nvcc made of the CUDA kernels, read from _cuda.so: no GPU needed.

expected/SOURCE.json holds, for every kernel of csrc/cuda/SOURCE.cu, `registers`: the most a thread may use
for the number of blocks per multiprocessor that the kernel was designed for (64 lets 1024 threads run); and
how many of sass.COUNTED its code has, for both architectures or for each. What is left out is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import sass

from softdimo_fast.ops import _library

LIBRARY = _library.FOLDER / "_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90a")
Expected = dict[str, Any]
EXPECTED: dict[str, Expected] = {}
for table in sorted(Path(__file__).with_name("expected").glob("*.json")):
    EXPECTED |= json.loads(table.read_text())


@pytest.fixture(scope="module")
def library() -> Path:
    if not LIBRARY.is_file():
        pytest.skip(f"{LIBRARY} is not built: nvcc was not found, or CUDA was switched off")
    if sass.find_cuobjdump() is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return LIBRARY


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kernels(library: Path, architecture: str) -> dict[str, sass.Kernel]:
    return sass.kernels(library, architecture)


def test_architectures_are_those_it_names(library: Path) -> None:
    assert sass.architectures(library) == set(_library.compiled_cuda_archs())
    assert {*ARCHITECTURES, "compute_80"} <= sass.architectures(library)


def test_every_kernel_is_in_the_table(kernels: dict[str, sass.Kernel]) -> None:
    assert set(kernels) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_kernel(kernels: dict[str, sass.Kernel], architecture: str, name: str) -> None:
    kernel, expected = kernels[name], EXPECTED[name]
    assert expected.keys() <= {"registers", *sass.COUNTED}
    assert kernel.registers <= expected["registers"]
    assert kernel.stack == kernel.local == 0
    assert kernel.count("LDL") == kernel.count("STL") == 0
    found = {what: kernel.count(pattern) for what, pattern in sass.COUNTED.items()}
    assert found == {what: _number(expected.get(what, 0), architecture) for what in sass.COUNTED}


def _number(entry: int | dict[str, int], architecture: str) -> int:
    return entry[architecture] if isinstance(entry, dict) else entry


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("token_statistics")])
def test_token_statistics_propagates_nan(kernels: dict[str, sass.Kernel], name: str) -> None:
    """The maximum that keeps NaN, and one hardware exponential without denormal repair around it."""
    assert kernels[name].count(r"FMNMX\.NAN") > 0
    assert kernels[name].count(r"MUFU\.EX2") > 0
    assert kernels[name].count("DADD|DMUL|DFMA") == 0


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN8softdimo52_GLOBAL__N__4ea8c701_19_token_statistics_cu_680143d323token_statistics_kernel"
            "I13__nv_bfloat16Li64EEEvNS_21TokenStatisticsParamsE",
            "token_statistics_kernel<__nv_bfloat16, 64>",
        ),
        ("_ZN8softdimo10sum_kernelIfLb1ELi8EEEvPKf", "sum_kernel<float, 1, 8>"),
        ("_ZN8softdimo11copy_kernelEPKfPf", "copy_kernel"),
        ("_Z11pack_kernelIJi6float2EEvPfDpT_", "pack_kernel<int, float2>"),
        ("_Z10one_kernelISt4pairIlmEEvPT_", "one_kernel<pair<long, unsigned long>>"),
        (
            "_ZN8softdimo4cuda36_GLOBAL__N__0ba48982_4_n_cu_3605f6cd16all_kinds_kernelI6__halfPKfLb0ELNS_5DTypeE0E"
            "LNS1_4KindEn3ELi128ENS_2OpILi3ENS_9RowReaderIfEEE5InnerEJSB_EEEvNS1_6ParamsEPT_T0_",
            "all_kinds_kernel<__half, const float*, 0, 0, -3, 128, Inner, Op<3, RowReader<float>>>",
        ),
        ("_ZN8softdimo6helperEv", "_ZN8softdimo6helperEv"),
        ("printf", "printf"),
    ],
)
def test_readable_names(symbol: str, name: str) -> None:
    assert sass.readable(symbol) == name


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "architecture", "share"),
    [
        (64, 0, 128, "sm_80", 0.5),
        (32, 0, 128, "sm_80", 1.0),
        (128, 0, 256, "sm_80", 0.25),
        (33, 0, 256, "sm_90a", 0.75),
        (32, 40 * 1024, 256, "sm_80", 4 * 8 / 64),
        (32, 40 * 1024, 256, "sm_90a", 5 * 8 / 64),
        (16, 0, 32, "sm_80", 0.5),
    ],
)
def test_occupancy(
    registers: int, shared: int, threads: int, architecture: str, share: float
) -> None:
    kernel = sass.Kernel(registers=registers, shared=shared)
    assert sass.occupancy(kernel, threads, architecture) == share

"""The Triton kernels, compiled ahead of time for devices of capability 8.0 and 9.0: no device is needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import sass
from support.process import ROOT, run_python
from support.triton import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(sass.find_cuobjdump() is None, reason="no cuobjdump"),
    pytest.mark.xdist_group("triton_compiled"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: here the kernels may be the interpreter's."""
    run = run_python(
        "-m", "support.triton_compiled", timeout=600,
        environment={
            "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        },
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def label(kernel: dict[str, Any]) -> str:
    return f"{kernel['kernel']} for sm_{kernel['capability']}"


def test_every_kernel_is_compiled_for_both(kernels: list[dict[str, Any]]) -> None:
    names = {(kernel["kernel"].split()[0], kernel["capability"]) for kernel in kernels}
    parts = {
        "soft_embedding_forward", "soft_embedding_dlogits", "soft_embedding_dcodebook",
        "divergence_forward", "divergence_backward",
    }  # fmt: skip
    assert names == {(part, capability) for part in parts for capability in (80, 90)}


def test_half_products_run_on_tensor_cores(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        half = kernel["codebook"] in ("bf16", "fp16")
        assert (kernel["products"] > 0) == half, label(kernel)


def test_no_float32_product_is_cut_to_tf32(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert not kernel["tf32"], label(kernel)


def test_no_atomics(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["atomics"] == 0, label(kernel)


def test_registers_suffice(kernels: list[dict[str, Any]]) -> None:
    """ptxas may put a few numbers aside around a loop, to let one more program in; tiles do not spill."""
    for kernel in kernels:
        assert kernel["local"] <= 16, label(kernel)
        assert kernel["shared"] <= 163 * 1024, label(kernel)


def test_aligned_rows_are_read_wide(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["vocabulary"] % 16 == 0:
            assert kernel["loads_128"] > 0, label(kernel)

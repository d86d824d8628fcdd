"""linear_soft_embedding: memory, and what results may not depend on."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, gradients, thread_count
from support.linear_soft_embedding import (
    BACKENDS,
    NAMES,
    VARIANTS,
    make,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from softdimo_fast.ops import _backends
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.linear_soft_embedding import linear_soft_embedding
from softdimo_fast.ops.reference import linear_soft_embedding as reference

# By name: the package exports the function over the module.
module = importlib.import_module("softdimo_fast.ops.linear_soft_embedding")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with either backend."""
    monkeypatch.setattr(_backends, "PREFERRED", request.param)
    return str(request.param)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(VARIANTS[request.param])


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the specification three to seven slices even for the smallest case."""
    monkeypatch.setattr(reference, "SLICE_BYTES", 200)


# --------------------------------------------------------------------------------------------------
# What is kept, and how much is held


@pytest.mark.usefixtures("small_slices")
def test_memory_does_not_change_a_bit(variant: dict[str, Any]) -> None:
    case = make(dtype=torch.float32, **variant)
    upstream = torch.randn(case.call()(*case.values).shape)
    kept, kept_grads = gradients(case.call(memory="keep"), case.values, upstream)
    value, grads = gradients(case.call(memory="recompute"), case.values, upstream)
    assert_same_bits(kept, value)
    for name, first, second in zip(case.tensors, kept_grads, grads, strict=True):
        assert_same_bits(first, second, name)


def kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the largest tensor that autograd saves for ``call``'s backward."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return max(sizes)


def test_auto_keeps_logits_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(lead=(10,), vocabulary=50, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    logits = 10 * 50 * 4  # kept in float32
    assert module.KEEP_BYTES == 256 * 2**20
    for limit, memory, expected in (
        (logits, "auto", True),
        (logits - 1, "auto", False),
        (logits - 1, "keep", True),
        (logits, "recompute", False),
    ):
        monkeypatch.setattr(module, "KEEP_BYTES", limit)
        largest = kept_bytes(lambda memory=memory: case.call(memory=memory)(*leaves))
        assert (largest == logits) == expected, (limit, memory)
        note = explain(linear_soft_embedding, *leaves, memory=memory).notes[0]
        assert note.endswith("kept for backward" if expected else "not kept")


def test_nothing_is_kept_without_a_gradient() -> None:
    case = make(memory="keep", dtype=torch.float32)
    assert "not kept" in explain(linear_soft_embedding, *case.values, memory="keep").notes[0]
    leaves = [tensor.requires_grad_() for tensor in case.values]
    with torch.no_grad():
        assert "not kept" in explain(linear_soft_embedding, *leaves, memory="keep").notes[0]


PEAK_SCRIPT = """
import os, sys, torch
from softdimo_fast import linear_soft_embedding
threads, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(threads)
H, V, D = 128, 2048, 96

def held(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024

def peak(rows):
    # Beyond inputs, outputs, what autograd keeps and the accumulators of dW and dE.
    leaves = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((rows, H), (V, H), (V, D))]
    upstream = torch.ones(rows, D, dtype=dtype)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = held("VmRSS")
    value = linear_soft_embedding(*leaves, memory="recompute", backend="cpp")
    value.backward(upstream)
    size = dtype.itemsize
    results = rows * (H + D) * size + V * (H + D) * size
    half = size < 4
    kept = rows * (8 + (D * 4 if half else 0)) + (V * (H + D) * 4 if half else 0)
    return held("VmHWM") - before - results - kept

peak(8192)
print(peak(8192), peak(32768))
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer's own memory counts too"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_of_the_kernel_is_bounded(backend: str, threads: int, dtype: str) -> None:
    """4 MiB a thread, whatever the number of rows; the logits would take 256 MiB."""
    if backend == "reference" or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("about the kernel, where the system counts peaks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # memory goes back when it is freed
    }
    run = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(threads), dtype],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    few, many = map(int, run.stdout.split())
    assert max(few, many) <= threads * 4 * 2**20 + 2**20
    assert many - few <= 2**20


# --------------------------------------------------------------------------------------------------
# What the kernel's results may not depend on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "positions", "grouped"])
def test_a_row_does_not_depend_on_its_batch(name: str, dtype: torch.dtype, backend: str) -> None:
    """Alone, in another order, among others: the same value and the same gradient to hidden."""
    if backend == "reference":
        pytest.skip("the specification's products are not batch-invariant")
    case = make(
        lead=(230,), vocabulary=300, hidden_width=40, width=24, dtype=dtype, **VARIANTS[name]
    )
    case.options.pop("mask", None)
    case.tensors.pop("mask_embedding", None)
    named = case.tensors
    named["bias"] = (
        named["bias"].expand(230, *named["weight"].shape[:-1])
        if "bias" in named
        else torch.zeros(230, 300, dtype=dtype)
    )
    value, grads = gradients(case.call(), case.values)
    for rows in (torch.tensor([57]), torch.arange(100, 131), torch.randperm(230)):
        picked = {
            key: tensor if key in ("weight", "codebook") else tensor[rows]
            for key, tensor in named.items()
        }
        part, part_grads = gradients(case._replace(tensors=picked).call(), picked.values())
        assert_same_bits(part, value[rows])
        assert_same_bits(part_grads[0], grads[0][rows], "hidden")
        assert_same_bits(part_grads[3], grads[3][rows], "bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bias", "positions", "grouped"])
def test_threads_do_not_change_a_bit(name: str, dtype: torch.dtype, backend: str) -> None:
    """More threads share larger blocks of rows."""
    if backend == "reference":
        pytest.skip("about the kernel")
    case = make(
        lead=(11, 100), vocabulary=1200, hidden_width=48, width=40, dtype=dtype, **VARIANTS[name]
    )
    found = []
    for threads in (1, 2, 5):
        with thread_count(threads):
            value, grads = gradients(case.call(), case.values)
        found.append((value, *grads))
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert_same_bits(first, second)


@pytest.mark.parametrize("layout", ["columns", "expanded", "sliced"])
def test_strides_do_not_change_a_bit(layout: str) -> None:
    case = make(
        lead=(6, 5), vocabulary=40, hidden_width=8, width=6, dtype=torch.float32, bias="all"
    )
    if layout == "expanded":
        case.tensors["hidden"] = case.tensors["hidden"][:, :1].expand(6, 5, 8)
        case.tensors["bias"] = case.tensors["bias"][:1].expand(6, 5, 40)
    expected, expected_grads = gradients(
        case.call(), [tensor.contiguous() for tensor in case.values]
    )
    for name, tensor in case.tensors.items():
        if layout == "columns":
            case.tensors[name] = tensor.mT.contiguous().mT
        elif layout == "sliced":
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
            wide[..., ::2] = tensor
            case.tensors[name] = wide[..., ::2]
    value, grads = gradients(case.call(), case.values)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    for first, second in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_packing_does_not_change_a_bit(backend: str) -> None:
    """Contiguous rows of bfloat16 are copied into the products' operands, others gathered."""
    if backend == "reference":
        pytest.skip("about the kernel")
    case = make(
        lead=(5, 13), vocabulary=1100, hidden_width=45, width=37, dtype=torch.bfloat16, bias="all"
    )
    value, grads = gradients(case.call(), case.values)
    for name in ("hidden", "weight", "codebook"):
        case.tensors[name] = case.tensors[name].mT.contiguous().mT
    other, other_grads = gradients(case.call(), case.values)
    assert_same_bits(value, other)
    for first, second in zip(grads, other_grads, strict=True):
        assert_same_bits(first, second)


# --------------------------------------------------------------------------------------------------
# The specification's slices


@pytest.fixture
def reference_only(backend: str) -> None:
    if backend != "reference":
        pytest.skip("about the specification")


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest storage that any torch operator inside returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that ``call`` holds at once beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


BIG = {"vocabulary": 2048, "hidden_width": 16, "width": 16, "dtype": torch.float32}


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("name", ["plain", "positions", "grouped"])
def test_no_temporary_is_larger_than_a_slice(name: str) -> None:
    """The logits take 16 MiB or 32; forward and backward never make a tensor above 4 MiB."""
    case = make(lead=(16, 128), **(VARIANTS[name] | BIG))
    named, mask = case.tensors, case.options.get("mask")
    arguments = [named.get(name) for name in NAMES[:4]] + [1.0, named.get("temperature"), mask]
    arguments.append(named.get("mask_embedding"))
    with LargestTensor() as forward:
        output, logits = reference.linear_soft_embedding(*arguments, False)  # type: ignore[arg-type]
    assert logits.numel() == 0
    assert forward.bytes <= reference.SLICE_BYTES
    wanted = [name in named for name in NAMES]
    with LargestTensor() as backward:
        reference.linear_soft_embedding_backward(
            torch.randn_like(output), *arguments, None, wanted  # type: ignore[arg-type]
        )  # fmt: skip
    assert 2**20 < backward.bytes <= reference.SLICE_BYTES


@pytest.mark.usefixtures("reference_only")
def test_peak_memory_grows_with_the_logits_only_where_they_are_kept() -> None:
    """Twice the rows add 16 MiB of logits to "keep", and to "recompute" nothing but small outputs."""

    def peak(rows: int, memory: str) -> int:
        case = make(lead=(rows,), memory=memory, **BIG)
        leaves = [tensor.requires_grad_() for tensor in case.values]
        return peak_bytes(lambda: case.call()(*leaves).sum().backward())

    few, many = peak(2048, "recompute"), peak(4096, "recompute")
    assert few < 10 * reference.SLICE_BYTES
    assert many - few < 2**20
    assert peak(4096, "keep") - peak(2048, "keep") > 15 * 2**20


@pytest.mark.usefixtures("reference_only")
def test_slices_agree_with_one_slice(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(**variant)
    value, grads = gradients(case.call(), case.values)
    for size in (1, 200, 500):
        monkeypatch.setattr(reference, "SLICE_BYTES", size)
        sliced, sliced_grads = gradients(case.call(), case.values)
        torch.testing.assert_close(sliced, value)
        for first, second in zip(sliced_grads, grads, strict=True):
            torch.testing.assert_close(first, second)


@pytest.mark.usefixtures("reference_only")
def test_backward_computes_only_what_is_wanted() -> None:
    case = make()
    hidden, weight, codebook = case.values
    upstream = torch.randn(3, 4, 3, dtype=torch.float64)
    found = reference.linear_soft_embedding_backward(
        upstream, hidden, weight, codebook, None, 1.0, None, None, None, None, [False, True] + [False] * 4
    )  # fmt: skip
    assert [tuple(grad.shape) for grad in found] == [(0,), (7, 5), *[(0,)] * 4]

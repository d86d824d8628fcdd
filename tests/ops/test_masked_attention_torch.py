"""masked_attention and torch: compile, export, autocast, which kernel runs, argument errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.attention import BACKENDS, inputs, masked_call, masks
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from softdimo_fast.ops import _backends
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.masked_attention import masked_attention


@pytest.mark.parametrize(
    ("masked", "requires_grad", "wanted"),
    [(False, False, [False, True, False]), (True, True, [True, True, True])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(masked: bool, requires_grad: bool, wanted: list[bool], dtype: torch.dtype) -> None:
    key_mask, query_mask = masks() if masked else (None, None)
    tensors = tuple(tensor.to(dtype).requires_grad_(requires_grad) for tensor in inputs())
    arguments = (*tensors, key_mask, query_mask, 0.5)
    upstream = torch.randn(2, 2, 5, 3, dtype=dtype, requires_grad=requires_grad)
    statistics = tuple(t.detach() for t in torch.ops.softdimo.masked_attention(*arguments)[1:])
    for operators, saved in (
        (torch.ops.softdimo_reference, ()),
        (torch.ops.softdimo, statistics),
    ):
        torch.library.opcheck(operators.masked_attention.default, arguments)
        torch.library.opcheck(
            operators.masked_attention_backward.default, (upstream, *arguments, *saved, wanted)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_and_export_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    tensors = inputs(dtype=dtype)
    assert_compiles_bitwise(masked_call(backend), *tensors)
    assert_exports(masked_call(backend), *tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_query_key_value(backend: str) -> None:
    tensors = inputs(dtype=torch.float32)
    call = masked_call(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(call, tensors)
        dense = masked_attention(*tensors)
        wide = call(*(tensor.double() for tensor in tensors))
    halves = tuple(tensor.bfloat16() for tensor in tensors)
    expected, half_grads = gradients(call, halves)
    assert_same_bits(value, expected)
    for grad, half_grad in zip(grads, half_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_same_bits(grad, half_grad.float())
    assert_same_bits(dense, masked_attention(*halves))
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_an_expanded_upstream_and_twice(backend: str) -> None:
    call, tensors = masked_call(backend), inputs(dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = call(*leaves)
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.ones_like(value))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 3, 5, 4, dtype=torch.bfloat16), torch.empty(2, 3, 6, 4)
        found = masked_attention(
            q, k, torch.empty(2, 3, 6, 7), key_mask=torch.ones(6, dtype=torch.bool), backend=backend
        )
    assert found.shape == (2, 3, 5, 7)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jvp_raise_clearly(backend: str) -> None:
    call, tensors = masked_call(backend), inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"masked_attention does not support torch\.vmap"):
        torch.func.vmap(call)(*(tensor[None] for tensor in tensors))
    with pytest.raises(RuntimeError, match="query carries a forward-mode tangent"):
        torch.func.jvp(call, tensors, tensors)


# --------------------------------------------------------------------------------------------------
# Which kernel


def test_dense_calls_go_to_torch_and_masked_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(dtype=torch.float32)
    reference, kernel = (
        [f"{name}::masked_attention"] for name in ("softdimo_reference", "softdimo")
    )
    assert operators_run(lambda: masked_attention(*tensors)) == []
    assert_same_bits(masked_attention(*tensors), scaled_dot_product_attention(*tensors))
    assert_same_bits(
        masked_attention(*tensors, scale=0.3), scaled_dot_product_attention(*tensors, scale=0.3)
    )
    assert operators_run(lambda: masked_attention(*tensors, backend="reference")) == reference
    assert operators_run(lambda: masked_attention(*tensors, backend="cpp")) == kernel
    assert operators_run(lambda: masked_call(None)(*tensors)) == kernel
    monkeypatch.setattr(_backends, "PREFERRED", "reference")
    assert operators_run(lambda: masked_attention(*tensors)) == reference


def test_masked_gradients_come_from_the_kernel() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(dtype=torch.float32)]
    assert operators_run(lambda: masked_call(None)(*leaves).sum().backward()) == [
        "softdimo::masked_attention",
        "softdimo::masked_attention_backward",
    ]


def test_explain_names_the_kernel_and_the_floor() -> None:
    tensors, key_mask = inputs(dtype=torch.bfloat16), torch.ones(6, dtype=torch.bool)
    dense = explain(masked_attention, *(tensor.half() for tensor in tensors))
    assert dense.backend == "sdpa"
    assert dense.kernel == "torch.nn.functional.scaled_dot_product_attention"
    fast = torch.ops.softdimo.cpu_isa() == "amx-bf16"
    assert explain(masked_attention, *tensors).backend == ("cpp" if fast else "sdpa")
    masked = explain(masked_attention, *tensors, key_mask=key_mask)
    assert masked.backend == "cpp"
    assert masked.kernel == f"softdimo::masked_attention, {torch.ops.softdimo.cpu_isa()}"
    plain = explain(masked_attention, *tensors, key_mask=key_mask, backend="reference")
    assert plain.kernel == "plain torch"
    weights = 2 * 2 * 5 * 6
    for explanation in (dense, masked, plain):
        assert explanation.flops == 2 * weights * (4 + 3)
        assert explanation.exponentials == weights
        assert explanation.bytes == 2 * 4 * (5 * 4 + 6 * 4 + 6 * 3 + 5 * 3)
    columns = tensors[1].transpose(2, 3).contiguous().transpose(2, 3)
    copied = explain(masked_attention, tensors[0], columns, tensors[2], key_mask=key_mask)
    assert any("key has stride 6 along d" in note for note in copied.notes)


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
key_mask, query_mask = torch.rand(2, 150) < 0.7, torch.rand(2, 117) < 0.7
def run(tensors, dtype, backend):
    leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
    out = s.masked_attention(*leaves, key_mask=key_mask, query_mask=query_mask, backend=backend)
    return out, *torch.autograd.grad(out, leaves, tensors[3].to(dtype))
for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
    shapes = ((117, 21), (150, 21), (150, 40), (117, 40))
    tensors = [torch.randn(2, 2, *shape).to(dtype).double() for shape in shapes]
    for mine, true in zip(run(tensors, dtype, "cpp"), run(tensors, torch.float64, "reference")):
        assert (mine - true).norm() < bound * true.norm(), (mine - true).norm() / true.norm()
"""


@pytest.mark.parametrize("isa", torch.ops.softdimo.compiled_cpu_isas().split())
def test_every_instruction_set(isa: str) -> None:
    best = torch.ops.softdimo.compiled_cpu_isas().split()
    if "SOFTDIMO_CPU_ISA" in os.environ or best.index(isa) < best.index(
        torch.ops.softdimo.cpu_isa()
    ):
        pytest.skip("this processor, or the environment, does not allow it")
    environment = os.environ | {"SOFTDIMO_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(isa=isa)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key": torch.ones(2, 2, 6, 4).int()}, TypeError, "key must have dtype"),
        ({"value": None}, TypeError, "value must be a torch.Tensor, got NoneType"),
        ({"query": torch.ones(2, 5, 4)}, ValueError, r"query must have shape \[B, H, Lq, d\]"),
        ({"query": torch.ones(2, 2, 5, 0)}, ValueError, "query must have .* d >= 1"),
        ({"key": torch.ones(2, 2, 6, 5)}, ValueError, r"key must have shape .* \[2, 2, Lk, 4\]"),
        ({"key": torch.ones(2, 1, 6, 4)}, ValueError, "key must have shape"),
        ({"value": torch.ones(2, 2, 5, 3)}, ValueError, r"value must have .* \[2, 2, 6, d_v\]"),
        ({"value": torch.ones(2, 2, 6, 0)}, ValueError, "value must have shape .* d_v >= 1"),
        ({"key": torch.ones(2, 2, 6, 4, device="meta")}, ValueError, "key is on meta"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must have dtype bool"),
        ({"key_mask": torch.ones(2, 5) > 0}, ValueError, r"key_mask must .*\[B, Lk\] = \[2, 6\]"),
        ({"query_mask": [True]}, TypeError, "query_mask must be a bool tensor or None"),
        ({"query_mask": torch.ones(6) > 0}, ValueError, "query_mask must broadcast to the rows"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a float, got str"),
        ({"backend": "sdpa"}, ValueError, "backend must be None or one of"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend='cuda' cannot run: this operator has no CUDA kernel",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    query, key, value = inputs(dtype=torch.float32)
    tensors = {"query": query, "key": key, "value": value} | options
    with pytest.raises(error, match="masked_attention: " + message):
        masked_attention(**tensors)

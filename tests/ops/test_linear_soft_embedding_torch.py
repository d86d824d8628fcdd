"""linear_soft_embedding and torch: compile, export, autocast, checkpointing, which kernel runs, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.linear_soft_embedding import (
    BACKENDS,
    NAMES,
    VARIANTS,
    Case,
    make,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops import _backends
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.linear_soft_embedding import (
    LOGITS,
    NOTHING,
    STATISTICS,
    linear_soft_embedding,
)
from softdimo_fast.ops.reference import linear_soft_embedding as reference

OPERATORS = {
    "reference": "softdimo_reference::linear_soft_embedding",
    "cpp": "softdimo::linear_soft_embedding",
}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with either backend."""
    monkeypatch.setattr(_backends, "PREFERRED", request.param)
    return str(request.param)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    """Forward and backward, bare and with every option, keeping the logits and not."""
    operators = torch.ops.softdimo_reference
    case = make(dtype=torch.float32, **VARIANTS["positions" if requires_grad else "plain"])
    named = {name: t.requires_grad_(requires_grad) for name, t in case.tensors.items()}
    arguments = (
        *(named.get(name) for name in NAMES[:4]), 0.7, named.get("temperature"),
        case.options.get("mask"), named.get("mask_embedding"),
    )  # fmt: skip
    for keep in (False, True):
        torch.library.opcheck(operators.linear_soft_embedding.default, (*arguments, keep))
    output, logits = operators.linear_soft_embedding(*arguments, True)
    upstream = torch.randn_like(output).requires_grad_(requires_grad)
    wanted = [name in named for name in NAMES]
    torch.library.opcheck(
        operators.linear_soft_embedding_backward.default,
        (upstream, *arguments, logits if requires_grad else None, wanted),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_the_kernel(requires_grad: bool) -> None:
    """Forward and backward, bare and with every option, and everything that forward may keep."""
    operators = torch.ops.softdimo
    dtype = torch.bfloat16 if requires_grad else torch.float32
    case = make(dtype=dtype, **VARIANTS["positions" if requires_grad else "plain"])
    named = {name: t.requires_grad_(requires_grad) for name, t in case.tensors.items()}
    arguments = (
        *(named.get(name) for name in NAMES[:4]), 0.7, named.get("temperature"),
        case.options.get("mask"), named.get("mask_embedding"), False,
    )  # fmt: skip
    for keep in (STATISTICS, LOGITS) if requires_grad else (NOTHING, STATISTICS, LOGITS):
        torch.library.opcheck(operators.linear_soft_embedding.default, (*arguments, keep))
    output, logits, *rest, soft = operators.linear_soft_embedding(*arguments, LOGITS)
    upstream = torch.randn_like(output).requires_grad_(requires_grad)
    kept = (logits if requires_grad else None, *rest, soft if requires_grad else output)
    wanted = [name in named for name in NAMES]
    torch.library.opcheck(
        operators.linear_soft_embedding_backward.default,
        (upstream, *arguments, *[None if t is None else t.detach() for t in kept], wanted),
    )


def test_unwanted_gradients_of_mixed_dtypes_have_one_fake() -> None:
    """What is empty has hidden's dtype in the kernel and in its fake."""
    hidden, weight, codebook = (
        torch.randn(4, 5),
        torch.randn(9, 5).bfloat16(),
        torch.randn(9, 3).double(),
    )
    arguments = (hidden, weight, codebook, None, 1.0, None, None, None, False)
    output, _, *rest, _ = torch.ops.softdimo.linear_soft_embedding(*arguments, STATISTICS)
    for first in (0, 1, 2):
        wanted = [i == first for i in range(6)]
        torch.library.opcheck(
            torch.ops.softdimo.linear_soft_embedding_backward.default,
            (torch.ones_like(output), *arguments, None, *rest, output, wanted),
        )


@pytest.mark.parametrize(
    ("name", "memory"), [("plain", "auto"), ("positions", "keep"), ("grouped", "recompute")]
)
def test_compile_and_export_give_the_same_bits(name: str, memory: str) -> None:
    case = make(dtype=torch.float32, memory=memory, **VARIANTS[name])
    assert_compiles_bitwise(case.call(), *case.values)
    assert_exports(case.call(), *case.values)


def test_autocast_casts_everything_but_the_temperature() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(case.call(), case.values)
        wide = make().call()(*make().values)
    halves = {
        name: tensor if name == "temperature" else tensor.bfloat16()
        for name, tensor in case.tensors.items()
    }
    expected, half_grads = gradients(Case(halves, case.options).call(), halves.values())
    assert_same_bits(value, expected)
    for grad, half_grad in zip(grads, half_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_same_bits(grad, half_grad.float())
    assert wide.dtype == torch.float64


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    _, expected = gradients(case.call(), case.values)
    _, found = gradients(
        lambda *values: checkpoint(case.call(), *values, use_reentrant=False),  # type: ignore[no-untyped-call]
        case.values,
    )
    for first, second in zip(found, expected, strict=True):
        assert_same_bits(first, second)


def test_backward_twice_and_an_expanded_upstream() -> None:
    case = make(dtype=torch.float32, **VARIANTS["positions"])
    leaves = [tensor.requires_grad_() for tensor in case.values]
    value = case.call()(*leaves)
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.ones_like(value))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_in_place_change_after_forward_is_caught() -> None:
    case = make(dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    value = case.call()(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_vmap_and_jvp_raise_clearly() -> None:
    case = make(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"linear_soft_embedding does not support torch\.vmap"):
        torch.func.vmap(case.call(), in_dims=(0, None, None))(*case.values)
    with pytest.raises(RuntimeError, match="hidden carries a forward-mode tangent"):
        torch.func.jvp(case.call(), tuple(case.values), tuple(case.values))


def test_fake_tensors_trace_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone: a trace must not unroll the walk over the slices."""
    monkeypatch.setattr(reference, "_slices", None)
    with FakeTensorMode():
        hidden = torch.empty(2, 3, 5, requires_grad=True)
        weight = torch.empty(2, 7, 5, dtype=torch.bfloat16, requires_grad=True)
        value = linear_soft_embedding(hidden, weight, torch.empty(2, 7, 4, dtype=torch.float16))
        value.sum().backward()
    assert value.shape == (2, 3, 2, 4)
    assert value.dtype == torch.float16
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_only_our_operator_runs_and_explain_counts_it(backend: str) -> None:
    case = make(dtype=torch.bfloat16, groups=2)
    assert operators_run(lambda: case.call()(*case.values)) == [OPERATORS[backend]]
    explanation = explain(linear_soft_embedding, *case.values, **case.options)
    assert explanation.backend == backend
    assert explanation.flops == 2 * 12 * 2 * 7 * (5 + 3)
    assert explanation.exponentials == 12 * 2 * 7
    assert explanation.bytes == 2 * (12 * 5 + 2 * 7 * 5 + 2 * 7 * 3 + 12 * 2 * 3)
    rows = reference.SLICE_BYTES // (4 * 2 * 7)
    isa = torch.ops.softdimo.cpu_isa()
    kernels = {
        "reference": f"plain torch, {rows} rows at a time",
        "cpp": f"softdimo::linear_soft_embedding, {isa}",
    }
    assert explanation.kernel == kernels[backend]


def test_explain_says_where_products_are_of_bfloat16(backend: str) -> None:
    case = make(dtype=torch.bfloat16, width=9)
    here = backend == "cpp" and torch.ops.softdimo.cpu_isa().endswith("-bf16")
    for options, expected in (({}, here), ({"precision": "high"}, False)):
        notes = explain(linear_soft_embedding, *case.values, **options).notes
        assert any("products of bfloat16" in note for note in notes) == expected
    wide = explain(linear_soft_embedding, *make(dtype=torch.float32, width=9).values)
    assert not any("products of bfloat16" in note for note in wide.notes)


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
h, w, e, b = torch.randn(300, 40), torch.randn(777, 40), torch.randn(777, 21), torch.randn(777)
g = torch.randn(300, 21)
def run(backend, *tensors):
    h, w, e, b = leaves = [t.requires_grad_() for t in tensors]
    out = s.linear_soft_embedding(h, w, e, bias=b, temperature=0.7, backend=backend)
    return out, *torch.autograd.grad(out, leaves, g.to(out.dtype))
wide = run("reference", *[t.double() for t in (h, w, e, b)])
for mine, true in zip(run("cpp", h, w, e, b), wide):
    assert (mine - true).norm() < 5e-6 * true.norm(), (mine - true).norm() / true.norm()
halves = [t.detach().bfloat16() for t in (h, w, e, b)]
wide = run("reference", *[t.double() for t in halves])
for mine, true in zip(run("cpp", *halves), wide):
    assert (mine - true).norm() < 8e-3 * true.norm(), (mine - true).norm() / true.norm()
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


HIDDEN, WEIGHT, CODEBOOK = torch.ones(3, 5), torch.ones(7, 5), torch.ones(7, 2)
ROWS = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must have dtype"),
        ({"codebook": CODEBOOK.to_sparse()}, TypeError, "codebook must be a dense"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have shape \[..., H\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \[V, H\] or \[G, V, H\]"),
        ({"weight": torch.ones(0, 5)}, ValueError, "weight must have shape .* no size 0"),
        ({"weight": torch.ones(7, 4)}, ValueError, "weight must have H = 5 columns"),
        ({"codebook": torch.ones(6, 2)}, ValueError, r"codebook must have shape \[V, D\]"),
        ({"codebook": torch.ones(7, 0)}, ValueError, "codebook must have .* D >= 1"),
        ({"codebook": torch.ones(2, 7, 2)}, ValueError, r"codebook must have shape \[V, D\]"),
        ({"weight": torch.ones(2, 7, 5)}, ValueError, r"codebook must have shape \[G, V, D\]"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"bias": torch.ones(2, 7)}, ValueError, r"bias must broadcast to the rows .*= \[3, 7\]"),
        ({"mask": ROWS}, ValueError, "mask_embedding is required when mask is given"),
        (
            {"mask_embedding": torch.ones(2)},
            ValueError,
            "mask_embedding is given, but mask is None",
        ),
        (
            {"mask": ROWS, "mask_embedding": torch.ones(3)},
            ValueError,
            r"mask_embedding must have shape \[D\] = \[2\], got \[3\]",
        ),
        (
            {"mask": torch.ones(3), "mask_embedding": torch.ones(2)},
            TypeError,
            "mask must have dtype",
        ),
        ({"mask": ROWS[:2], "mask_embedding": torch.ones(2)}, ValueError, "mask must broadcast"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must .* hidden.shape\[:-1\]"),
        ({"memory": "small"}, ValueError, "memory must be one of 'auto', 'keep', 'recompute'"),
        ({"precision": "low"}, ValueError, "precision must be one of 'default', 'high'"),
        ({"codebook": CODEBOOK.to("meta")}, ValueError, "codebook is on meta"),
        ({"bias": torch.ones(7, device="meta")}, ValueError, "bias is on meta"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        (
            {"backend": "cuda"},
            ValueError,
            r"backend='cuda' cannot run: this operator has no CUDA kernel",
        ),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = {"hidden": HIDDEN, "weight": WEIGHT, "codebook": CODEBOOK} | options
    with pytest.raises(error, match="linear_soft_embedding: " + message):
        linear_soft_embedding(**tensors)

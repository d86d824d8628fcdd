"""soft_embedding and torch: derivatives, compile, export, autocast, which kernel runs."""

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
from support.soft_embedding import BACKENDS, DTYPES, small_case, strided

from softdimo_fast import explain, soft_embedding
from softdimo_fast.ops.reference.random import gumbel

# ---------------------------------------------------------------------------------------------------
# derivatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_gradcheck(backend: str, grouped: bool, noise: bool) -> None:
    case = small_case(noise, grouped)
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.call(backend), leaves)
    assert torch.autograd.gradgradcheck(case.call(backend), leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_higher_derivatives_of_dependent_inputs(backend: str, tied: bool) -> None:
    """Second and third derivatives, where backward's inputs depend on each other through the graph."""
    table = torch.randn(5, 5, dtype=torch.double)

    def derivatives(op: Any) -> list[torch.Tensor]:
        z = torch.linspace(-1, 1, 15, dtype=torch.double).reshape(3, 5).requires_grad_()
        codebook = table * z.sum() if tied else table
        temperature = 1 + z[:, 0].square()
        found = []
        value = op(z, codebook, temperature).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, z, create_graph=True)
            found.append(gradient.detach())
            value = gradient.square().sum()
        return found

    ours = derivatives(lambda z, e, t: soft_embedding(z, e, temperature=t, backend=backend))
    theirs = derivatives(lambda z, e, t: torch.softmax(z / t.unsqueeze(-1), -1) @ e)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}])
def test_gradcheck_truncated(backend: str, options: dict[str, Any]) -> None:
    case = small_case(noise=True, **options)
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.call(backend), leaves)
    assert torch.autograd.gradgradcheck(case.call(backend), leaves, fast_mode=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_specification_backward_is_the_derivative_of_its_forward(grouped: bool) -> None:
    """torch differentiates the specification's forward; its written-out backward says the same."""
    case = small_case(noise=True, grouped=grouped)
    upstream = torch.randn((2, 2, 2, 3) if grouped else (2, 3, 3), dtype=torch.double)
    _, ours = gradients(case.call("reference"), case.tensors(), upstream)
    _, theirs = gradients(case.composed, case.tensors(), upstream)
    for mine, true in zip(ours, theirs, strict=True):
        # The yardstick's noise is rounded to float32.
        torch.testing.assert_close(mine, true, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_only_where_required(backend: str, wanted: int) -> None:
    case = small_case()
    _, everything = gradients(case.call(backend), case.tensors())
    leaves = [
        t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.tensors())
    ]
    case.call(backend)(*leaves).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        if wanted >> i & 1:
            torch.testing.assert_close(leaf.grad, full, rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_is_the_argmax_embedding_with_the_soft_gradient(backend: str) -> None:
    logits, codebook, upstream = torch.randn(300, 70), torch.randn(70, 12), torch.randn(300, 12)
    options: dict[str, Any] = {"noise": "gumbel", "seed": 5, "temperature": 0.7, "backend": backend}
    hard, hard_grads = gradients(
        lambda z, e: soft_embedding(z, e, hard=True, **options), (logits, codebook), upstream
    )
    _, soft_grads = gradients(
        lambda z, e: soft_embedding(z, e, **options), (logits, codebook), upstream
    )
    noised = logits + gumbel(torch.tensor([5, 0]), torch.arange(300), 70, torch.float32)
    assert_same_bits(hard, codebook[noised.argmax(-1)])
    for mine, soft in zip(hard_grads, soft_grads, strict=True):
        assert_same_bits(mine, soft)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_ties_go_to_the_lowest_index(backend: str) -> None:
    logits = torch.zeros(4, 600)
    logits[1, [300, 599]] = 2.0
    logits[2, [255, 256]] = 1.0
    logits[3, 599] = 3.0
    picked = soft_embedding(logits, torch.arange(600.0)[:, None], hard=True, backend=backend)
    assert picked.flatten().tolist() == [0, 300, 255, 599]


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_keeps_what_it_says(backend: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    eye = torch.eye(5)
    kept = soft_embedding(logits, eye, backend=backend, top_k=2) > 0
    assert kept.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    kept = soft_embedding(logits, eye, backend=backend, top_k=99) > 0
    assert bool(kept.all())
    # Masses of the first row in order: .375 (index 1), .375 (2), .138 (4), .051 (0), .019 (3).
    kept = soft_embedding(logits, eye, backend=backend, top_p=0.4) > 0
    assert kept.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    kept = soft_embedding(logits, eye, backend=backend, top_p=0.3) > 0
    assert kept.tolist() == [[False, True, False, False, False], [True, True, False, False, False]]
    assert bool((soft_embedding(logits, eye, backend=backend, top_p=1.0) > 0).all())
    # Truncation looks at logits / T without noise; noise never revives a dropped entry.
    kept = soft_embedding(logits, eye, backend=backend, top_k=1, noise="gumbel", seed=0)
    assert_same_bits(kept, torch.eye(5)[[1, 0]])


# ---------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_compiled_is_bitwise_eager(backend: str, grouped: bool) -> None:
    case = small_case(noise=True, grouped=grouped)
    assert_compiles_bitwise(case.call(backend), *[t.float() for t in case.tensors()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_hard_half_precision(backend: str) -> None:
    logits, codebook = torch.randn(5, 6, 300).bfloat16(), torch.randn(300, 7).bfloat16()
    assert_compiles_bitwise(
        lambda z, e: soft_embedding(z, e, hard=True, temperature=0.5, backend=backend),
        logits,
        codebook,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changing_temperature_does_not_compile_anew(backend: str) -> None:
    """More values than torch recompiles for; each gives the eager bits."""
    torch._dynamo.reset()
    logits, codebook = torch.randn(5, 300), torch.randn(300, 7)
    annealed = torch.compile(
        lambda z, t: soft_embedding(z, codebook, temperature=t, backend=backend), fullgraph=True
    )
    for temperature in torch.linspace(1.5, 0.05, 20).tolist():
        eager = soft_embedding(logits, codebook, temperature=temperature, backend=backend)
        assert_same_bits(annealed(logits, temperature), eager)


def test_exports() -> None:
    case = small_case(noise=True)
    assert_exports(case.call(None), *[t.float() for t in case.tensors()])


def operator_arguments(grouped: bool, hard: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    case = small_case(grouped=grouped)
    logits, codebook, temperature, embedding = (
        t.to(dtype).requires_grad_() for t in case.tensors()
    )
    mask = case.options["mask"]
    seed, truncation = torch.tensor([1, 2]), (4, 0.9)
    return (
        logits, codebook, 1.0, temperature, mask, embedding, seed, None, *truncation, False, hard,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("grouped", "hard", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.float32)],
)
def test_opcheck_forward(grouped: bool, hard: bool, dtype: torch.dtype) -> None:
    arguments = operator_arguments(grouped, hard, dtype)
    torch.library.opcheck(torch.ops.softdimo.soft_embedding, arguments)
    plain = (arguments[0].detach(), arguments[1].detach(), 2.0, *[None] * 7, False, hard)
    torch.library.opcheck(torch.ops.softdimo.soft_embedding, plain)
    torch.library.opcheck(
        torch.ops.softdimo_reference.soft_embedding, (*arguments[:8], hard, 3, 0.9)
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck_backward(grouped: bool) -> None:
    inputs = operator_arguments(grouped, False, torch.float64)
    *inputs, _ = inputs
    outputs = torch.ops.softdimo.soft_embedding(*inputs, False)
    value, top, total, _, threshold, last = (t.detach() for t in outputs)
    grad = torch.randn_like(value, requires_grad=True)
    for wanted in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(
            torch.ops.softdimo.soft_embedding_backward,
            (grad, *inputs, top, total, value, threshold, last, wanted),
        )
        torch.library.opcheck(
            torch.ops.softdimo_reference.soft_embedding_backward,
            (grad, *inputs[:8], False, None, None, wanted),
        )


def test_unwanted_gradients_of_mixed_dtypes_have_one_fake() -> None:
    """What is empty has the logits' dtype in the kernel and in its fake."""
    logits, codebook = torch.randn(4, 9).bfloat16(), torch.randn(9, 3).double()
    inputs = (logits, codebook, 1.0, *[None] * 7, False)
    value, top, total, _, threshold, last = torch.ops.softdimo.soft_embedding(*inputs, False)
    for wanted in ([True, False, False, False], [False, True, False, False]):
        torch.library.opcheck(
            torch.ops.softdimo.soft_embedding_backward,
            (torch.ones_like(value), *inputs, top, total, value, threshold, last, wanted),
        )


def test_autocast_casts_the_codebook_and_reads_logits_as_they_are() -> None:
    logits, codebook, embedding = torch.randn(5, 40), torch.randn(40, 6), torch.randn(6)
    mask = torch.tensor([True, False, False, True, False])
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = soft_embedding(
                logits, codebook, mask=mask, mask_embedding=embedding, backend=backend
            )
            wide = soft_embedding(logits.double(), codebook.double(), backend=backend)
        expected = soft_embedding(
            logits,
            codebook.bfloat16(),
            mask=mask,
            mask_embedding=embedding.bfloat16(),
            backend=backend,
        )
        assert_same_bits(value, expected)
        assert wide.dtype == torch.float64


def test_vmap_and_jvp_raise_clearly() -> None:
    logits, codebook = torch.randn(2, 3, 8), torch.randn(8, 4)
    for backend in BACKENDS:
        with pytest.raises(RuntimeError, match=r"soft_embedding does not support torch\.vmap"):
            torch.vmap(lambda z, b=backend: soft_embedding(z, codebook, backend=b))(logits)
        with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
            torch.func.jvp(
                lambda z, b=backend: soft_embedding(z, codebook, backend=b), (logits,), (logits,)
            )


def test_double_backward_under_compile_raises_clearly() -> None:
    logits, codebook = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3)
    value = torch.compile(lambda z: soft_embedding(z, codebook))(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------------
# which kernel runs


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "softdimo"),
        ({"hard": True}, "softdimo"),
        ({"noise": "gumbel"}, "softdimo"),
        ({"precision": "high"}, "softdimo"),
        ({"top_k": 3}, "softdimo"),
        ({"top_p": 0.5}, "softdimo"),
        ({"backend": "reference"}, "softdimo_reference"),
        ({"backend": "cpp"}, "softdimo"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_which_kernel_runs(options: dict[str, Any], kernel: str, dtype: torch.dtype) -> None:
    logits, codebook = (
        torch.randn(4, 8, dtype=dtype, requires_grad=True),
        torch.randn(8, 3, dtype=dtype),
    )
    ran = operators_run(lambda: soft_embedding(logits, codebook, **options).sum().backward())
    assert ran == [f"{kernel}::soft_embedding", f"{kernel}::soft_embedding_backward"]
    assert ("reference" in kernel) == (
        explain(soft_embedding, logits, codebook, **options).backend == "reference"
    )


def test_explain_names_costs() -> None:
    logits, codebook = torch.randn(6, 5, 100), torch.randn(100, 16)
    explanation = explain(soft_embedding, logits, codebook)
    assert explanation.backend == "cpp"
    assert explanation.flops == 2 * 30 * 100 * 16
    assert explanation.exponentials == 3000
    assert explanation.bytes == 4 * (3000 + 1600 + 480)
    assert explanation.floor_seconds(1e9, 1e12) == pytest.approx(explanation.bytes / 1e9)
    assert explanation.notes == ()
    strides = explain(soft_embedding, strided(logits, "columns"), codebook)
    assert "contiguous copy" in strides.notes[0]
    assert "top_k" in explain(soft_embedding, logits, codebook, top_k=2).notes[0]
    assert "soft_embedding" in str(explanation)
    before = torch.get_rng_state()
    assert explain(soft_embedding, logits, codebook, noise="gumbel").backend == "cpp"
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="fn must be one of"):
        explain(print)


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
z, e, g = torch.randn(300, 777) * 4, torch.randn(777, 21), torch.randn(300, 21)
def run(z, e, backend):
    z, e = z.requires_grad_(), e.requires_grad_()
    out = s.soft_embedding(z, e, temperature=0.7, noise="gumbel", seed=1, backend=backend)
    return out, *torch.autograd.grad(out, (z, e), g.to(out.dtype))
for mine, true in zip(run(z, e, "cpp"), run(z.detach().double(), e.detach().double(), "reference")):
    assert (mine - true).norm() < 2e-6 * true.norm(), (mine - true).norm() / true.norm()
e = e.detach().bfloat16()
for mine, true in zip(run(z.detach(), e, "cpp"), run(z.detach().double(), e.double(), "reference")):
    assert (mine - true).norm() < 4e-3 * true.norm(), (mine - true).norm() / true.norm()
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


def test_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import softdimo_fast as s, torch; s.soft_embedding(torch.ones(1, 2), torch.ones(2, 1))",
        ],
        env=os.environ | {"SOFTDIMO_CPU_ISA": "z80", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "SOFTDIMO_CPU_ISA=z80 is none of" in run.stderr

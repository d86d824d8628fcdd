"""sample_tokens and torch: compile, export, bad arguments, which kernel runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.checks import assert_same_bits, operators_run
from support.sampling import BACKENDS, operator_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.sample_tokens import sample_tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_differentiated_and_autocast_is_ignored(backend: str) -> None:
    logits = torch.randn(30, 9, requires_grad=True)
    temperature = torch.full((30,), 0.7, requires_grad=True)
    tokens, log_prob = sample_tokens(
        logits, temperature=temperature, seed=1, return_log_prob=True, backend=backend
    )
    assert not tokens.requires_grad
    assert not log_prob.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = sample_tokens(
            logits, temperature=temperature, seed=1, return_log_prob=True, backend=backend
        )
    assert_same_bits(again[0], tokens)
    assert_same_bits(again[1], log_prob)


def test_only_our_operator_runs() -> None:
    logits = torch.randn(3, 4)
    assert operators_run(lambda: sample_tokens(logits)) == ["softdimo::sample_tokens"]
    for space, backend in (("softdimo", "cpp"), ("softdimo_reference", "reference")):
        ran = operators_run(lambda backend=backend: sample_tokens(logits, backend=backend))  # type: ignore[misc]
        assert ran == [f"{space}::sample_tokens"]


def test_explain() -> None:
    logits = torch.randn(3, 4)
    explanation = explain(sample_tokens, logits, return_log_prob=True)
    assert explanation.backend == "cpp"
    assert explanation.bytes == 12 * 4 + 3 * (8 + 4)
    assert explanation.exponentials == 12
    assert explanation.notes == ()
    assert "contiguous copy" in explain(sample_tokens, torch.randn(4, 3).t()).notes[0]
    truncated = explain(sample_tokens, logits, top_p=0.9)
    assert truncated.exponentials == 12
    assert "sorts nothing" in truncated.notes[0]
    reference = explain(sample_tokens, logits, backend="reference")
    assert reference.exponentials == 24
    assert "[N, V]" in reference.notes[0]
    state = torch.get_rng_state()
    explain(sample_tokens, logits)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [(None, None, False), (3, 0.8, True)])
def test_opcheck(backend: str, options: tuple[int | None, float | None, bool]) -> None:
    top_k, top_p, log_prob = options
    seed, numbers = torch.tensor([1, 0]), torch.arange(6).reshape(2, 3)
    temperature = torch.rand(3) + 0.5
    operator = operator_of(backend).default
    for row_temperature, row_ids in ((None, None), (temperature, numbers)):
        torch.library.opcheck(
            operator,
            (torch.randn(2, 3, 5), 0.7, row_temperature, top_k, top_p, seed, row_ids, log_prob),
        )


def drawn_with(seed: Tensor, backend: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        return sample_tokens(
            logits,
            seed=seed,
            top_k=5,
            top_p=0.9,
            temperature=0.7,
            return_log_prob=True,
            backend=backend,
        )

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_gives_the_same_bits(backend: str) -> None:
    torch._dynamo.reset()
    call = drawn_with(torch.tensor([9, 2]), backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for count in (6, 10):
        logits = torch.randn(count, 8)
        for first, second in zip(call(logits), compiled(logits), strict=True):
            assert_same_bits(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_draws_follow_manual_seed(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: sample_tokens(logits, backend=backend), fullgraph=True)
    logits = torch.randn(100, 8)
    torch.manual_seed(1)
    first, second = compiled(logits), compiled(logits)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(logits))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export_keeps_the_operator(backend: str) -> None:
    call = drawn_with(torch.tensor([9, 2]), backend)

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            return call(logits)

    logits = torch.randn(6, 8)
    program = torch.export.export(Module(), (logits,))
    assert any("sample_tokens" in str(node.target) for node in program.graph.nodes)
    for first, second in zip(program.module()(logits), call(logits), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend: str) -> None:
    with FakeTensorMode():
        tokens, log_prob = sample_tokens(
            torch.empty(2, 3, 5), top_k=2, return_log_prob=True, backend=backend
        )
    assert tokens.shape == log_prob.shape == (2, 3)
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jvp_raise_clearly(backend: str) -> None:
    logits = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"sample_tokens does not support torch\.vmap"):
        torch.func.vmap(lambda z: sample_tokens(z, seed=1, backend=backend))(logits)
    with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
        torch.func.jvp(lambda z: sample_tokens(z, seed=1, backend=backend), (logits,), (logits,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.ones(3, dtype=torch.int64)}, TypeError, "logits must have dtype"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[..., V\]"),
        ({"logits": torch.ones(3, 0)}, ValueError, "logits must have a vocabulary V >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a float, got str"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must broadcast to the rows"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2**63}, ValueError, "top_k must fit int64, got 9223372036854775808"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int or None, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": "a"}, TypeError, "top_p must be a float, got str"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 signed bits"),
        ({"seed": torch.ones(2)}, ValueError, "a seed tensor must be int64"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator exclude"),
        ({"row_ids": torch.ones(3)}, TypeError, "row_ids must be an int64 tensor or None"),
        ({"row_ids": torch.arange(4)}, ValueError, "row_ids must broadcast to the rows"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        (
            {"backend": "cpp", "logits": torch.ones(3, 4, device="meta")},
            ValueError,
            "backend='cpp' cannot run: the C\\+\\+ kernels need CPU tensors",
        ),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run"),
        ({"temperature": torch.ones(3, device="meta")}, ValueError, "temperature is on meta"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    logits = options.pop("logits", torch.randn(3, 4))
    with pytest.raises(error, match="sample_tokens: " + message):
        sample_tokens(logits, **options)  # type: ignore[call-overload]


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
z = torch.randn(2000, 777) * 3
for options in ({{}}, {{"top_k": 40}}, {{"top_p": 0.9, "temperature": 0.7}}):
    for logits in (z, z.double(), z.bfloat16(), z.half()):
        (mine, log_p), (true, true_log_p) = (
            s.sample_tokens(logits, seed=1, return_log_prob=True, backend=b, **options)
            for b in ("cpp", "reference")
        )
        assert torch.equal(mine, true), int((mine != true).sum())
        assert ((log_p - true_log_p).abs() < 1e-5).float().mean() > 0.998
"""


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v3", "x86-64-v4"])
def test_every_instruction_set(isa: str) -> None:
    best = torch.ops.softdimo.compiled_cpu_isas().split()
    if (
        "SOFTDIMO_CPU_ISA" in os.environ
        or isa not in best
        or best.index(isa) < best.index(torch.ops.softdimo.cpu_isa())
    ):
        pytest.skip("this processor, the build or the environment does not allow it")
    environment = os.environ | {"SOFTDIMO_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(isa=isa)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr

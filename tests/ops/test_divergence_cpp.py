"""What the C++ divergences promise beyond the specification: lone rows, threads, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, gradients
from torch import Tensor

from softdimo_fast import distribution_matching_loss, explain, token_divergence

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": 0.3},
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows_of_every_sort(rows: int, vocabulary: int, dtype: torch.dtype) -> list[Tensor]:
    """Teacher, model and unconditional logits: far apart, nearly equal, nearly one-hot, -inf, NaN."""
    model, noise, uncond = torch.randn(3, rows, vocabulary)
    distance = torch.tensor([3.0, 1e-3, 0.1, 1.0])[torch.arange(rows) % 4, None]
    teacher = model + distance * noise
    for row in range(0, rows, 5):
        teacher[row, row % vocabulary] += 20
        model[row, row % vocabulary] += 20
    teacher[3::7, 0] = model[3::7, 0] = uncond[3::7, 0] = -torch.inf
    teacher[4::11, 1] = -torch.inf
    teacher[9::31, 2] = torch.nan
    return [t.to(dtype) for t in (teacher, model, uncond)]


def run(tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    def call(teacher: Tensor, model: Tensor, uncond: Tensor) -> Tensor:
        return token_divergence(
            teacher,
            model,
            teacher_uncond_logits=uncond,
            guidance_scale=1.5,
            backend="cpp",
            **options,
        )

    value, grads = gradients(call, tensors)
    return value, *grads


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 700])
def test_a_row_does_not_depend_on_the_others(
    options: dict[str, Any], dtype: torch.dtype, vocabulary: int
) -> None:
    tensors = rows_of_every_sort(66, max(vocabulary, 3), dtype)
    tensors = [t[:, :vocabulary].contiguous() for t in tensors]
    everything = run(tensors, reduction="none", **options)
    order = torch.randperm(66)
    for chosen in (order, order[:17], torch.arange(5, 6)):
        some = run([t[chosen] for t in tensors], reduction="none", **options)
        for mine, theirs in zip(some, everything, strict=True):
            assert_same_bits(mine, theirs[chosen])
    mask = torch.rand(66) < 0.5
    counted = run(tensors, reduction="none", mask=mask, **options)
    for mine, theirs in zip(counted, everything, strict=True):
        kept = mask if mine.dim() == 1 else mask[:, None]
        assert_same_bits(mine, torch.where(kept, theirs, 0.0))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_threads_change_nothing(threads: Callable[[int], None], reduction: str) -> None:
    tensors = [t.nan_to_num(0.5) for t in rows_of_every_sort(1001, 100, torch.float32)]
    mask, weight = torch.rand(1001) < 0.7, torch.rand(1001)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run(tensors, reduction=reduction, mask=mask, weight=weight))
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("normalization", ["sum", "batch", "masked"])
def test_threads_do_not_change_the_loss(threads: Callable[[int], None], normalization: str) -> None:
    student, teacher, auxiliary = torch.randn(3, 4, 250, 100).unbind()
    mask = torch.rand(4, 250) < 0.7
    results = []
    for count in (1, 2, 5):
        threads(count)
        value, (gradient,) = gradients(
            lambda z: distribution_matching_loss(
                z, teacher, auxiliary, mask, normalization=normalization, backend="cpp"
            ),
            (student,),
        )
        results.append((value, gradient))
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("options", KINDS)
def test_the_loss_is_the_divergence(options: dict[str, Any]) -> None:
    """Same kernel, same bits: the student's gradient is the model's of token_divergence."""
    teacher, auxiliary = torch.randn(2, 6, 30, 333)
    mask = torch.rand(6, 30) < 0.6
    _, (student,) = gradients(
        lambda z: distribution_matching_loss(
            z, teacher, auxiliary, mask, normalization="sum", backend="cpp", **options
        ),
        (torch.full_like(teacher, torch.nan),),
    )
    _, (model,) = gradients(
        lambda z: token_divergence(
            teacher, z, mask=mask, reduction="sum", backend="cpp", **options
        ),
        (auxiliary,),
    )
    assert_same_bits(student, model)


def test_a_large_vocabulary() -> None:
    """Chunks add up: a row longer than any chunk, against float64."""
    teacher, model = (4 * torch.randn(2, 4, 70001)).unbind()
    for options in KINDS:
        value, grads = gradients(
            lambda a, b, o=options: token_divergence(a, b, backend="cpp", **o), (teacher, model)
        )
        truth, true_grads = gradients(
            lambda a, b, o=options: token_divergence(a, b, backend="reference", **o),
            (teacher.double(), model.double()),
        )
        for mine, true in zip((value, *grads), (truth, *true_grads), strict=True):
            assert float((mine - true).norm() / true.norm()) < 1e-6


def test_bfloat16_rows_keep_float32_accuracy() -> None:
    """log_softmax rounds to bfloat16 and is off by several percent."""
    teacher, model = (2 * torch.randn(2, 300, 1024)).bfloat16().unbind()
    truth = token_divergence(teacher.double(), model.double(), backend="reference")
    value = token_divergence(teacher, model, backend="cpp")
    assert float((value - truth).abs() / truth) < 1e-6


def test_explain_names_copies() -> None:
    teacher, model = torch.randn(2, 6, 5, 100)
    columns = model.transpose(-1, -2).contiguous().transpose(-1, -2)
    explanation = explain(token_divergence, teacher, columns)
    assert explanation.backend == "cpp"
    assert explanation.notes == ("model_logits have stride 5 along V: one contiguous copy is made",)
    assert explain(token_divergence, teacher[..., :90], model[..., 10:]).notes == ()
    mask = torch.ones(6, 5, dtype=torch.bool)
    explanation = explain(distribution_matching_loss, columns, columns, model, mask)
    assert [note.split()[0] for note in explanation.notes] == ["teacher_logits"]
    assert "softdimo::distribution_matching_loss" in explanation.kernel


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
b = torch.randn(300, 777) * 4
a = b + torch.logspace(-5, 1, 300)[:, None] * torch.randn(300, 777)
def run(a, b, backend, **options):
    a, b = a.requires_grad_(), b.requires_grad_()
    out = s.token_divergence(a, b, model_temperature=0.7, teacher_temperature=0.7, reduction="none",
                             backend=backend, **options)
    return out, *torch.autograd.grad(out.sum(), (a, b))
for options in (dict(kind="forward_kl"), dict(kind="reverse_kl"), dict(kind="jeffreys", beta=0.3)):
    truth = run(a.detach().double(), b.detach().double(), "reference", **options)
    for mine, true in zip(run(a.detach(), b.detach(), "cpp", **options), truth):
        assert (mine - true).norm() < 1e-6 * true.norm(), (mine - true).norm() / true.norm()
"""


@pytest.mark.parametrize("isa", ["x86-64-v4", "x86-64-v3", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    compiled = torch.ops.softdimo.compiled_cpu_isas().split()
    if "SOFTDIMO_CPU_ISA" in os.environ or isa not in compiled:
        pytest.skip("the environment, or the build, does not allow it")
    if compiled.index(isa) < compiled.index(torch.ops.softdimo.cpu_isa()):
        pytest.skip("this processor does not allow it")
    environment = os.environ | {"SOFTDIMO_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = ISA_SCRIPT.format(isa=isa)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""Everything that is compared computes the same thing, for every case."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch import Tensor

from softdimo_fast import sample_tokens, soft_embedding
from softdimo_fast.benchmark import accuracy
from softdimo_fast.benchmark.cases import CASES, OPERATORS, Case, select
from softdimo_fast.benchmark.workloads import build, peers
from softdimo_fast.benchmark.workloads.common import (
    TEMPERATURE,
    Absent,
    Function,
    Implementation,
    Inputs,
    Workload,
    nbytes,
)
from softdimo_fast.benchmark.workloads.names import COMPILED, MEANINGS, OURS
from softdimo_fast.benchmark.workloads.published import generator_loss

COMPARED = [case for case in CASES if build(case, tiny=True).exact is not None]
RANDOM = [case for case in CASES if case not in COMPARED]
# Of a whole result. Eager bfloat16 rounds every intermediate; logits that are nearly equal cost it more.
TOLERANCE = {"float32": 5e-6, "bfloat16": 0.05, "autocast": 0.05}
NEAR_EQUAL = 0.1


def implementations(workload: Workload) -> list[Implementation]:
    """Those that need no compiler."""
    return [one for one in workload.implementations if not one.compiled]


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.key)
def test_everybody_agrees_with_float64(case: Case) -> None:
    workload = build(case, tiny=True)
    true = accuracy.exact(workload)
    assert true is not None
    for implementation in implementations(workload):
        errors = accuracy.errors(workload, implementation, true)
        ours = implementation.name.startswith(OURS)
        loose = case.variant == "near-equal" and not ours
        limit = NEAR_EQUAL if loose else TOLERANCE[case.dtype]
        assert (errors.value is None) == (not implementation.same_value)
        assert (errors.value or 0) < limit, implementation.name
        assert (errors.gradient is None) == (not workload.wanted)
        assert (errors.gradient or 0) < limit, implementation.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_expression_that_errors_are_measured_by_is_the_operator(operator: str) -> None:
    """In float64 both agree to rounding: neither temperature, mask nor smoothing differs."""
    for case in select(operators=[operator], dtypes=["float32"]):
        workload = build(case, tiny=True)
        if workload.exact is None:
            continue
        wide = {
            name: tensor.detach().double() if tensor.is_floating_point() else tensor
            for name, tensor in workload.inputs.items()
        }
        values = (workload.implementations[0].function(wide), workload.exact(wide))
        ours, lean = (one if isinstance(one, tuple) else (one,) for one in values)
        for got, wanted in zip(ours, lean, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_a_case_is_whole(case: Case) -> None:
    workload = build(case, tiny=True)
    assert workload.implementations[0].name.startswith(OURS)
    names = [one.name for one in (*workload.implementations, *workload.absent)]
    assert len(set(names)) == len(names) >= 2
    known = {name.removesuffix(" after F.linear") for name in names}
    assert known <= set(MEANINGS)
    assert any(one.compiled for one in workload.implementations) == case.compiled
    assert bool(workload.wanted) == (len(case.passes) == 2)
    for work in workload.work.values():
        assert work.read > 0
        assert min(work.written, work.flops, work.exponentials) >= 0
    again = build(case, tiny=True)
    for name, tensor in workload.inputs.items():
        assert torch.equal(tensor, again.inputs[name]), name


def test_gumbel_softmax_has_the_same_mean() -> None:
    torch.manual_seed(0)
    case = next(case for case in RANDOM if case.variant == "gumbel")
    workload = build(case, tiny=True)
    logits = torch.linspace(-1, 1, 6).expand(20_000, 6)
    inputs: Inputs = {"logits": logits, "codebook": torch.eye(6)}
    ours, theirs = (one.function(inputs).mean(0) for one in implementations(workload))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    plain = soft_embedding(logits[0], torch.eye(6), temperature=TEMPERATURE)
    assert (ours - plain).abs().max() > 0.01


def test_samples_have_the_same_law() -> None:
    torch.manual_seed(0)
    (case,) = select(operators=["sample_tokens"], shapes=["maskgit"], dtypes=["float32"])
    logits = torch.linspace(-1, 1, 6).expand(20_000, 6)
    law = torch.softmax(logits[0] / TEMPERATURE, -1)
    for implementation in build(case, tiny=True).implementations:
        drawn: Tensor = implementation.function({"logits": logits})
        assert drawn.shape == (20_000,)
        assert drawn.dtype == sample_tokens(logits[:1]).dtype
        share = torch.bincount(drawn, minlength=6) / len(drawn)
        torch.testing.assert_close(share, law, rtol=0, atol=0.015, msg=implementation.name)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_agrees_too() -> None:
    (case,) = select(operators=["token_statistics"], shapes=["maskgit"], dtypes=["float32"])
    workload = build(case, tiny=True)
    (compiled,) = (one for one in workload.implementations if one.name == COMPILED)
    true = accuracy.exact(workload)
    assert true is not None
    value = accuracy.errors(workload, compiled, true).value
    assert value is not None
    assert value < TOLERANCE["float32"]


def test_compilations_do_not_count_as_recompilations_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They share their source lines, which torch refuses to compile too often."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def make(number: int) -> Function:
        return lambda inputs: inputs["x"] + number

    x = torch.zeros(2)
    for number in range(torch._dynamo.config.recompile_limit + 2):
        value = peers.compiled(make(number)).function({"x": x})
        assert torch.equal(value, x + number)


def test_the_published_surrogate_of_a_reverse_kl() -> None:
    """beta = 1 gives the reverse KL's gradient; NaN samples are dropped before that of the others."""
    teacher, uncond, auxiliary = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    student = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4) < 0.7
    loss = generator_loss(student, teacher, uncond, auxiliary, mask, 2.0, beta=1.0)
    (found,) = torch.autograd.grad(loss, student)
    leaf = auxiliary.clone().requires_grad_()
    log_p = torch.log_softmax(uncond + 2 * (teacher - uncond), -1)
    log_q = torch.log_softmax(leaf, -1)
    ((log_q.exp() * (log_q - log_p)).sum(-1) * mask / 2).sum().backward()
    assert leaf.grad is not None
    # The distance is taken in float32.
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-6)


def test_peers_are_named_with_the_reason_why_they_do_not_run() -> None:
    found = peers.liger("cpu", lambda module: lambda inputs: inputs)
    assert found == Absent("Liger", "its kernels need a CUDA device")


def test_least_work_of_a_product() -> None:
    (case,) = select(operators=["soft_embedding"], shapes=["digits"], dtypes=["float32"])
    workload = build(case, tiny=True)
    logits, codebook = workload.inputs["logits"], workload.inputs["codebook"]
    rows, vocabulary, width = *logits.shape, codebook.shape[1]
    forward, backward = workload.work["forward"], workload.work["backward"]
    assert forward.flops == 2 * rows * vocabulary * width
    assert forward.read == nbytes(logits, codebook)
    assert forward.written == 4 * rows * width
    assert backward.flops == 2 * forward.flops
    assert backward.read == forward.read + forward.written
    assert backward.written == nbytes(logits, codebook)
    assert workload.work["both"] == forward + backward


def test_least_work_of_a_frozen_table_is_one_product_less() -> None:
    (case,) = (one for one in CASES if one.variant == "frozen" and one.shape == "maskgit")
    workload = build(case, tiny=True)
    assert workload.work["backward"].flops == workload.work["forward"].flops
    assert workload.work["backward"].written == nbytes(workload.inputs["logits"])


def test_least_work_of_attention_is_what_takes_part() -> None:
    works = {
        case.variant: build(case, tiny=True).work["forward"]
        for case in select(operators=["masked_attention"], dtypes=["float32"])
    }
    assert works["keys"].flops == works["queries"].flops == works["dense"].flops // 2
    assert works["keys"].read < works["dense"].read

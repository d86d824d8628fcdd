"""The divergences on a CUDA device: values, streams, graphs, sizes beyond 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_compiles_bitwise, assert_same_bits, gradients, operators_run
from support.contract import FLOORS, assert_contract
from support.divergence_calls import KINDS, NAMES, Call, Result, assert_same, rows_of_every_sort
from torch import Tensor

from softdimo_fast import distribution_matching_loss, token_divergence

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 128, 129, 1024, 1025, 4096, 4097, 8192, 8193, 50257)
OPERATORS = torch.ops.softdimo


def logits(
    rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, special: bool = False
) -> list[Tensor]:
    tensors = rows_of_every_sort(rows, vocabulary, dtype)
    return [(t if special else t.clamp(min=-1e4)).to(DEVICE) for t in tensors]


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64(vocabulary: int, dtype: torch.dtype, weights: tuple[float, float]) -> None:
    call = Call(
        *logits(64, vocabulary, dtype), guidance=3 * torch.rand(64, device=DEVICE), temperatures=(0.8, 1.2),
        weights=weights, weight=torch.rand(64, device=DEVICE),
    )  # fmt: skip
    found, truth, yardstick = call.run(OPERATORS), call.exact(), call.composed()
    assert_contract(found.value, yardstick.value, truth.value, floor=1e-6)
    for name, mine, theirs, true in zip(
        NAMES, found.grads, yardstick.grads, truth.grads, strict=True
    ):
        assert mine.dtype == dtype
        assert_contract(mine, theirs, true, floor=max(2e-6, FLOORS[dtype]), what=name)


@pytest.mark.parametrize("weights", KINDS[:2])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_logits_do_not_cancel(distance: float, weights: tuple[float, float]) -> None:
    model = torch.randn(256, 1000, device=DEVICE)
    call = Call(model + distance * torch.randn_like(model), model, weights=weights)
    found, truth = call.run(OPERATORS), call.exact()
    for mine, true in zip(
        (found.value, *found.grads[:2]), (truth.value, *truth.grads), strict=False
    ):
        assert float((mine - true).norm() / true.norm()) < 1e-6
    assert float(((found.value - truth.value).abs() / truth.value).max()) < 1e-5


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("vocabulary", [5, 1000, 9000])
def test_infinite_entries(vocabulary: int, weights: tuple[float, float]) -> None:
    call = Call(*logits(64, vocabulary, special=True), weights=weights)
    found, truth = call.run(OPERATORS), call.exact()
    for mine, true in zip((found.value, *found.grads), (truth.value, *truth.grads), strict=True):
        assert torch.equal(mine.isnan(), true.isnan())
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1025, 4111, 8200])
def test_bits_depend_on_the_row_alone(vocabulary: int, dtype: torch.dtype) -> None:
    """Alone and in a batch, in another order, at every address modulo 16."""
    call = Call(*logits(300, vocabulary, dtype, special=True), guidance=1.5, weights=(0.7, 0.3))
    expected = call.run(OPERATORS)
    order = torch.randperm(300, device=DEVICE)
    for chosen in (order, order[:70], slice(5, 6)):
        found = call.rows(chosen).run(OPERATORS)
        assert_same(found, Result(expected.value[chosen], tuple(g[chosen] for g in expected.grads)))
    for offset in range(16 // call.model.element_size()):
        memory = torch.full(
            (3, 300, vocabulary + offset + 1), torch.nan, dtype=dtype, device=DEVICE
        )
        views = memory[..., offset : offset + vocabulary].unbind()
        for view, name in zip(views, NAMES, strict=True):
            view.copy_(getattr(call, name))
        assert_same(call.change(**dict(zip(NAMES, views, strict=True))).run(OPERATORS), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(reduction: str) -> None:
    teacher, model, _ = logits(100_000, 40)
    mask = torch.rand(100_000, device=DEVICE) < 0.6
    call = Call(teacher, model, mask=mask, reduction=reduction)
    found, truth = call.run(OPERATORS), call.exact()
    torch.testing.assert_close(found.value.double(), truth.value, rtol=1e-6, atol=0)
    assert float((found.grads[1] - truth.grads[1]).norm() / truth.grads[1].norm()) < 2e-6


def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(20 * 10**9)
    rows, vocabulary = 262_145, 8192
    teacher = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    model = torch.empty_like(teacher).normal_()
    call = Call(teacher, model)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    found = call.run(OPERATORS, [False, True, False])
    expected = call.rows(some).run(OPERATORS)
    assert_same_bits(found.value[some], expected.value)
    assert_same_bits(found.grads[1][some], expected.grads[1])


# ---------------------------------------------------------------------------------------------------
# torch


def loss(
    student: Tensor, teacher: Tensor, auxiliary: Tensor, mask: Tensor, **options: Any
) -> Tensor:
    return distribution_matching_loss(student, teacher, auxiliary, mask, backend="cuda", **options)


def test_the_kernels_run_by_default() -> None:
    teacher, model, _ = (t.requires_grad_() for t in logits(4, 100))
    ran = operators_run(lambda: token_divergence(teacher, model).backward())
    assert ran == ["softdimo::token_divergence", "softdimo::token_divergence_backward"]
    double = operators_run(lambda: token_divergence(teacher.double(), model))
    assert double == ["softdimo_reference::token_divergence"]


@pytest.mark.parametrize("normalization", ["sum", "batch", "masked"])
def test_loss_against_the_cpu(normalization: str) -> None:
    teacher, auxiliary, uncond = (t.reshape(6, 20, 300) for t in logits(120, 300))
    mask = torch.rand(6, 20, device=DEVICE) < 0.5
    options: dict[str, Any] = {"guidance_scale": 2.0, "normalization": normalization}
    (value, (gradient,)), (true, (true_gradient,)) = (
        gradients(
            lambda z, d=device: distribution_matching_loss(
                z, teacher.to(d), auxiliary.to(d), mask.to(d), teacher_uncond_logits=uncond.to(d), **options
            ),
            (torch.zeros(6, 20, 300, device=device),),
        )
        for device in (DEVICE, "cpu")
    )  # fmt: skip
    torch.testing.assert_close(value.cpu(), true, rtol=2e-6, atol=0)
    # In norm: where p and q nearly agree, their difference keeps the rounding of either.
    assert float((gradient.cpu() - true_gradient).norm()) <= 2e-6 * float(true_gradient.norm())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_opcheck(reduction: str) -> None:
    tensors = [t.reshape(4, 6, 50) for t in logits(24, 50, torch.bfloat16)]
    mask = torch.rand(4, 6, device=DEVICE) > 0.5
    call = Call(*tensors, guidance=1.5, mask=mask, reduction=reduction)
    operator = torch.ops.softdimo.token_divergence.default
    torch.library.opcheck(operator, call.arguments())
    tests = ("test_schema", "test_faketensor")
    _, statistics = operator(*call.arguments())
    torch.library.opcheck(
        torch.ops.softdimo.token_divergence_backward.default,
        (call.grad(), *call.arguments(), statistics, [True, True, False]),
        test_utils=tests,
    )


def test_compiles_bitwise() -> None:
    teacher, model, _ = (t.reshape(4, 6, 1025) for t in logits(24, 1025))
    mask = torch.rand(4, 6, device=DEVICE) > 0.5
    assert_compiles_bitwise(lambda z: token_divergence(teacher, z, backend="cuda"), model)
    assert_compiles_bitwise(lambda z: loss(z, teacher, teacher + 1, mask), model)


def test_side_stream() -> None:
    """The kernels queue behind the work of the current stream, and on no other."""
    source = torch.randn(2048, 8192, device=DEVICE)

    def call() -> Result:
        return Call(source + 1, source * 0.9, reduction="mean").run(OPERATORS)

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = call()
        assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


def captured(compute: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        compute()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    return graph, found


def test_graph_capture() -> None:
    """Captured once and replayed with new logits, masks and guidance; forward and backward."""
    teacher, model, uncond = logits(300, 1025, torch.bfloat16)
    student = torch.zeros(4, 75, 1025, device=DEVICE, requires_grad=True)
    mask = torch.rand(300, device=DEVICE) > 0.5
    scale = torch.rand(300, device=DEVICE)

    def compute() -> list[Tensor]:
        rows = Call(teacher, model, uncond, scale, mask=mask, reduction="mean").run(OPERATORS)
        value = loss(
            student, teacher.view(4, 75, -1), model.view(4, 75, -1), mask.view(4, 75), normalization="masked"
        )  # fmt: skip
        return [rows.value, *rows.grads, value.detach(), *torch.autograd.grad(value, student)]

    graph, found = captured(compute)
    for _ in range(3):
        for tensor in (teacher, model, uncond):
            tensor.normal_()
        mask.copy_(torch.rand(300, device=DEVICE) > 0.5)
        scale.uniform_(0.5, 2)
        graph.replay()
        for mine, expected in zip(found, compute(), strict=True):
            assert_same_bits(mine, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    call = Call(*logits(30, 1025), guidance=1.5)
    moved = call.change(**{name: getattr(call, name).to("cuda:1") for name in NAMES})
    with torch.cuda.device(0):
        found = moved.run(OPERATORS)
    assert found.value.device == torch.device("cuda:1")
    assert_same(
        Result(found.value.to("cuda:0"), tuple(g.to("cuda:0") for g in found.grads)),
        call.run(OPERATORS),
    )

"""soft_embedding's backward on a CUDA device: gradients, layouts, streams, graphs, sizes beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, operators_run
from support.soft_embedding_backward import DTYPES, Call, assert_accurate
from torch import Tensor

from softdimo_fast.ops.soft_embedding import soft_embedding

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = [(128, 7), (256, 16), (300, 1), (1024, 64), (1025, 33), (4111, 128)]


def gradients(call: Call, **options: Any) -> tuple[Tensor, ...]:
    """To logits, codebook, temperature and mask embedding; empty where the call has none."""
    inputs = (call.logits, call.codebook, call.row_temperature(), call.mask_embedding)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    logits, codebook, temperature, embedding = leaves
    assert logits is not None
    assert codebook is not None
    value = soft_embedding(
        logits, codebook, temperature=call.scalar() if temperature is None else temperature,
        mask=call.mask, mask_embedding=embedding, backend="cuda", **options,
    )  # fmt: skip
    found = iter(torch.autograd.grad(value, [t for t in leaves if t is not None], call.grad))
    return tuple(logits.new_empty(0) if leaf is None else next(found) for leaf in leaves)


def random_call(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, table: torch.dtype
) -> Call:
    """From flat rows to one-hot ones, some of them masked, a temperature for each."""
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 1000.0], device=DEVICE)
    logits = torch.randn(rows, vocabulary, device=DEVICE)
    logits = (logits * scales[torch.arange(rows, device=DEVICE) % 6, None]).to(dtype)
    codebook = torch.randn(vocabulary, width, device=DEVICE).to(table)
    return Call(
        logits,
        codebook,
        torch.randn(rows, width, device=DEVICE).to(table),
        torch.rand(rows, device=DEVICE) + 0.5,
        torch.rand(rows, device=DEVICE) > 0.7,
        torch.randn(width, device=DEVICE).to(table),
    )


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
def test_float64(vocabulary: int, width: int, dtype: torch.dtype, table: torch.dtype) -> None:
    call = random_call(1536, vocabulary, width, dtype, table)
    assert_accurate(gradients(call), call)


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
def test_row_gradients_depend_on_the_row_alone(
    vocabulary: int, width: int, table: torch.dtype
) -> None:
    """Few rows and many, at every address modulo 16; and every gradient again, twenty times."""
    call = random_call(5000, vocabulary, width, torch.bfloat16, table)
    expected = gradients(call)
    for _ in range(20):
        for first, second in zip(expected, gradients(call), strict=True):
            assert_same_bits(second, first, "again")
    few = slice(4700, 5000)
    assert isinstance(call.temperature, Tensor)
    assert call.mask is not None
    for offset in range(8):
        memory = torch.full((300, vocabulary + 9), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        moved = memory[:, offset : offset + vocabulary]
        moved.copy_(call.logits[few])
        part = call._replace(
            logits=moved,
            grad=call.grad[few],
            temperature=call.temperature[few],
            mask=call.mask[few],
        )
        found = gradients(part)
        assert_same_bits(found[0], expected[0][few], f"logits at offset {offset}")
        assert_same_bits(found[2], expected[2][few], f"temperature at offset {offset}")


def test_masked_rows_are_not_read_and_get_zero() -> None:
    call = random_call(700, 1025, 64, torch.float32, torch.bfloat16)
    expected = gradients(call)
    assert call.mask is not None
    found = gradients(call._replace(logits=call.logits.masked_fill(call.mask[:, None], torch.nan)))
    for first, second in zip(expected, found, strict=True):
        assert_same_bits(second, first)
    assert not found[0][call.mask].any()


def test_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 10**9:
        pytest.skip(f"needs 10 GB of device memory, {free / 1e9:.0f} are free")
    rows, vocabulary = 262_145, 8192
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    codebook = torch.randn(vocabulary, 64, device=DEVICE).bfloat16()
    call = Call(logits, codebook, torch.randn(rows, 64, device=DEVICE).bfloat16())
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    found = gradients(call)[0][some]
    expected = gradients(call._replace(logits=logits[some], grad=call.grad[some]))[0]
    assert_same_bits(found, expected)


def test_side_stream() -> None:
    """The kernels queue behind the work of the current stream, and on no other."""
    source = random_call(2048, 8192, 64, torch.float32, torch.float32)
    expected = gradients(source._replace(logits=source.logits + 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = gradients(source._replace(logits=source.logits + 1))
    torch.cuda.current_stream().wait_stream(stream)
    for first, second in zip(expected, found, strict=True):
        assert_same_bits(second, first)


def test_graph_capture() -> None:
    """Forward and backward, captured once and replayed with new logits, masks and seeds."""
    call = random_call(300, 2050, 64, torch.bfloat16, torch.bfloat16)
    seed = torch.tensor([3, 0], device=DEVICE)
    assert call.mask is not None

    def compute() -> tuple[Tensor, ...]:
        return gradients(call) + gradients(call, noise="gumbel", seed=seed)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        compute()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for step in range(3):
        call.logits.normal_()
        call.mask.copy_(torch.rand(300, device=DEVICE) > 0.5)
        seed.fill_(step)
        graph.replay()
        for found, expected in zip(captured, compute(), strict=True):
            assert_same_bits(found, expected)


def test_only_what_is_wanted_runs() -> None:
    logits = torch.randn(300, 1024, device=DEVICE).requires_grad_()
    codebook = torch.randn(1024, 64, device=DEVICE)
    value = soft_embedding(logits, codebook)
    names = operators_run(lambda: value.sum().backward())
    assert "softdimo::soft_embedding_backward" in names
    assert logits.grad is not None
    assert codebook.grad is None

"""The Triton kernels on a CUDA device: what their tests in tests/ops/triton, which run here too, do not ask.

Larger sizes, streams, graph capture and replay with a changed seed, sizes beyond 32 bits, alignment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, gradients
from support.soft_embedding import Case, assert_close_to_float64
from support.triton import DTYPES, needs_triton
from torch import Tensor

from softdimo_fast import soft_embedding, token_divergence

pytestmark = [pytest.mark.gpu, needs_triton]

DEVICE = "cuda"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def embed(z: Tensor, e: Tensor, **options: Any) -> Tensor:
    return soft_embedding(z, e, backend="triton", **options)


def diverge(*logits: Tensor, **options: Any) -> Tensor:
    return token_divergence(*logits, backend="triton", reduction="none", **options)


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "width"), [(1024, 64), (8192, 64), (1025, 128), (128, 7)])
def test_contract_at_the_sizes_of_training(dtype: torch.dtype, vocabulary: int, width: int) -> None:
    logits, codebook = (3 * randn(2048, vocabulary)).to(dtype), randn(vocabulary, width).to(dtype)
    assert_close_to_float64(Case(logits, codebook, None, None, {}), "triton")


@pytest.mark.parametrize("vocabulary", [1024, 1025, 8192, 50257])
def test_divergence_at_the_sizes_of_training(vocabulary: int) -> None:
    tensors = [2 * randn(512, vocabulary) for _ in range(2)]
    for kind in ("forward_kl", "reverse_kl"):
        truth = token_divergence(
            *[t.double() for t in tensors], kind=kind, reduction="none", backend="reference"
        )
        torch.testing.assert_close(
            diverge(*tensors, kind=kind).double(), truth, rtol=4e-6, atol=1e-7
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 1024])
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, vocabulary: int) -> None:
    """Whatever the number of rows, which Triton specializes for 1, and the address of the first."""
    logits, codebook = (3 * randn(515, vocabulary)).to(dtype), randn(vocabulary, 64).to(dtype)
    teacher, upstream = randn(515, vocabulary).to(dtype), randn(515, 64)
    value, (dlogits, _) = gradients(embed, (logits, codebook), upstream)
    rows = diverge(teacher, logits)
    for pick in (slice(0, 1), slice(3, 4), slice(1, 514), slice(7, None, 16)):
        part, (dpart, _) = gradients(embed, (logits[pick], codebook), upstream[pick])
        assert_same_bits(part, value[pick])
        assert_same_bits(dpart, dlogits[pick])
        assert_same_bits(diverge(teacher[pick], logits[pick]), rows[pick])
    for shift in (1, 2, 3, 8):
        store = torch.empty(515 * (vocabulary + shift) + shift, dtype=dtype, device=DEVICE)
        moved = store[shift:].view(515, vocabulary + shift)[:, :vocabulary].copy_(logits)
        assert_same_bits(embed(moved, codebook), value)
        assert_same_bits(diverge(teacher, moved), rows)


def test_repeats_give_the_same_bits() -> None:
    logits, codebook, upstream = randn(8192, 1024), randn(1024, 64), randn(8192, 64)
    first = gradients(embed, (logits, codebook), upstream)
    for _ in range(20):
        again = gradients(embed, (logits, codebook), upstream)
        assert_same_bits(again[0], first[0])
        for mine, other in zip(again[1], first[1], strict=True):
            assert_same_bits(mine, other)


def test_streams() -> None:
    """Kernels run on the current stream, behind what fills their inputs."""
    codebook = randn(1024, 64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits = torch.arange(1024.0, device=DEVICE).expand(256, 1024).contiguous() / 100
        value = embed(logits, codebook)
    stream.synchronize()
    assert_same_bits(value, embed(logits, codebook))


def test_graphs_replay_with_other_data_and_another_seed() -> None:
    logits, codebook = randn(256, 1024), randn(1024, 64)
    seed = torch.tensor([1, 0], device=DEVICE)

    def run() -> tuple[Tensor, Tensor]:
        z = logits.detach().requires_grad_()
        value = embed(z, codebook, noise="gumbel", seed=seed)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        return value, gradient

    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        run()
    warm_up.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    logits.copy_(randn(256, 1024))
    seed.copy_(torch.tensor([7, 3]))
    graph.replay()
    for mine, true in zip(captured, run(), strict=True):
        assert_same_bits(mine, true)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_tensors_device_is_used() -> None:
    logits, codebook = randn(8, 100), randn(100, 16)
    value = embed(logits.to("cuda:1"), codebook.to("cuda:1"))
    assert value.device == torch.device("cuda:1")
    assert_same_bits(value.cpu(), embed(logits, codebook).cpu())


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(30 << 30)
    rows, vocabulary = 262145, 8192
    logits = randn(1, vocabulary).bfloat16().expand(rows, vocabulary)
    codebook = randn(vocabulary, 16).bfloat16()
    upstream = torch.ones((), device=DEVICE).expand(rows, 16)
    value, (dlogits,) = gradients(lambda z: embed(z, codebook), (logits,), upstream)
    rows_kl, (dmodel,) = gradients(
        lambda z: diverge(logits.roll(1, -1)[:1].expand_as(z), z), (logits,)
    )
    for found in (value, dlogits, rows_kl, dmodel):
        for row in (1, rows // 2, rows - 1):
            assert_same_bits(found[row], found[0])
    assert float(dlogits[0].abs().max()) > 0

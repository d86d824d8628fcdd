"""soft_embedding's forward on a CUDA device: values, layouts, streams, graphs, sizes beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, operators_run
from support.contract import assert_contract
from torch import Tensor

from softdimo_fast import explain
from softdimo_fast.ops.reference import soft_embedding as reference
from softdimo_fast.ops.soft_embedding import soft_embedding

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATOR = "softdimo::soft_embedding"


def embed(logits: Tensor, codebook: Tensor, **options: Any) -> Tensor:
    return soft_embedding(logits, codebook, backend="cuda", **options)


def exact(
    logits: Tensor, codebook: Tensor, temperature: float = 1.0, seed: int | None = None
) -> Tensor:
    pair = None if seed is None else torch.tensor([seed, 0], device=DEVICE)
    return reference.soft_embedding(
        logits.double(), codebook.double(), temperature, None, None, None, pair, None, False, None, None
    )  # fmt: skip


def composed(logits: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """What a user would write: a float32 softmax, and a product in the codebook's dtype."""
    return torch.softmax(logits.float() / temperature, -1).to(codebook.dtype) @ codebook


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "width"), [(128, 7), (300, 1), (1024, 64), (1025, 33), (8192, 64), (4111, 128)]
)
def test_float64(
    vocabulary: int, width: int, dtype: torch.dtype, table: torch.dtype, precision: str
) -> None:
    """From flat rows to one-hot ones."""
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 1000.0], device=DEVICE)
    logits = torch.randn(768, vocabulary, device=DEVICE) * scales.repeat(128)[:, None]
    logits = logits.to(dtype)
    codebook = torch.randn(vocabulary, width, device=DEVICE).to(table)
    found = embed(logits, codebook, temperature=0.8, precision=precision)
    truth, yardstick = exact(logits, codebook, 0.8), composed(logits, codebook, 0.8)
    for row in range(len(scales)):
        rows = slice(row, None, len(scales))
        assert_contract(found[rows], yardstick[rows], truth[rows])


@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_noise_is_that_of_the_reference(table: torch.dtype) -> None:
    logits = 3 * torch.randn(200, 1025, device=DEVICE)
    codebook = torch.randn(1025, 64, device=DEVICE).to(table)
    found = embed(logits, codebook, noise="gumbel", seed=-5)
    torch.testing.assert_close(
        found.double(), exact(logits, codebook, 1.0, -5),
        rtol=2e-5 if table == torch.float32 else 1e-2, atol=2e-5 if table == torch.float32 else 1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [257, 1025, 4111])
def test_bits_depend_on_the_row_alone(
    dtype: torch.dtype, table: torch.dtype, vocabulary: int
) -> None:
    """Few rows and many, whose chunks are joined by a kernel or by a block; at every address modulo 16."""
    logits = torch.randn(20_000, vocabulary, device=DEVICE).to(dtype)
    codebook = torch.randn(vocabulary, 64, device=DEVICE).to(table)
    expected = embed(logits, codebook)
    for rows in (1, 17, 700):
        assert_same_bits(embed(logits[:rows], codebook), expected[:rows], f"{rows} rows")
    few = logits[-300:]
    for offset in range(16 // logits.element_size()):
        memory = torch.full((300, vocabulary + 9), torch.nan, device=DEVICE, dtype=dtype)
        moved = memory[:, offset : offset + vocabulary]
        moved.copy_(few)
        assert_same_bits(embed(moved, codebook), expected[-300:], f"offset {offset}")
    for _ in range(20):
        assert_same_bits(embed(logits, codebook), expected, "again")


def test_masked_rows_are_not_read() -> None:
    logits = torch.randn(50, 40, 1025, device=DEVICE)
    codebook = torch.randn(1025, 64, device=DEVICE).bfloat16()
    expected = embed(logits, codebook)
    mask = torch.rand(50, 1, device=DEVICE) > 0.5
    logits[mask.expand(50, 40)] = torch.nan
    found = embed(logits, codebook, mask=mask, mask_embedding=codebook[3])
    assert_same_bits(found, torch.where(mask[..., None], codebook[3], expected), "value")


def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(5 * 10**9)
    rows, vocabulary = 262_145, 8192
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    codebook = torch.randn(vocabulary, 64, device=DEVICE).bfloat16()
    found = embed(logits, codebook)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    assert_same_bits(found[some], embed(logits[some], codebook), "value")


def test_the_kernel_runs_by_default_where_there_is_one() -> None:
    logits, codebook = torch.randn(4, 300, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    assert operators_run(lambda: soft_embedding(logits, codebook)) == [OPERATOR]
    fallback = ["softdimo_reference::soft_embedding"]
    assert operators_run(lambda: soft_embedding(logits.double(), codebook)) == fallback
    assert operators_run(lambda: soft_embedding(logits, codebook, top_k=5)) == fallback
    wide = torch.randn(300, 129, device=DEVICE)
    assert operators_run(lambda: soft_embedding(logits, wide)) == fallback
    assert "at most 128 columns, this one has 129" in explain(soft_embedding, logits, wide).reason
    assert "three terms" in str(explain(soft_embedding, logits, codebook).kernel)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_fakes(table: torch.dtype, hard: bool) -> None:
    logits = torch.randn(4, 6, 300, device=DEVICE)
    codebook = torch.randn(300, 64, device=DEVICE).to(table)
    torch.library.opcheck(
        torch.ops.softdimo.soft_embedding.default,
        (logits, codebook, 0.7, None, None, None, None, None, None, None, False, hard),
    )


def test_compiles_bitwise() -> None:
    logits = torch.randn(8, 1025, device=DEVICE)
    codebook = torch.randn(1025, 64, device=DEVICE)
    compiled = torch.compile(lambda z, e: embed(z, e, temperature=0.7), fullgraph=True)
    assert_same_bits(compiled(logits, codebook), embed(logits, codebook, temperature=0.7), "value")


def test_side_stream() -> None:
    """The kernels queue behind the work of the current stream, and on no other."""
    source = torch.randn(4096, 8192, device=DEVICE)
    codebook = torch.randn(8192, 64, device=DEVICE)
    expected = embed(source + 1, codebook)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = embed(source + 1, codebook)
        assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, expected, "value")


def test_graph_capture() -> None:
    """Captured once and replayed with new logits, masks and seeds."""
    logits = torch.randn(300, 2050, device=DEVICE).bfloat16()
    codebook = torch.randn(2050, 64, device=DEVICE)
    mask = torch.rand(300, device=DEVICE) > 0.5
    seed = torch.tensor([3, 0], device=DEVICE)

    def compute() -> list[Tensor]:
        return [
            embed(logits, codebook, mask=mask, mask_embedding=codebook[0]),
            embed(logits[:, ::2], codebook[::2].bfloat16(), noise="gumbel", seed=seed),
        ]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        compute()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for step in range(3):
        logits.normal_()
        mask.copy_(torch.rand(300, device=DEVICE) > 0.5)
        seed.fill_(step)
        graph.replay()
        for found, expected in zip(captured, compute(), strict=True):
            assert_same_bits(found, expected, "value")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    logits, codebook = torch.randn(300, 2050), torch.randn(2050, 64)
    with torch.cuda.device(0):
        found = embed(logits.to("cuda:1"), codebook.to("cuda:1"))
    assert found.device == torch.device("cuda:1")
    expected = embed(logits.to("cuda:0"), codebook.to("cuda:0"))
    assert_same_bits(found.to("cuda:0"), expected, "value")

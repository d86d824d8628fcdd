"""token_statistics on a CUDA device: values, layouts, streams, graphs, sizes beyond 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.checks import assert_same_bits, operators_run
from support.contract import assert_contract
from torch import Tensor

from softdimo_fast.ops.reference import token_statistics as reference
from softdimo_fast.ops.token_statistics import TokenStatistics, token_statistics

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 8, 31, 128, 129, 1000, 1025, 2048, 2049, 8192, 50257)
OPERATOR = "softdimo::token_statistics"


def statistics(logits: Tensor, **options: object) -> TokenStatistics:
    return token_statistics(logits, backend="cuda", **options)


def composed(logits: Tensor, temperature: float | Tensor) -> TokenStatistics:
    """What a user would write, in float32."""
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    scaled = logits.float() / temperature
    p, log_p = torch.softmax(scaled, -1), torch.log_softmax(scaled, -1)
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    return TokenStatistics(torch.logsumexp(scaled, -1), entropy, p.amax(-1))


def exact(
    logits: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> TokenStatistics:
    rows = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    return TokenStatistics(*reference.token_statistics(logits.double(), number, rows, mask))


def assert_accurate(found: TokenStatistics, logits: Tensor, temperature: float | Tensor) -> None:
    truth, yardstick = exact(logits, temperature), composed(logits, temperature)
    fields = TokenStatistics._fields
    for name, ours, theirs, true in zip(fields, found, yardstick, truth, strict=True):
        assert ours.dtype == torch.float32
        assert_contract(ours, theirs, true, what=name)


def assert_same(first: TokenStatistics, second: TokenStatistics) -> None:
    for name, a, b in zip(TokenStatistics._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def picked(found: TokenStatistics, rows: object) -> TokenStatistics:
    return TokenStatistics(*(part[rows] for part in found))


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


# --------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64(dtype: torch.dtype, vocabulary: int) -> None:
    scales = torch.tensor([0.0, 0.01, 1.0, 5.0, 50.0, 1000.0], device=DEVICE)
    logits = torch.randn(1536, vocabulary, device=DEVICE) * scales.repeat(256)[:, None]
    logits = logits.to(dtype)
    found = statistics(logits, temperature=0.8)
    assert_accurate(found, logits, 0.8)
    for row in range(len(scales)):
        rows = slice(row, None, len(scales))
        assert_accurate(picked(found, rows), logits[rows], 0.8)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_temperature(temperature: float) -> None:
    logits = 3 * torch.randn(256, 3000, device=DEVICE)
    assert_accurate(statistics(logits, temperature=temperature), logits, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_of_each_row(dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(16, 32, 500, device=DEVICE)
    for shape in ((16, 32), (16, 1), (32,), (1,), ()):
        temperature = (torch.rand(shape, device=DEVICE) + 0.5).to(dtype)
        found = statistics(logits, temperature=temperature)
        assert_accurate(found, logits, temperature.float().expand(16, 32))


def test_nearly_one_hot() -> None:
    logits = torch.randn(256, 1000, device=DEVICE)
    logits[:, 3] = 30
    found, truth = statistics(logits), exact(logits, 1.0)
    assert float((found.entropy / truth.entropy - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 4200])
def test_special_rows(dtype: torch.dtype, vocabulary: int) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(9, vocabulary, device=DEVICE).to(dtype)
    logits[0] = -inf
    logits[1] = -inf
    logits[1, -1] = 2.5
    logits[2, ::2] = -inf
    logits[3, -1] = nan
    logits[4, 0] = nan
    logits[5, 2] = inf
    logits[6] = -inf
    logits[6, 3] = nan
    logits[7] = 3.0
    found, truth = statistics(logits), exact(logits, 1.0)
    for ours, true in zip(found, truth, strict=True):
        assert ours.isnan().nonzero().flatten().tolist() == [0, 3, 4, 5, 6]
        torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert [float(part[1]) for part in found] == [2.5, 0.0, 1.0]


def test_bad_temperature_loses_its_row_alone() -> None:
    logits = torch.randn(5, 300, device=DEVICE)
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, 1.0], device=DEVICE)
    found, plain = statistics(logits, temperature=temperature), statistics(logits)
    good = torch.tensor([True, False, False, False, True], device=DEVICE)
    for ours, expected in zip(found, plain, strict=True):
        assert torch.equal(ours.isnan(), ~good)
        assert torch.equal(ours[good], expected[good])


# --------------------------------------------------------------------------------------------------
# masks, shapes, strides


@pytest.mark.parametrize("shape", [(12, 20), (12, 1), (20,), ()])
def test_mask(shape: tuple[int, ...]) -> None:
    """Rows that do not count give zeros whatever they hold; the mask broadcasts."""
    logits = torch.randn(12, 20, 700, device=DEVICE)
    expected = statistics(logits)
    mask = torch.rand(shape, device=DEVICE) > 0.5
    rows = mask.expand(12, 20)
    logits[~rows] = torch.nan
    found = statistics(logits, mask=mask)
    assert_same(found, TokenStatistics(*(torch.where(rows, part, 0.0) for part in expected)))


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[..., :333],
        lambda z: z[..., 3:],
        lambda z: z[:, 1::2],
        lambda z: z.transpose(0, 1),
        lambda z: z[..., ::2],
        lambda z: z[:, :1].expand(-1, 9, -1),
        lambda z: z[0, 0],
        lambda z: z.permute(2, 0, 1),
        lambda z: z[:0],
    ],
    ids=[
        "padded",
        "offset",
        "rows",
        "transposed",
        "strided",
        "expanded",
        "vector",
        "outer",
        "empty",
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    logits = view(torch.randn(6, 8, 341, device=DEVICE).to(dtype))
    found = statistics(logits)
    assert all(part.shape == logits.shape[:-1] for part in found)
    assert_same(found, statistics(logits.contiguous()))
    for ours, true in zip(found, exact(logits, 1.0), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1025, 4111])
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, vocabulary: int) -> None:
    """Alone and in a batch, at every address modulo 16, the same bits a hundred times."""
    logits = torch.randn(300, vocabulary, device=DEVICE).to(dtype)
    expected = statistics(logits)
    for row in (0, 1, 150, 299):
        assert_same(
            statistics(logits[row : row + 1].clone()), picked(expected, slice(row, row + 1))
        )
    for offset in range(16 // logits.element_size()):
        memory = torch.full((300, vocabulary + 9), torch.nan, device=DEVICE, dtype=dtype)
        moved = memory[:, offset : offset + vocabulary]
        moved.copy_(logits)
        assert_same(statistics(moved), expected)
    for _ in range(100):
        assert_same(statistics(logits), expected)


def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(5 * 10**9)
    rows, vocabulary = 262_145, 8192
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    assert logits.numel() > 2**31
    found = statistics(logits)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    assert_same(picked(found, some), statistics(logits[some]))
    assert_accurate(picked(found, slice(rows - 256, rows)), logits[-256:], 1.0)


def test_row_stride_beyond_32_bits() -> None:
    needs_memory(10 * 10**9)
    memory = torch.zeros(2 * (2**31 + 8) + 4096, device=DEVICE, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 4096), (2**31 + 8, 1))
    values = torch.randn(3, 4096, device=DEVICE).bfloat16()
    for row in range(3):
        logits[row].copy_(values[row])
    assert_same(statistics(logits), statistics(values))


# --------------------------------------------------------------------------------------------------
# torch


def test_the_kernel_runs_by_default() -> None:
    logits = torch.randn(4, 100, device=DEVICE)
    assert operators_run(lambda: token_statistics(logits)) == [OPERATOR]
    double = operators_run(lambda: token_statistics(logits.double()))
    assert double == ["softdimo_reference::token_statistics"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 6, 100, device=DEVICE).to(dtype)
    mask = torch.rand(4, 1, device=DEVICE) > 0.5
    rows = torch.rand(6, device=DEVICE) + 0.5
    operator = torch.ops.softdimo.token_statistics.default
    torch.library.opcheck(operator, (logits, 0.7, None, None))
    torch.library.opcheck(operator, (logits, 1.0, rows.expand(4, 6), mask.expand(4, 6)))


def test_compiles_bitwise() -> None:
    logits = torch.randn(8, 1025, device=DEVICE)
    compiled = torch.compile(lambda z: tuple(statistics(z, temperature=0.7)), fullgraph=True)
    assert_same(TokenStatistics(*compiled(logits)), statistics(logits, temperature=0.7))


def test_side_stream() -> None:
    """The kernel queues behind the work of the current stream, and on no other."""
    source = torch.randn(4096, 8192, device=DEVICE)
    expected = statistics(source + 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = statistics(source + 1)
        assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


def test_graph_capture() -> None:
    """Captured once and replayed with new data, masks, temperatures; layouts that need a copy included."""
    logits = torch.randn(300, 2 * 1025, device=DEVICE).bfloat16()
    mask = torch.rand(300, device=DEVICE) > 0.5
    temperature = torch.rand(300, device=DEVICE).bfloat16() + 0.5

    def compute() -> list[TokenStatistics]:
        return [
            statistics(logits, mask=mask, temperature=temperature),
            statistics(logits[:, 1:1026]),
            statistics(logits[:, ::2], temperature=0.7),
        ]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        compute()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for _ in range(3):
        logits.normal_()
        mask.copy_(torch.rand(300, device=DEVICE) > 0.5)
        temperature.uniform_(0.5, 2)
        graph.replay()
        for found, expected in zip(captured, compute(), strict=True):
            assert_same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    logits = torch.randn(300, 1025)
    with torch.cuda.device(0):
        found = statistics(logits.to("cuda:1"))
    assert all(part.device == torch.device("cuda:1") for part in found)
    assert_same(
        TokenStatistics(*(part.to("cuda:0") for part in found)), statistics(logits.to("cuda:0"))
    )

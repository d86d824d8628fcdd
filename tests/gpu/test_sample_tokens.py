"""sample_tokens on a CUDA device: the CPU's tokens, laws, streams, graphs, sizes beyond 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.checks import assert_same_bits, operators_run
from support.contract import assert_contract
from support.sampling import chi_square_score, near_the_cut
from torch import Tensor

from softdimo_fast.ops.reference.soft_embedding import kept_entries
from softdimo_fast.ops.sample_tokens import sample_tokens

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 8, 129, 1025, 2056, 8192, 16400, 50257)
OPTIONS = ((None, None), (1, None), (40, None), (None, 0.4), (None, 0.97), (90, 0.6))
Drawn = tuple[Tensor, Tensor]


def draw(logits: Tensor, *, backend: str = "cuda", **options: object) -> Drawn:
    options = {"seed": 5, **options}
    return sample_tokens(logits, return_log_prob=True, backend=backend, **options)  # type: ignore[call-overload, no-any-return]


def assert_same(first: Drawn, second: Drawn) -> None:
    assert_same_bits(first[0], second[0], "tokens")
    assert_same_bits(first[1], second[1], "log_prob")


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


# --------------------------------------------------------------------------------------------------
# the CPU's tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("top_k", "top_p"), OPTIONS)
def test_tokens_of_the_cpu(
    dtype: torch.dtype, vocabulary: int, top_k: int | None, top_p: float | None
) -> None:
    scales = torch.tensor([0.0, 0.5, 3.0, 40.0]).repeat(16)[:, None]
    logits = (torch.randn(64, vocabulary) * scales).to(dtype)
    options = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
    tokens, log_prob = (part.cpu() for part in draw(logits.to(DEVICE), **options))
    expected = draw(logits, backend="cpp", **options)
    same = tokens == expected[0]
    sure = ~near_the_cut(logits.double() / 0.7, top_k, top_p)
    assert int((~same & sure).sum()) <= 1, "at most where the two best keys differ by a few ulp"
    sure &= same
    torch.testing.assert_close(log_prob[sure], expected[1][sure], atol=3e-6, rtol=3e-6)


def test_one_row_in_a_hundred_thousand_may_differ() -> None:
    logits, numbers = torch.randn(300_000, 64), torch.arange(300_000) * 2**20
    found = draw(logits.to(DEVICE), row_ids=numbers.to(DEVICE), temperature=0.9)[0].cpu()
    expected = draw(logits, row_ids=numbers, temperature=0.9, backend="cpp")[0]
    assert int((found != expected).sum()) <= 3


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.3, 0.5, 0.9])
def test_equal_entries_are_cut_where_the_cpu_cuts(top_p: float) -> None:
    for vocabulary in (50, 1300, 9000, 20_000):
        logits = torch.full((64, vocabulary), 1.7)
        found = draw(logits.to(DEVICE), top_p=top_p)
        expected = draw(logits, top_p=top_p, backend="cpp")
        assert torch.equal(found[0].cpu(), expected[0])
        torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize(
    ("vocabulary", "top_k", "top_p"),
    [(13, None, None), (8192, None, None), (13, 5, None), (8192, 200, None), (8192, None, 0.9)],
)
def test_draws_follow_the_law(vocabulary: int, top_k: int | None, top_p: float | None) -> None:
    row = (2 * torch.randn(vocabulary)).bfloat16()
    tokens, _ = draw(row.to(DEVICE).expand(400_000, -1), top_k=top_k, top_p=top_p)
    scaled = row.float()
    keep = kept_entries(scaled, top_k, top_p)
    if keep is not None:
        scaled = scaled.masked_fill(~keep, -torch.inf)
    counts, law = (
        torch.bincount(tokens.cpu(), minlength=vocabulary),
        torch.softmax(scaled.double(), -1),
    )
    assert not bool(counts[law == 0].any())
    assert chi_square_score(counts, law) < 4


def test_log_prob_keeps_the_contract() -> None:
    logits = 3 * torch.randn(1024, 8192, device=DEVICE)
    tokens, log_prob = draw(logits, temperature=0.7)
    truth, yardstick = (
        torch.log_softmax(z / 0.7, -1).gather(-1, tokens[:, None])[:, 0]
        for z in (logits.double(), logits)
    )
    assert_contract(log_prob, yardstick, truth)


@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 9000, 20_000])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_special_rows(vocabulary: int, options: dict[str, float]) -> None:
    clean = torch.randn(8, vocabulary, device=DEVICE)
    logits = clean.clone()
    logits[0, -1], logits[1, 0], logits[2], logits[3, 2] = (
        torch.nan,
        torch.nan,
        -torch.inf,
        torch.inf,
    )
    logits[4] = -torch.inf
    logits[4, 3] = torch.nan
    logits[5] = -torch.inf
    logits[5, -1] = 2.5
    tokens, log_prob = draw(logits, **options)
    assert tokens[:5].tolist() == [-1] * 5
    assert log_prob.isnan().nonzero().flatten().tolist() == list(range(5))
    assert int(tokens[5]) == vocabulary - 1
    assert float(log_prob[5]) == 0
    expected = draw(clean, **options)
    assert_same((tokens[6:], log_prob[6:]), (expected[0][6:], expected[1][6:]))


def test_bad_temperature_loses_its_row_alone() -> None:
    logits = torch.randn(5, 300, device=DEVICE)
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf], device=DEVICE)
    tokens, log_prob = draw(logits, temperature=temperature)
    assert tokens[1:].tolist() == [-1] * 4
    assert log_prob.isnan().tolist() == [False, True, True, True, True]
    assert int(tokens[0]) == int(draw(logits)[0][0])


# --------------------------------------------------------------------------------------------------
# layouts and sizes


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
    found = draw(logits, top_k=30)
    assert all(part.shape == logits.shape[:-1] for part in found)
    assert_same(found, draw(logits.contiguous(), top_k=30))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1025, 4111, 17_000])
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, vocabulary: int) -> None:
    """Alone and in a batch, at every address modulo 16, the same bits a hundred times."""
    logits = torch.randn(100, vocabulary, device=DEVICE).to(dtype)
    numbers = torch.randperm(1000, device=DEVICE)[:100] + 2**33
    for options in ({}, {"top_k": 50, "top_p": 0.9}):
        expected = draw(logits, row_ids=numbers, **options)
        for row in (0, 1, 50, 99):
            part = slice(row, row + 1)
            alone = draw(logits[part].clone(), row_ids=numbers[part], **options)
            assert_same(alone, (expected[0][part], expected[1][part]))
        for offset in range(16 // logits.element_size()):
            memory = torch.full((100, vocabulary + 9), torch.nan, device=DEVICE, dtype=dtype)
            moved = memory[:, offset : offset + vocabulary]
            moved.copy_(logits)
            assert_same(draw(moved, row_ids=numbers, **options), expected)
        for _ in range(100):
            assert_same(draw(logits, row_ids=numbers, **options), expected)


def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(5 * 10**9)
    rows, vocabulary = 262_145, 8192
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    assert logits.numel() > 2**31
    tokens, log_prob = draw(logits)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    assert_same((tokens[some], log_prob[some]), draw(logits[some], row_ids=some))


# --------------------------------------------------------------------------------------------------
# torch


def test_the_kernel_runs_by_default() -> None:
    logits = torch.randn(4, 100, device=DEVICE)
    assert operators_run(lambda: sample_tokens(logits)) == ["softdimo::sample_tokens"]
    double = operators_run(lambda: sample_tokens(logits.double()))
    assert double == ["softdimo_reference::sample_tokens"]


@pytest.mark.parametrize("options", [(None, None, False), (3, 0.8, True)])
def test_opcheck(options: tuple[int | None, float | None, bool]) -> None:
    top_k, top_p, log_prob = options
    seed, numbers = (
        torch.tensor([1, 0], device=DEVICE),
        torch.arange(6, device=DEVICE).reshape(2, 3),
    )
    temperature = torch.rand(3, device=DEVICE) + 0.5
    operator = torch.ops.softdimo.sample_tokens.default
    logits = torch.randn(2, 3, 5, device=DEVICE).bfloat16()
    for row_temperature, row_ids in ((None, None), (temperature, numbers)):
        torch.library.opcheck(
            operator, (logits, 0.7, row_temperature, top_k, top_p, seed, row_ids, log_prob)
        )


def test_compiles_bitwise() -> None:
    logits = torch.randn(8, 1025, device=DEVICE)
    compiled = torch.compile(lambda z: draw(z, top_k=50), fullgraph=True)
    assert_same(compiled(logits), draw(logits, top_k=50))


def test_side_stream() -> None:
    """The kernel queues behind the work of the current stream, and on no other."""
    source = torch.randn(4096, 8192, device=DEVICE)
    expected = draw(source + 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = draw(source + 1)
        assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


def test_graph_capture() -> None:
    """Captured once and replayed with new data and a new seed: the kernel reads the seed itself."""
    logits = torch.randn(300, 2 * 1025, device=DEVICE).bfloat16()
    temperature = torch.rand(300, device=DEVICE).bfloat16() + 0.5
    seed = torch.tensor([1, 0], device=DEVICE)

    def compute() -> list[Drawn]:
        return [
            draw(logits, temperature=temperature, seed=seed),
            draw(logits[:, 1:1026], seed=seed, top_k=20),
            draw(logits[:, ::2], seed=seed, top_p=0.9),
        ]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        compute()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    before = captured[0][0].clone()
    for _ in range(3):
        logits.normal_()
        temperature.uniform_(0.5, 2)
        seed += 1
        graph.replay()
        for found, expected in zip(captured, compute(), strict=True):
            assert_same(found, expected)
        assert not torch.equal(captured[0][0], before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    logits = torch.randn(300, 1025)
    with torch.cuda.device(0):
        found = draw(logits.to("cuda:1"))
    assert all(part.device == torch.device("cuda:1") for part in found)
    expected = draw(logits.to("cuda:0"))
    assert_same((found[0].to("cuda:0"), found[1].to("cuda:0")), expected)

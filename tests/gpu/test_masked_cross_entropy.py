"""masked_cross_entropy on a GPU: the contract, layouts, streams, graphs, sizes that only a device has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_same_bits, operators_run
from support.contract import FLOORS, assert_contract
from torch import Tensor

from softdimo_fast.ops.masked_cross_entropy import masked_cross_entropy
from softdimo_fast.ops.reference import cross_entropy as reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 8, 31, 128, 129, 1000, 1025, 2048, 2049, 8192, 50257)
SCALES = (0.0, 0.01, 1.0, 5.0, 50.0, 1000.0)
KERNELS = ["softdimo::masked_cross_entropy", "softdimo::masked_cross_entropy_backward"]


class Found(NamedTuple):
    loss: Tensor
    gradient: Tensor


def run(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, smoothing: float = 0.0,
    reduction: str = "none", upstream: Tensor | None = None,
) -> Found:  # fmt: skip
    leaf = logits.detach().requires_grad_()
    loss = masked_cross_entropy(
        leaf, targets, mask, label_smoothing=smoothing, reduction=reduction, backend="cuda"
    )
    upstream = torch.ones_like(loss) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return Found(loss.detach(), gradient)


def targets_of(logits: Tensor) -> Tensor:
    """Half of them where the row is largest, as in a model that is trained."""
    rows, vocabulary = logits.shape
    random = torch.randint(vocabulary, (rows,), device=DEVICE)
    return torch.where(torch.rand(rows, device=DEVICE) < 0.5, logits.argmax(-1), random)


def assert_accurate(
    found: Found, logits: Tensor, targets: Tensor, smoothing: float, upstream: Tensor
) -> None:
    arguments = (logits.double(), targets, None, smoothing, "none")
    loss = reference.masked_cross_entropy(*arguments)
    gradient = reference.masked_cross_entropy_backward(upstream.double(), *arguments, [True])
    leaf = logits.detach().requires_grad_()
    composed = F.cross_entropy(leaf, targets, label_smoothing=smoothing, reduction="none")
    (theirs,) = torch.autograd.grad(composed, leaf, upstream.to(composed.dtype))
    assert_contract(found.loss, composed.detach(), loss, what="loss")
    assert_contract(found.gradient, theirs, gradient, floor=FLOORS[logits.dtype], what="gradient")


def assert_same(first: Found, second: Found) -> None:
    for name, a, b in zip(Found._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def needs_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")


# --------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64(dtype: torch.dtype, vocabulary: int, smoothing: float) -> None:
    scales = torch.tensor(SCALES, device=DEVICE).repeat(256)
    logits = (torch.randn(1536, vocabulary, device=DEVICE) * scales[:, None]).to(dtype)
    targets, upstream = targets_of(logits), torch.randn(1536, device=DEVICE)
    found = run(logits, targets, smoothing=smoothing, upstream=upstream)
    for first in range(len(SCALES)):
        some = slice(first, None, len(SCALES))
        part = Found(*(tensor[some] for tensor in found))
        assert_accurate(part, logits[some], targets[some], smoothing, upstream[some])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [1, 300, 2**15, 3 * 2**15 + 5])
def test_reductions(rows: int, reduction: str) -> None:
    logits, mask = torch.randn(rows, 33, device=DEVICE), torch.rand(rows, device=DEVICE) > 0.4
    logits[~mask] = torch.nan
    targets = torch.randint(33, (rows,), device=DEVICE).where(mask, -100)
    found = run(logits, targets, mask, smoothing=0.1, reduction=reduction)
    each = run(logits, targets, mask, smoothing=0.1)
    count = int(mask.sum().clamp(min=1)) if reduction == "mean" else 1
    torch.testing.assert_close(found.loss, (each.loss.double().sum() / count).float())
    torch.testing.assert_close(found.gradient, each.gradient / count)
    assert not bool(found.gradient[~mask].any())


def test_nearly_one_hot() -> None:
    logits, targets = (
        torch.randn(64, 1025, device=DEVICE),
        torch.randint(1025, (64,), device=DEVICE),
    )
    logits[torch.arange(64, device=DEVICE), targets] = 30
    arguments = (logits.double(), targets, None, 0.0, "none")
    found, loss = run(logits, targets), reference.masked_cross_entropy(*arguments)
    assert float((found.loss / loss - 1).abs().max()) < 2e-6
    assert float((found.gradient.double().sum(-1) / loss).abs().max()) < 4e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 1025, 4200])
def test_special_rows(dtype: torch.dtype, vocabulary: int) -> None:
    """As on the CPU; targets out of range included, which no row reads."""
    inf, nan = torch.inf, torch.nan
    logits, targets = torch.randn(10, vocabulary).to(dtype), torch.full((10,), 3)
    logits[0] = -inf
    logits[1] = -inf
    logits[1, 3] = 2.5
    logits[2, ::2] = -inf
    logits[3, 1::2] = -inf
    logits[4, -1] = nan
    logits[5, 2] = inf
    logits[6, 3] = inf
    targets[7:10] = torch.tensor([-1, vocabulary, -(2**63)])
    for smoothing in (0.0, 0.1):
        found = run(logits.to(DEVICE), targets.to(DEVICE), smoothing=smoothing)
        arguments = (logits.double(), targets, None, smoothing, "none")
        loss = reference.masked_cross_entropy(*arguments)
        gradient = reference.masked_cross_entropy_backward(
            torch.ones(10).double(), *arguments, [True]
        )
        close = {"rtol": 2 * FLOORS[dtype] + 2e-6, "atol": 2 * FLOORS[dtype], "equal_nan": True}
        torch.testing.assert_close(found.loss.cpu().double(), loss, **close)
        torch.testing.assert_close(found.gradient.cpu().double(), gradient, **close)


# --------------------------------------------------------------------------------------------------
# a row's bits depend on the row alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1025, 4111])
def test_bits_depend_on_the_row_alone(dtype: torch.dtype, vocabulary: int) -> None:
    """Alone and in a batch, at every address modulo 16, the same bits a hundred times."""
    logits = torch.randn(300, vocabulary, device=DEVICE).to(dtype)
    targets = targets_of(logits)
    expected = run(logits, targets, smoothing=0.1)
    for row in (0, 1, 150, 299):
        some = slice(row, row + 1)
        alone = run(logits[some].clone(), targets[some], smoothing=0.1)
        assert_same(alone, Found(*(part[some] for part in expected)))
    for offset in range(16 // logits.element_size()):
        memory = torch.full((300, vocabulary + 9), torch.nan, device=DEVICE, dtype=dtype)
        moved = memory[:, offset : offset + vocabulary]
        moved.copy_(logits)
        assert_same(run(moved, targets, smoothing=0.1), expected)
    for _ in range(100):
        assert_same(run(logits, targets, smoothing=0.1), expected)


def test_more_than_two_to_the_31_elements() -> None:
    needs_memory(10 * 10**9)
    rows, vocabulary = 262_145, 8192
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_()
    assert logits.numel() > 2**31
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    found = run(logits, targets)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=DEVICE)
    assert_same(Found(*(part[some] for part in found)), run(logits[some], targets[some]))


# --------------------------------------------------------------------------------------------------
# torch


def test_the_kernels_run_by_default() -> None:
    logits = torch.randn(4, 100, device=DEVICE, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    ran = operators_run(lambda: masked_cross_entropy(logits, targets, None).backward())
    assert ran == KERNELS


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction: str) -> None:
    logits = torch.randn(4, 6, 100, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.randint(100, (4, 6), device=DEVICE)
    mask = (torch.rand(4, 1, device=DEVICE) > 0.5).expand(4, 6)
    arguments, operators = (logits, targets, mask, 0.1, reduction), torch.ops.softdimo
    torch.library.opcheck(operators.masked_cross_entropy, arguments)
    loss, *saved = (t.detach() for t in operators.masked_cross_entropy(*arguments))
    torch.library.opcheck(operators.masked_cross_entropy_backward, (loss, *arguments, *saved))


def test_compiles_bitwise() -> None:
    logits = torch.randn(8, 1025, device=DEVICE, requires_grad=True)
    targets = torch.randint(1025, (8,), device=DEVICE)
    results = []
    for fn in (masked_cross_entropy, torch.compile(masked_cross_entropy, fullgraph=True)):
        loss = fn(logits, targets, None, label_smoothing=0.1)
        results.append(Found(loss.detach(), *torch.autograd.grad(loss, logits)))
    assert_same(*results)


def test_side_stream() -> None:
    """The kernels queue behind the work of the current stream, and on no other."""
    source, targets = (
        torch.randn(4096, 8192, device=DEVICE),
        torch.zeros(4096, device=DEVICE).long(),
    )
    expected = run(source + 1, targets, reduction="mean")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: whatever does not wait reads too early
        found = run(source + 1, targets, reduction="mean")
        assert not stream.query(), "the call waited for the device"
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


def test_graph_capture() -> None:
    """Captured once, replayed with new data, targets and masks; a layout that needs a copy included."""
    logits = torch.randn(300, 2 * 1025, device=DEVICE).bfloat16()
    targets = torch.randint(1025, (300,), device=DEVICE)
    mask = torch.rand(300, device=DEVICE) > 0.5

    def compute() -> list[Found]:
        return [
            run(logits[:, 1:1026], targets, mask, smoothing=0.1, reduction="mean"),
            run(logits[:, ::2], targets, reduction="sum"),
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
        targets.random_(1025)
        mask.copy_(torch.rand(300, device=DEVICE) > 0.5)
        graph.replay()
        for found, expected in zip(captured, compute(), strict=True):
            assert_same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    logits, targets = torch.randn(300, 1025), torch.randint(1025, (300,))
    with torch.cuda.device(0):
        found = run(logits.to("cuda:1"), targets.to("cuda:1"), reduction="mean")
    assert all(part.device == torch.device("cuda:1") for part in found)
    expected = run(logits.to("cuda:0"), targets.to("cuda:0"), reduction="mean")
    assert_same(Found(*(part.to("cuda:0") for part in found)), expected)

"""The CUDA forward of ``soft_embedding`` on the CPU: values, and bits that depend on the row alone."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.contract import assert_contract
from torch import Tensor

from softdimo_fast.ops.reference import soft_embedding as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([2**62 + 11, 5])


class Result(NamedTuple):
    """What the operator returns."""

    output: Tensor
    row_max: Tensor
    row_sum: Tensor
    soft: Tensor
    row_threshold: Tensor
    row_last: Tensor


def run(
    emulated: ModuleType, logits: Tensor, codebook: Tensor, *, temperature: float | Tensor = 1.0,
    mask: Tensor | None = None, mask_embedding: Tensor | None = None, seed: Tensor | None = None,
    row_ids: Tensor | None = None, high: bool = False, hard: bool = False, schedule: str = "greedy",
) -> Result:  # fmt: skip
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    rows = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    return Result(
        *torch.ops.softdimo_emulated.soft_embedding(
            logits, codebook, number, rows, mask, mask_embedding, seed, row_ids, None, None, high, hard
        )
    )  # fmt: skip


def exact(
    logits: Tensor, codebook: Tensor, temperature: float = 1.0, seed: Tensor | None = None
) -> Tensor:
    return reference.soft_embedding(
        logits.double(), codebook.double(), temperature, None, None, None, seed, None, False, None, None
    )  # fmt: skip


def weights(
    logits: Tensor, temperature: float = 1.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The float64 row maximum and sum."""
    y = reference.noised_logits(
        logits.double(), temperature, None, None, None, None, seed, None, torch.double
    )
    top = y.amax(-1)
    return top, ((y - top[..., None]) / temperature).exp().sum(-1)


def composed(logits: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """What a user would write: a float32 softmax, and a product in the codebook's dtype."""
    return torch.softmax(logits.float() / temperature, -1).to(codebook.dtype) @ codebook


def assert_same(first: Result, second: Result) -> None:
    for name, a, b in zip(Result._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def picked(result: Result, rows: object) -> Result:
    return Result(*(part[rows] if part.numel() else part for part in result))


def spread(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows from flat to one-hot."""
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 1000.0]).repeat(rows)[:rows]
    return (torch.randn(rows, vocabulary) * scales[:, None]).to(dtype)


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("high", [False, True], ids=["default", "high"])
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "width"), [(300, 40), (1300, 17), (129, 128), (130, 65)])
def test_float64_and_order_of_threads(
    emulated: ModuleType, vocabulary: int, width: int, dtype: torch.dtype, codebook_dtype: torch.dtype,
    high: bool,
) -> None:  # fmt: skip
    if high and codebook_dtype == torch.float32:
        pytest.skip("float32 products have one precision")
    logits = spread(18, vocabulary, dtype)
    codebook = torch.randn(vocabulary, width).to(codebook_dtype)
    found = run(emulated, logits, codebook, temperature=0.8, high=high)
    assert_same(
        found, run(emulated, logits, codebook, temperature=0.8, high=high, schedule="reverse")
    )
    truth, (top, total) = exact(logits, codebook, 0.8), weights(logits, 0.8)
    assert_contract(found.output, composed(logits, codebook, 0.8), truth)
    assert torch.equal(found.row_max, top)
    assert float((found.row_sum / total - 1).abs().max()) < 2e-6
    if codebook_dtype == torch.float32:
        assert found.soft.numel() == 0
        return
    assert_contract(found.soft, composed(logits, codebook.float(), 0.8), truth, floor=2e-3)
    if high:
        error = (found.soft - truth).norm() / truth.norm()
        assert float(error) < 1e-5


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "width"), [(300, 40), (130, 65)])
def test_noise(
    emulated: ModuleType, vocabulary: int, width: int, dtype: torch.dtype, codebook_dtype: torch.dtype
) -> None:  # fmt: skip
    logits = (3 * torch.randn(17, vocabulary)).to(dtype)
    codebook = torch.randn(vocabulary, width).to(codebook_dtype)
    found = run(emulated, logits, codebook, seed=SEED)
    assert_same(found, run(emulated, logits, codebook, seed=SEED, schedule="reverse"))
    truth, (top, total) = exact(logits, codebook, 1.0, SEED), weights(logits, 1.0, SEED)
    value = found.output if codebook_dtype == torch.float32 else found.soft
    torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.row_max, top, rtol=0, atol=1e-7)
    assert float((found.row_sum / total - 1).abs().max()) < 2e-6
    ids = torch.randperm(17)
    moved = run(emulated, logits[ids], codebook, seed=SEED, row_ids=ids)
    assert_same(moved, picked(found, ids))


def test_noise_beside_large_logits(emulated: ModuleType) -> None:
    """At 1e6 a float32 is 1/16 coarse: the noise stays whole beside it."""
    logits = torch.full((4, 300), 1e6)
    codebook = torch.randn(300, 20)
    found = run(emulated, logits, codebook, seed=SEED, temperature=0.01)
    torch.testing.assert_close(
        found.output.double(), exact(logits, codebook, 0.01, SEED), rtol=1e-4, atol=1e-4
    )
    near = run(emulated, logits - 1e6, codebook, seed=SEED, temperature=0.01)
    torch.testing.assert_close(found.output, near.output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_temperature(emulated: ModuleType, temperature: float) -> None:
    logits, codebook = 3 * torch.randn(20, 300), torch.randn(300, 30)
    found = run(emulated, logits, codebook, temperature=temperature)
    truth = exact(logits, codebook, temperature)
    assert_contract(found.output, composed(logits, codebook, temperature), truth)
    each = 10 ** torch.linspace(-3, 3, 40)[::2]
    rows = run(emulated, logits, codebook, temperature=each)
    for n in range(0, 20, 6):
        alone = run(emulated, logits[n : n + 1], codebook, temperature=float(each[n]))
        assert_same(alone, picked(rows, slice(n, n + 1)))


def test_logits_far_from_zero(emulated: ModuleType) -> None:
    """A common offset changes nothing but the maximum."""
    logits, codebook = torch.randint(-64, 64, (20, 300)) / 8.0, torch.randn(300, 30)
    near, far = run(emulated, logits, codebook), run(emulated, logits + 1e4, codebook)
    assert_same_bits(near.output, far.output, "output")
    assert_same_bits(near.row_sum, far.row_sum, "row_sum")


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
def test_nearly_one_hot(emulated: ModuleType, codebook_dtype: torch.dtype) -> None:
    """What is left beside the largest entry is as precise as the terms of p."""
    logits, codebook = torch.randn(20, 1500), torch.randn(1500, 30).to(codebook_dtype)
    logits[:, 1200] = 12
    found = run(emulated, logits, codebook)
    value = found.output if codebook_dtype == torch.float32 else found.soft
    truth = exact(logits, codebook)
    rest = (truth - codebook[1200].double()).norm()
    assert float((value - truth).norm() / rest) < 2e-3
    certain = torch.full((3, 1500), -200.0)
    certain[:, 1499] = 0
    found = run(emulated, certain, codebook)
    assert torch.equal(found.output, codebook[1499].expand(3, -1))


# ---------------------------------------------------------------------------------------------------
# bits depend on the row alone


@pytest.mark.parametrize(
    ("dtype", "codebook_dtype", "seed"),
    [
        (torch.bfloat16, torch.bfloat16, None),
        (torch.bfloat16, torch.float16, SEED),
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.float32, SEED),
    ],
    ids=str,
)
def test_chunks_in_one_block_or_in_blocks_of_their_own(
    emulated: ModuleType, dtype: torch.dtype, codebook_dtype: torch.dtype, seed: Tensor | None
) -> None:
    """96 groups are enough blocks for a block to walk over the chunks; one group is not."""
    groups = 96
    logits = (5 * torch.randn(1, groups, 1100)).to(dtype)
    codebook = torch.randn(1100, 20).to(codebook_dtype)
    before = emulated.launches()
    walked = run(emulated, logits, codebook.expand(groups, -1, -1), seed=seed, hard=True)
    assert emulated.launches() == before + 2  # the codebook is packed first
    split = run(emulated, logits[0], codebook, seed=seed, hard=True)
    assert emulated.launches() == before + 5
    assert_same(picked(walked, 0), split)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [257, 1029])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Alone and in a batch, at every address modulo 16, in padded rows; the NaN around is not read."""
    logits, codebook = torch.randn(19, vocabulary).to(dtype), torch.randn(vocabulary, 24).bfloat16()
    expected = run(emulated, logits, codebook)
    for n in (0, 7, 8, 18):
        alone = run(emulated, logits[n : n + 1].clone(), codebook)
        assert_same(alone, picked(expected, slice(n, n + 1)))
    for offset in range(16 // logits.element_size()):
        memory = torch.full((19, offset + vocabulary + 5), torch.nan, dtype=dtype)
        view = memory[:, offset : offset + vocabulary]
        view.copy_(logits)
        assert_same(run(emulated, view, codebook), expected)
    expanded = run(emulated, logits[:1].expand(19, -1), codebook)
    assert_same(expanded, picked(expected, torch.zeros(19, dtype=torch.long)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codebooks_of_any_layout(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Read as it is, or packed first: the same bits."""
    logits, codebook = torch.randn(5, 300), torch.randn(300, 64).to(dtype)
    expected = run(emulated, logits, codebook)
    wide = torch.full((300, 71), torch.nan, dtype=dtype)
    wide[:, 3:67] = codebook
    for view in (wide[:, 3:67], codebook.t().contiguous().t()):
        assert_same(run(emulated, logits, view), expected)
    narrow = run(emulated, logits, codebook[:, :33])
    assert_same_bits(narrow.output, expected.output[:, :33], "output")


# ---------------------------------------------------------------------------------------------------
# masks, groups, hard values


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [300, 1100])
def test_masked_rows(emulated: ModuleType, vocabulary: int, codebook_dtype: torch.dtype) -> None:
    logits = torch.randn(4, 10, 2, vocabulary)
    codebook = torch.randn(2, vocabulary, 20).to(codebook_dtype)
    plain = run(emulated, logits, codebook)
    mask = torch.rand(4, 1, 2) > 0.5
    mask[0] = True
    embedding = torch.randn(2, 20).half()
    rows = mask.expand(4, 10, 2)
    logits[rows] = torch.nan
    found = run(emulated, logits, codebook, mask=mask, mask_embedding=embedding)
    assert_same_bits(
        found.output,
        torch.where(rows[..., None], embedding.to(codebook_dtype), plain.output),
        "output",
    )
    assert_same_bits(found.row_max, torch.where(rows, 0.0, plain.row_max), "row_max")
    assert_same_bits(found.row_sum, torch.where(rows, 1.0, plain.row_sum), "row_sum")
    if found.soft.numel():
        assert_same_bits(found.soft, torch.where(rows[..., None], 0.0, plain.soft), "soft")
    for group in range(2):
        alone = run(
            emulated, torch.where(rows[..., None], 0.0, logits)[:, :, group], codebook[group]
        )
        assert torch.equal(
            alone.output[~rows[..., group]], found.output[..., group, :][~rows[..., group]]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "noise"])
def test_hard(emulated: ModuleType, dtype: torch.dtype, seed: Tensor | None) -> None:
    """codebook[argmax], the first of equals wherever they are; the soft value is kept beside it."""
    logits, codebook = torch.randn(30, 1200).to(dtype), torch.randn(1200, 20)
    if seed is None:
        for n, columns in enumerate(
            [(5, 6), (31, 32), (63, 64), (1023, 1024), (8, 1100), (0, 1199)]
        ):
            logits[n, list(columns)] = 9
    soft = run(emulated, logits, codebook, seed=seed)
    found = run(emulated, logits, codebook, seed=seed, hard=True)
    y = reference.noised_logits(
        logits.double(), 1.0, None, None, None, None, seed, None, torch.double
    )
    assert torch.equal(found.output, codebook[y.argmax(-1)])
    assert_same_bits(found.soft, soft.output, "soft")


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [300, 1100])
def test_special_rows(
    emulated: ModuleType,
    dtype: torch.dtype,
    codebook_dtype: torch.dtype,
    vocabulary: int,
    hard: bool,
) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(11, vocabulary).to(dtype)
    logits[0] = -inf
    logits[1] = -inf
    logits[1, -1] = 2.5  # one-hot
    logits[2, 1:] = -inf  # one-hot, the first
    logits[3, ::2] = -inf
    logits[4, -1] = nan
    logits[5, 0] = nan
    logits[6, 2] = inf
    logits[7, :2] = inf
    logits[8] = nan
    logits[9] = 3.0
    codebook = torch.randn(vocabulary, 20).to(codebook_dtype)
    found = run(emulated, logits, codebook, hard=hard)
    truth = reference.soft_embedding(
        logits.double(), codebook.double(), 1.0, None, None, None, None, None, hard, None, None
    )
    lost = torch.tensor([n in (0, 4, 5, 6, 7, 8) for n in range(11)])
    assert torch.equal(found.output.isnan().all(-1), lost)
    torch.testing.assert_close(found.output.double(), truth, rtol=1e-2, atol=1e-3, equal_nan=True)
    assert torch.equal(found.output[1], codebook[-1])
    assert torch.equal(found.output[2], codebook[0])


def test_extreme_temperatures(emulated: ModuleType) -> None:
    logits, codebook = torch.randn(7, 300), torch.randn(300, 20)
    logits[5, 3:] = -torch.inf
    each = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, torch.inf, 3e38])
    found = run(emulated, logits, codebook, temperature=each)
    assert found.output.isnan().all(-1).tolist() == [False, True, True, True] + 3 * [False]
    torch.testing.assert_close(found.output[4], codebook.mean(0))
    torch.testing.assert_close(found.output[5], codebook[:3].mean(0))
    large = torch.tensor([[3e38, -3e38, -3e38] * 100])
    one = run(emulated, large, codebook)
    torch.testing.assert_close(one.output[0], codebook[::3].mean(0))


# ---------------------------------------------------------------------------------------------------
# anything


@given(data=st.data())
def test_any_call(emulated: ModuleType, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    dtype, table = (data.draw(st.sampled_from(DTYPES)) for _ in range(2))
    groups, positions = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    vocabulary = data.draw(st.integers(1, 600) | st.sampled_from([1024, 1025, 2049]))
    width = data.draw(st.integers(1, 128))
    offset, padding = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))
    memory = torch.full((positions, groups, offset + vocabulary + padding), torch.nan, dtype=dtype)
    logits = memory[..., offset : offset + vocabulary]
    scale = data.draw(st.sampled_from([0.1, 3.0, 100.0]))
    logits.copy_(scale * torch.randn(positions, groups, vocabulary))
    codebook = torch.randn(groups, vocabulary, width).to(table)
    temperature = 10.0 ** data.draw(st.floats(-2, 2))
    seed = SEED if data.draw(st.booleans()) else None
    found = run(emulated, logits, codebook, temperature=temperature, seed=seed)
    truth = exact(logits, codebook, temperature, seed)
    tolerance = 3e-5 * max(1.0, 1 / temperature) if table == torch.float32 else 2e-2
    error = (found.output - truth).norm() / (codebook.double().norm() / vocabulary**0.5)
    assert float(error) < tolerance * positions**0.5
    assert not bool(found.row_sum.isnan().any())


def test_nothing_to_do(emulated: ModuleType) -> None:
    before = emulated.launches()
    found = run(emulated, torch.randn(0, 300), torch.randn(300, 20))
    assert found.output.shape == (0, 20)
    assert emulated.launches() == before


def test_what_it_cannot_run_is_refused(emulated: ModuleType) -> None:
    logits, codebook = torch.randn(3, 300), torch.randn(300, 129)
    with pytest.raises(RuntimeError, match="at most 128 columns, got 129"):
        run(emulated, logits, codebook)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16"):
        run(emulated, logits.double(), codebook[:, :20])
    with pytest.raises(RuntimeError, match="codebook must have shape"):
        run(emulated, logits[:, :-1], codebook[:, :20])
    with pytest.raises(RuntimeError, match="needs a mask_embedding"):
        run(emulated, logits, codebook[:, :20], mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="no CUDA kernel truncates"):
        torch.ops.softdimo_emulated.soft_embedding(
            logits, codebook[:, :20], 1.0, None, None, None, None, None, 5, None, False, False
        )

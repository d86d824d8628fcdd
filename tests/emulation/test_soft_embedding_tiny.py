"""The CUDA kernels of soft_embedding for tiny vocabularies, run on the CPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits, gradients
from support.contract import assert_contract
from support.soft_embedding import Case, strided
from torch import Tensor

from softdimo_fast.ops.reference import soft_embedding as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKBIT = (2, 128, 7)
# One shape of [G, V, D] for each team of threads, full and not, of one and several quads of columns.
SHAPES = ((1, 1, 1), (3, 5, 2), (2, 64, 8), (1, 65, 9), MASKBIT, (2, 129, 16), (2, 256, 4))


class Found(NamedTuple):
    """What forward and backward give; gradients of logits, codebook and temperature."""

    value: Tensor
    row_max: Tensor
    row_sum: Tensor
    soft: Tensor
    dlogits: Tensor
    dcodebook: Tensor
    dtemperature: Tensor
    dmask: Tensor


def run(
    case: Case,
    upstream: Tensor,
    *,
    hard: bool = False,
    schedule: str = "greedy",
    emulated: ModuleType,
    wanted: tuple[bool, ...] = (True, True, True, True),
) -> Found:
    """Both operators, on memory that is NaN where they have not written."""
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    options = case.options
    seed = torch.tensor([options["seed"], 3]) if options.get("noise") else None
    arguments = (
        case.logits, case.codebook, options.get("temperature", 1.0), case.temperature, options.get("mask"),
        case.mask_embedding, seed, options.get("row_ids"), None, None, False,
    )  # fmt: skip
    operators = torch.ops.softdimo_emulated
    before = emulated.launches()
    value, row_max, row_sum, soft, *kept = operators.soft_embedding(*arguments, hard)
    assert emulated.launches() == before + 1
    saved = soft if soft.numel() or not value.numel() else value
    have = (True, True, case.temperature is not None, case.mask_embedding is not None)
    gradients_found = operators.soft_embedding_backward(
        upstream.to(case.codebook.dtype), *arguments, row_max, row_sum, saved, *kept,
        [a and b for a, b in zip(have, wanted, strict=True)],
    )  # fmt: skip
    return Found(value, row_max, row_sum, soft, *gradients_found)


def by_row(found: Found) -> tuple[Tensor, ...]:
    return (found.value, found.row_max, found.row_sum, found.dlogits)


def assert_same(first: Found, second: Found) -> None:
    for name, one, two in zip(Found._fields, first, second, strict=True):
        assert_same_bits(one, two, name)


def make(
    shape: tuple[int, int, int], rows: int = 64, dtype: torch.dtype = torch.float32,
    table: torch.dtype = torch.float32, scale: float = 3.0, **options: Any,
) -> Case:  # fmt: skip
    groups, vocabulary, _width = shape
    logits = (scale * torch.randn(rows, groups, vocabulary)).to(dtype)
    return Case(logits, torch.randn(shape).to(table), None, None, options)


def in_float64(case: Case, hard: bool = False) -> Any:
    """The specification's arguments."""
    logits, codebook, temperature, embedding = (None if t is None else t.double() for t in case[:4])
    options = case.options
    seed = torch.tensor([options["seed"], 3]) if options.get("noise") else None
    return (
        logits, codebook, options.get("temperature", 1.0), temperature, options.get("mask"), embedding, seed,
        options.get("row_ids"), hard, None, None,
    )  # fmt: skip


def assert_accurate(case: Case, found: Found, upstream: Tensor) -> None:
    """Value and every gradient keep the numerics contract."""
    upstream = upstream.to(case.codebook.dtype)
    arguments = in_float64(case)
    truth = reference.soft_embedding(*arguments)
    true_grads = reference.soft_embedding_backward(upstream.double(), *arguments, wanted=[True] * 4)
    yardstick, grads = gradients(case.composed, case.tensors(), upstream)
    assert_contract(found.value, yardstick, truth)
    theirs = iter(grads)
    for name, mine, tensor, true in zip(
        Found._fields[4:], found[4:], case[:4], true_grads, strict=True
    ):
        if tensor is not None:
            assert mine.dtype == tensor.dtype, name
            assert_contract(mine, next(theirs), true, what=name)


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(
    emulated: ModuleType, dtype: torch.dtype, table: torch.dtype, shape: tuple[int, int, int]
) -> None:
    case = make(shape, 256, dtype, table, temperature=0.8)
    upstream = torch.randn(256, shape[0], shape[2])
    found = run(case, upstream, emulated=emulated)
    assert_accurate(case, found, upstream)


def with_everything(case: Case, *, noise: bool = True) -> Case:
    """A temperature of each row, masked rows that hold NaN, noise keyed by row numbers."""
    rows = case.logits.shape[:-1]
    mask = torch.rand(rows) < 0.3
    logits = case.logits.clone()
    logits[mask] = torch.nan
    embedding = torch.randn(case.codebook.shape[::2]).to(case.codebook.dtype)
    options: dict[str, Any] = {"mask": mask}
    if noise:
        options |= {"noise": "gumbel", "seed": -(2**62) - 5}
        options["row_ids"] = torch.randint(2**40, rows)
    return Case(logits, case.codebook, torch.rand(rows) + 0.5, embedding, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_at_once(
    emulated: ModuleType, dtype: torch.dtype, noise: bool, shape: tuple[int, int, int]
) -> None:
    """Against float64, and the same bits whichever warp and lane goes first."""
    case = with_everything(make(shape, 256, dtype), noise=noise)
    upstream = torch.randn(256, shape[0], shape[2])
    found = run(case, upstream, emulated=emulated)
    assert_accurate(case, found, upstream)
    assert_same(found, run(case, upstream, emulated=emulated, schedule="reverse"))
    mask = case.options["mask"]
    assert bool((found.dlogits[mask] == 0).all())
    assert bool((found.row_max[mask] == 0).all() and (found.row_sum[mask] == 1).all())
    assert_same_bits(found.value[mask], case.mask_embedding.expand(256, -1, -1)[mask])


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("scale", [0.01, 30.0, 1000.0])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_scales_and_temperatures(
    emulated: ModuleType, scale: float, temperature: float, noise: bool
) -> None:
    case = make(MASKBIT, 256, scale=scale * max(temperature, 0.01), temperature=temperature)
    if noise:
        case.options.update({"noise": "gumbel", "seed": 11})
    upstream = torch.randn(256, 2, 7)
    assert_accurate(case, run(case, upstream, emulated=emulated), upstream)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("distance", [2.0, 5.0, 10.0, 15.0])
def test_nearly_one_hot(emulated: ModuleType, distance: float, noise: bool) -> None:
    case = make((2, 100, 7), 256, scale=0.5)
    case.logits[..., 37] = distance + 5
    case = case._replace(temperature=torch.rand(256, 2) + 0.5)
    if noise:
        case.options.update({"noise": "gumbel", "seed": 11})
    upstream = torch.randn(256, 2, 7)
    found = run(case, upstream, emulated=emulated)
    assert_accurate(case, found, upstream)
    size = found.dlogits.abs().sum(-1)
    assert bool((found.dlogits.sum(-1).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hard(
    emulated: ModuleType, table: torch.dtype, shape: tuple[int, int, int], noise: bool
) -> None:
    """The value is the codebook's entry to the last bit, the rest that of the soft value."""
    case = with_everything(make(shape, 64, table=table), noise=noise)
    upstream = torch.randn(64, shape[0], shape[2])
    hard, soft = (run(case, upstream, hard=h, emulated=emulated) for h in (True, False))
    chosen = reference.soft_embedding(*in_float64(case, hard=True))
    assert_same_bits(hard.value, chosen.to(table))
    kept = soft.soft if soft.soft.numel() else soft.value.masked_fill(soft.value == 0, 0.0)
    soft_rows = ~case.options["mask"]
    assert_same_bits(hard.soft[soft_rows], kept[soft_rows])
    assert bool((hard.soft[~soft_rows] == 0).all())
    for name in Found._fields[4:7]:
        assert_same_bits(getattr(hard, name), getattr(soft, name), name)


def test_ties_go_to_the_lowest_entry(emulated: ModuleType) -> None:
    logits = torch.zeros(5, 1, 200)
    logits[1, 0, [150, 199]] = 2.0
    logits[2, 0, [7, 8]] = 1.0
    logits[3, 0, 199] = 3.0
    logits[4, 0, [64, 128]] = 0.5
    case = Case(logits, torch.arange(200.0).reshape(1, 200, 1), None, None, {})
    found = run(case, torch.ones(5, 1, 1), hard=True, emulated=emulated)
    assert found.value.flatten().tolist() == [0, 150, 7, 199, 64]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("vocabulary", [5, 100, 130, 256])
def test_special_rows(emulated: ModuleType, vocabulary: int, noise: bool, hard: bool) -> None:
    """A row without a distribution is NaN, and its neighbours are what they are without it."""
    inf, nan = torch.inf, torch.nan
    case = make((1, vocabulary, 7), 16)._replace(temperature=torch.rand(16, 1) + 0.5)
    plain, logits, temperature = case.logits.clone(), case.logits, case.temperature
    assert temperature is not None
    if noise:
        case.options.update({"noise": "gumbel", "seed": 5})
    logits[0], logits[1], logits[2, 0, 1], logits[3, 0, -1] = -inf, nan, nan, inf
    logits[4, 0, :2], logits[5], logits[5, 0, 2] = inf, -inf, nan
    logits[6], logits[6, 0, -1] = -inf, 2.5  # one-hot
    logits[7, 0, ::2] = -inf
    temperature[8], temperature[9], temperature[10] = 0.0, -1.0, nan
    temperature[11], temperature[12] = inf, 1e-40
    logits[11, 0, 1] = -inf
    upstream = torch.randn(16, 1, 7)
    found = run(case, upstream, hard=hard, emulated=emulated)
    lost = torch.tensor([n in (0, 1, 2, 3, 4, 5, 8, 9, 10) for n in range(16)])
    for name in ("value", "dlogits"):
        assert torch.equal(getattr(found, name).isnan().flatten(1).any(1), lost), name
    arguments = in_float64(case, hard)
    truth = reference.soft_embedding(*arguments)
    true_grads = reference.soft_embedding_backward(upstream.double(), *arguments, wanted=[True] * 4)
    pairs = zip(
        (found.value, found.dlogits, found.dtemperature), (truth, *true_grads[::2]), strict=True
    )
    for ours, true in pairs:
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert bool(found.dcodebook.isnan().all())
    calm = run(
        case._replace(logits=plain, temperature=torch.where(lost[:, None], 1.0, temperature)),
        upstream, hard=hard, emulated=emulated,
    )  # fmt: skip
    for name in ("value", "dlogits", "dtemperature"):
        assert_same_bits(getattr(found, name)[13:], getattr(calm, name)[13:], name)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 72, 128, 129, 256])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int, noise: bool
) -> None:
    """Alone and in a batch, at every address modulo 16, in padded rows; the NaN around is not read."""
    case = make((1, vocabulary, 7), 19, dtype, temperature=0.7)
    if noise:
        case.options.update({"noise": "gumbel", "seed": 5, "row_ids": torch.randint(99, (19, 1))})
    upstream = torch.randn(19, 1, 7)
    expected = by_row(run(case, upstream, emulated=emulated))
    for n in (0, 7, 18):
        alone = case._replace(logits=case.logits[n : n + 1].clone(), options=dict(case.options))
        if noise:
            alone.options["row_ids"] = case.options["row_ids"][n : n + 1]
        for mine, all_rows in zip(
            by_row(run(alone, upstream[n : n + 1], emulated=emulated)), expected, strict=True
        ):
            assert_same_bits(mine, all_rows[n : n + 1])
    for offset in range(16 // case.logits.element_size()):
        for padding in (0, 1, 5):
            memory = torch.full((19, 1, offset + vocabulary + padding), torch.nan, dtype=dtype)
            view = memory[..., offset : offset + vocabulary]
            view.copy_(case.logits)
            moved = by_row(run(case._replace(logits=view), upstream, emulated=emulated))
            for one, two in zip(moved, expected, strict=True):
                assert_same_bits(one, two)


def test_codebook_gradient_of_many_parts(emulated: ModuleType) -> None:
    case = make((2, 40, 3), 700)
    case.options["mask"] = torch.rand(700, 2) < 0.9
    case = case._replace(mask_embedding=torch.randn(2, 3))
    upstream = torch.randn(700, 2, 3)
    assert_accurate(case, run(case, upstream, emulated=emulated), upstream)


# ---------------------------------------------------------------------------------------------------
# layouts


@pytest.mark.parametrize("layout", ["padded", "transposed", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(emulated: ModuleType, dtype: torch.dtype, layout: str) -> None:
    """Strided logits, a transposed codebook, a broadcast mask and temperatures of another type."""
    case = make(MASKBIT, 24, dtype)
    case = case._replace(
        temperature=(torch.rand(24, 1) + 0.5).bfloat16().expand(24, 2),
        mask_embedding=torch.randn(2, 7),
    )
    case.options["mask"] = (torch.rand(2) < 0.5).expand(24, 2)
    upstream = torch.randn(24, 2, 7)
    plain = run(case, upstream, emulated=emulated)
    moved = case._replace(
        logits=strided(case.logits, layout),
        codebook=case.codebook.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_same(run(moved, upstream, emulated=emulated), plain)


def test_a_codebook_without_groups(emulated: ModuleType) -> None:
    case = make((1, 100, 5), 30)
    upstream = torch.randn(30, 1, 5)
    grouped = run(case, upstream, emulated=emulated)
    flat = run(
        case._replace(logits=case.logits[:, 0], codebook=case.codebook[0]), upstream[:, 0],
        emulated=emulated,
    )  # fmt: skip
    for name, one, two in zip(Found._fields, flat, grouped, strict=True):
        if two.numel():
            assert_same_bits(one, two[0] if name == "dcodebook" else two[:, 0], name)


def test_no_rows(emulated: ModuleType) -> None:
    case = make(MASKBIT, 0)
    operators = torch.ops.softdimo_emulated
    arguments = (case.logits, case.codebook, 1.0, *[None] * 7, False)
    before = emulated.launches()
    value, *kept = operators.soft_embedding(*arguments, False)
    assert value.shape == (0, 2, 7)
    assert emulated.launches() == before
    found = operators.soft_embedding_backward(value, *arguments, *kept, [True, True, False, False])
    assert found[0].shape == (0, 2, 128)
    assert bool((found[1] == 0).all())


@pytest.mark.parametrize("only", [0, 1, 2])
def test_gradients_only_where_wanted(emulated: ModuleType, only: int) -> None:
    wanted = tuple(position == only for position in range(4))
    case = with_everything(make((2, 100, 7), 40))
    upstream = torch.randn(40, 2, 7)
    everything = run(case, upstream, emulated=emulated)
    some = run(case, upstream, emulated=emulated, wanted=wanted)
    for name, one, two, is_wanted in zip(
        Found._fields[4:], some[4:], everything[4:], wanted, strict=True
    ):
        if is_wanted:
            assert_same_bits(one, two, name)
        else:
            assert one.numel() == 0, name


def test_a_block_takes_several_steps(emulated: ModuleType) -> None:
    """So many rows that blocks do not take one step each, and the last one's steps end past the rows."""
    case = make((513, 3, 1), 130, temperature=0.9)
    upstream = torch.randn(130, 513, 1)
    found = run(case, upstream, emulated=emulated)
    assert_accurate(case, found, upstream)
    few = run(case._replace(logits=case.logits[:3].clone()), upstream[:3], emulated=emulated)
    for one, two in zip(by_row(few), by_row(found), strict=True):
        assert_same_bits(one, two[:3])


@given(
    dtype=st.sampled_from(DTYPES),
    table=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 256), st.integers(1, 16)),
    rows=st.integers(1, 70),
    layout=st.sampled_from(["contiguous", "padded", "transposed", "columns"]),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    every=st.booleans(),
    noise=st.booleans(),
)
def test_any_call(
    emulated: ModuleType, dtype: torch.dtype, table: torch.dtype, shape: tuple[int, int, int], rows: int,
    layout: str, scale: float, every: bool, noise: bool,
) -> None:  # fmt: skip
    case = make(shape, rows, dtype, table, scale)
    case = with_everything(case, noise=noise) if every else case
    case = case._replace(logits=strided(case.logits, layout))
    upstream = torch.randn(rows, shape[0], shape[2]).to(table).float()
    found = run(case, upstream, emulated=emulated)
    truth = reference.soft_embedding(*in_float64(case))
    grads = reference.soft_embedding_backward(
        upstream.double(), *in_float64(case), wanted=[True] * 4
    )
    torch.testing.assert_close(found.value, truth.to(table))
    torch.testing.assert_close(found.dlogits, grads[0].to(dtype))
    torch.testing.assert_close(found.dcodebook, grads[1].to(table))

"""The CUDA kernels of soft_embedding's backward, run on the CPU through their binding.

What the forward saves comes from float64 here, so that the backward alone is judged; at the end from the
forward's own kernels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.contract import assert_contract
from support.soft_embedding_backward import (
    DTYPES,
    NAMES,
    Call,
    Saved,
    assert_accurate,
    assert_same,
    backward,
    composed,
    example,
    saved,
    truth,
)
from torch import Tensor

# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float64_and_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype, table: torch.dtype
) -> None:
    """From flat rows to nearly one-hot ones."""
    width = 100 if dtype == table else 40  # both widths of tiles, for every product
    call = example(256, 140, width, dtype, table)
    scales = torch.tensor([0.01, 1.0, 3.0, 10.0])
    call = call._replace(logits=(call.logits.float() * scales.repeat(64)[:, None]).to(dtype))
    found = backward(emulated, call)
    assert_same(found, backward(emulated, call, schedule="reverse"))
    assert_accurate(found, call)


@pytest.mark.parametrize("table", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_every_option_together(emulated: ModuleType, table: torch.dtype, width: int) -> None:
    """Noise, temperatures of rows, masks; two groups; masked logits are NaN and stay out."""
    call = example(
        150, 67, width, torch.bfloat16, table, groups=2, seed=torch.tensor([-7, 3]),
        row_ids=torch.randperm(300).view(150, 2) + 2**33, temperature=torch.rand(150, 1) + 0.5,
        mask=torch.rand(150, 2) < 0.3, mask_embedding=torch.randn(2, width),
    )  # fmt: skip
    assert call.mask is not None
    expected = backward(emulated, call)
    assert_same(expected, backward(emulated, call, schedule="reverse"))
    assert_accurate(expected, call)
    assert not bool(expected[0][call.mask].any())
    call.logits[call.mask] = torch.nan
    assert_same(backward(emulated, call), expected)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_nearly_one_hot(emulated: ModuleType, table: torch.dtype, seed: int | None) -> None:
    """Rows whose largest probability is 1 - 1e-1 to 1 - 1e-6, over several chunks of the vocabulary."""
    call = example(256, 2100, 24, torch.float32, table, scale=1.0)
    gap = torch.log(2100 * 10 ** torch.linspace(1, 6, 256))
    peaks = torch.randint(0, 2100, (256, 1))
    call.logits.scatter_(1, peaks, gap[:, None])
    if seed is not None:
        call = call._replace(seed=torch.tensor([seed, 0]))
    found = backward(emulated, call, wanted=[True, False, False, False])
    true, theirs = truth(call)[0], composed(call)[0]
    assert_contract(found[0], theirs, true)
    if seed is None:
        size = found[0].double().abs().sum(-1)
        assert bool((found[0].double().sum(-1).abs() <= 2e-6 * size).all())
        relative = (found[0] - true).norm(dim=-1) / true.norm(dim=-1)
        assert float(relative.max()) < (1e-2 if table != torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_gradient_over_chunks(emulated: ModuleType, dtype: torch.dtype) -> None:
    call = example(256, 1500, 17, dtype, temperature=0.5 + torch.rand(256))
    wanted = [False, False, True, False]
    found = backward(emulated, call, wanted=wanted)
    assert_contract(found[2], composed(call)[2], truth(call)[2])
    assert [part.numel() for part in found] == [0, 0, 256, 0]


@pytest.mark.parametrize(
    ("table", "high"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_high_precision(emulated: ModuleType, table: torch.dtype, high: bool) -> None:
    """In two terms of p the codebook's gradient, before it is rounded, errs by far less."""
    call = example(256, 130, 64, torch.float32, table, high_precision=high)
    # Sums that are exact in the codebook's type: one column of g per row of the codebook's gradient.
    call.grad.zero_()
    call.grad[:, 0] = 1.0
    found = backward(emulated, call, wanted=[False, True, False, False])[1].double()
    true = truth(call)[1]
    error = float((found - true).abs().max() / true.abs().max())
    assert error < (2**-8 if table == torch.bfloat16 else 2**-11)
    assert_contract(found.to(table), composed(call)[1], true)


def test_parts_of_the_rows(emulated: ModuleType) -> None:
    """Enough rows for several parts of the codebook's and the mask embedding's gradients."""
    call = example(
        1700, 70, 20, torch.float16, torch.float32, mask=torch.rand(1700) < 0.5,
        mask_embedding=torch.randn(20),
    )  # fmt: skip
    found = backward(emulated, call, wanted=[False, True, False, True])
    assert_same(
        found, backward(emulated, call, wanted=[False, True, False, True], schedule="reverse")
    )
    for index in (1, 3):
        assert_contract(found[index], composed(call)[index], truth(call)[index])


@given(
    dtype=st.sampled_from(DTYPES),
    table=st.sampled_from(DTYPES),
    rows=st.integers(1, 140),
    vocabulary=st.integers(1, 300),
    width=st.integers(17, 128),
    padding=st.integers(0, 9),
    offset=st.integers(0, 9),
    scale=st.sampled_from([0.1, 3.0, 50.0]),
    temperature=st.sampled_from([0.001, 1.0, 1000.0, None]),
    masked=st.booleans(),
    noisy=st.booleans(),
    transposed=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_any_call(
    emulated: ModuleType, dtype: torch.dtype, table: torch.dtype, rows: int, vocabulary: int, width: int,
    padding: int, offset: int, scale: float, temperature: float | None, masked: bool, noisy: bool,
    transposed: bool, wanted: list[bool],
) -> None:  # fmt: skip
    memory = torch.full((rows, offset + vocabulary + padding), torch.nan, dtype=dtype)
    logits = memory[:, offset : offset + vocabulary]
    wide = scale * max(temperature or 1.0, 1e-2) * torch.randn(rows, vocabulary)
    logits.copy_(wide.clamp(-1e4, 1e4))
    codebook = (
        torch.randn(width, vocabulary).to(table).T
        if transposed
        else torch.randn(vocabulary, width).to(table)
    )
    call = Call(
        logits, codebook, torch.randn(rows, width).to(table),
        temperature=0.5 + torch.rand(rows) if temperature is None else temperature,
        mask=torch.rand(rows) < 0.3 if masked else None,
        mask_embedding=torch.randn(width).to(table) if masked else None,
        seed=torch.tensor([3, 1]) if noisy else None,
    )  # fmt: skip
    found = backward(emulated, call, wanted=wanted)
    # A gradient is judged beside what it is a sum of: temperatures and single rows may cancel.
    size = float(call.grad.double().norm(dim=-1).max() * codebook.double().norm(dim=-1).max())
    t = 0.5 if temperature is None else temperature
    sizes = (
        size / t,
        float(call.grad.double().abs().sum()),
        size * rows / t**2,
        float(call.grad.double().abs().sum()),
    )
    for name, want, ours, true, bound in zip(NAMES, wanted, found, truth(call), sizes, strict=True):
        if not want or true.numel() == 0:
            assert ours.numel() == 0, name
            continue
        eps = 2e-2 if name == "codebook" and table != torch.float32 else 1e-5
        eps = max(eps, 8e-3 if ours.dtype != torch.float32 else 0.0)
        assert float((ours.double() - true).abs().max()) <= eps * bound, name


# ---------------------------------------------------------------------------------------------------
# a row's bits depend on the row alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [False, True])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, options: bool
) -> None:
    """Alone and in a batch, at other positions of a tile, at every address modulo 16, in padded rows."""
    call = example(5, 301, 19, dtype)
    call.logits[2, 7] = 60.0
    if options:
        call = call._replace(
            seed=torch.tensor([1, 2]), row_ids=torch.arange(5), temperature=torch.rand(5) + 0.5
        )
    kept, wanted = saved(call), [True, False, True, False]
    expected = backward(emulated, call, kept, wanted=wanted)
    order = torch.tensor([3, 0, 4, 2, 1] * 30)

    def picked(value: Any) -> Any:
        per_row = isinstance(value, Tensor) and value.shape[:1] == (5,)
        return value[order] if per_row else value

    many = Call(*map(picked, call))
    found = backward(emulated, many, Saved(*map(picked, kept)), wanted=wanted)
    assert_same(found, tuple(picked(part) for part in expected))
    for offset in range(16 // call.logits.element_size()):
        memory = torch.full((5, offset + 301 + 2), torch.nan, dtype=dtype)
        memory[:, offset : offset + 301] = call.logits
        view = call._replace(logits=memory[:, offset : offset + 301])
        assert_same(backward(emulated, view, kept, wanted=wanted), expected)


# ---------------------------------------------------------------------------------------------------
# special rows, edges, errors


@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_special_rows(emulated: ModuleType, table: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    call = example(9, 75, 30, torch.float32, table)
    logits = call.logits
    logits[0] = -inf
    logits[1] = -inf
    logits[1, -1] = 2.5
    logits[2, 1:] = -inf
    logits[3, ::2] = -inf
    logits[4, -1] = nan
    logits[5, 0] = nan
    logits[6, 2] = inf
    logits[7] = 3.0
    found, true = backward(emulated, call)[0], truth(call)[0]
    assert torch.equal(found.isnan(), true.isnan())
    finite = ~true.isnan()
    torch.testing.assert_close(found.double()[finite], true[finite], rtol=1e-4, atol=1e-6)
    assert not bool(found[1].any())
    bad = call._replace(
        logits=torch.randn(9, 75), temperature=torch.tensor([0.0, -1.0, nan] + 6 * [1.0])
    )
    slopes, dlogits = (backward(emulated, bad)[index] for index in (2, 0))
    assert slopes.isnan().tolist() == 3 * [True] + 6 * [False]
    assert dlogits.isnan().all(-1).tolist() == 3 * [True] + 6 * [False]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(0, 300, 20), (1, 1, 1), (3, 1, 128), (2, 257, 1), (130, 64, 17)],
)
def test_edges(emulated: ModuleType, rows: int, vocabulary: int, width: int) -> None:
    call = example(
        rows, vocabulary, width, temperature=torch.ones(1), mask=torch.zeros(rows, dtype=torch.bool),
        mask_embedding=torch.randn(width),
    )  # fmt: skip
    found = backward(emulated, call)
    for tensor, ours, true in zip(
        (call.logits, call.codebook, torch.ones(1), torch.ones(width)),
        found,
        truth(call),
        strict=True,
    ):
        assert ours.shape == tensor.shape
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)


def test_errors(emulated: ModuleType) -> None:
    wide = example(2, 3, 129)
    with pytest.raises(RuntimeError, match="at most 128 columns, got 129"):
        backward(emulated, wide)
    call = example(2, 300, 20)
    kept = saved(call)
    with pytest.raises(RuntimeError, match="row_sum does not fit"):
        backward(emulated, call, kept._replace(row_sum=kept.row_sum[:1]))
    with pytest.raises(RuntimeError, match="the gradient does not fit"):
        backward(emulated, call._replace(grad=call.grad[:1]), kept)


@pytest.mark.parametrize("table", DTYPES, ids=str)
def test_forward_and_backward_together(emulated: ModuleType, table: torch.dtype) -> None:
    """With what the forward's kernels save."""
    call = example(
        256, 300, 48, torch.bfloat16, table, temperature=torch.rand(256) + 0.5, seed=torch.tensor([8, 1]),
        row_ids=torch.arange(256), mask=torch.rand(256) < 0.3, mask_embedding=torch.randn(48).to(table),
    )  # fmt: skip
    emulated.set_schedule(emulated.Schedule.greedy)
    value, row_max, row_sum, soft, *_ = torch.ops.softdimo_emulated.soft_embedding(
        call.logits, call.codebook, 1.0, call.temperature, call.mask, call.mask_embedding, call.seed,
        call.row_ids, None, None, False, False,
    )  # fmt: skip
    kept = Saved(row_max, row_sum, value if table == torch.float32 else soft)
    assert_accurate(backward(emulated, call, kept), call)

"""The CUDA kernel of sample_tokens, run on the CPU: the C++ kernel's tokens, laws, layouts, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.contract import assert_contract
from support.sampling import chi_square_score, near_the_cut
from torch import Tensor

from softdimo_fast.ops.reference.soft_embedding import kept_entries

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 16 threads a row, 128, and rows that are read in every sweep; a chunk is 4 or 8 entries.
VOCABULARIES = (1, 2, 7, 8, 129, 1025, 2056, 8192, 16400)
SEED = torch.tensor([-5, 7])
Drawn = tuple[Tensor, Tensor]
# No truncation, top_k, top_p, both, and both in a row of equal entries.
OPTIONS = ((None, None), (1, None), (40, None), (None, 0.4), (None, 0.97), (90, 0.6))


def run(
    space: str, logits: Tensor, *, temperature: float | Tensor = 1.0, top_k: int | None = None,
    top_p: float | None = None, seed: Tensor = SEED, row_ids: Tensor | None = None,
) -> Drawn:  # fmt: skip
    rows = temperature if isinstance(temperature, Tensor) else None
    number = 1.0 if isinstance(temperature, Tensor) else temperature
    operator = getattr(torch.ops, space).sample_tokens
    tokens, log_prob = operator(logits, number, rows, top_k, top_p, seed, row_ids, True)
    return tokens, log_prob


def draw(
    emulated: ModuleType, logits: Tensor, *, schedule: str = "greedy", **options: object
) -> Drawn:
    """Tokens and log-probabilities; memory that the kernel does not write holds NaN and 2^63 - 1."""
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    with unwritten_is_visible():
        return run("softdimo_emulated", logits, **options)  # type: ignore[arg-type]


@contextmanager
def unwritten_is_visible() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_same(first: Drawn, second: Drawn) -> None:
    assert_same_bits(first[0], second[0], "tokens")
    assert_same_bits(first[1], second[1], "log_prob")


def assert_agrees(found: Drawn, expected: Drawn) -> None:
    """Tokens may differ where the two best keys do by a few ulp, which no row here has."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=2e-6, equal_nan=True)


def rows_for(vocabulary: int) -> int:
    return max(3, min(40, 6000 // vocabulary))


# ---------------------------------------------------------------------------------------------------
# the C++ kernel's tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_of_the_cpu_and_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Flat to peaked rows; the same bits whichever warp and lane goes first."""
    scales = torch.tensor([0.0, 0.5, 3.0, 40.0])
    for i, (top_k, top_p) in enumerate(OPTIONS):
        logits = torch.randn(rows_for(vocabulary), vocabulary)
        logits = (logits * scales[torch.arange(len(logits)) % 4, None]).to(dtype)
        temperature = (1.0, 0.6)[i % 2]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        found = draw(emulated, logits, **options)
        assert_same(found, draw(emulated, logits, schedule="reverse", **options))
        sure = ~near_the_cut(logits.double() / temperature, top_k, top_p)
        sure |= torch.arange(len(logits)) % 4 == 0  # equal entries are cut alike everywhere
        expected = run("softdimo", logits, **options)  # type: ignore[arg-type]
        assert_agrees((found[0][sure], found[1][sure]), (expected[0][sure], expected[1][sure]))


def test_tokens_of_many_rows(emulated: ModuleType) -> None:
    """At most one in 10^5 rows may differ, where the two best keys differ by a few ulp."""
    logits, numbers = torch.randn(20_000, 24), torch.arange(20_000) * 2**30
    found = draw(emulated, logits, row_ids=numbers, temperature=0.9)
    expected = run("softdimo", logits, row_ids=numbers, temperature=0.9)
    assert int((found[0] != expected[0]).sum()) == 0


@pytest.mark.parametrize("vocabulary", [300, 4000])
def test_small_temperatures_skip_chunks(emulated: ModuleType, vocabulary: int) -> None:
    """Entries that no noise can help are not given any; the tokens stay."""
    logits = 3 * torch.randn(24, vocabulary)
    logits[::2, :-70] -= 20
    for temperature in (0.5, 0.1, 1e-3):
        found = draw(emulated, logits, temperature=temperature)
        assert_agrees(found, run("softdimo", logits, temperature=temperature))


@pytest.mark.parametrize("vocabulary", [400, 3000])
def test_entries_that_one_thread_holds_in_several_chunks(
    emulated: ModuleType, vocabulary: int
) -> None:
    """With few entries scores are far above keys: the best score may lose to the best of another chunk."""
    apart = 64 if vocabulary == 400 else 512  # threads times the entries of a chunk
    logits = torch.full((300, vocabulary), -torch.inf)
    logits[:, 5::apart] = 0.3 * torch.randn(300, 1)
    found = draw(emulated, logits)
    assert_agrees(found, run("softdimo", logits))
    assert found[0].unique().numel() == len(range(5, vocabulary, apart))


# Words of Philox below 512 under seed 3: their score says nothing, u cannot be told from 0 by 23 bits.
TINY_UNIFORMS = ((1354, 6241), (2634, 1277), (3617, 3921))


def test_uniforms_that_round_to_zero(emulated: ModuleType) -> None:
    seed = torch.tensor([3, 0])
    numbers = torch.tensor([row for row, _ in TINY_UNIFORMS]).repeat_interleave(5)
    logits = torch.randn(15, 8192)
    for i, (_, at) in enumerate(TINY_UNIFORMS):
        for k, value in enumerate((0.0, -20.0, -12.0, -40.0, -torch.inf)):
            logits[5 * i + k, at] = value
            if k > 0:  # the thread's next chunk is better, for all that this score says
                logits[5 * i + k, at + 512] = 20
    found = draw(emulated, logits, row_ids=numbers, seed=seed)
    assert_agrees(found, run("softdimo", logits, row_ids=numbers, seed=seed))
    assert found[0][::5].tolist() == [at for _, at in TINY_UNIFORMS]
    assert found[0][1::5].tolist() == [at + 512 for _, at in TINY_UNIFORMS]


@given(
    dtype=st.sampled_from(DTYPES),
    vocabulary=st.one_of(st.integers(1, 40), st.integers(1, 3000)),
    scale=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    temperature=st.sampled_from([1e-3, 0.7, 1.0, 30.0]),
    top_k=st.sampled_from([None, 1, 2, 17, 500]),
    top_p=st.sampled_from([None, 1e-6, 0.3, 0.9, 1.0]),
    rounded=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_options(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int, scale: float, temperature: float,
    top_k: int | None, top_p: float | None, rounded: bool, seed: int,
) -> None:  # fmt: skip
    logits = scale * torch.randn(9, vocabulary)
    logits = ((2 * logits).round() / 2 if rounded else logits).to(dtype)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    pair = torch.tensor([seed, seed >> 7])
    found = draw(emulated, logits, seed=pair, **options)
    sure = ~near_the_cut(logits.double() / temperature, top_k, top_p) | (scale == 0.0)
    expected = run("softdimo", logits, seed=pair, **options)  # type: ignore[arg-type]
    assert_agrees((found[0][sure], found[1][sure]), (expected[0][sure], expected[1][sure]))


# ---------------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.8)])
def test_draws_follow_the_law(emulated: ModuleType, top_k: int | None, top_p: float | None) -> None:
    """Chi-square over draws of one row; nothing that was dropped is drawn."""
    row = torch.randn(13).bfloat16()
    tokens, _ = draw(
        emulated, row.expand(8000, -1), temperature=0.8, top_k=top_k, top_p=top_p
    )  # fmt: skip
    scaled = row.float() / 0.8
    keep = kept_entries(scaled, top_k, top_p)
    if keep is not None:
        scaled = scaled.masked_fill(~keep, -torch.inf)
    counts, law = torch.bincount(tokens, minlength=13), torch.softmax(scaled.double(), -1)
    assert not bool(counts[law == 0].any())
    assert chi_square_score(counts, law) < 4


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_draws_follow_a_law_of_many_entries(emulated: ModuleType, scale: float) -> None:
    row = scale * torch.randn(4100)
    tokens, _ = draw(emulated, row.expand(1200, -1), seed=torch.tensor([2, 2]))
    counts, law = torch.bincount(tokens, minlength=4100), torch.softmax(row.double(), -1)
    assert chi_square_score(counts.reshape(41, 100).sum(0), law.reshape(41, 100).sum(0)) < 4
    assert chi_square_score(counts.reshape(41, 100).sum(1), law.reshape(41, 100).sum(1)) < 4


@pytest.mark.parametrize("vocabulary", [60, 2500])
def test_log_prob_keeps_the_contract(emulated: ModuleType, vocabulary: int) -> None:
    logits = 3 * torch.randn(256 if vocabulary < 100 else 64, vocabulary)
    tokens, log_prob = draw(emulated, logits, temperature=0.7)
    truth, yardstick = (
        torch.log_softmax(z / 0.7, -1).gather(-1, tokens[:, None])[:, 0]
        for z in (logits.double(), logits)
    )
    assert_contract(log_prob, yardstick, truth)


def test_log_prob_near_one(emulated: ModuleType) -> None:
    """The relative error of a tiny -log p: the entry drawn is not in the sum."""
    logits = torch.randn(32, 200)
    logits[:, 150] = 30
    tokens, log_prob = draw(emulated, logits)
    truth = -torch.log1p((logits.double() - 30).exp().index_fill(1, torch.tensor(150), 0).sum(1))
    assert tokens.tolist() == [150] * 32
    torch.testing.assert_close(log_prob.double(), truth, rtol=2e-6, atol=0)


# ---------------------------------------------------------------------------------------------------
# truncation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rounded", "huge", "uneven", "holes", "tiny", "zeros"])
def test_truncation_agrees_with_the_cpu(
    emulated: ModuleType, dtype: torch.dtype, kind: str
) -> None:
    """Ties, outliers, subnormal and negative zero, vanishing entries; log_prob gives a kept set away."""
    for vocabulary, rows in ((350, 24), (2300, 6)):
        normal = torch.randn(rows, vocabulary)
        logits = {
            "rounded": (2 * normal).round() / 2,
            "huge": 6e4 * normal.clamp(-1, 1),
            "uneven": torch.exp(4 * normal),
            "holes": normal.masked_fill(torch.rand(rows, vocabulary) < 0.7, -torch.inf),
            "tiny": -torch.exp(-60 * normal.abs()),
            "zeros": torch.where(normal > 0, 0.0, -0.0),
        }[kind].to(dtype)
        for top_k, top_p in ((1, None), (40, None), (300, None), (None, 0.6), (90, 0.37)):
            for temperature in (1.0, 0.9):
                options = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
                found = draw(emulated, logits, **options)
                expected = run("softdimo", logits, **options)  # type: ignore[arg-type]
                sure = ~near_the_cut(logits.double() / temperature, top_k, top_p)
                sure |= torch.tensor(kind == "zeros")
                assert torch.equal(found[0][sure], expected[0][sure])
                torch.testing.assert_close(
                    found[1][sure], expected[1][sure], atol=2e-6, rtol=2e-6, equal_nan=True
                )


@pytest.mark.parametrize("vocabulary", [50, 1300, 9000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-7])
def test_equal_entries_are_cut_where_the_cpu_cuts(
    emulated: ModuleType, vocabulary: int, top_p: float
) -> None:
    """Some of the ties are kept, those of the lowest index: both kernels keep the same number."""
    logits = torch.full((3, vocabulary), 1.7)
    logits[1, 2:] = 0.25
    logits[2, vocabulary // 2 :] = -3.0
    for top_k in (None, vocabulary // 3):
        options = {"top_p": top_p, "top_k": top_k, "row_ids": torch.arange(3)}
        found = draw(emulated, logits, **options)
        assert_agrees(found, run("softdimo", logits, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("vocabulary", [40, 1500])
def test_top_k_keeps_the_lowest_of_equals(emulated: ModuleType, vocabulary: int) -> None:
    """Exactly k entries, for every k: the uniform law of the kept has log-probability -log k."""
    row = torch.zeros(vocabulary).bfloat16()
    for k in (1, 2, vocabulary // 2, vocabulary - 1, vocabulary, 2**62):
        tokens, log_prob = draw(emulated, row.expand(64, -1), top_k=k)
        kept = min(k, vocabulary)
        assert int(tokens.max()) < kept
        expected = torch.full((64,), -torch.log(torch.tensor(float(kept))))
        torch.testing.assert_close(log_prob, expected, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------
# rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 129, 1025, 2300])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Alone and in a batch, at every address modulo 16, in padded rows; the NaN around is not read."""
    logits, numbers = torch.randn(9, vocabulary).to(dtype), torch.randperm(1000)[:9] + 2**33
    for options in ({}, {"top_k": 5, "top_p": 0.9}):
        expected = draw(emulated, logits, row_ids=numbers, **options)
        for i in (0, 5, 8):
            part = slice(i, i + 1)
            alone = draw(emulated, logits[part].clone(), row_ids=numbers[part], **options)
            assert_same(alone, (expected[0][part], expected[1][part]))
        for offset in range(16 // logits.element_size()):
            memory = torch.full((9, offset + vocabulary + offset % 3), torch.nan, dtype=dtype)
            view = memory[:, offset : offset + vocabulary].copy_(logits)
            assert_same(draw(emulated, view, row_ids=numbers, **options), expected)


def test_long_rows_at_any_address(emulated: ModuleType) -> None:
    """Rows that are read again in every sweep."""
    logits = torch.randn(2, 8300)
    for options in ({}, {"top_k": 70, "top_p": 0.9}):
        expected = draw(emulated, logits, **options)
        for offset in (1, 3):
            memory = torch.full((2, 8300 + 2 * offset), torch.nan)
            view = memory[:, offset : offset + 8300].copy_(logits)
            assert_same(draw(emulated, view, **options), expected)


@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 9000])
def test_rows_without_a_distribution(emulated: ModuleType, vocabulary: int) -> None:
    """Token -1 and NaN for NaN, +inf, nothing but -inf; the others keep their bits."""
    clean = torch.randn(8, vocabulary)
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
    logits[6, ::2] = -torch.inf
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        tokens, log_prob = draw(emulated, logits, **options)
        assert tokens[:5].tolist() == [-1] * 5
        assert log_prob.isnan().nonzero().flatten().tolist() == list(range(5))
        assert int(tokens[5]) == vocabulary - 1
        assert float(log_prob[5]) == 0
        assert int(tokens[6]) % 2 == 1
        expected = draw(emulated, clean, **options)
        assert_same((tokens[7:], log_prob[7:]), (expected[0][7:], expected[1][7:]))
        assert torch.equal(tokens, run("softdimo", logits, **options)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("vocabulary", [6, 1300])
def test_bad_temperatures_lose_their_row_alone(emulated: ModuleType, vocabulary: int) -> None:
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, 1.0])
    logits = torch.randn(6, vocabulary)
    tokens, log_prob = draw(emulated, logits, temperature=temperature)
    good = torch.tensor([True, False, False, False, False, True])
    expected = draw(emulated, logits)
    assert torch.equal(log_prob.isnan(), ~good)
    assert torch.equal(tokens == -1, ~good)
    assert_same((tokens[good], log_prob[good]), (expected[0][good], expected[1][good]))
    assert draw(emulated, logits, temperature=-1.0)[0].tolist() == [-1] * 6


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 3e38, 1e300])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.5}])
def test_temperatures_at_the_end_of_float32(
    emulated: ModuleType, temperature: float, options: dict[str, float]
) -> None:
    logits = torch.randn(40, 150)
    found = draw(emulated, logits, temperature=temperature, **options)
    expected = run("softdimo", logits, temperature=temperature, **options)  # type: ignore[arg-type]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].isnan(), found[0] == -1)
    negative = -1 - torch.rand(40, 150)
    found = draw(emulated, negative, temperature=temperature, **options)
    assert torch.equal(
        found[0],
        run("softdimo", negative, temperature=temperature, **options)[0],  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------------------------------------
# the binding


def test_the_operator_takes_any_layout(emulated: ModuleType) -> None:
    """Transposed rows, padded columns, broadcast numbers, temperatures of another dtype."""
    logits = (3 * torch.randn(3, 5, 40)).bfloat16().transpose(0, 1)[..., 1:37]
    temperature = (torch.rand(5, 1, dtype=torch.float64) + 0.5).expand(5, 3)
    numbers = torch.arange(10, 13).expand(5, 3)
    seed = torch.tensor([[4, 0], [9, 0]])[:, 0]
    before = emulated.launches()
    found = draw(emulated, logits, temperature=temperature, row_ids=numbers, seed=seed)
    assert emulated.launches() == before + 1
    expected = draw(
        emulated, logits.reshape(15, 36), temperature=temperature.float().reshape(15),
        row_ids=numbers.reshape(15), seed=torch.tensor([4, 9]),
    )  # fmt: skip
    assert_same((found[0].reshape(15), found[1].reshape(15)), expected)
    assert_same(draw(emulated, logits[..., ::2]), draw(emulated, logits[..., ::2].contiguous()))


def test_row_numbers_default_to_0_and_up(emulated: ModuleType) -> None:
    logits = torch.randn(1, 20).expand(30, 20)
    found = draw(emulated, logits)
    assert_same(found, draw(emulated, logits, row_ids=torch.arange(30)))
    assert found[0].unique().numel() > 5


def test_log_prob_is_empty_unless_asked_for(emulated: ModuleType) -> None:
    logits = torch.randn(4, 5, 30)
    operator = torch.ops.softdimo_emulated.sample_tokens
    tokens, log_prob = operator(logits, 1.0, None, 3, None, SEED, None, False)
    assert log_prob.shape == (0,)
    assert torch.equal(tokens, draw(emulated, logits, top_k=3)[0])
    before = emulated.launches()
    tokens, log_prob = draw(emulated, torch.randn(3, 0, 7))
    assert tokens.shape == log_prob.shape == (3, 0)
    assert emulated.launches() == before


def test_what_it_cannot_read_is_refused(emulated: ModuleType) -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16"):
        draw(emulated, logits.double())
    with pytest.raises(RuntimeError, match="1 <= V"):
        draw(emulated, torch.randn(2, 0))
    with pytest.raises(RuntimeError, match="top_k must be at least 1"):
        draw(emulated, logits, top_k=0)
    with pytest.raises(RuntimeError, match="top_p must be positive"):
        draw(emulated, logits, top_p=0.0)
    with pytest.raises(RuntimeError, match="seed must be int64"):
        draw(emulated, logits, seed=torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="row_ids must be int64"):
        draw(emulated, logits, row_ids=torch.zeros(2))
    with pytest.raises(RuntimeError, match="row_ids must broadcast"):
        draw(emulated, logits, row_ids=torch.arange(3))

"""sample_tokens: the law of the draws, truncation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.contract import assert_contract
from support.sampling import BACKENDS, DTYPES, chi_square_score, draw, near_the_cut

from softdimo_fast.ops.reference.random import default_row_ids, gumbel
from softdimo_fast.ops.reference.soft_embedding import kept_entries
from softdimo_fast.ops.sample_tokens import sample_tokens

# --------------------------------------------------------------------------------------------------
# The law


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_a_small_law(backend: str, vocabulary: int, temperature: float) -> None:
    row = torch.randn(vocabulary)
    tokens = draw(row, 40_000, block=40_000, temperature=temperature, backend=backend)
    law = torch.softmax(row.double() / temperature, -1)
    assert chi_square_score(torch.bincount(tokens, minlength=vocabulary), law) < 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_draws_follow_a_large_law(backend: str, scale: float) -> None:
    """Flat, nearly flat and peaked at V = 8192; cells of a flat law are pooled by index, two ways."""
    vocabulary, count = 8192, 6144 if backend == "reference" else 60_000
    row = scale * torch.randn(vocabulary)
    tokens = draw(row, count, block=512, backend=backend)
    counts, law = torch.bincount(tokens, minlength=vocabulary), torch.softmax(row.double(), -1)
    for view in ((256, 32), (32, 256)):
        for axis in (0, 1):
            pooled = counts.reshape(view).sum(axis), law.reshape(view).sum(axis)
            assert chi_square_score(*pooled) < 4, (view, axis)
    if scale == 3.0:
        assert chi_square_score(counts, law) < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbouring_rows_are_independent(backend: str) -> None:
    tokens = draw(torch.tensor([0.0, 0.5, -0.5]), 40_000, block=40_000, backend=backend)
    law = torch.softmax(torch.tensor([0.0, 0.5, -0.5]).double(), -1)
    for lag in (1, 4):
        pairs = torch.bincount(tokens[:-lag] * 3 + tokens[lag:], minlength=9)
        assert chi_square_score(pairs, (law[:, None] * law).flatten()) < 4, lag


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_law_survives_large_logits(backend: str) -> None:
    """At z = 1e4 and T = 1e-3 a float32 key z / T + g would round the noise to whole numbers."""
    temperature = 2.0**-10
    row = 1e4 - temperature * torch.tensor([0.0, 1.0, 1.0, 2.0])
    tokens = draw(row, 40_000, block=40_000, temperature=temperature, backend=backend)
    law = torch.softmax(row.double() / temperature, -1)
    assert chi_square_score(torch.bincount(tokens, minlength=4), law) < 4


def test_scores_reject_a_wrong_law() -> None:
    """The bound above has power: a law off by a tenth of a nat is rejected."""
    row = torch.randn(16)
    counts = torch.bincount(draw(row, 40_000, block=40_000), minlength=16)
    wrong = row + torch.tensor([0.1, 0.0]).repeat(8)
    assert chi_square_score(counts, torch.softmax(wrong.double(), -1)) > 8


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.sampled_from([(300,), (4, 80), (2, 3, 50)]),
    vocabulary=st.sampled_from([1, 2, 7, 33, 130]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1e-3, 0.7, 1.0, 1e3]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    top_k=st.sampled_from([None, 1, 3, 200]),
    top_p=st.sampled_from([None, 0.3, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_tokens_are_the_best_keys_and_log_probs_keep_the_contract(
    backend: str, shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, temperature: float,
    scale: float, top_k: int | None, top_p: float | None, seed: int,
) -> None:  # fmt: skip
    logits = (scale * torch.randn(*shape, 2 * vocabulary)).clamp(-6e4, 6e4).to(dtype)[..., ::2]
    tokens, log_prob = sample_tokens(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        return_log_prob=True,
        backend=backend,
    )
    assert tokens.dtype == torch.int64
    assert tokens.shape == log_prob.shape == shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_prob.dtype == compute

    wide = logits.to(compute)
    keep = kept_entries(wide / temperature, top_k, top_p)
    keep = torch.ones_like(wide, dtype=torch.bool) if keep is None else keep
    clear = torch.ones(shape, dtype=torch.bool)
    if backend != "reference" and scale > 0:  # rows of equal entries agree everywhere
        clear = ~near_the_cut(logits.double() / temperature, top_k, top_p)
    truth = (logits.double() / temperature).masked_fill(~keep, -torch.inf)
    rows = default_row_ids(None, torch.Size(shape), torch.device("cpu"))
    keys = truth + gumbel(torch.tensor([seed, 0]), rows, vocabulary, torch.float64)
    chosen = keys.gather(-1, tokens[..., None])[..., 0]
    # A few ulp of the noise and of the difference to the row maximum, which the winner is close to.
    assert bool((keys.amax(-1) - chosen <= 2e-5)[clear].all())

    yard = torch.log_softmax((wide / temperature).masked_fill(~keep, -torch.inf), -1)
    yard = yard.gather(-1, tokens[..., None])[..., 0]
    above = truth - truth.gather(-1, tokens[..., None])
    exact = -torch.log1p(above.exp().scatter(-1, tokens[..., None], 0).sum(-1))
    assert_contract(log_prob[clear], yard[clear], exact[clear])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [1.0, 30.0, 80.0])
def test_log_prob_of_an_almost_certain_token_is_not_rounded_to_zero(
    backend: str, gap: float
) -> None:
    logits = torch.tensor([[0.0, -gap]])
    tokens, log_prob = sample_tokens(logits, seed=0, return_log_prob=True, backend=backend)
    assert tokens.tolist() == [0]
    assert float(log_prob) == pytest.approx(-math.log1p(math.exp(-gap)), rel=1e-6, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_noise_room_it_is_the_argmax(backend: str) -> None:
    logits = torch.randn(256, 50)
    tokens = sample_tokens(logits, temperature=1e-6, backend=backend)
    assert torch.equal(tokens, logits.argmax(-1))


def test_ties_of_the_key_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    from softdimo_fast.ops.reference import sample_tokens as reference

    monkeypatch.setattr(
        reference, "gumbel", lambda seed, rows, vocabulary, dtype: torch.zeros(vocabulary)
    )
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert sample_tokens(logits, backend="reference").tolist() == [1, 0]


# --------------------------------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_draws_only_the_k_largest_and_fits_their_law(backend: str) -> None:
    row = torch.tensor([0.3, 1.0, 1.0, 1.0, -0.2, 0.9])
    tokens = draw(row, 20_000, block=20_000, top_k=2, backend=backend)
    assert set(tokens.tolist()) == {1, 2}, "ties of the k-th value go to the lowest index"
    counts = torch.bincount(tokens, minlength=6)[1:3]
    assert chi_square_score(counts, torch.tensor([0.5, 0.5])) < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_draws_only_the_shortest_prefix(backend: str) -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    tokens = draw(probabilities.log(), 20_000, block=20_000, top_p=0.6, backend=backend)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert chi_square_score(counts[[1, 3]], torch.tensor([4 / 7, 3 / 7])) < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_comes_before_top_p(backend: str) -> None:
    """Among the 2 entries that top_k keeps, the first has mass 4/7 > 0.56: it stays alone."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    both = set(draw(probabilities.log(), 2000, top_k=2, top_p=0.56, backend=backend).tolist())
    assert both == {0}
    assert set(draw(probabilities.log(), 2000, top_p=0.56, backend=backend).tolist()) == {0, 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_works_on_tempered_logits(backend: str) -> None:
    """At T = 2 the law is flatter, and the prefix of mass 0.6 longer."""
    row = torch.tensor([0.7, 0.2, 0.06, 0.04]).log()
    assert set(draw(row, 4000, top_p=0.6, backend=backend).tolist()) == {0}
    assert set(draw(row, 4000, top_p=0.6, temperature=2.0, backend=backend).tolist()) == {0, 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens_are_never_drawn(backend: str) -> None:
    row = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
    tokens = draw(row, 20_000, block=20_000, backend=backend)
    assert set(tokens.tolist()) == {1, 3}
    assert set(draw(row, 2000, top_k=3, backend=backend).tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_rows_of_equal_entries_are_cut_where_the_reference_cuts(
    dtype: torch.dtype, top_p: float
) -> None:
    """The mass before an entry is p itself, but for rounding: both decide alike."""
    for vocabulary in (10, 20, 50, 130):
        logits = torch.full((2000, vocabulary), 1.7, dtype=dtype)
        first, second = (
            sample_tokens(logits, seed=1, top_p=top_p, return_log_prob=True, backend=backend)
            for backend in BACKENDS
        )
        assert torch.equal(first[0], second[0])
        torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rounded", "huge", "uneven", "holes", "tiny", "zeros"])
def test_truncation_agrees_with_the_reference(dtype: torch.dtype, kind: str) -> None:
    """Ties, outliers, subnormal and negative zero, many vanishing entries; a token gives a kept set away."""
    normal = torch.randn(400, 700)
    logits = {
        "rounded": (2 * normal).round() / 2,
        "huge": 6e4 * normal.clamp(-1, 1),
        "uneven": torch.exp(4 * normal),
        "holes": normal.masked_fill(torch.rand(400, 700) < 0.7, -torch.inf),
        "tiny": -torch.exp(-60 * normal.abs()),
        "zeros": torch.where(normal > 0, 0.0, -0.0),
    }[kind].to(dtype)
    for top_k, top_p in (
        (1, None),
        (40, None),
        (600, None),
        (None, 0.6),
        (None, 0.999),
        (90, 0.37),
    ):
        options = {"seed": 4, "top_k": top_k, "top_p": top_p, "return_log_prob": True}
        (tokens, log_prob), (expected, expected_log_prob) = (
            sample_tokens(logits, backend=backend, **options)  # type: ignore[call-overload]
            for backend in ("cpp", "reference")
        )
        clear = ~near_the_cut(logits.double(), top_k, top_p)
        assert int(clear.sum()) > 300 or kind in ("zeros", "tiny", "rounded")
        assert torch.equal(tokens[clear], expected[clear])
        torch.testing.assert_close(
            log_prob[clear], expected_log_prob[clear], atol=2e-6, rtol=2e-6, equal_nan=True
        )

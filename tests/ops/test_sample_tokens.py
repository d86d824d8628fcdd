"""sample_tokens: the law of the draws, truncation, reproducibility, special rows, torch integration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits, operators_run
from support.contract import assert_contract
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.reference.random import default_row_ids, gumbel
from softdimo_fast.ops.reference.soft_embedding import kept_entries
from softdimo_fast.ops.sample_tokens import sample_tokens

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def chi_square_score(counts: Tensor, probabilities: Tensor, enough: float = 8.0) -> float:
    """How many standard deviations the chi-square statistic lies above its mean.

    Cells with fewer than ``enough`` expected counts are pooled. The cube root of a chi-square
    variable is close to normal (Wilson and Hilferty 1931).
    """
    expected = probabilities.double() * counts.sum()
    large = expected >= enough
    cells = torch.cat([expected[large], expected[~large].sum().reshape(1)])
    found = torch.cat([counts[large], counts[~large].sum().reshape(1)]).double()
    if float(cells[-1]) < enough:
        assert int(found[-1]) <= float(cells[-1]) + 6 * math.sqrt(float(cells[-1]) + 1)
        cells, found = cells[:-1], found[:-1]
    freedom = cells.numel() - 1
    statistic = float(((found - cells) ** 2 / cells).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def draw(row: Tensor, count: int, block: int = 4096, **options: object) -> Tensor:
    """``count`` draws from one row, a block of rows at a time (the row numbers run on)."""
    parts = []
    for start in range(0, count, block):
        numbers = torch.arange(start, min(start + block, count))
        logits = row.expand(numbers.numel(), -1)
        parts.append(sample_tokens(logits, row_ids=numbers, seed=11, **options))  # type: ignore[call-overload]
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# The law


@pytest.mark.parametrize("vocabulary", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_a_small_law(vocabulary: int, temperature: float) -> None:
    row = torch.randn(vocabulary)
    tokens = draw(row, 40_000, block=40_000, temperature=temperature)
    law = torch.softmax(row.double() / temperature, -1)
    assert chi_square_score(torch.bincount(tokens, minlength=vocabulary), law) < 4


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_draws_follow_a_large_law(scale: float) -> None:
    """Flat, nearly flat and peaked at V = 8192; cells of a flat law are pooled by index, two ways."""
    vocabulary, count = 8192, 6144
    row = scale * torch.randn(vocabulary)
    tokens = draw(row, count, block=512)
    counts, law = torch.bincount(tokens, minlength=vocabulary), torch.softmax(row.double(), -1)
    for view in ((256, 32), (32, 256)):
        for axis in (0, 1):
            pooled = counts.reshape(view).sum(axis), law.reshape(view).sum(axis)
            assert chi_square_score(*pooled) < 4, (view, axis)
    if scale == 3.0:
        assert chi_square_score(counts, law) < 4


def test_neighbouring_rows_are_independent() -> None:
    tokens = draw(torch.tensor([0.0, 0.5, -0.5]), 40_000, block=40_000)
    law = torch.softmax(torch.tensor([0.0, 0.5, -0.5]).double(), -1)
    for lag in (1, 4):
        pairs = torch.bincount(tokens[:-lag] * 3 + tokens[lag:], minlength=9)
        assert chi_square_score(pairs, (law[:, None] * law).flatten()) < 4, lag


def test_the_law_survives_large_logits() -> None:
    """At z = 1e4 and T = 1e-3 a float32 key z / T + g would round the noise to whole numbers."""
    temperature = 2.0**-10
    row = 1e4 - temperature * torch.tensor([0.0, 1.0, 1.0, 2.0])
    tokens = draw(row, 40_000, block=40_000, temperature=temperature)
    law = torch.softmax(row.double() / temperature, -1)
    assert chi_square_score(torch.bincount(tokens, minlength=4), law) < 4


def test_scores_reject_a_wrong_law() -> None:
    """The bound above has power: a law off by a tenth of a nat is rejected."""
    row = torch.randn(16)
    counts = torch.bincount(draw(row, 40_000, block=40_000), minlength=16)
    wrong = row + torch.tensor([0.1, 0.0]).repeat(8)
    assert chi_square_score(counts, torch.softmax(wrong.double(), -1)) > 8


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
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, temperature: float, scale: float,
    top_k: int | None, top_p: float | None, seed: int,
) -> None:  # fmt: skip
    logits = (scale * torch.randn(*shape, 2 * vocabulary)).clamp(-6e4, 6e4).to(dtype)[..., ::2]
    tokens, log_prob = sample_tokens(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, return_log_prob=True
    )
    assert tokens.dtype == torch.int64
    assert tokens.shape == log_prob.shape == shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_prob.dtype == compute

    wide = logits.to(compute)
    keep = kept_entries(wide / temperature, top_k, top_p)
    keep = torch.ones_like(wide, dtype=torch.bool) if keep is None else keep
    truth = (logits.double() / temperature).masked_fill(~keep, -torch.inf)
    rows = default_row_ids(None, torch.Size(shape), torch.device("cpu"))
    keys = truth + gumbel(torch.tensor([seed, 0]), rows, vocabulary, torch.float64)
    chosen = keys.gather(-1, tokens[..., None])[..., 0]
    # A few ulp of the noise and of the difference to the row maximum, which the winner is close to.
    assert bool((keys.amax(-1) - chosen <= 2e-5).all())

    yard = torch.log_softmax((wide / temperature).masked_fill(~keep, -torch.inf), -1)
    yard = yard.gather(-1, tokens[..., None])[..., 0]
    above = truth - truth.gather(-1, tokens[..., None])
    exact = -torch.log1p(above.exp().scatter(-1, tokens[..., None], 0).sum(-1))
    assert_contract(log_prob, yard, exact)


@pytest.mark.parametrize("gap", [1.0, 30.0, 80.0])
def test_log_prob_of_an_almost_certain_token_is_not_rounded_to_zero(gap: float) -> None:
    logits = torch.tensor([[0.0, -gap]])
    tokens, log_prob = sample_tokens(logits, seed=0, return_log_prob=True)
    assert tokens.tolist() == [0]
    assert float(log_prob) == pytest.approx(-math.log1p(math.exp(-gap)), rel=1e-6, abs=0)


def test_without_noise_room_it_is_the_argmax() -> None:
    logits = torch.randn(256, 50)
    tokens = sample_tokens(logits, temperature=1e-6)
    assert torch.equal(tokens, logits.argmax(-1))


def test_ties_of_the_key_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    from softdimo_fast.ops.reference import sample_tokens as reference

    monkeypatch.setattr(
        reference, "gumbel", lambda seed, rows, vocabulary, dtype: torch.zeros(vocabulary)
    )
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert sample_tokens(logits).tolist() == [1, 0]


# --------------------------------------------------------------------------------------------------
# Truncation


def test_top_k_draws_only_the_k_largest_and_fits_their_law() -> None:
    row = torch.tensor([0.3, 1.0, 1.0, 1.0, -0.2, 0.9])
    tokens = draw(row, 20_000, block=20_000, top_k=2)
    assert set(tokens.tolist()) == {1, 2}, "ties of the k-th value go to the lowest index"
    counts = torch.bincount(tokens, minlength=6)[1:3]
    assert chi_square_score(counts, torch.tensor([0.5, 0.5])) < 4


def test_top_p_draws_only_the_shortest_prefix() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    tokens = draw(probabilities.log(), 20_000, block=20_000, top_p=0.6)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert chi_square_score(counts[[1, 3]], torch.tensor([4 / 7, 3 / 7])) < 4


def test_top_k_comes_before_top_p() -> None:
    """Among the 2 entries that top_k keeps, the first has mass 4/7 > 0.56: it stays alone."""
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    both = set(draw(probabilities.log(), 2000, top_k=2, top_p=0.56).tolist())
    assert both == {0}
    assert set(draw(probabilities.log(), 2000, top_p=0.56).tolist()) == {0, 1}


def test_truncation_works_on_tempered_logits() -> None:
    """At T = 2 the law is flatter, and the prefix of mass 0.6 longer."""
    row = torch.tensor([0.7, 0.2, 0.06, 0.04]).log()
    assert set(draw(row, 4000, top_p=0.6).tolist()) == {0}
    assert set(draw(row, 4000, top_p=0.6, temperature=2.0).tolist()) == {0, 1}


def test_impossible_tokens_are_never_drawn() -> None:
    row = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0])
    tokens = draw(row, 20_000, block=20_000)
    assert set(tokens.tolist()) == {1, 3}
    assert set(draw(row, 2000, top_k=3).tolist()) == {1, 3}


# --------------------------------------------------------------------------------------------------
# Randomness


def test_seed_repeats_and_other_seeds_differ() -> None:
    logits = torch.randn(300, 17)
    first = sample_tokens(logits, seed=5)
    assert torch.equal(first, sample_tokens(logits, seed=5))
    assert torch.equal(first, sample_tokens(logits, seed=torch.tensor([5, 0])))
    for other in (6, torch.tensor([5, 1])):
        assert not torch.equal(first, sample_tokens(logits, seed=other))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_split_does_not_change_a_bit(size: int) -> None:
    logits, numbers = torch.randn(100, 37), torch.randperm(1000)[:100] + 2**33
    options = {"seed": 3, "top_k": 20, "top_p": 0.95, "return_log_prob": True}
    tokens, log_prob = sample_tokens(logits, row_ids=numbers, **options)  # type: ignore[call-overload]
    for start in range(0, 100, size):
        part = slice(start, start + size)
        found = sample_tokens(logits[part], row_ids=numbers[part], **options)  # type: ignore[call-overload]
        assert_same_bits(found[0], tokens[part])
        assert_same_bits(found[1], log_prob[part])


def test_row_ids_default_and_broadcast() -> None:
    logits = torch.randn(4, 5, 9)
    numbers = torch.arange(20).reshape(4, 5)
    assert torch.equal(
        sample_tokens(logits, seed=1), sample_tokens(logits, seed=1, row_ids=numbers)
    )
    same = logits[:1].expand(4, 5, 9)
    shared = sample_tokens(same, seed=1, row_ids=torch.arange(5))
    assert torch.equal(shared, shared[:1].expand(4, 5))


def test_manual_seed_and_generator() -> None:
    logits = torch.randn(200, 11)
    torch.manual_seed(4)
    first, second = sample_tokens(logits), sample_tokens(logits)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, sample_tokens(logits))
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(first, sample_tokens(logits, generator=generator))
    assert torch.equal(state, torch.get_rng_state()), "a generator leaves torch's own alone"


def test_activation_checkpointing_draws_the_same_tokens() -> None:
    logits, table = torch.randn(50, 8), torch.randn(8, 3, requires_grad=True)
    drawn: list[Tensor] = []

    def embed(values: Tensor) -> Tensor:
        drawn.append(sample_tokens(logits))
        return torch.nn.functional.embedding(drawn[-1], values).square()

    checkpoint(embed, table, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    assert len(drawn) == 2
    assert torch.equal(*drawn)
    assert table.grad is not None
    expected = torch.zeros(8, 3).index_add(0, drawn[0], 2 * table.detach()[drawn[0]])
    torch.testing.assert_close(table.grad, expected)


# --------------------------------------------------------------------------------------------------
# Special rows and shapes


def test_rows_without_a_distribution_say_so_and_stay_alone() -> None:
    logits = torch.randn(6, 5)
    clean = sample_tokens(logits, seed=2, return_log_prob=True)
    logits[0, 2], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, log_prob = sample_tokens(logits, seed=2, return_log_prob=True)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert bool(log_prob[:3].isnan().all())
    assert_same_bits(tokens[3:], clean[0][3:])
    assert_same_bits(log_prob[3:], clean[1][3:])
    assert sample_tokens(logits, seed=2, top_k=2, top_p=0.5)[:3].tolist() == [-1, -1, -1]


def test_bad_temperature_rows() -> None:
    """On the CPU in eager they raise; where values are not looked at the row says so."""
    logits, temperature = torch.randn(4, 5), torch.tensor([1.0, 0.0, -1.0, torch.nan])
    with pytest.raises(ValueError, match="sample_tokens: temperature must be positive"):
        sample_tokens(logits, temperature=temperature)
    operator = torch.ops.softdimo_reference.sample_tokens
    seed = torch.tensor([1, 0])
    tokens, log_prob = operator(logits, 1.0, temperature, None, None, seed, None, True)
    assert tokens[1:].tolist() == [-1, -1, -1]
    assert bool(log_prob[1:].isnan().all())
    assert int(tokens[0]) == int(sample_tokens(logits, seed=1)[0])


def test_row_temperature_equals_numbers() -> None:
    logits, temperature = torch.randn(3, 4, 9), torch.tensor([0.5, 1.0, 4.0])[:, None]
    tokens, log_prob = sample_tokens(
        logits, temperature=temperature, seed=1, top_p=0.8, return_log_prob=True
    )
    numbers = torch.arange(12).reshape(3, 4)
    for i, value in enumerate([0.5, 1.0, 4.0]):
        found = sample_tokens(
            logits[i],
            temperature=value,
            seed=1,
            row_ids=numbers[i],
            top_p=0.8,
            return_log_prob=True,
        )
        assert_same_bits(found[0], tokens[i])
        assert_same_bits(found[1], log_prob[i])


@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 0, 2), (1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    tokens, log_prob = sample_tokens(torch.randn(shape), return_log_prob=True)
    assert tokens.shape == log_prob.shape == shape[:-1]
    if shape[-1] == 1:
        assert not bool(tokens.any())
        assert not bool(log_prob.any())


def test_strides_do_not_matter() -> None:
    logits = torch.randn(40, 9)
    expected = sample_tokens(logits, seed=1)
    padded = torch.full((40, 12), torch.nan)
    padded[:, :9] = logits
    assert torch.equal(expected, sample_tokens(padded[:, :9], seed=1))
    assert torch.equal(expected, sample_tokens(logits.t().contiguous().t(), seed=1))


def test_float64_temperature_makes_it_float64() -> None:
    temperature = torch.ones(3, dtype=torch.float64)
    _, log_prob = sample_tokens(torch.randn(3, 4), temperature=temperature, return_log_prob=True)
    assert log_prob.dtype == torch.float64


# --------------------------------------------------------------------------------------------------
# torch


def test_nothing_is_differentiated_and_autocast_is_ignored() -> None:
    logits = torch.randn(30, 9, requires_grad=True)
    temperature = torch.full((30,), 0.7, requires_grad=True)
    tokens, log_prob = sample_tokens(logits, temperature=temperature, seed=1, return_log_prob=True)
    assert not tokens.requires_grad
    assert not log_prob.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = sample_tokens(logits, temperature=temperature, seed=1, return_log_prob=True)
    assert_same_bits(again[0], tokens)
    assert_same_bits(again[1], log_prob)


def test_only_our_operator_runs() -> None:
    logits = torch.randn(3, 4)
    assert operators_run(lambda: sample_tokens(logits)) == ["softdimo_reference::sample_tokens"]
    explanation = explain(sample_tokens, logits, return_log_prob=True)
    assert explanation.backend == "reference"
    assert explanation.bytes == 12 * 4 + 3 * (8 + 4)
    state = torch.get_rng_state()
    explain(sample_tokens, logits)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [(None, None, False), (3, 0.8, True)])
def test_opcheck(options: tuple[int | None, float | None, bool]) -> None:
    top_k, top_p, log_prob = options
    seed, numbers = torch.tensor([1, 0]), torch.arange(6).reshape(2, 3)
    temperature = torch.rand(3) + 0.5
    operator = torch.ops.softdimo_reference.sample_tokens.default
    for row_temperature, row_ids in ((None, None), (temperature, numbers)):
        torch.library.opcheck(
            operator,
            (torch.randn(2, 3, 5), 0.7, row_temperature, top_k, top_p, seed, row_ids, log_prob),
        )


def drawn_with(seed: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        return sample_tokens(
            logits, seed=seed, top_k=5, top_p=0.9, temperature=0.7, return_log_prob=True
        )

    return call


def test_compile_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    call = drawn_with(torch.tensor([9, 2]))
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for count in (6, 10):
        logits = torch.randn(count, 8)
        for first, second in zip(call(logits), compiled(logits), strict=True):
            assert_same_bits(first, second)


def test_compiled_draws_follow_manual_seed() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: sample_tokens(logits), fullgraph=True)
    logits = torch.randn(100, 8)
    torch.manual_seed(1)
    first, second = compiled(logits), compiled(logits)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(logits))
    assert not torch.equal(first, second)


def test_export_keeps_the_operator() -> None:
    call = drawn_with(torch.tensor([9, 2]))

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            return call(logits)

    logits = torch.randn(6, 8)
    program = torch.export.export(Module(), (logits,))
    assert any("sample_tokens" in str(node.target) for node in program.graph.nodes)
    for first, second in zip(program.module()(logits), call(logits), strict=True):
        assert_same_bits(first, second)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        tokens, log_prob = sample_tokens(torch.empty(2, 3, 5), top_k=2, return_log_prob=True)
    assert tokens.shape == log_prob.shape == (2, 3)
    assert tokens.dtype == torch.int64


def test_vmap_and_jvp_raise_clearly() -> None:
    logits = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"sample_tokens does not support torch\.vmap"):
        torch.func.vmap(lambda z: sample_tokens(z, seed=1))(logits)
    with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
        torch.func.jvp(lambda z: sample_tokens(z, seed=1), (logits,), (logits,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.ones(3, dtype=torch.int64)}, TypeError, "logits must have dtype"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[..., V\]"),
        ({"logits": torch.ones(3, 0)}, ValueError, "logits must have a vocabulary V >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a float, got str"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must broadcast to the rows"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int or None, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": "a"}, TypeError, "top_p must be a float, got str"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 signed bits"),
        ({"seed": torch.ones(2)}, ValueError, "a seed tensor must be int64"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator exclude"),
        ({"row_ids": torch.ones(3)}, TypeError, "row_ids must be an int64 tensor or None"),
        ({"row_ids": torch.arange(4)}, ValueError, "row_ids must broadcast to the rows"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        ({"backend": "cpp"}, ValueError, "backend='cpp' cannot run: this operator has no C\\+\\+"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run"),
        ({"temperature": torch.ones(3, device="meta")}, ValueError, "temperature is on meta"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    logits = options.pop("logits", torch.randn(3, 4))
    with pytest.raises(error, match="sample_tokens: " + message):
        sample_tokens(logits, **options)  # type: ignore[call-overload]

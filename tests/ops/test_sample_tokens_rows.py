"""sample_tokens: the random numbers, agreement of the backends, special rows and shapes."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_same_bits
from support.sampling import BACKENDS, DTYPES, operator_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops.reference.random import gumbel
from softdimo_fast.ops.sample_tokens import sample_tokens

# --------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize(
    ("rows", "vocabulary", "scale"), [(60_000, 33, 1.0), (20_000, 200, 0.0), (4000, 1500, 3.0)]
)
def test_tokens_are_those_of_the_reference(rows: int, vocabulary: int, scale: float) -> None:
    """All but at most one in 10^5 rows, where the two best keys differ by a few ulp."""
    logits = scale * torch.randn(rows, vocabulary)
    numbers = torch.arange(rows) * 2**30
    tokens, expected = (
        sample_tokens(logits, seed=-3, row_ids=numbers, temperature=0.9, backend=backend)
        for backend in ("cpp", "reference")
    )
    other = (tokens != expected).nonzero()[:, 0]
    assert other.numel() <= 1
    for row in other.tolist():
        noise = gumbel(torch.tensor([-3, 0]), numbers[row], vocabulary, torch.float64)
        best = (logits[row].double() / 0.9 + noise).topk(2).values
        assert float(best[0] - best[1]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_every_dtype_are_those_of_the_reference(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(5, 300, 257)).to(dtype)
    options = {"seed": 9, "temperature": torch.rand(300) + 0.5, "row_ids": torch.randperm(300)}
    mine, theirs = (
        sample_tokens(logits, backend=backend, **options)  # type: ignore[call-overload]
        for backend in ("cpp", "reference")
    )
    assert torch.equal(mine, theirs)


def test_nothing_depends_on_the_number_of_threads() -> None:
    logits, before, found = torch.randn(999, 1100), torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            found.append(sample_tokens(logits, seed=1, top_p=0.9, return_log_prob=True))
        finally:
            torch.set_num_threads(before)
    for tokens, log_prob in found[1:]:
        assert_same_bits(tokens, found[0][0])
        assert_same_bits(log_prob, found[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_repeats_and_other_seeds_differ(backend: str) -> None:
    logits = torch.randn(300, 17)
    first = sample_tokens(logits, seed=5, backend=backend)
    assert torch.equal(first, sample_tokens(logits, seed=5, backend=backend))
    assert torch.equal(first, sample_tokens(logits, seed=torch.tensor([5, 0]), backend=backend))
    for other in (6, torch.tensor([5, 1])):
        assert not torch.equal(first, sample_tokens(logits, seed=other, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("vocabulary", [37, 2100])
def test_batch_split_does_not_change_a_bit(backend: str, size: int, vocabulary: int) -> None:
    logits, numbers = torch.randn(100, vocabulary), torch.randperm(1000)[:100] + 2**33
    options = {"seed": 3, "top_k": 20, "top_p": 0.95, "return_log_prob": True}
    tokens, log_prob = sample_tokens(logits, row_ids=numbers, **options, backend=backend)  # type: ignore[call-overload]
    for start in range(0, 100, size):
        part = slice(start, start + size)
        found = sample_tokens(logits[part], row_ids=numbers[part], **options, backend=backend)  # type: ignore[call-overload]
        assert_same_bits(found[0], tokens[part])
        assert_same_bits(found[1], log_prob[part])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_ids_default_and_broadcast(backend: str) -> None:
    logits = torch.randn(4, 5, 9)
    numbers = torch.arange(20).reshape(4, 5)
    assert torch.equal(
        sample_tokens(logits, seed=1, backend=backend),
        sample_tokens(logits, seed=1, row_ids=numbers, backend=backend),
    )
    same = logits[:1].expand(4, 5, 9)
    shared = sample_tokens(same, seed=1, row_ids=torch.arange(5), backend=backend)
    assert torch.equal(shared, shared[:1].expand(4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_manual_seed_and_generator(backend: str) -> None:
    logits = torch.randn(200, 11)
    torch.manual_seed(4)
    first, second = sample_tokens(logits, backend=backend), sample_tokens(logits, backend=backend)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, sample_tokens(logits, backend=backend))
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(first, sample_tokens(logits, generator=generator, backend=backend))
    assert torch.equal(state, torch.get_rng_state()), "a generator leaves torch's own alone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_draws_the_same_tokens(backend: str) -> None:
    logits, table = torch.randn(50, 8), torch.randn(8, 3, requires_grad=True)
    drawn: list[Tensor] = []

    def embed(values: Tensor) -> Tensor:
        drawn.append(sample_tokens(logits, backend=backend))
        return torch.nn.functional.embedding(drawn[-1], values).square()

    checkpoint(embed, table, use_reentrant=False).sum().backward()  # type: ignore[no-untyped-call]
    assert len(drawn) == 2
    assert torch.equal(*drawn)
    assert table.grad is not None
    expected = torch.zeros(8, 3).index_add(0, drawn[0], 2 * table.detach()[drawn[0]])
    torch.testing.assert_close(table.grad, expected)


# --------------------------------------------------------------------------------------------------
# Special rows and shapes


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_distribution_say_so_and_stay_alone(backend: str) -> None:
    logits = torch.randn(6, 5)
    clean = sample_tokens(logits, seed=2, return_log_prob=True, backend=backend)
    logits[0, 2], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, log_prob = sample_tokens(logits, seed=2, return_log_prob=True, backend=backend)
    assert tokens[:3].tolist() == [-1, -1, -1]
    assert bool(log_prob[:3].isnan().all())
    assert_same_bits(tokens[3:], clean[0][3:])
    assert_same_bits(log_prob[3:], clean[1][3:])
    assert sample_tokens(logits, seed=2, top_k=2, top_p=0.5, backend=backend)[:3].tolist() == [
        -1,
        -1,
        -1,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_temperature_rows(backend: str) -> None:
    """On the CPU in eager they raise; where values are not looked at the row says so."""
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf])
    logits = torch.randn(5, 6)
    with pytest.raises(ValueError, match="sample_tokens: temperature must be positive"):
        sample_tokens(logits, temperature=temperature, backend=backend)
    operator = operator_of(backend)
    seed = torch.tensor([1, 0])
    tokens, log_prob = operator(logits, 1.0, temperature, None, None, seed, None, True)
    assert tokens[1:].tolist() == [-1] * 4
    assert bool(log_prob[1:].isnan().all())
    assert int(tokens[0]) == int(sample_tokens(logits, seed=1, backend=backend)[0])


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 3e38, 1e300])
@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.5}])
def test_temperatures_at_the_end_of_float32(temperature: float, options: dict[str, float]) -> None:
    """C++ holds on to the argmax and to the flat law; truncated it may find no law, and says so."""
    logits = torch.randn(200, 300)
    tokens, log_prob = sample_tokens(
        logits, temperature=temperature, seed=1, return_log_prob=True, backend="cpp", **options
    )  # type: ignore[call-overload]
    assert torch.equal(log_prob.isnan(), tokens == -1)
    if temperature == 1e-30 or not options:
        assert bool((tokens >= 0).all())
    if temperature == 1e-30 or (temperature == 1e-45 and not options):
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_temperature_equals_numbers(backend: str) -> None:
    logits, temperature = torch.randn(3, 4, 9), torch.tensor([0.5, 1.0, 4.0])[:, None]
    tokens, log_prob = sample_tokens(
        logits, temperature=temperature, seed=1, top_p=0.8, return_log_prob=True, backend=backend
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
            backend=backend,
        )
        assert_same_bits(found[0], tokens[i])
        assert_same_bits(found[1], log_prob[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 0, 2), (1, 1)])
def test_small_shapes(backend: str, shape: tuple[int, ...]) -> None:
    tokens, log_prob = sample_tokens(torch.randn(shape), return_log_prob=True, backend=backend)
    assert tokens.shape == log_prob.shape == shape[:-1]
    if shape[-1] == 1:
        assert not bool(tokens.any())
        assert not bool(log_prob.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    logits = torch.randn(40, 9)
    expected = sample_tokens(logits, seed=1, backend=backend)
    padded = torch.full((40, 12), torch.nan)
    padded[:, :9] = logits
    assert torch.equal(expected, sample_tokens(padded[:, :9], seed=1, backend=backend))
    assert torch.equal(
        expected, sample_tokens(logits.t().contiguous().t(), seed=1, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_temperature_makes_it_float64(backend: str) -> None:
    temperature = torch.ones(3, dtype=torch.float64)
    _, log_prob = sample_tokens(
        torch.randn(3, 4), temperature=temperature, return_log_prob=True, backend=backend
    )
    assert log_prob.dtype == torch.float64

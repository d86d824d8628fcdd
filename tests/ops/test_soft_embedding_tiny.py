"""soft_embedding in C++ for tiny vocabularies: values, gradients, special rows, and which calls they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits, gradients, thread_count
from support.soft_embedding import Case, assert_close_to_float64, strided
from torch import Tensor

from softdimo_fast import explain, soft_embedding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257)
WIDTHS = (1, 2, 7, 8, 9, 16, 17)


@st.composite
def tiny_cases(draw: st.DrawFn) -> Case:
    """Calls around the limits of the tiny kernels."""
    groups = draw(st.sampled_from([None, 1, 2, 5, 40]))
    vocabulary = draw(st.sampled_from(VOCABULARIES) | st.integers(1, 257))
    width = draw(st.sampled_from(WIDTHS) | st.integers(1, 17))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows = (7, 19) if groups is None else (7, 19, groups)
    temperature = 10.0 ** draw(st.floats(-3, 3))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0])) * max(temperature, 1e-2)
    logits = (torch.randn(*rows, vocabulary) * scale).to(draw(st.sampled_from(DTYPES)))
    logits = strided(logits, draw(st.sampled_from(["contiguous", "padded", "transposed"])))
    shape = (vocabulary, width) if groups is None else (groups, vocabulary, width)
    table = draw(st.sampled_from(DTYPES))
    options: dict[str, Any] = {}
    per_row = mask_embedding = None
    if draw(st.booleans()):
        per_row = temperature * (0.5 + torch.rand(rows))
    else:
        options["temperature"] = temperature
    if draw(st.booleans()):
        options["mask"] = torch.rand(rows) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        mask_embedding = torch.randn(shape[:-2] + shape[-1:]).to(table)
    return Case(logits, torch.randn(shape).to(table), per_row, mask_embedding, options)


@given(case=tiny_cases())
def test_contract(case: Case) -> None:
    assert_close_to_float64(case, "cpp")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_limit(vocabulary: int, width: int) -> None:
    case = Case(torch.randn(130, 2, vocabulary), torch.randn(2, vocabulary, width), None, None, {})
    assert_close_to_float64(case, "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
def test_maskbit(dtype: torch.dtype) -> None:
    """More rows than one split of the codebook's gradient, the last block and split not full."""
    logits, codebook = torch.randn(1500, 2, 128).to(dtype), torch.randn(2, 128, 7).to(dtype)
    mask = torch.rand(1500, 2) < 0.2
    options = {"mask": mask, "temperature": 0.7}
    assert_close_to_float64(
        Case(logits, codebook, None, torch.randn(2, 7).to(dtype), options), "cpp"
    )


# ---------------------------------------------------------------------------------------------------
# which calls the tiny kernels take


def named_tiny(logits: Tensor, codebook: Tensor, **options: Any) -> bool:
    kernel = explain(soft_embedding, logits, codebook, backend="cpp", **options).kernel
    return "tiny" in str(kernel)


def cancelling(vocabulary: int, width: int) -> Tensor:
    """Entries whose sum is 2^-30 in double, and 0 in float32, where it is lost in the lane of the 1."""
    codebook = torch.zeros(vocabulary, width)
    codebook[0], codebook[1], codebook[16] = 1.0, -1.0, 2.0**-30
    return codebook


@pytest.mark.parametrize(
    ("vocabulary", "width", "tiny"),
    [(17, 1, True), (128, 7, True), (256, 8, True), (256, 16, True), (257, 8, False), (257, 16, False)],
)  # fmt: skip
def test_the_forward_takes_its_branch(vocabulary: int, width: int, tiny: bool) -> None:
    """The general kernels sum few columns in double, and more of them in the order of the entries."""
    logits, codebook = torch.zeros(3, vocabulary), cancelling(vocabulary, width)
    assert named_tiny(logits, codebook) == tiny
    value = soft_embedding(logits, codebook, backend="cpp")
    assert bool(((value == 0) == tiny).all())


@pytest.mark.parametrize(
    "options",
    [{"hard": True}, {"noise": "gumbel", "seed": 1}, {"top_k": 99}, {"top_p": 1.0}],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_left_to_the_general_kernels(options: dict[str, Any]) -> None:
    logits, codebook = torch.zeros(3, 99), cancelling(99, 7)
    assert not named_tiny(logits, codebook, **options)
    assert bool((soft_embedding(logits, codebook, backend="cpp", **options) != 0).all())


def test_inputs_in_double_are_left_to_the_general_kernels() -> None:
    for logits, codebook in (
        (torch.zeros(3, 99).double(), cancelling(99, 7)),
        (torch.zeros(3, 99), cancelling(99, 7).double()),
    ):
        assert not named_tiny(logits, codebook)
        assert bool((soft_embedding(logits, codebook, backend="cpp") != 0).all())


@pytest.mark.parametrize(
    ("vocabulary", "differentiable", "tiny"), [(32, False, True), (15, False, False), (32, True, False)]
)  # fmt: skip
def test_the_backward_takes_its_branch(vocabulary: int, differentiable: bool, tiny: bool) -> None:
    """The gradient of the codebook sums rows in float32; in double with a gradient of the temperature."""
    codebook, upstream = torch.zeros(vocabulary, 2), torch.zeros(40, 2)
    upstream[0], upstream[1], upstream[2] = 1.0, 2.0**-30, -1.0
    temperature = torch.ones(40, requires_grad=differentiable)
    codebook.requires_grad_()
    value = soft_embedding(
        torch.zeros(40, vocabulary), codebook, temperature=temperature, backend="cpp"
    )
    (gradient,) = torch.autograd.grad(value, codebook, upstream)
    assert bool(((gradient == 0) == tiny).all())


# ---------------------------------------------------------------------------------------------------
# rows


@pytest.mark.parametrize("width", [7, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [100, 128, 200])
def test_rows_do_not_depend_on_the_batch(vocabulary: int, dtype: torch.dtype, width: int) -> None:
    logits, codebook = torch.randn(700, vocabulary).to(dtype) * 3, torch.randn(vocabulary, width)
    upstream, temperature = torch.randn(700, width), torch.rand(700) + 0.5

    def run(pick: Tensor) -> tuple[Tensor, Tensor]:
        def call(z: Tensor, e: Tensor) -> Tensor:
            return soft_embedding(z, e, temperature=temperature[pick], backend="cpp")

        value, grads = gradients(call, (logits[pick], codebook), upstream[pick])
        return value, grads[0]

    whole = run(torch.arange(700))
    for pick in (
        torch.arange(1),
        torch.arange(5, 24),
        torch.randperm(700),
        torch.arange(0, 700, 3),
    ):
        for part, all_rows in zip(run(pick), whole, strict=True):
            assert_same_bits(part, all_rows[pick])


def test_nothing_depends_on_the_number_of_threads() -> None:
    logits, codebook, upstream = torch.randn(9000, 64), torch.randn(64, 7), torch.randn(9000, 7)
    call = Case(logits, codebook, None, torch.ones(7), {"mask": torch.rand(9000) < 0.3})

    def run(threads: int) -> tuple[Tensor, ...]:
        with thread_count(threads):
            value, grads = gradients(call.call("cpp"), call.tensors(), upstream)
        return value, *grads

    alone = run(1)
    for threads in (2, 3, 7):
        for mine, first in zip(run(threads), alone, strict=True):
            assert_same_bits(mine, first)


@pytest.mark.parametrize("vocabulary", [70, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_stay_in_their_row(dtype: torch.dtype, vocabulary: int) -> None:
    logits = torch.randn(40, vocabulary)
    logits[1, 17], logits[2], logits[3, :60], logits[4, 50] = (
        torch.nan, -torch.inf, -torch.inf, torch.inf,
    )  # fmt: skip
    logits[5, :16], logits[5, 3], logits[20] = -torch.inf, torch.nan, torch.nan
    logits, codebook = logits.to(dtype), torch.randn(vocabulary, 6)
    value, (dlogits, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend="cpp"), (logits, codebook)
    )
    broken = torch.zeros(40, dtype=torch.bool)
    broken[[1, 2, 4, 5, 20]] = True
    for result in (value, dlogits):
        assert torch.equal(result.isnan().any(dim=1), broken)
    assert torch.equal(value.isnan().all(dim=1), broken)
    torch.testing.assert_close(value[3], logits[3].float().softmax(0) @ codebook)
    assert dlogits[3, :60].abs().max() == 0


def test_masked_rows_are_never_read() -> None:
    mask = torch.rand(50, 2) < 0.5
    logits, codebook, embedding = torch.randn(50, 2, 33), torch.randn(2, 33, 5), torch.randn(2, 5)
    upstream, results = torch.randn(50, 2, 5), []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf):
        poisoned = torch.where(mask[..., None], garbage, logits)
        call = Case(poisoned, codebook, None, embedding, {"mask": mask})
        value, grads = gradients(call.call("cpp"), call.tensors(), upstream)
        results.append((value, *grads))
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert_same_bits(mine, first)
    assert_same_bits(results[0][0][mask], embedding.expand(50, 2, 5)[mask])
    assert bool((results[0][1][mask] == 0).all())


@pytest.mark.parametrize("vocabulary", [40, 128])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(vocabulary: int, distance: float) -> None:
    """The entry with p > 1/2 gets minus the sum of the others, whose own gradients do not cancel."""
    rows = 256
    logits = torch.randn(rows, vocabulary, dtype=torch.float64)
    winner = torch.randint(vocabulary, (rows, 1))
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), dim=1, keepdim=True)
    logits.scatter_(1, winner, others + torch.log(torch.tensor((1 - distance) / distance)))
    logits, codebook, upstream = logits.float(), torch.randn(vocabulary, 7), torch.randn(rows, 7)
    assert_close_to_float64(Case(logits, codebook, None, None, {}), "cpp")
    _, (mine, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend="cpp"), (logits, codebook), upstream
    )
    _, (truth, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend="reference"),
        (logits.double(), codebook.double()),
        upstream.double(),
    )
    relative = (mine.double() - truth).gather(1, winner).abs() / truth.gather(1, winner).abs()
    assert float(relative.median()) < 2e-5


def test_one_hot_rows_give_the_hard_embedding_bit_for_bit() -> None:
    codebook, tokens = torch.randn(128, 7), torch.randint(128, (64,))
    logits = torch.full((64, 128), -torch.inf).scatter(1, tokens[:, None], 0.0)
    assert_same_bits(soft_embedding(logits, codebook, backend="cpp"), codebook[tokens])


def test_temperatures_of_any_size_side_by_side() -> None:
    """Whose powers float32 cannot hold among ordinary ones."""
    temperature = torch.tensor([1e-38, 1e-6, 1e-4, 0.5, 1.0, 3e4, 1e6, 1e30, torch.inf]).repeat(5)
    logits = torch.randn(45, 128) * temperature.clamp(1e-6, 1e6)[:, None]
    case = Case(logits, torch.randn(128, 7), None, None, {"temperature": temperature})
    upstream = torch.randn(45, 7)
    value, (dlogits, dcodebook) = gradients(case.call("cpp"), case.tensors(), upstream)
    finite = temperature.clamp(max=3e38).double()
    truth, (dlogits_truth, dcodebook_truth) = gradients(
        lambda z, e: soft_embedding(z, e, temperature=finite, backend="reference"),
        (logits.double(), case.codebook.double()),
        upstream.double(),
    )
    torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(dcodebook.double(), dcodebook_truth, rtol=2e-5, atol=2e-5)
    scaled, scaled_truth = (x.double() * finite[:, None] for x in (dlogits, dlogits_truth))
    ordinary = (temperature > 1e-30) & (temperature < 1e20)
    torch.testing.assert_close(scaled[ordinary], scaled_truth[ordinary], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", ["logits", "codebook"])
def test_one_gradient_alone_has_the_bits_it_has_beside_the_other(frozen: str) -> None:
    logits, codebook = torch.randn(90, 2, 100), torch.randn(2, 100, 7)
    upstream = torch.randn(90, 2, 7)
    _, both = gradients(
        lambda z, e: soft_embedding(z, e, backend="cpp"), (logits, codebook), upstream
    )
    if frozen == "codebook":
        _, (alone,) = gradients(
            lambda z: soft_embedding(z, codebook, backend="cpp"), (logits,), upstream
        )
        assert_same_bits(alone, both[0])
    else:
        _, (alone,) = gradients(
            lambda e: soft_embedding(logits, e, backend="cpp"), (codebook,), upstream
        )
        assert_same_bits(alone, both[1])

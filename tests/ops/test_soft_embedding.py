"""soft_embedding: values, gradients, noise, special values and layouts, against the float64 specification."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from support.checks import assert_same_bits, gradients
from support.soft_embedding import (
    BACKENDS,
    DTYPES,
    Case,
    assert_close_to_float64,
    cases,
    strided,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softdimo_fast import soft_embedding


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_contract(backend: str, case: Case) -> None:
    assert_close_to_float64(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(backend: str, dtype: torch.dtype, distance: float) -> None:
    """Where max p is 1 - distance, and torch's own gradient of the dominant entry cancels."""
    rows, vocabulary, width = 256, 300, 24
    logits = torch.randn(rows, vocabulary, dtype=torch.float64)
    winner = torch.randint(vocabulary, (rows, 1))
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), dim=1, keepdim=True)
    logits = logits.scatter(1, winner, others + torch.log(torch.tensor((1 - distance) / distance)))
    case = Case(logits.to(dtype), torch.randn(vocabulary, width, dtype=dtype), None, None, {})
    assert_close_to_float64(case, backend)

    upstream = torch.randn(rows, width, dtype=dtype)
    _, (dlogits, _) = gradients(case.call(backend), case.tensors(), upstream)
    wide = [tensor.double() for tensor in case.tensors()]
    _, (truth, _) = gradients(case.call("reference"), wide, upstream.double())
    size = upstream.double().norm(dim=1, keepdim=True) * wide[1].norm(dim=1).max()
    small = truth.abs() < 1e-6 * size
    error = (dlogits.double() - truth).abs()
    assert bool((error <= 4 * torch.finfo(dtype).eps * size)[small].all())
    # The dominant entry alone, relative to its own size: the case that eager loses.
    relative = error.gather(1, winner) / truth.gather(1, winner).abs().clamp(min=1e-300)
    assert float(relative.median()) < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_gradients_sum_to_zero(backend: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(256, 500) * torch.logspace(-1, 1.5, 256)[:, None]).to(dtype)
    codebook, upstream = torch.randn(500, 16).to(dtype), torch.randn(256, 16)
    _, (dlogits, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend=backend), (logits, codebook), upstream
    )
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rounding = torch.finfo(dtype).eps * dlogits.double().abs().sum(dim=1)
    products = torch.finfo(compute).eps * upstream.norm(dim=1) * float(codebook.norm(dim=1).max())
    assert bool((dlogits.double().sum(dim=1).abs() <= rounding + 2 * products).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [7, 32])
def test_temperature_gradient_of_nearly_uniform_rows(backend: str, width: int) -> None:
    """The rounding of delta is common to a row's dlogits: about max y it would add up over V."""
    logits, codebook = 0.1 * torch.randn(256, 512), torch.randn(512, width)
    case = Case(logits, codebook, torch.rand(256) + 0.5, None, {})
    assert_close_to_float64(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [300, 3000])
def test_narrow_sums_over_rows_that_cancel(backend: str, rows: int) -> None:
    """The codebook gradient of one entry is the sum of the upstream gradient, here 0.01 from large terms."""
    upstream = torch.randn(rows, 1)
    upstream[-1] -= upstream.double().sum().float() - 0.01
    truth = upstream.double().sum(dim=0, keepdim=True)
    _, (gradient,) = gradients(
        lambda e: soft_embedding(torch.zeros(rows, 1), e, backend=backend),
        (torch.ones(1, 1),),
        upstream,
    )
    torch.testing.assert_close(gradient.double(), truth, rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_sums_over_the_vocabulary_that_cancel(backend: str) -> None:
    codebook = torch.randn(512, 1)
    codebook[-1] -= codebook.double().sum().float() - 0.01
    value = soft_embedding(torch.zeros(3, 512), codebook, backend=backend)
    truth = codebook.double().mean().expand(3, 1)
    torch.testing.assert_close(value.double(), truth, rtol=3e-7, atol=0)


def test_mask_embedding_gradient_that_cancels() -> None:
    upstream = torch.randn(3000, 1)
    upstream[-1] -= upstream.double().sum().float() - 0.01
    mask = torch.ones(3000, dtype=torch.bool)
    _, (gradient,) = gradients(
        lambda m: soft_embedding(
            torch.zeros(3000, 1), torch.ones(1, 1), mask=mask, mask_embedding=m, backend="cpp"
        ),
        (torch.ones(1),),
        upstream,
    )
    torch.testing.assert_close(gradient.double(), upstream.double().sum(0), rtol=3e-7, atol=0)


@pytest.mark.parametrize("width", [16, 64])
def test_a_large_product_early_in_a_long_sum(width: int) -> None:
    """What is added after it is rounded at its size: the error grows with the length of the chain."""
    logits, codebook = torch.randn(256, 256), torch.randn(256, width)
    logits[:, 0] = 6.0
    value = soft_embedding(logits, codebook, backend="cpp").double()
    truth = soft_embedding(logits.double(), codebook.double(), backend="reference")
    assert float((value - truth).norm() / truth.norm()) < 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "temperature"), [(1e4, 1.0), (0.0, 1e-3)])
def test_noise_keeps_its_digits(backend: str, size: float, temperature: float) -> None:
    """Beside large logits, whose float32 spacing is 1e-3; at a temperature that magnifies its rounding."""
    logits, codebook = torch.full((256, 40), size), torch.randn(40, 16)
    for hard in (False, True):
        options = {"noise": "gumbel", "seed": 3, "temperature": temperature, "hard": hard}
        value = soft_embedding(logits, codebook, backend=backend, **options)
        truth = soft_embedding(logits.double(), codebook.double(), backend="reference", **options)
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=2e-6)


def test_one_hot_rows_give_the_hard_embedding_bit_for_bit() -> None:
    codebook = torch.randn(300, 20)
    tokens = torch.randint(300, (64,))
    logits = torch.full((64, 300), -torch.inf).scatter(1, tokens[:, None], 0.0)
    for backend in BACKENDS:
        assert_same_bits(soft_embedding(logits, codebook, backend=backend), codebook[tokens])


def test_affine_functions_commute_with_the_expectation() -> None:
    """Equation e~ = E_p[e]: for an affine f, f(e~) = E_p[f(e)]."""
    logits, codebook = (
        torch.randn(64, 50, dtype=torch.double),
        torch.randn(50, 8, dtype=torch.double),
    )
    weight = torch.randn(8, 5, dtype=torch.double)
    inside = soft_embedding(logits, codebook @ weight + 1)
    torch.testing.assert_close(soft_embedding(logits, codebook) @ weight + 1, inside)


def test_grouped_bits_match_the_enumerated_joint_distribution() -> None:
    """MaskBit: expected bits per split equal the expectation over all 2^bits joint codes."""
    bits = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.double)
    logits = torch.randn(32, 2, 4, dtype=torch.double)
    soft = soft_embedding(logits, torch.stack([bits, bits])).flatten(1)
    p = logits.softmax(-1)
    joint = torch.einsum("na,nb->nab", p[:, 0], p[:, 1]).flatten(1)
    codes = torch.cat([bits.repeat_interleave(4, 0), bits.repeat(4, 1)], dim=1)
    torch.testing.assert_close(soft, joint @ codes)


# ---------------------------------------------------------------------------------------------------
# randomness and determinism


def noisy(z: Tensor, codebook: Tensor, **options: Any) -> Tensor:
    return soft_embedding(z, codebook, noise="gumbel", **options)


@pytest.mark.parametrize("width", [5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, width: int) -> None:
    """A row's value and gradient have the same bits in any batch, position and block size."""
    logits = (torch.randn(700, 1100) * 3).to(dtype)
    codebook, upstream = torch.randn(1100, width).to(dtype), torch.randn(700, width)
    ids = torch.arange(700)
    value, (dlogits, _) = gradients(
        lambda z, e: noisy(z, e, seed=3, row_ids=ids, temperature=0.8), (logits, codebook), upstream
    )
    for pick in (torch.arange(1), torch.arange(5, 9), torch.randperm(700), torch.arange(0, 700, 3)):
        part, (dpart, _) = gradients(
            lambda z, e, pick=pick: noisy(z, e, seed=3, row_ids=ids[pick], temperature=0.8),
            (logits[pick], codebook),
            upstream[pick],
        )
        assert_same_bits(part, value[pick])
        assert_same_bits(dpart, dlogits[pick])


@pytest.mark.parametrize("width", [5, 20])
def test_nothing_depends_on_the_number_of_threads(width: int) -> None:
    case = Case(
        torch.randn(2000, 300), torch.randn(300, width), torch.rand(2000) + 0.5, torch.randn(width),
        {"mask": torch.rand(2000) < 0.3, "noise": "gumbel", "seed": 1},
    )  # fmt: skip
    upstream, before = torch.randn(2000, width), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            results.append(gradients(case.call("cpp"), case.tensors(), upstream))
        finally:
            torch.set_num_threads(before)
    for value, grads in results[1:]:
        assert_same_bits(value, results[0][0])
        for mine, first in zip(grads, results[0][1], strict=True):
            assert_same_bits(mine, first)


def test_scalar_temperature_gradient_does_not_depend_on_threads() -> None:
    """One number from 50000 rows, summed in one order."""
    logits, codebook = torch.randn(50000, 4), torch.randn(4, 3)
    temperature, before, found = torch.tensor(1.3, requires_grad=True), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            value = (soft_embedding(logits, codebook, temperature=temperature) * codebook[0]).sum()
            found.append(torch.autograd.grad(value, temperature)[0])
        finally:
            torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_seed_row_ids_and_offset_key_the_noise() -> None:
    logits, codebook = torch.zeros(6, 40), torch.eye(40)
    base = noisy(logits, codebook, seed=7)
    assert_same_bits(base, noisy(logits, codebook, seed=torch.tensor([7, 0])))
    assert_same_bits(base, noisy(logits, codebook, seed=7, row_ids=torch.arange(6)))
    swapped = torch.tensor([5, 4, 3, 2, 1, 0])
    assert_same_bits(base.flip(0), noisy(logits, codebook, seed=7, row_ids=swapped))
    for other in (
        noisy(logits, codebook, seed=8),
        noisy(logits, codebook, seed=torch.tensor([7, 1])),
    ):
        assert float((other - base).abs().min(dim=1).values.max()) > 0
    far = noisy(logits, codebook, seed=7, row_ids=torch.arange(6) + 2**40)
    assert not torch.equal(far, base)


def test_seed_none_follows_torchs_generator() -> None:
    logits, codebook = torch.randn(6, 40), torch.randn(40, 4)
    torch.manual_seed(4)
    first, second = noisy(logits, codebook), noisy(logits, codebook)
    torch.manual_seed(4)
    assert_same_bits(first, noisy(logits, codebook))
    assert not torch.equal(first, second)
    one, two = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    assert_same_bits(noisy(logits, codebook, generator=one), noisy(logits, codebook, generator=two))


def test_backends_agree_on_the_noise() -> None:
    logits, codebook = torch.randn(200, 301), torch.randn(301, 8)
    for dtype in (torch.float32, torch.float64):
        cpp = noisy(logits.to(dtype), codebook.to(dtype), seed=2, backend="cpp")
        reference = noisy(logits.to(dtype), codebook.to(dtype), seed=2, backend="reference")
        torch.testing.assert_close(cpp, reference)


def test_gumbel_softmax_has_the_law_of_torchs() -> None:
    """The hard draws follow softmax(logits): chi-square over 20000 rows."""
    logits = torch.randn(30)
    draws = noisy(logits.expand(20000, 30), torch.eye(30), hard=True, seed=1).sum(0)
    expected = logits.softmax(0) * 20000
    chi_square = float(((draws - expected) ** 2 / expected).sum())
    assert chi_square < 29 + 4.5 * (2 * 29) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_replays_the_noise(backend: str) -> None:
    logits, codebook = torch.randn(8, 40), torch.randn(40, 4)

    def run(z: Tensor, e: Tensor) -> Tensor:
        return noisy(z, e, backend=backend).square()

    torch.manual_seed(1)
    value, plain = gradients(run, (logits, codebook))
    torch.manual_seed(1)
    again, replayed = gradients(
        lambda z, e: checkpoint(run, z, e, use_reentrant=False), (logits, codebook)
    )
    assert_same_bits(value, again)
    for mine, theirs in zip(plain, replayed, strict=True):
        assert_same_bits(mine, theirs)


# ---------------------------------------------------------------------------------------------------
# special values, sizes and layouts


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_stay_in_their_row(backend: str) -> None:
    logits = torch.randn(8, 600)
    logits[1, 17] = torch.nan
    logits[2] = -torch.inf
    logits[3, :500] = -torch.inf
    logits[4, 550] = torch.inf
    logits[5, :256] = -torch.inf
    logits[5, 100] = torch.nan
    codebook = torch.randn(600, 6)
    value, (dlogits, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend=backend), (logits, codebook)
    )
    broken = [False, True, True, False, True, True, False, False]
    assert value.isnan().all(dim=1).tolist() == broken
    assert value.isnan().any(dim=1).tolist() == broken
    assert dlogits.isnan().any(dim=1).tolist() == broken
    torch.testing.assert_close(value[3], logits[3].softmax(0) @ codebook)
    assert dlogits[3, :500].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_are_never_read(backend: str, garbage: float) -> None:
    mask = torch.tensor([True, False, True, False])
    logits, codebook, embedding = torch.randn(4, 300), torch.randn(300, 5), torch.randn(5)
    poisoned = torch.where(mask[:, None], garbage, logits)
    temperature = torch.where(mask, 3.0, 1.5)

    def run(z: Tensor, e: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return soft_embedding(z, e, temperature=t, mask=mask, mask_embedding=m, backend=backend)

    value, grads = gradients(run, (poisoned, codebook, temperature, embedding))
    clean, clean_grads = gradients(run, (logits, codebook, temperature, embedding))
    assert_same_bits(value, clean)
    assert_same_bits(value[mask], embedding.expand(2, 5))
    for mine, theirs in zip(grads, clean_grads, strict=True):
        assert_same_bits(mine, theirs)
    assert bool((grads[0][mask] == 0).all())
    assert bool((grads[2][mask] == 0).all())
    assert_same_bits(grads[3], torch.full((5,), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 1), (5,), (2, 0, 3, 5)])
def test_empty_and_tiny_shapes(backend: str, shape: tuple[int, ...]) -> None:
    codebook = torch.randn(shape[-1], 1)
    value, (dlogits, dcodebook) = gradients(
        lambda z, e: soft_embedding(z, e, backend=backend), (torch.randn(shape), codebook)
    )
    assert value.shape == (*shape[:-1], 1)
    assert dlogits.shape == shape
    if value.numel() == 0:
        assert_same_bits(dcodebook, torch.zeros_like(codebook))
    if shape[-1] == 1:
        assert_same_bits(value, codebook.expand_as(value))
        assert bool((dlogits == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_and_none_masked(backend: str) -> None:
    logits, codebook, embedding = torch.randn(9, 30), torch.randn(30, 5), torch.randn(5)
    for mask in (torch.ones(9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool)):
        value, grads = gradients(
            lambda z, e, m, mask=mask: soft_embedding(
                z, e, mask=mask, mask_embedding=m, backend=backend
            ),
            (logits, codebook, embedding),
        )
        if mask.all():
            assert_same_bits(value, embedding.expand(9, 5))
            assert bool((grads[0] == 0).all())
            assert bool((grads[1] == 0).all())
        else:
            assert_same_bits(value, soft_embedding(logits, codebook, backend=backend))
            assert bool((grads[2] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    base = torch.randn(6, 4, 5, 130)
    codebook = torch.randn(130, 9)
    expected = soft_embedding(base, codebook, backend=backend)
    views = [strided(base, layout) for layout in ("padded", "transposed", "columns")]
    views.append(base.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3))
    wide = torch.randn(130, 18)
    wide[:, ::2] = codebook
    for view in views:
        assert_same_bits(soft_embedding(view, codebook, backend=backend), expected)
        assert_same_bits(soft_embedding(view, wide[:, ::2], backend=backend), expected)
    one = soft_embedding(base[:1, :1].expand(6, 4, 5, 130), codebook, backend=backend)
    torch.testing.assert_close(one, expected[:1, :1].expand(6, 4, 5, 9))
    _, (dlogits, _) = gradients(
        lambda z, e: soft_embedding(z, e, backend=backend),
        (views[1], codebook),
        torch.ones(()).expand(6, 4, 5, 9),
    )
    assert dlogits.is_contiguous()


def test_more_dimensions_than_the_kernel_walks() -> None:
    """Nine dimensions that cannot be merged: one copy, the same result."""
    base = torch.randn(*[2] * 9, 7)[..., ::1].permute(8, 7, 6, 5, 4, 3, 2, 1, 0, 9)
    codebook = torch.randn(7, 3)
    assert_same_bits(soft_embedding(base, codebook), soft_embedding(base.contiguous(), codebook))


def test_row_offsets_beyond_32_bits() -> None:
    """Rows that lie 2^30 elements apart; only the pages of the rows are ever touched."""
    vocabulary, stride = 300, 2**30
    store = torch.empty(3 * stride + vocabulary, dtype=torch.bfloat16)
    logits = store.as_strided((4, vocabulary), (stride, 1))
    logits.copy_(torch.randn(4, vocabulary))
    codebook = torch.randn(vocabulary, 8)
    assert_same_bits(
        soft_embedding(logits, codebook), soft_embedding(logits.contiguous(), codebook)
    )


def free_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/meminfo") or free_memory() < 12 << 30, reason="needs 12 GiB of memory"
)
@pytest.mark.skipif("SOFTDIMO_LIBRARY_DIR" in os.environ, reason="too slow under a sanitizer")
def test_more_than_two_to_the_31_elements() -> None:
    rows, vocabulary = 262145, 8192
    logits = (
        torch.randn(1, vocabulary, dtype=torch.bfloat16).expand(rows, vocabulary).requires_grad_()
    )
    codebook = torch.randn(vocabulary, 1, dtype=torch.bfloat16)
    value = soft_embedding(logits, codebook)
    assert bool((value == value[0]).all())
    (dlogits,) = torch.autograd.grad(value, logits, torch.ones(()).expand(rows, 1))
    assert dlogits.shape == (rows, vocabulary)
    for row in (1, rows // 2, rows - 1):
        assert_same_bits(dlogits[row], dlogits[0])
    assert float(dlogits[0].abs().max()) > 0


def test_temperature_broadcasts_and_its_gradient_is_reduced() -> None:
    logits, codebook = (
        torch.randn(3, 4, 50, dtype=torch.double),
        torch.randn(50, 5, dtype=torch.double),
    )
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (3, 4)):
        temperature = torch.rand(shape, dtype=torch.double) + 0.5
        for backend in BACKENDS:
            _, (gradient,) = gradients(
                lambda t, b=backend: soft_embedding(
                    logits, codebook, temperature=t, backend=b
                ).square(),
                (temperature,),
            )
            _, (expected,) = gradients(
                lambda t: (
                    torch.softmax(logits / t.expand(3, 4).unsqueeze(-1), -1) @ codebook
                ).square(),
                (temperature,),
            )
            torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [16, 17, 33])
def test_infinite_temperature_gives_the_mean(backend: str, vocabulary: int) -> None:
    logits, codebook = torch.randn(2, vocabulary), torch.randn(vocabulary, 4)
    mean = codebook.mean(0).expand(2, 4)
    for temperature in (torch.full((2,), torch.inf), 1e39):
        value = soft_embedding(logits, codebook, temperature=temperature, backend=backend)
        torch.testing.assert_close(value, mean)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_temperature_that_is_not_positive_is_nan_where_it_cannot_raise(
    backend: str, hard: bool
) -> None:
    logits, codebook = torch.randn(3, 20), torch.randn(20, 4)
    compiled = torch.compile(
        lambda t: soft_embedding(logits, codebook, temperature=t, hard=hard, backend=backend),
        fullgraph=True,
    )
    value = compiled(torch.tensor([1.0, -1.0, 0.0]))
    assert value.isnan().all(dim=1).tolist() == [False, True, True]

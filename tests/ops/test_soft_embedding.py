"""soft_embedding against the float64 specification, and everything torch may do to an operator."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.contract import FLOORS, assert_contract
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softdimo_fast import explain, soft_embedding
from softdimo_fast.ops.reference.random import default_row_ids, gumbel

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One call: tensors that get gradients, and the options."""

    logits: Tensor
    codebook: Tensor
    temperature: Tensor | None
    mask_embedding: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]

    def call(self, backend: str | None) -> Any:
        """The operator as a function of :meth:`tensors`."""

        def run(*tensors: Tensor) -> Tensor:
            logits, codebook, *rest = tensors
            options = dict(self.options)
            if self.temperature is not None:
                options["temperature"] = rest.pop(0)
            if self.mask_embedding is not None:
                options["mask_embedding"] = rest.pop(0)
            return soft_embedding(logits, codebook, backend=backend, **options)

        return run

    def composed(self, *tensors: Tensor) -> Tensor:
        """What a user would write in the inputs' own dtype."""
        logits, codebook, *rest = tensors
        temperature = rest.pop(0).unsqueeze(-1) if self.temperature is not None else None
        mask, dtype = self.options.get("mask"), torch.promote_types(logits.dtype, codebook.dtype)
        z = logits.to(dtype)
        if mask is not None:
            z = torch.where(mask.unsqueeze(-1), 0.0, z)
        if self.options.get("noise"):
            rows = default_row_ids(self.options.get("row_ids"), z.shape[:-1], z.device)
            seed = torch.tensor([self.options["seed"], 0])
            z = z + gumbel(seed, rows, z.shape[-1], torch.float32).to(dtype)
        scale = self.options.get("temperature", 1.0) if temperature is None else temperature.to(dtype)
        p = torch.softmax(z / scale, dim=-1)
        if codebook.dim() == 3:
            out = torch.einsum("...gv,gvd->...gd", p, codebook.to(dtype))
        else:
            out = p @ codebook.to(dtype)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), rest.pop(0).to(dtype), out)
        return out.to(codebook.dtype)


def strided(logits: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "padded":
        wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 3), torch.nan, dtype=logits.dtype)
        wide[..., : logits.shape[-1]] = logits
        return wide[..., : logits.shape[-1]]
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns":
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    return logits


def assert_close_to_float64(case: Case, backend: str) -> None:
    """Value and every gradient keep the numerics contract."""
    tensors = case.tensors()
    upstream = torch.randn(case.call(backend)(*tensors).shape)
    wide = case._replace(
        **{name: None if t is None else t.double() for name, t in zip(case._fields[:4], case[:4], strict=True)}
    )
    truth, truth_grads = gradients(wide.call("reference"), wide.tensors(), upstream.to(case.codebook.dtype))
    value, grads = gradients(case.call(backend), tensors, upstream)
    yardstick, yardstick_grads = gradients(case.composed, tensors, upstream)
    assert value.dtype == case.codebook.dtype
    assert_contract(value, yardstick, truth, floor=contract_floor(case, value))
    names = ("logits", "codebook", "temperature", "mask_embedding")
    present = [name for name, t in zip(names, case[:4], strict=True) if t is not None]
    for name, tensor, mine, theirs, true in zip(
        present, tensors, grads, yardstick_grads, truth_grads, strict=True
    ):
        assert mine.dtype == tensor.dtype, name
        assert_contract(mine, theirs, true, floor=contract_floor(case, mine), what=f"gradient of {name}")


def contract_floor(case: Case, result: Tensor) -> float:
    """The floor of the narrowest dtype that took part, and more where a true value is nearly zero."""
    return max(FLOORS[t.dtype] for t in (*case.tensors(), result))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes, layouts, masks, temperatures and scales up to nearly one-hot rows."""
    groups = draw(st.sampled_from([None, 1, 2, 3]))
    vocabulary = draw(st.integers(1, 70) | st.sampled_from([128, 255, 257, 520]))
    width = draw(st.integers(1, 40) | st.sampled_from([7, 64, 65]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows = (16, 18) if groups is None else (16, 18, groups)
    dtype, table = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    temperature = 10.0 ** draw(st.floats(-3, 3))
    logits = (torch.randn(*rows, vocabulary) * min(scale * max(temperature, 1e-2), 1e4)).to(dtype)
    logits = strided(logits, draw(st.sampled_from(["contiguous", "padded", "transposed", "columns"])))
    shape = (vocabulary, width) if groups is None else (groups, vocabulary, width)
    options: dict[str, Any] = {}
    per_row = mask_embedding = None
    if draw(st.booleans()):
        per_row = temperature * (0.5 + torch.rand(rows))
    else:
        options["temperature"] = temperature
    if draw(st.booleans()):
        options["mask"] = torch.rand(rows) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        mask_embedding = torch.randn(shape[:-2] + shape[-1:]).to(table)
    if draw(st.booleans()):
        options |= {"noise": "gumbel", "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    return Case(logits, torch.randn(shape).to(table), per_row, mask_embedding, options)


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


def test_one_hot_rows_give_the_hard_embedding_bit_for_bit() -> None:
    codebook = torch.randn(300, 20)
    tokens = torch.randint(300, (64,))
    logits = torch.full((64, 300), -torch.inf).scatter(1, tokens[:, None], 0.0)
    for backend in BACKENDS:
        assert_same_bits(soft_embedding(logits, codebook, backend=backend), codebook[tokens])


def test_affine_functions_commute_with_the_expectation() -> None:
    """Equation e~ = E_p[e]: for an affine f, f(e~) = E_p[f(e)]."""
    logits, codebook = torch.randn(64, 50, dtype=torch.double), torch.randn(50, 8, dtype=torch.double)
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
# derivatives


def small_case(noise: bool = False, grouped: bool = False, **options: Any) -> Case:
    rows = (2, 2, 2) if grouped else (2, 3)
    shape = (2, 6, 3) if grouped else (6, 3)
    if noise:
        options |= {"noise": "gumbel", "seed": 11}
    return Case(
        torch.randn(*rows, 6, dtype=torch.double),
        torch.randn(shape, dtype=torch.double),
        torch.rand(rows[-1], dtype=torch.double) + 0.5,
        torch.randn(shape[:-2] + shape[-1:], dtype=torch.double),
        options | {"mask": torch.rand(rows) < 0.3},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_gradcheck(backend: str, grouped: bool, noise: bool) -> None:
    case = small_case(noise, grouped)
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.call(backend), leaves)
    assert torch.autograd.gradgradcheck(case.call(backend), leaves)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}])
def test_gradcheck_truncated(options: dict[str, Any]) -> None:
    case = small_case(noise=True, **options)
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.call(None), leaves)
    assert torch.autograd.gradgradcheck(case.call(None), leaves)


@pytest.mark.parametrize("grouped", [False, True])
def test_specification_backward_is_the_derivative_of_its_forward(grouped: bool) -> None:
    """torch differentiates the specification's forward; its written-out backward says the same."""
    case = small_case(noise=True, grouped=grouped)
    upstream = torch.randn((2, 2, 2, 3) if grouped else (2, 3, 3), dtype=torch.double)
    _, ours = gradients(case.call("reference"), case.tensors(), upstream)
    _, theirs = gradients(case.composed, case.tensors(), upstream)
    for mine, true in zip(ours, theirs, strict=True):
        # The yardstick's noise is rounded to float32.
        torch.testing.assert_close(mine, true, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_only_where_required(backend: str, wanted: int) -> None:
    case = small_case()
    _, everything = gradients(case.call(backend), case.tensors())
    leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.tensors())]
    case.call(backend)(*leaves).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        if wanted >> i & 1:
            torch.testing.assert_close(leaf.grad, full, rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_is_the_argmax_embedding_with_the_soft_gradient(backend: str) -> None:
    logits, codebook, upstream = torch.randn(300, 70), torch.randn(70, 12), torch.randn(300, 12)
    options: dict[str, Any] = {"noise": "gumbel", "seed": 5, "temperature": 0.7, "backend": backend}
    hard, hard_grads = gradients(
        lambda z, e: soft_embedding(z, e, hard=True, **options), (logits, codebook), upstream
    )
    _, soft_grads = gradients(lambda z, e: soft_embedding(z, e, **options), (logits, codebook), upstream)
    noised = logits + gumbel(torch.tensor([5, 0]), torch.arange(300), 70, torch.float32)
    assert_same_bits(hard, codebook[noised.argmax(-1)])
    for mine, soft in zip(hard_grads, soft_grads, strict=True):
        assert_same_bits(mine, soft)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_ties_go_to_the_lowest_index(backend: str) -> None:
    logits = torch.zeros(4, 600)
    logits[1, [300, 599]] = 2.0
    logits[2, [255, 256]] = 1.0
    logits[3, 599] = 3.0
    picked = soft_embedding(logits, torch.arange(600.0)[:, None], hard=True, backend=backend)
    assert picked.flatten().tolist() == [0, 300, 255, 599]


def test_truncation_keeps_what_it_says() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    eye = torch.eye(5)
    kept = soft_embedding(logits, eye, top_k=2) > 0
    assert kept.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    kept = soft_embedding(logits, eye, top_k=99) > 0
    assert bool(kept.all())
    # Masses of the first row in order: .375 (index 1), .375 (2), .138 (4), .051 (0), .019 (3).
    kept = soft_embedding(logits, eye, top_p=0.4) > 0
    assert kept.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    kept = soft_embedding(logits, eye, top_p=0.3) > 0
    assert kept.tolist() == [[False, True, False, False, False], [True, True, False, False, False]]
    assert bool((soft_embedding(logits, eye, top_p=1.0) > 0).all())
    # Truncation looks at logits / T without noise; noise never revives a dropped entry.
    kept = soft_embedding(logits, eye, top_k=1, noise="gumbel", seed=0)
    assert_same_bits(kept, torch.eye(5)[[1, 0]])


# ---------------------------------------------------------------------------------------------------
# randomness and determinism


def noisy(z: Tensor, codebook: Tensor, **options: Any) -> Tensor:
    return soft_embedding(z, codebook, noise="gumbel", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A row's value and gradient have the same bits in any batch, position and block size."""
    logits = (torch.randn(700, 1100) * 3).to(dtype)
    codebook, upstream = torch.randn(1100, 33).to(dtype), torch.randn(700, 33)
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


def test_nothing_depends_on_the_number_of_threads() -> None:
    case = Case(
        torch.randn(2000, 300), torch.randn(300, 20), torch.rand(2000) + 0.5, torch.randn(20),
        {"mask": torch.rand(2000) < 0.3, "noise": "gumbel", "seed": 1},
    )  # fmt: skip
    upstream, before = torch.randn(2000, 20), torch.get_num_threads()
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


def test_seed_row_ids_and_offset_key_the_noise() -> None:
    logits, codebook = torch.zeros(6, 40), torch.eye(40)
    base = noisy(logits, codebook, seed=7)
    assert_same_bits(base, noisy(logits, codebook, seed=torch.tensor([7, 0])))
    assert_same_bits(base, noisy(logits, codebook, seed=7, row_ids=torch.arange(6)))
    swapped = torch.tensor([5, 4, 3, 2, 1, 0])
    assert_same_bits(base.flip(0), noisy(logits, codebook, seed=7, row_ids=swapped))
    for other in (noisy(logits, codebook, seed=8), noisy(logits, codebook, seed=torch.tensor([7, 1]))):
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
            lambda z, e, m, mask=mask: soft_embedding(z, e, mask=mask, mask_embedding=m, backend=backend),
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
        lambda z, e: soft_embedding(z, e, backend=backend), (views[1], codebook), torch.ones(()).expand(6, 4, 5, 9)
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
    assert_same_bits(soft_embedding(logits, codebook), soft_embedding(logits.contiguous(), codebook))


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
    logits = torch.randn(1, vocabulary, dtype=torch.bfloat16).expand(rows, vocabulary).requires_grad_()
    codebook = torch.randn(vocabulary, 1, dtype=torch.bfloat16)
    value = soft_embedding(logits, codebook)
    assert bool((value == value[0]).all())
    (dlogits,) = torch.autograd.grad(value, logits, torch.ones(()).expand(rows, 1))
    assert dlogits.shape == (rows, vocabulary)
    for row in (1, rows // 2, rows - 1):
        assert_same_bits(dlogits[row], dlogits[0])
    assert float(dlogits[0].abs().max()) > 0


def test_temperature_broadcasts_and_its_gradient_is_reduced() -> None:
    logits, codebook = torch.randn(3, 4, 50, dtype=torch.double), torch.randn(50, 5, dtype=torch.double)
    for shape in ((), (1,), (4,), (3, 1), (1, 4), (3, 4)):
        temperature = torch.rand(shape, dtype=torch.double) + 0.5
        for backend in BACKENDS:
            _, (gradient,) = gradients(
                lambda t, b=backend: soft_embedding(logits, codebook, temperature=t, backend=b).square(),
                (temperature,),
            )
            _, (expected,) = gradients(
                lambda t: (torch.softmax(logits / t.expand(3, 4).unsqueeze(-1), -1) @ codebook).square(),
                (temperature,),
            )
            torch.testing.assert_close(gradient, expected)


def test_frozen_temperature_that_is_not_positive_is_nan_where_it_cannot_raise() -> None:
    logits, codebook = torch.randn(3, 20), torch.randn(20, 4)
    compiled = torch.compile(lambda t: soft_embedding(logits, codebook, temperature=t), fullgraph=True)
    value = compiled(torch.tensor([1.0, -1.0, 0.0]))
    assert value.isnan().all(dim=1).tolist() == [False, True, True]


# ---------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_compiled_is_bitwise_eager(backend: str, grouped: bool) -> None:
    case = small_case(noise=True, grouped=grouped)
    assert_compiles_bitwise(case.call(backend), *[t.float() for t in case.tensors()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_hard_half_precision(backend: str) -> None:
    logits, codebook = torch.randn(5, 6, 300).bfloat16(), torch.randn(300, 7).bfloat16()
    assert_compiles_bitwise(
        lambda z, e: soft_embedding(z, e, hard=True, temperature=0.5, backend=backend), logits, codebook
    )


def test_exports() -> None:
    case = small_case(noise=True)
    assert_exports(case.call(None), *[t.float() for t in case.tensors()])


def operator_arguments(grouped: bool, hard: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    case = small_case(grouped=grouped)
    logits, codebook, temperature, embedding = (t.to(dtype).requires_grad_() for t in case.tensors())
    mask = case.options["mask"]
    return (logits, codebook, 1.0, temperature, mask, embedding, torch.tensor([1, 2]), None, hard)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(grouped: bool, hard: bool, dtype: torch.dtype) -> None:
    arguments = operator_arguments(grouped, hard, dtype)
    torch.library.opcheck(torch.ops.softdimo.soft_embedding, arguments)
    plain = (arguments[0].detach(), arguments[1].detach(), 2.0, *[None] * 5, hard)
    torch.library.opcheck(torch.ops.softdimo.soft_embedding, plain)
    torch.library.opcheck(torch.ops.softdimo_reference.soft_embedding, (*arguments, 3, 0.9))


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck_backward(grouped: bool) -> None:
    inputs = operator_arguments(grouped, False, torch.float64)
    value, top, total, _ = (t.detach() for t in torch.ops.softdimo.soft_embedding(*inputs))
    grad = torch.randn_like(value, requires_grad=True)
    for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        torch.library.opcheck(
            torch.ops.softdimo.soft_embedding_backward, (grad, *inputs[:8], top, total, value, wanted)
        )
        torch.library.opcheck(
            torch.ops.softdimo_reference.soft_embedding_backward, (grad, *inputs, None, None, wanted)
        )


def test_autocast_casts_the_codebook_and_reads_logits_as_they_are() -> None:
    logits, codebook, embedding = torch.randn(5, 40), torch.randn(40, 6), torch.randn(6)
    mask = torch.tensor([True, False, False, True, False])
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = soft_embedding(logits, codebook, mask=mask, mask_embedding=embedding, backend=backend)
            wide = soft_embedding(logits.double(), codebook.double(), backend=backend)
        expected = soft_embedding(
            logits, codebook.bfloat16(), mask=mask, mask_embedding=embedding.bfloat16(), backend=backend
        )
        assert_same_bits(value, expected)
        assert wide.dtype == torch.float64


def test_vmap_and_jvp_raise_clearly() -> None:
    logits, codebook = torch.randn(2, 3, 8), torch.randn(8, 4)
    for backend in BACKENDS:
        with pytest.raises(RuntimeError, match=r"soft_embedding does not support torch\.vmap"):
            torch.vmap(lambda z, b=backend: soft_embedding(z, codebook, backend=b))(logits)
        with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
            torch.func.jvp(lambda z, b=backend: soft_embedding(z, codebook, backend=b), (logits,), (logits,))


def test_double_backward_under_compile_raises_clearly() -> None:
    logits, codebook = torch.randn(4, 8, requires_grad=True), torch.randn(8, 3)
    value = torch.compile(lambda z: soft_embedding(z, codebook))(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


# ---------------------------------------------------------------------------------------------------
# which kernel runs


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "softdimo"),
        ({"hard": True}, "softdimo"),
        ({"noise": "gumbel"}, "softdimo"),
        ({"precision": "high"}, "softdimo"),
        ({"top_k": 3}, "softdimo_reference"),
        ({"top_p": 0.5}, "softdimo_reference"),
        ({"backend": "reference"}, "softdimo_reference"),
        ({"backend": "cpp"}, "softdimo"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_which_kernel_runs(options: dict[str, Any], kernel: str, dtype: torch.dtype) -> None:
    logits, codebook = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.randn(8, 3, dtype=dtype)
    ran = operators_run(lambda: soft_embedding(logits, codebook, **options).sum().backward())
    assert ran == [f"{kernel}::soft_embedding", f"{kernel}::soft_embedding_backward"]
    assert ("reference" in kernel) == (explain(soft_embedding, logits, codebook, **options).backend == "reference")


def test_explain_names_costs() -> None:
    logits, codebook = torch.randn(6, 5, 100), torch.randn(100, 16)
    explanation = explain(soft_embedding, logits, codebook)
    assert explanation.backend == "cpp"
    assert explanation.flops == 2 * 30 * 100 * 16
    assert explanation.exponentials == 3000
    assert explanation.bytes == 4 * (3000 + 1600 + 480)
    assert explanation.floor_seconds(1e9, 1e12) == pytest.approx(explanation.bytes / 1e9)
    assert explanation.notes == ()
    strides = explain(soft_embedding, strided(logits, "columns"), codebook)
    assert "contiguous copy" in strides.notes[0]
    assert "top_k" in explain(soft_embedding, logits, codebook, top_k=2).reason
    assert "soft_embedding" in str(explanation)
    with pytest.raises(TypeError, match="fn must be one of"):
        explain(print)


ISA_SCRIPT = """
import torch, softdimo_fast as s
assert torch.ops.softdimo.cpu_isa() == {isa!r}
torch.manual_seed(0)
z, e, g = torch.randn(300, 777) * 4, torch.randn(777, 21), torch.randn(300, 21)
def run(z, e, backend):
    z, e = z.requires_grad_(), e.requires_grad_()
    out = s.soft_embedding(z, e, temperature=0.7, noise="gumbel", seed=1, backend=backend)
    return out, *torch.autograd.grad(out, (z, e), g.to(out.dtype))
for mine, true in zip(run(z, e, "cpp"), run(z.detach().double(), e.detach().double(), "reference")):
    assert (mine - true).norm() < 2e-6 * true.norm(), (mine - true).norm() / true.norm()
"""


@pytest.mark.parametrize("isa", torch.ops.softdimo.compiled_cpu_isas().split())
def test_every_instruction_set(isa: str) -> None:
    best = torch.ops.softdimo.compiled_cpu_isas().split()
    if "SOFTDIMO_CPU_ISA" in os.environ or best.index(isa) < best.index(torch.ops.softdimo.cpu_isa()):
        pytest.skip("this processor, or the environment, does not allow it")
    environment = os.environ | {"SOFTDIMO_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT.format(isa=isa)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import softdimo_fast as s, torch; s.soft_embedding(torch.ones(1, 2), torch.ones(2, 1))"],
        env=os.environ | {"SOFTDIMO_CPU_ISA": "z80", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "SOFTDIMO_CPU_ISA=z80 is none of" in run.stderr


# ---------------------------------------------------------------------------------------------------
# bad input


Z, E, M = torch.randn(4, 6, 10), torch.randn(10, 3), torch.zeros(4, 6, dtype=torch.bool)
GROUPED = torch.randn(6, 10, 3)

BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "logits must be a torch.Tensor, got list", ([1.0], E), {}),
    (TypeError, "logits must have dtype .* got torch.int64", (torch.ones(2, 10, dtype=torch.int64), E), {}),
    (TypeError, "logits must be a dense", (torch.eye(10).to_sparse(), E), {}),
    (TypeError, "codebook must be a torch.Tensor, got NoneType", (Z, None), {}),
    (TypeError, "codebook must have dtype .* got torch.complex64", (Z, E.to(torch.complex64)), {}),
    (ValueError, r"logits must have shape \[\.\.\., V\], got 0-d", (torch.tensor(1.0), E), {}),
    (ValueError, "logits must have a vocabulary V >= 1", (torch.ones(3, 0), torch.ones(0, 3)), {}),
    (ValueError, r"codebook must have shape \[V, D\] or \[G, V, D\], got \[10\]", (Z, E[:, 0]), {}),
    (ValueError, r"codebook must have V = 10 rows", (Z, torch.ones(9, 3)), {}),
    (ValueError, "codebook must have a width D >= 1", (Z, torch.ones(10, 0)), {}),
    (ValueError, r"grouped codebook .* needs logits \[\.\.\., G, V\] with G = 5", (Z, GROUPED[:5]), {}),
    (ValueError, "codebook is on meta, but logits is on cpu", (Z, E.to("meta")), {}),
    (ValueError, "temperature must be positive and finite, got 0", (Z, E), {"temperature": 0}),
    (ValueError, "temperature must be positive and finite, got -1.0", (Z, E), {"temperature": -1.0}),
    (ValueError, "temperature must be finite, got nan", (Z, E), {"temperature": float("nan")}),
    (ValueError, "temperature must be finite, got inf", (Z, E), {"temperature": float("inf")}),
    (TypeError, "temperature must be a float, got str", (Z, E), {"temperature": "1"}),
    (TypeError, "temperature must be a float, got bool", (Z, E), {"temperature": True}),
    (TypeError, "temperature must have dtype", (Z, E), {"temperature": torch.ones(6, dtype=torch.int32)}),
    (ValueError, r"temperature must broadcast to the rows .* = \[4, 6\], got shape \[5\]", (Z, E), {"temperature": torch.ones(5)}),
    (ValueError, "temperature must be positive everywhere, its smallest value is -1.0", (Z, E), {"temperature": torch.tensor([1.0, -1, 1, 1, 1, 1])}),
    (ValueError, "mask_embedding is required when mask is given", (Z, E), {"mask": M}),
    (ValueError, "mask_embedding is given, but mask is None", (Z, E), {"mask_embedding": E[0]}),
    (TypeError, "mask must have dtype bool, got torch.uint8", (Z, E), {"mask": M.byte(), "mask_embedding": E[0]}),
    (TypeError, "mask must be a bool tensor or None, got list", (Z, E), {"mask": [True], "mask_embedding": E[0]}),
    (ValueError, r"mask must broadcast to the rows .* got shape \[4\]", (Z, E), {"mask": M[:, 0], "mask_embedding": E[0]}),
    (ValueError, r"mask_embedding must have shape \[D\] = \[3\], got \[4\]", (Z, E), {"mask": M, "mask_embedding": torch.ones(4)}),
    (ValueError, r"mask_embedding must have shape \[G, D\] = \[6, 3\], got \[3\]", (Z, GROUPED), {"mask": M, "mask_embedding": E[0]}),
    (ValueError, "noise must be None or 'gumbel', got 'normal'", (Z, E), {"noise": "normal"}),
    (ValueError, "seed is given, but noise is None", (Z, E), {"seed": 1}),
    (ValueError, "row_ids is given, but noise is None", (Z, E), {"row_ids": torch.arange(6)}),
    (ValueError, "generator is given, but noise is None", (Z, E), {"generator": torch.Generator()}),
    (ValueError, "seed and generator exclude each other", (Z, E), {"noise": "gumbel", "seed": 1, "generator": torch.Generator()}),
    (TypeError, "seed must be an int, .* got float", (Z, E), {"noise": "gumbel", "seed": 1.0}),
    (ValueError, "seed must fit in 64 signed bits", (Z, E), {"noise": "gumbel", "seed": 2**63}),
    (ValueError, r"seed tensor must be int64 of shape \[2\]", (Z, E), {"noise": "gumbel", "seed": torch.ones(3, dtype=torch.int64)}),
    (TypeError, "row_ids must be an int64 tensor or None, got torch.int32", (Z, E), {"noise": "gumbel", "row_ids": torch.arange(6, dtype=torch.int32)}),
    (ValueError, "row_ids must broadcast to the rows", (Z, E), {"noise": "gumbel", "row_ids": torch.arange(5)}),
    (TypeError, "top_k must be an int or None, got float", (Z, E), {"top_k": 2.0}),
    (ValueError, "top_k must be at least 1, got 0", (Z, E), {"top_k": 0}),
    (ValueError, r"top_p must be in \(0, 1\], got 0", (Z, E), {"top_p": 0}),
    (ValueError, r"top_p must be in \(0, 1\], got 1.5", (Z, E), {"top_p": 1.5}),
    (TypeError, "top_p must be a float, got str", (Z, E), {"top_p": "all"}),
    (ValueError, "precision must be one of 'default', 'high', got 'low'", (Z, E), {"precision": "low"}),
    (ValueError, "backend must be None or one of .* got 'numpy'", (Z, E), {"backend": "numpy"}),
    (ValueError, "backend='cuda' cannot run: .* need CUDA tensors", (Z, E), {"backend": "cuda"}),
    (ValueError, "backend='triton' cannot run: this operator has no Triton kernel", (Z, E), {"backend": "triton"}),
    (ValueError, "backend='cpp' cannot run: the C\\+\\+ kernel does not truncate", (Z, E), {"backend": "cpp", "top_k": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD)
def test_bad_input_names_the_argument(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"soft_embedding: .*{message}|soft_embedding: {message}"):
        soft_embedding(*arguments, **options)

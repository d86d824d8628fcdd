"""linear_soft_embedding: accuracy, gradients, masks, special values, on either backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from support.checks import assert_same_bits, gradients
from support.contract import assert_contract
from support.linear_soft_embedding import (
    BACKENDS,
    NAMES,
    VARIANTS,
    Case,
    cases,
    floor,
    make,
)

from softdimo_fast.ops import _backends
from softdimo_fast.ops.linear_soft_embedding import NOTHING, linear_soft_embedding
from softdimo_fast.ops.reference import linear_soft_embedding as reference
from softdimo_fast.ops.soft_embedding import soft_embedding


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with either backend."""
    monkeypatch.setattr(_backends, "PREFERRED", request.param)
    return str(request.param)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(VARIANTS[request.param])


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the specification three to seven slices even for the smallest case."""
    monkeypatch.setattr(reference, "SLICE_BYTES", 200)


# --------------------------------------------------------------------------------------------------
# Values and gradients


def assert_case_keeps_the_contract(case: Case) -> None:
    """Over at least 256 rows; a gradient that is zero but for rounding is bounded by its terms."""
    upstream = torch.randn(case.call()(*case.values).shape)
    value, grads = gradients(case.call(), case.values, upstream)
    yard, yard_grads = gradients(case.composed, case.values, upstream)
    wide = Case({name: tensor.double() for name, tensor in case.tensors.items()}, case.options)
    upstream = upstream.to(value.dtype)
    truth, true_grads = gradients(wide.composed, wide.values, upstream)
    assert value.dtype == case.tensors["codebook"].dtype
    assert_contract(value, yard, truth, floor=floor(case))
    for name, mine, theirs, exact in zip(case.tensors, grads, yard_grads, true_grads, strict=True):
        assert mine.dtype == case.tensors[name].dtype, name
        if float(exact.norm()) > 1e-3:
            assert_contract(mine, theirs, exact, floor=floor(case), what=name)
        else:
            size = float(upstream.norm()) * float(wide.tensors["codebook"].norm())
            assert float((mine - exact).abs().max()) <= floor(case) * size, name


@given(case=cases())
def test_contract(case: Case) -> None:
    assert_case_keeps_the_contract(case)


@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("name", ["plain", "bias", "positions", "samples"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_contract_of_bfloat16_products(name: str, precision: str, memory: str) -> None:
    """Widths that fill no step of such a product, and ones that do."""
    for vocabulary, hidden_width, width in ((300, 70, 41), (256, 64, 32)):
        case = make(
            lead=(30, 11), vocabulary=vocabulary, hidden_width=hidden_width, width=width, scale=10.0,
            dtype=torch.bfloat16, precision=precision, memory=memory, **VARIANTS[name],
        )  # fmt: skip
        assert_case_keeps_the_contract(case)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(distance: float) -> None:
    """A head that copies its input: max p is 1 - distance in every row."""
    vocabulary = 64
    winner = torch.randint(vocabulary, (256, 1))
    logits = torch.randn(256, vocabulary, dtype=torch.float64)
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), 1, keepdim=True)
    logits = logits.scatter(1, winner, others + math.log((1 - distance) / distance)).float()
    case = Case({"hidden": logits, "weight": torch.eye(64), "codebook": torch.randn(64, 16)}, {})
    upstream = torch.randn(256, 16)
    value, grads = gradients(case.call(), case.values, upstream)
    yard, yard_grads = gradients(case.composed, case.values, upstream)
    wide = [tensor.double() for tensor in case.values]
    truth, true_grads = gradients(case.composed, wide, upstream)
    assert_contract(value, yard, truth, floor=1e-6)
    for name, mine, theirs, exact in zip(NAMES, grads, yard_grads, true_grads, strict=False):
        assert_contract(mine, theirs, exact, floor=1e-6, what=name)
    # The head is the identity, so dhidden is dlogits, and its dominant entry must not cancel.
    error = (grads[0].double() - true_grads[0]).abs().gather(1, winner)
    assert float((error / true_grads[0].abs().gather(1, winner)).median()) < 2e-5


def test_equals_the_soft_embedding_of_the_logits(variant: dict[str, Any]) -> None:
    case = make(**variant)
    named = case.tensors
    z = torch.einsum("...h,gvh->...gv", named["hidden"], named["weight"]) if variant.get(
        "groups"
    ) else named["hidden"] @ named["weight"].T  # fmt: skip
    options = case.options | {
        name: named[name] for name in ("temperature", "mask_embedding") if name in named
    }
    expected = soft_embedding(z + named.get("bias", 0), named["codebook"], **options)
    torch.testing.assert_close(case.call()(*case.values), expected)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_explicit_backward_is_the_derivative_of_the_forward(
    variant: dict[str, Any], memory: str
) -> None:
    case = make(**variant)
    value = case.call()(*case.values)
    upstream = torch.randn_like(value)
    _, found = gradients(case.call(memory=memory), case.values, upstream)
    _, expected = gradients(case.composed, case.values, upstream)
    for name, mine, theirs in zip(case.tensors, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("small_slices")
def test_gradcheck_and_gradgradcheck(variant: dict[str, Any]) -> None:
    """The second derivative with kept logits and without."""
    case = make(lead=(2, 3), vocabulary=4, hidden_width=3, width=2, **variant)
    leaves = [tensor.requires_grad_() for tensor in case.values]
    assert torch.autograd.gradcheck(case.call(memory="recompute"), leaves)
    memory = "keep" if variant.get("groups") else "recompute"
    assert torch.autograd.gradgradcheck(case.call(memory=memory), leaves)


def test_second_derivative_does_not_depend_on_memory() -> None:
    case = make(**VARIANTS["positions"])
    found = []
    for memory in ("keep", "recompute"):
        leaves = [tensor.detach().requires_grad_() for tensor in case.values]
        value = case.call(memory=memory)(*leaves).square().sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(penalty, leaves))
    assert all(bool(grad.any()) for grad in found[0])
    for first, second in zip(*found, strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("masked", [False, True])
def test_frozen_inputs(masked: bool) -> None:
    """Every subset of inputs that require a gradient gets the gradients of the full set."""
    settings = VARIANTS["positions"] | {"masked": 0.4 if masked else None}
    case = make(dtype=torch.float32, **settings)
    _, expected = gradients(case.call(), case.values)
    for wanted in itertools.product([False, True], repeat=len(expected)):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip(case.values, wanted, strict=True)]
        case.call()(*leaves).sum().backward()
        for leaf, needed, grad in zip(leaves, wanted, expected, strict=True):
            assert (leaf.grad is not None) == needed
            if leaf.grad is not None:
                assert_same_bits(leaf.grad, grad)


# --------------------------------------------------------------------------------------------------
# Masks and special values


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("groups", [None, 2])
def test_masked_rows_are_never_read(garbage: float, memory: str, groups: int | None) -> None:
    """Hidden, bias and temperature of a masked row may be anything; all gradients are the same."""
    case = make(
        groups=groups, dtype=torch.float32, bias="all", rows_temperature=True, masked=0.5, memory=memory
    )  # fmt: skip
    mask = case.options["mask"]
    mask[0, 0], mask[1, 1] = True, False
    unread = mask if groups is None else mask.all(-1)
    upstream = torch.randn(*mask.shape, 3)
    value, grads = gradients(case.call(), case.values, upstream)
    case.tensors["hidden"][unread] = garbage
    case.tensors["bias"][mask] = garbage
    dirty_value, dirty_grads = gradients(case.call(), case.values, upstream)
    assert_same_bits(value, dirty_value)
    for name, first, second in zip(case.tensors, grads, dirty_grads, strict=True):
        assert_same_bits(first, second, name)
    assert not bool(grads[0][unread].any())
    assert not bool(grads[3][mask].any())
    assert not bool(grads[4][mask].any())
    embedding = case.tensors["mask_embedding"].expand(value.shape)
    assert_same_bits(value[mask], embedding[mask])


def test_a_nan_in_a_group_that_counts_does_not_reach_a_masked_one() -> None:
    case = make(groups=2, dtype=torch.float32, masked=0.0)
    mask = case.options["mask"]
    mask[..., 0] = True
    case.tensors["hidden"][0, 0] = math.nan
    value, grads = gradients(case.call(), case.values)
    named = dict(zip(case.tensors, grads, strict=True))
    assert bool(value[0, 0, 1].isnan().all())
    assert bool(value[..., 0, :].isfinite().all())
    assert not bool(named["weight"][0].any())
    assert not bool(named["codebook"][0].any())
    assert bool(named["weight"][1].isnan().any())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_no_rows_masked(share: float) -> None:
    case = make(dtype=torch.float32, masked=share, bias="vocabulary")
    value, grads = gradients(case.call(), case.values)
    named = dict(zip(case.tensors, grads, strict=True))
    if share == 0:
        plain = Case({k: v for k, v in case.tensors.items() if k != "mask_embedding"}, {})
        assert_same_bits(value, plain.call()(*plain.values))
        assert not bool(named["mask_embedding"].any())
    else:
        assert_same_bits(value, case.tensors["mask_embedding"].expand(value.shape))
        assert not any(bool(named[name].any()) for name in NAMES[:4])
        assert_same_bits(named["mask_embedding"], torch.full((3,), 12.0))


def test_special_values_stay_in_their_row() -> None:
    """NaN hidden, an excluded token (bias -inf), +inf, and a row without any token."""
    case = make(lead=(6,), dtype=torch.float32, bias="all")
    clean = case.call()(*case.values)
    case.tensors["hidden"][0, 1] = math.nan
    case.tensors["bias"][1, 2] = math.inf
    case.tensors["bias"][2] = -math.inf
    case.tensors["bias"][3, 4] = -math.inf
    value, grads = gradients(case.call(), case.values)
    assert bool(value[:3].isnan().all())
    assert_same_bits(value[4:], clean[4:])
    kept = torch.arange(7) != 4
    z = case.tensors["hidden"][3] @ case.tensors["weight"].T + case.tensors["bias"][3]
    expected = torch.softmax(z[kept], -1) @ case.tensors["codebook"][kept]
    torch.testing.assert_close(value[3], expected)
    assert bool(grads[0][3:].isfinite().all())
    assert float(grads[3][3, 4]) == 0


def test_excluded_tokens_have_finite_second_derivatives() -> None:
    case = make(bias="vocabulary", rows_temperature=True)
    case.tensors["bias"][2] = -math.inf
    frozen = case.tensors.pop("bias")
    leaves = [tensor.requires_grad_() for tensor in case.values]
    assert torch.autograd.gradgradcheck(case.call(bias=frozen), leaves)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (1,)])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_small_shapes(lead: tuple[int, ...], groups: int | None, memory: str) -> None:
    settings: dict[str, Any] = {"vocabulary": 1, "hidden_width": 1, "width": 1, "memory": memory}
    case = make(lead, groups, bias="positions", rows_temperature=True, masked=0.5, **settings)
    value, grads = gradients(case.call(), case.values)
    expected, expected_grads = gradients(case.composed, case.values)
    torch.testing.assert_close(value, expected)
    for first, second in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(first, second)


def test_no_rows_give_zero_gradients_to_the_tables() -> None:
    case = make(lead=(0, 4), dtype=torch.float32, bias="vocabulary")
    value, grads = gradients(case.call(), case.values)
    assert value.shape == (0, 4, 3)
    assert all(not bool(grad.any()) for grad in grads)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in case.values]


def test_bad_temperature_rows(backend: str) -> None:
    """On the CPU in eager they raise; where values are not looked at the row becomes NaN."""
    case = make(lead=(4,), dtype=torch.float32)
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan])
    with pytest.raises(ValueError, match="linear_soft_embedding: temperature must be positive"):
        linear_soft_embedding(*case.values, temperature=temperature)
    if backend == "cpp":
        operator, keep = torch.ops.softdimo.linear_soft_embedding, (False, NOTHING)
    else:
        operator, keep = torch.ops.softdimo_reference.linear_soft_embedding, (False,)
    value, *_ = operator(*case.values, None, 1.0, temperature, None, None, *keep)
    assert bool(value[1:].isnan().all())
    torch.testing.assert_close(value[:1], case.call()(*case.values)[:1])

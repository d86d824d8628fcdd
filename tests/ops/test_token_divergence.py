"""token_divergence against the float64 specification, F.kl_div and its own identities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
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

from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.reference import divergence as specification
from softdimo_fast.ops.token_divergence import token_divergence

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": 0.3},
    {"kind": "jeffreys", "beta": -0.2},
    {"kind": "jeffreys", "beta": 1.7},
)


def composed_rows(
    teacher: Tensor,
    model: Tensor,
    uncond: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    model_temperature: float = 1.0,
) -> Tensor:
    """What a user would write, row by row, in the inputs' own dtype."""
    if uncond is not None:
        scale = guidance_scale
        if isinstance(scale, Tensor):
            scale = scale.unsqueeze(-1).to(teacher.dtype)
        teacher = uncond + scale * (teacher - uncond)
    log_p = torch.log_softmax(teacher / teacher_temperature, dim=-1)
    log_q = torch.log_softmax(model / model_temperature, dim=-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)
    if kind == "jeffreys":
        assert beta is not None
        return (1 - beta) * forward + beta * reverse
    return forward if kind == "forward_kl" else reverse


class Case(NamedTuple):
    """One call: tensors that get gradients, and the options."""

    teacher: Tensor
    model: Tensor
    uncond: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None]

    def call(self, backend: str | None = None, reduction: str = "none") -> Any:
        """The operator as a function of :meth:`tensors`."""

        def run(teacher: Tensor, model: Tensor, uncond: Tensor | None = None) -> Tensor:
            return token_divergence(
                teacher, model, teacher_uncond_logits=uncond, reduction=reduction, backend=backend,
                **self.options,
            )  # fmt: skip

        return run

    def composed(self, *tensors: Tensor) -> Tensor:
        options = dict(self.options)
        mask, weight = options.pop("mask", None), options.pop("weight", None)
        if mask is not None:
            tensors = tuple(torch.where(mask.unsqueeze(-1), t, 0.0) for t in tensors)
        rows = composed_rows(*tensors, **options)
        rows = rows if weight is None else rows * weight
        return rows if mask is None else torch.where(mask, rows, 0.0)

    def double(self) -> Case:
        """The same values in float64; a weight in the inputs' own dtype is exact already."""
        tensors = [None if t is None else t.double() for t in self[:3]]
        return Case(*tensors, self.options)


def strided(logits: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "padded":
        wide = torch.full((*logits.shape[:-1], logits.shape[-1] + 3), torch.nan, dtype=logits.dtype)
        wide[..., : logits.shape[-1]] = logits
        return wide[..., : logits.shape[-1]]
    if layout == "columns":
        return logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    return logits


def assert_close_to_float64(case: Case, backend: str) -> None:
    """The rows and every gradient keep the numerics contract."""
    truth, truth_grads = gradients(case.double().call("reference"), case.double().tensors())
    value, grads = gradients(case.call(backend), case.tensors())
    yardstick, yardstick_grads = gradients(case.composed, case.tensors())
    wide = any(t.dtype == torch.float64 for t in case.tensors())
    assert value.dtype == (torch.float64 if wide else torch.float32)
    narrowest = max(FLOORS[t.dtype] for t in case.tensors())
    floor = 2e-6 if narrowest == FLOORS[torch.float32] else narrowest
    assert_contract(value, yardstick, truth, floor=2e-6 if value.dtype == torch.float32 else 1e-12)
    for name, mine, theirs, true in zip(
        ("teacher", "model", "uncond"), grads, yardstick_grads, truth_grads, strict=False
    ):
        assert_contract(mine, theirs, true, floor=floor, what=f"gradient of {name}")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes, layouts, masks, temperatures and scales up to one-hot rows."""
    vocabulary = draw(st.integers(1, 70) | st.sampled_from([128, 255, 520]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, dtype = (16, 18), draw(st.sampled_from(DTYPES))
    hotter, cooler = 10.0 ** draw(st.floats(-3, 3)), 10.0 ** draw(st.floats(-3, 3))
    size = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    size = min(size * max(min(hotter, cooler), 1e-2), 1e4)
    distance = draw(st.sampled_from([0.1, 1.0]))
    layouts = st.sampled_from(["contiguous", "padded", "transposed", "columns"])
    model = torch.randn(*rows, vocabulary) * size
    teacher = model + distance * size * torch.randn(*rows, vocabulary)
    options = dict(draw(st.sampled_from(KINDS)))
    options["teacher_temperature"] = hotter
    options["model_temperature"] = hotter if draw(st.booleans()) else cooler
    uncond = None
    if draw(st.booleans()):
        uncond = (teacher + 0.3 * size * torch.randn_like(teacher)).to(dtype)
        options["guidance_scale"] = draw(st.sampled_from([0.0, 0.4, 1.0, 2.0, 7.5]))
        if draw(st.booleans()):
            options["guidance_scale"] = 3 * torch.rand(rows)
    if draw(st.booleans()):
        options["mask"] = torch.rand(rows) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(rows)
    return Case(
        strided(teacher.to(dtype), draw(layouts)), strided(model.to(dtype), draw(layouts)), uncond, options
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_contract(backend: str, case: Case) -> None:
    assert_close_to_float64(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("scale", [None, 0.0, 0.4, 1.0, 2.5, "rows"])
def test_float64_equals_the_composed_expression(
    backend: str, options: dict[str, Any], scale: Any
) -> None:
    """Method oracle 1: values and row gradients are those of KL, by torch's own differentiation."""
    tensors = [
        3 * torch.randn(4, 5, 9, dtype=torch.double) for _ in range(2 if scale is None else 3)
    ]
    options = options | {"teacher_temperature": 0.8, "model_temperature": 1.3}
    if scale is not None:
        options["guidance_scale"] = 4 * torch.rand(4, 5).double() if scale == "rows" else scale
    upstream = torch.randn(4, 5)
    case = Case(*tensors, *[None] * (3 - len(tensors)), options)
    value, grads = gradients(case.call(backend), tensors, upstream)
    true, true_grads = gradients(case.composed, tensors, upstream)
    torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_gradients_are_the_closed_forms(backend: str) -> None:
    """To the model: q - p, and q (log q - log p - KL(q || p)); each row sums to zero."""
    teacher, model = torch.randn(2, 6, 11, dtype=torch.double)
    p, q = teacher.softmax(-1), model.softmax(-1)
    ratio = model.log_softmax(-1) - teacher.log_softmax(-1)
    reverse = (q * ratio).sum(-1, keepdim=True)
    for kind, expected in (("forward_kl", q - p), ("reverse_kl", q * (ratio - reverse))):
        _, grads = gradients(
            Case(teacher, model, None, {"kind": kind}).call(backend), (teacher, model)
        )
        torch.testing.assert_close(grads[1], expected, rtol=1e-13, atol=1e-15)
        for gradient in grads:
            assert float(gradient.sum(-1).abs().max()) < 1e-15


# ---------------------------------------------------------------------------------------------------
# accuracy where the usual expression loses it


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    ("distance", "size", "offset"),
    [(1e-2, 1.0, 0.0), (1e-4, 1.0, 0.0), (1e-6, 1.0, 0.0), (1e-2, 20.0, 0.0), (1e-5, 20.0, 0.0),
     (1e-2, 3.0, 4096.0), (1e-3, 3.0, 4096.0)],
)  # fmt: skip
def test_nearly_equal_logits_do_not_cancel(
    backend: str, kind: str, distance: float, size: float, offset: float
) -> None:
    """Relative to float64, with no allowance for the error of a yardstick."""
    model = size * torch.randn(256, 300) + offset
    teacher = model + distance * size * torch.randn(256, 300)
    options = {"kind": kind, "teacher_temperature": 0.7, "model_temperature": 0.7}
    case = Case(teacher, model - offset, None, options)
    truth, truth_grads = gradients(case.double().call("reference"), case.double().tensors())
    torch.testing.assert_close(
        truth, case.composed(*case.double().tensors()), rtol=1e-3, atol=1e-14
    )
    value, grads = gradients(case.call(backend), case.tensors())
    for mine, true in zip((value, *grads), (truth, *truth_grads), strict=True):
        assert float((mine - true).norm() / true.norm()) < 1e-6
    # Each row by itself: the values are never negative, and never lose their leading digits.
    assert float(((value - truth).abs() / truth).max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(backend: str, kind: str, distance: float) -> None:
    """Both distributions hold about 1 - distance at one entry, whose gradient cancels in q - p."""
    rows, vocabulary = 256, 200
    winner = torch.randint(vocabulary, (rows, 1))

    def one_hot(distance: float) -> Tensor:
        logits = torch.randn(rows, vocabulary, dtype=torch.double)
        others = logits.scatter(1, winner, -torch.inf).logsumexp(1, keepdim=True)
        return logits.scatter(1, winner, others + torch.log(torch.tensor(1 / distance - 1))).float()

    case = Case(one_hot(distance), one_hot(distance / 2), None, {"kind": kind})
    _, truth = gradients(case.double().call("reference"), case.double().tensors())
    _, grads = gradients(case.call(backend), case.tensors())
    for mine, true in zip(grads, truth, strict=True):
        error = (mine - true).abs().gather(1, winner) / true.abs().gather(1, winner)
        assert float(error.median()) < 2e-5
        assert float(mine.double().sum(1).abs().max()) <= 1e-6 * float(mine.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("floor", [-1e4, -3e7, -1e30])
def test_an_entry_that_one_distribution_all_but_rules_out(
    backend: str, kind: str, floor: float
) -> None:
    """A huge log ratio where only the other side holds mass does not cost the digits of the rest."""
    teacher, model = torch.randn(2, 256, 5)
    (teacher if kind == "forward_kl" else model)[:, 0] = floor
    case = Case(teacher, model, None, {"kind": kind})
    truth, truth_grads = gradients(case.double().composed, case.double().tensors())
    value, grads = gradients(case.call(backend), case.tensors())
    for mine, true in zip((value, *grads), (truth, *truth_grads), strict=True):
        assert float((mine - true).norm() / true.norm()) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_sum_to_zero(backend: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    size = torch.logspace(-2, 3, 256)[:, None]
    tensors = [(torch.randn(256, 300) * size).to(dtype) for _ in range(3)]
    case = Case(*tensors, options | {"guidance_scale": 2.0})
    _, grads = gradients(case.call(backend), tensors)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # The reverse KL's gradient is a product with log q - log p, rounded at its size.
    ratio = (
        composed_rows(*tensors, kind=kind, guidance_scale=2.0).double()
        for kind in ("forward_kl", "reverse_kl")
    )
    rounding = 4 * torch.finfo(compute).eps * sum(ratio)
    underflow = 300 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for gradient in grads:
        sums, sizes = gradient.double().sum(1).abs(), gradient.double().abs().sum(1)
        assert bool((sums <= 4 * torch.finfo(dtype).eps * sizes + rounding + underflow).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_common_offsets_and_permutations_change_nothing(backend: str) -> None:
    # Multiples of 1/64 below 1000 stay exact in float32 when 8192 is added.
    teacher, model = (torch.randint(-500, 500, (2, 64, 50)) / 64).unbind()
    order = torch.randperm(50)
    for options in KINDS:
        value, grads = gradients(
            Case(teacher, model, None, options).call(backend), (teacher, model)
        )
        shifted, shifted_grads = gradients(
            Case(teacher, model, None, options).call(backend), (teacher + 8192, model)
        )
        assert_same_bits(value, shifted)
        for mine, theirs in zip(grads, shifted_grads, strict=True):
            assert_same_bits(mine, theirs)
        permuted, permuted_grads = gradients(
            Case(teacher, model, None, options).call(backend), (teacher[:, order], model[:, order])
        )
        torch.testing.assert_close(value, permuted, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grads[1][:, order], permuted_grads[1], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS)
def test_equal_logits_give_exactly_nothing(backend: str, options: dict[str, Any]) -> None:
    """Method oracle 4: the same weights, s = 1: no divergence and no gradient; another s gives both."""
    logits, uncond = 5 * torch.randn(64, 100), torch.randn(64, 100)
    for scale in (1.0, torch.ones(64)):
        case = Case(logits, logits.clone(), uncond, options | {"guidance_scale": scale})
        value, grads = gradients(case.call(backend), case.tensors())
        for zero in (value, *grads):
            assert_same_bits(zero.abs(), torch.zeros_like(zero))
    case = Case(logits, logits.clone(), uncond, options | {"guidance_scale": 2.0})
    value, grads = gradients(case.call(backend), case.tensors())
    assert float(value.abs().min()) > 0
    assert all(float(gradient.abs().max()) > 0 for gradient in grads)


# ---------------------------------------------------------------------------------------------------
# what the options mean


@pytest.mark.parametrize("backend", BACKENDS)
def test_jeffreys_is_linear_in_beta_with_the_two_kl_as_end_points(backend: str) -> None:
    """Method oracle 2, for beta inside and outside [0, 1]."""
    teacher, model = torch.randn(2, 6, 11)

    def run(**options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gradients(Case(teacher, model, None, options).call(backend), (teacher, model))

    forward, reverse = run(kind="forward_kl"), run(kind="reverse_kl")
    for beta, end in ((0.0, forward), (1, reverse)):
        value, grads = run(kind="jeffreys", beta=beta)
        assert_same_bits(value, end[0])
        for mine, theirs in zip(grads, end[1], strict=True):
            assert_same_bits(mine, theirs)
    for beta in (-0.2, 0.25, 3.0):
        value, grads = run(kind="jeffreys", beta=beta)
        torch.testing.assert_close(value, (1 - beta) * forward[0] + beta * reverse[0])
        for mine, first, second in zip(grads, forward[1], reverse[1], strict=True):
            torch.testing.assert_close(mine, (1 - beta) * first + beta * second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_kl_is_forward_kl_with_the_arguments_exchanged(backend: str) -> None:
    first, second = torch.randn(2, 6, 11)
    options = {"teacher_temperature": 0.7, "model_temperature": 2.0}
    swapped = {"teacher_temperature": 2.0, "model_temperature": 0.7}
    value, grads = gradients(
        Case(first, second, None, options | {"kind": "reverse_kl"}).call(backend), (first, second)
    )
    other, other_grads = gradients(
        Case(second, first, None, swapped).call(backend), (second, first)
    )
    torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[0], other_grads[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grads[1], other_grads[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_is_that_of_the_guided_logits(backend: str) -> None:
    teacher, model, uncond = torch.randn(3, 6, 11, dtype=torch.double)
    for scale in (-0.5, 0.0, 0.3, 1.0, 2.0):
        guided = uncond + scale * (teacher - uncond)
        case = Case(teacher, model, uncond, {"guidance_scale": scale})
        value, (dteacher, dmodel, duncond) = gradients(case.call(backend), case.tensors())
        expected, (dguided, dmodel_expected) = gradients(
            Case(guided, model, None, {}).call(backend), (guided, model)
        )
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(dmodel, dmodel_expected)
        torch.testing.assert_close(dteacher, scale * dguided)
        torch.testing.assert_close(duncond, (1 - scale) * dguided)
        per_row = case._replace(options={"guidance_scale": torch.full((6,), scale)})
        again, again_grads = gradients(per_row.call(backend), case.tensors())
        torch.testing.assert_close(again, value)
        for mine, theirs in zip(again_grads, (dteacher, dmodel, duncond), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_broadcast_to_the_rows(backend: str) -> None:
    teacher, model, uncond = torch.randn(3, 2, 3, 11)
    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        scale, weight, mask = 1 + torch.rand(shape), torch.rand(shape), torch.rand(shape) < 0.5
        narrow = {"guidance_scale": scale, "weight": weight, "mask": mask}
        wide = {name: tensor.expand(2, 3).clone() for name, tensor in narrow.items()}
        results = [
            gradients(Case(teacher, model, uncond, options).call(backend), (teacher, model, uncond))
            for options in (narrow, wide)
        ]
        assert_same_bits(results[0][0], results[1][0])
        for mine, theirs in zip(results[0][1], results[1][1], strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(backend: str) -> None:
    """Weights multiply each row; the mean divides by the number of counted rows alone."""
    tensors = list(torch.randn(2, 4, 5, 11))
    mask, weight = torch.rand(4, 5) < 0.6, torch.rand(4, 5)
    for options in ({}, {"mask": mask}, {"weight": weight}, {"mask": mask, "weight": weight}):
        case = Case(*tensors, None, options)
        plain = Case(*tensors, None, {}).call(backend)(*tensors)
        counted = options.get("mask", torch.ones_like(mask))
        expected = torch.where(counted, plain * options.get("weight", torch.ones(())), 0.0)
        assert_same_bits(case.call(backend)(*tensors), expected)
        for reduction, true in (("sum", expected.sum()), ("mean", expected.sum() / counted.sum())):
            value, grads = gradients(case.call(backend, reduction), tensors)
            torch.testing.assert_close(value, true)
            divisor = counted.sum() if reduction == "mean" else 1
            _, rows_grads = gradients(case.call(backend), tensors)
            for mine, theirs in zip(grads, rows_grads, strict=True):
                torch.testing.assert_close(mine, theirs / divisor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(4, 7), (0, 7), (3, 0, 5)])
def test_no_counted_row(backend: str, reduction: str, shape: tuple[int, ...]) -> None:
    tensors = [torch.full(shape, torch.nan) for _ in range(3)]
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    case = Case(*tensors, {"guidance_scale": 2.0, "mask": mask})
    value, grads = gradients(case.call(backend, reduction), tensors)
    assert_same_bits(value, torch.zeros(shape[:-1] if reduction == "none" else ()))
    for gradient in grads:
        assert_same_bits(gradient, torch.zeros(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (1,), (4, 1), (2, 1, 3, 5)])
def test_any_leading_shape(backend: str, shape: tuple[int, ...]) -> None:
    teacher, model = torch.randn(2, *shape)
    value, grads = gradients(Case(teacher, model, None, {}).call(backend), (teacher, model))
    assert value.shape == shape[:-1]
    torch.testing.assert_close(value, composed_rows(teacher, model), atol=1e-6, rtol=1e-5)
    if shape[-1] == 1:
        assert all(bool((zero == 0).all()) for zero in (value, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    teacher, model, uncond = torch.randn(3, 4, 5, 33)
    options = {"guidance_scale": 2.0, "kind": "jeffreys", "beta": 0.5}
    value, grads = gradients(
        Case(teacher, model, uncond, options).call(backend), (teacher, model, uncond)
    )
    for layouts in itertools.permutations(["padded", "columns", "transposed"]):
        views = [
            strided(t, layout) for t, layout in zip((teacher, model, uncond), layouts, strict=True)
        ]
        again, again_grads = gradients(Case(*views, options).call(backend), views)
        torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-6)
        for mine, theirs in zip(again_grads, grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    row = model[:1, :1].expand(4, 5, 33)
    run = Case(teacher, row, None, {}).call(backend)
    torch.testing.assert_close(
        run(teacher, row), run(teacher, row.contiguous()), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_value_and_gradients(backend: str) -> None:
    for first, second, third in itertools.product(DTYPES, repeat=3):
        tensors = [torch.randn(3, 5).to(t) for t in (first, second, third)]
        wide = torch.float64 in (first, second, third)
        for reduction in ("none", "mean"):
            value, grads = gradients(
                Case(*tensors, {"guidance_scale": 2.0}).call(backend, reduction), tensors
            )
            assert value.dtype == (torch.float64 if wide else torch.float32)
            assert [g.dtype for g in grads] == [first, second, third]
    weight = torch.ones(3, dtype=torch.double)
    assert (
        token_divergence(tensors[0], tensors[1], weight=weight, backend=backend).dtype
        == torch.float64
    )


# ---------------------------------------------------------------------------------------------------
# special values


INF = torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend: str) -> None:
    """0 log 0 = 0; a divergence from something to nothing is +inf; the unused part never leaks."""
    teacher = torch.tensor([[1.0, 2.0, -INF], [1.0, 2.0, 3.0], [1.0, -INF, 3.0]])
    model = torch.tensor([[0.5, 0.1, -INF], [0.5, 0.1, -INF], [0.5, 0.1, 0.2]])
    finite = composed_rows(teacher[:1, :2], model[:1, :2])
    for options, expected in (
        ({"kind": "forward_kl"}, [False, True, False]),
        ({"kind": "reverse_kl"}, [False, False, True]),
        ({"kind": "jeffreys", "beta": 0.5}, [False, True, True]),
        ({"kind": "jeffreys", "beta": 0.0}, [False, True, False]),
        ({"kind": "jeffreys", "beta": 1.0}, [False, False, True]),
    ):
        value = Case(teacher, model, None, options).call(backend)(teacher, model)
        assert (value == INF).tolist() == expected, options
        assert not value.isnan().any()
    forward, grads = gradients(Case(teacher, model, None, {}).call(backend), (teacher, model))
    torch.testing.assert_close(forward[:1], finite)
    p, q = teacher.softmax(-1), model.softmax(-1)
    torch.testing.assert_close(
        forward[2], (p[2, [0, 2]] * (p[2, [0, 2]] / q[2, [0, 2]]).log()).sum()
    )
    # q - p stays right where the value is infinite, as it does in F.kl_div.
    torch.testing.assert_close(grads[1], q - p)
    assert grads[0].isnan().all(dim=1).tolist() == [False, True, False]
    assert grads[0].isnan().any(dim=1).tolist() == [False, True, False]
    assert grads[0][0, 2] == 0
    assert grads[0][2, 1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_infinity_follows_from_the_logits_not_from_underflow(backend: str, kind: str) -> None:
    teacher, model = torch.tensor([[0.0, -500.0]]), torch.tensor([[0.0, -INF]])
    tensors = (teacher, model) if kind == "forward_kl" else (model, teacher)
    assert token_divergence(*tensors, kind=kind, backend=backend).item() == INF
    assert token_divergence(*reversed(tensors), kind=kind, backend=backend).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entries_filled_with_the_most_negative_number(
    backend: str, kind: str, temperature: float
) -> None:
    """masked_fill(finfo.min) is a common stand-in for -inf, and overflows when divided by T < 1."""
    teacher, model = torch.randn(2, 5, 8)
    teacher[:, 6:], model[:, 6:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    for other in (1.0, temperature):
        options = {"kind": kind, "teacher_temperature": temperature, "model_temperature": other}
        value, grads = gradients(
            Case(teacher, model, None, options).call(backend), (teacher, model)
        )
        cut, cut_grads = gradients(
            Case(teacher[:, :6], model[:, :6], None, options).call(backend),
            (teacher[:, :6], model[:, :6]),
        )
        torch.testing.assert_close(value, cut)
        for mine, theirs in zip(grads, cut_grads, strict=True):
            torch.testing.assert_close(mine[:, :6], theirs)
            assert float(mine[:, 6:].abs().max()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_logits_at_minus_infinity(backend: str) -> None:
    """-inf in both branches is -inf; -inf in the conditional branch alone too, for s >= 1."""
    teacher, uncond, model = torch.randn(3, 4, 6)
    teacher[:, 0] = uncond[:, 0] = model[:, 0] = -INF
    teacher[:, 1] = model[:, 1] = -INF
    for scale in (1.0, 2.0, torch.tensor([1.0, 2.0, 1.0, 3.0])):
        case = Case(teacher, model, uncond, {"guidance_scale": scale})
        value, grads = gradients(case.call(backend), case.tensors())
        kept = [t[:, 2:] for t in case.tensors()]
        expected, expected_grads = gradients(
            Case(*kept, {"guidance_scale": scale}).call(backend), kept
        )
        torch.testing.assert_close(value, expected)
        for mine, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(mine[:, 2:], theirs)
            assert float(mine[:, :2].abs().max()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_broken_rows_stay_alone(backend: str, options: dict[str, Any], which: int) -> None:
    """NaN, +inf, or nothing but -inf: that row is NaN, in the value and in every gradient."""
    tensors = list(torch.randn(3, 5, 9))
    tensors[which][1, 4] = torch.nan
    tensors[which][2] = -INF
    tensors[which][3, 0] = INF
    tensors[0][1, 7] = tensors[1][1, 7] = -INF
    if which == 2:
        # Unconditional logits of -inf alone guide to +inf; one of them takes its -inf from both.
        tensors[0][2, 0] = -INF
    case = Case(*tensors, options | {"guidance_scale": 2.0})
    value, grads = gradients(case.call(backend), tensors)
    broken = torch.tensor([False, True, True, True, False])
    assert_same_bits(value.isnan(), broken)
    for gradient in grads:
        assert_same_bits(gradient.isnan(), broken[:, None].expand(5, 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_extreme_temperature_is_the_flat_law(backend: str, dtype: torch.dtype) -> None:
    """Absent entries weigh nothing there either."""
    teacher, model = torch.randn(4, 6).to(dtype), torch.randn(4, 6).to(dtype)
    teacher[0, 2] = model[0, 2] = -INF
    flat = torch.where(teacher == -INF, teacher, 0.0)
    for temperature in (1e30, 1e37):
        found = token_divergence(teacher, model, teacher_temperature=temperature, backend=backend)
        expected = token_divergence(flat, model, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_of_one_entry(backend: str, value: float) -> None:
    model = torch.tensor([[0.2]], requires_grad=True)
    found = token_divergence(torch.tensor([[value]]), model, backend=backend)
    (gradient,) = torch.autograd.grad(found, model)
    assert bool(found.isnan())
    assert bool(gradient.isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, INF, -INF])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_uncounted_rows_are_never_read(backend: str, garbage: float, reduction: str) -> None:
    mask = torch.tensor([True, False, True, False])
    clean = list(torch.randn(3, 4, 9))
    poisoned = [torch.where(mask[:, None], t, garbage) for t in clean]
    scale, weight = 1 + torch.rand(4), torch.rand(4)
    upstream = torch.where(mask, torch.rand(4), garbage) if reduction == "none" else None
    results = []
    for tensors, fill in ((clean, 1.0), (poisoned, garbage)):
        options = {"guidance_scale": torch.where(mask, scale, fill), "mask": mask}
        options["weight"] = torch.where(mask, weight, fill)
        case = Case(*tensors, options)
        results.append(gradients(case.call(backend, reduction), tensors, upstream))
    assert_same_bits(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert_same_bits(mine, theirs)
        assert bool((theirs[~mask] == 0).all())


# ---------------------------------------------------------------------------------------------------
# derivatives


def small_case(options: dict[str, Any], infinite: bool = False) -> Case:
    tensors = [torch.randn(3, 4, 6, dtype=torch.double) for _ in range(3)]
    if infinite:
        for tensor in tensors:
            tensor[0, :, 2:4] = -INF
    rows = {
        "guidance_scale": 0.5 + 2 * torch.rand(3, 1).double(),
        "mask": torch.rand(3, 4) < 0.7,
        "weight": torch.rand(4).double(),
    }
    return Case(*tensors, options | rows | {"teacher_temperature": 0.8, "model_temperature": 1.4})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "reduction", "temperatures"),
    [(KINDS[0], "none", (0.8, 1.4)), (KINDS[1], "mean", (1.0, 1.0)), (KINDS[2], "sum", (0.7, 0.7))],
)
def test_gradcheck(
    backend: str, options: dict[str, Any], reduction: str, temperatures: tuple[float, float]
) -> None:
    case = small_case(options)
    case.options.update(
        zip(("teacher_temperature", "model_temperature"), temperatures, strict=True)
    )
    leaves = [t.requires_grad_() for t in case.tensors()]
    assert torch.autograd.gradcheck(case.call(backend, reduction), leaves)
    assert torch.autograd.gradgradcheck(case.call(backend, reduction), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", KINDS[:3])
@pytest.mark.parametrize("poison", [-INF, torch.nan])
def test_second_derivatives_do_not_see_what_is_absent(
    backend: str, options: dict[str, Any], poison: float
) -> None:
    """-inf entries in every distribution, or garbage in a masked row, leave no NaN behind."""
    case = small_case(options, infinite=poison == -INF)
    if poison != -INF:
        rows = case.options["mask"]
        case.options["weight"] = torch.where(rows, 0.5, torch.nan).double()
        case.options["guidance_scale"] = torch.where(rows, 2.0, torch.nan).double()
        case = Case(
            *(torch.where(rows[..., None], t, torch.nan) for t in case.tensors()), case.options
        )
    leaves = [t.requires_grad_() for t in case.tensors()]
    upstream = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    first = torch.autograd.grad(case.call(backend)(*leaves), leaves, upstream, create_graph=True)
    directions = [torch.randn_like(g) for g in first]
    second = torch.autograd.grad(first, [*leaves, upstream], directions)
    assert all(bool(t.isfinite().all()) for t in (*first, *second))
    # The derivative of the gradient along the logits that are there, by central differences.
    step = 1e-6 * torch.randn(3, 4, 6, dtype=torch.double)

    def slope(sign: float) -> Tensor:
        moved = [t.detach() + sign * step for t in leaves]
        _, grads = gradients(case.call(backend), moved, upstream.detach())
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    present = step.where(leaves[0].isfinite(), 0.0)
    expected = sum((second[i] * present).sum() for i in range(3))
    torch.testing.assert_close((slope(1) - slope(-1)) / 2, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_specification_backward_is_the_derivative_of_its_forward(
    options: dict[str, Any], infinite: bool, reduction: str
) -> None:
    """torch differentiates the specification's forward; its written-out backward says the same."""
    case = small_case(options, infinite)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options["kind"], options.get("beta"))
    teacher, model, uncond = (t.requires_grad_() for t in case.tensors())
    arguments = (
        teacher, model, uncond, 1.0, case.options["guidance_scale"], 0.8, 1.4, 1 - beta, beta,
        case.options["mask"], case.options["weight"].expand(3, 4), reduction,
    )  # fmt: skip
    value = specification.token_divergence(*arguments)
    upstream = torch.randn_like(value)
    theirs = torch.autograd.grad(value, (teacher, model, uncond), upstream)
    ours = specification.token_divergence_backward(upstream, *arguments, [True] * 3)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradients_only_where_required(backend: str, wanted: int) -> None:
    case = small_case({"kind": "jeffreys", "beta": 0.3})
    _, everything = gradients(case.call(backend), case.tensors())
    leaves = [
        t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.tensors())
    ]
    case.call(backend)(*leaves).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        if wanted >> i & 1:
            assert_same_bits(leaf.grad, full)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_recorded_when_nothing_requires_a_gradient(backend: str) -> None:
    case = small_case({})
    assert not case.call(backend)(*case.tensors()).requires_grad


# ---------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_is_bitwise_eager(backend: str, reduction: str) -> None:
    case = small_case({"kind": "jeffreys", "beta": 0.3})
    assert_compiles_bitwise(case.call(backend, reduction), *[t.float() for t in case.tensors()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_half_precision_without_options(backend: str) -> None:
    run = Case(*torch.randn(2, 4, 5, 33).bfloat16(), None, {}).call(backend, "mean")
    assert_compiles_bitwise(run, *[torch.randn(4, 5, 33).bfloat16() for _ in range(2)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    case = small_case({"kind": "reverse_kl"})
    assert_exports(case.call(backend, "sum"), *[t.float() for t in case.tensors()])


def operator_arguments(dtype: torch.dtype, reduction: str, bare: bool = False) -> tuple[Any, ...]:
    case = small_case({})
    teacher, model, uncond = (t.to(dtype).requires_grad_() for t in case.tensors())
    if bare:
        return (teacher, model, None, 1.0, None, 1.0, 1.0, 1.0, 0.0, None, None, reduction)
    return (
        teacher, model, uncond, 1.0, case.options["guidance_scale"], 0.8, 1.4, 0.7, 0.3,
        case.options["mask"], case.options["weight"], reduction,
    )  # fmt: skip


NAMESPACES = {"reference": torch.ops.softdimo_reference, "cpp": torch.ops.softdimo}


def saved(backend: str, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """What the forward operator of a backend hands to its backward besides the inputs."""
    if backend == "reference":
        return ()
    return torch.ops.softdimo.token_divergence(*inputs)[1:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "reduction", "bare"),
    [(torch.float32, "none", False), (torch.bfloat16, "mean", False), (torch.float64, "sum", True)],
)
def test_opcheck_forward(backend: str, dtype: torch.dtype, reduction: str, bare: bool) -> None:
    operator = NAMESPACES[backend].token_divergence
    torch.library.opcheck(operator, operator_arguments(dtype, reduction, bare))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck_backward(backend: str, reduction: str) -> None:
    inputs = [
        t.detach() if isinstance(t, Tensor) else t
        for t in operator_arguments(torch.float32, reduction)
    ]
    grad = torch.randn((3, 4) if reduction == "none" else ())
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            NAMESPACES[backend].token_divergence_backward,
            (grad, *inputs, *saved(backend, inputs), wanted),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_double_backward(backend: str) -> None:
    inputs = operator_arguments(torch.float64, "sum", bare=True)
    grad = torch.randn((), dtype=torch.double, requires_grad=True)
    statistics = [t.detach() for t in saved(backend, inputs)]
    torch.library.opcheck(
        NAMESPACES[backend].token_divergence_backward,
        (grad, *inputs, *statistics, [False, True, False]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    case = small_case({"kind": "jeffreys", "beta": 0.3})
    for dtype in (torch.float32, torch.float64):
        tensors = [t.to(dtype) for t in case.tensors()]
        value, grads = gradients(case.call(backend), tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, again_grads = gradients(case.call(backend), tensors)
        assert_same_bits(value, again)
        for mine, theirs in zip(grads, again_grads, strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    case = small_case({"kind": "reverse_kl"})
    value, plain = gradients(case.call(backend), case.tensors())
    again, replayed = gradients(
        lambda *t: checkpoint(case.call(backend), *t, use_reentrant=False), case.tensors()
    )
    assert_same_bits(value, again)
    for mine, theirs in zip(plain, replayed, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jvp_raise_clearly(backend: str) -> None:
    teacher, model = torch.randn(2, 3, 4, 8)
    with pytest.raises(RuntimeError, match=r"token_divergence does not support torch\.vmap"):
        torch.vmap(partial(token_divergence, backend=backend))(teacher, model)
    for place, name in enumerate(("teacher_logits", "model_logits")):
        tensors = [teacher, model]

        def run(z: Tensor, place: int = place, tensors: list[Tensor] = tensors) -> Tensor:
            return token_divergence(*tensors[:place], z, *tensors[place + 1 :], backend=backend)

        with pytest.raises(RuntimeError, match=f"{name} carries a forward-mode tangent"):
            torch.func.jvp(run, (teacher,), (teacher,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_under_compile_raises_clearly(backend: str) -> None:
    teacher, model = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    value = torch.compile(lambda z: token_divergence(teacher, z, backend=backend))(model)
    (gradient,) = torch.autograd.grad(value, model, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
def test_which_kernel_runs(backend: str | None, dtype: torch.dtype) -> None:
    teacher, model = torch.randn(2, 4, 8, dtype=dtype).requires_grad_()
    ran = operators_run(lambda: token_divergence(teacher, model, backend=backend).backward())
    namespace = "softdimo_reference" if backend == "reference" else "softdimo"
    assert ran == [f"{namespace}::token_divergence{part}" for part in ("", "_backward")]
    assert explain(token_divergence, teacher, model, backend=backend).backend == (backend or "cpp")


def test_explain_counts_every_input_once() -> None:
    teacher, model = torch.randn(2, 6, 5, 100)
    explanation = explain(token_divergence, teacher, model)
    assert explanation.bytes == 4 * (2 * 3000 + 1)
    assert explanation.exponentials == 6000
    guided = explain(
        token_divergence, teacher, model.bfloat16(), teacher_uncond_logits=teacher, guidance_scale=2.0,
        reduction="none",
    )  # fmt: skip
    assert guided.bytes == 4 * 2 * 3000 + 2 * 3000 + 4 * 30
    assert guided.flops > explanation.flops


# ---------------------------------------------------------------------------------------------------
# bad input


Z, M = torch.randn(4, 6, 10), torch.zeros(4, 6, dtype=torch.bool)
W = torch.ones(4, 6)


def guided(uncond: Any, scale: Any) -> dict[str, Any]:
    return {"teacher_uncond_logits": uncond, "guidance_scale": scale}


BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "teacher_logits must be a torch.Tensor, got list", ([1.0], Z), {}),
    (TypeError, "teacher_logits must have dtype .* got torch.int64", (Z.long(), Z), {}),
    (TypeError, "model_logits must be a torch.Tensor, got NoneType", (Z, None), {}),
    (TypeError, "model_logits must have dtype .* got torch.complex64", (Z, Z.to(torch.complex64)), {}),
    (ValueError, r"teacher_logits must have shape \[\.\.\., V\], got 0-d", (Z.sum(), Z), {}),
    (ValueError, "teacher_logits must have a vocabulary V >= 1", (Z[..., :0], Z[..., :0]), {}),
    (ValueError, r"model_logits must have the shape of teacher_logits .* got \[6, 10\]", (Z, Z[0]), {}),
    (ValueError, "model_logits is on meta, but teacher_logits is on cpu", (Z, Z.to("meta")), {}),
    (ValueError, "kind must be one of 'forward_kl', .* got 'kl'", (Z, Z), {"kind": "kl"}),
    (ValueError, "beta is required by kind='jeffreys', got None", (Z, Z), {"kind": "jeffreys"}),
    (ValueError, "beta must be None for kind='forward_kl' .* got 0.5", (Z, Z), {"beta": 0.5}),
    (ValueError, "beta must be None for kind='reverse_kl'", (Z, Z), {"kind": "reverse_kl", "beta": 1.0}),
    (TypeError, "beta must be a float, got str", (Z, Z), {"kind": "jeffreys", "beta": "0"}),
    (ValueError, "beta must be finite, got nan", (Z, Z), {"kind": "jeffreys", "beta": float("nan")}),
    (ValueError, r"teacher_uncond_logits is required .* is 2.0\), got None", (Z, Z), {"guidance_scale": 2}),
    (ValueError, r"teacher_uncond_logits is required .* a tensor\), got", (Z, Z), {"guidance_scale": W}),
    (TypeError, "teacher_uncond_logits must be a torch.Tensor, got float", (Z, Z), guided(1.0, 2.0)),
    (ValueError, r"teacher_uncond_logits must have the shape .* got \[6, 10\]", (Z, Z), guided(Z[0], 2)),
    (TypeError, "guidance_scale must be a float, got str", (Z, Z), {"guidance_scale": "2"}),
    (ValueError, "guidance_scale must be finite, got inf", (Z, Z), guided(Z, float("inf"))),
    (ValueError, r"guidance_scale must broadcast .* got shape \[4\]", (Z, Z), guided(Z, W[:, 0])),
    (TypeError, "guidance_scale must have dtype", (Z, Z), guided(Z, M)),
    (ValueError, "guidance_scale gets no gradient", (Z, Z), guided(Z, W.clone().requires_grad_())),
    (ValueError, "teacher_temperature must be positive .* got 0", (Z, Z), {"teacher_temperature": 0}),
    (ValueError, "model_temperature must be positive .* got -1.0", (Z, Z), {"model_temperature": -1.0}),
    (TypeError, "model_temperature must be a float, got Tensor", (Z, Z), {"model_temperature": W}),
    (TypeError, "mask must have dtype bool, got torch.float32", (Z, Z), {"mask": W}),
    (TypeError, "mask must be a bool tensor or None, got list", (Z, Z), {"mask": [True]}),
    (ValueError, r"mask must broadcast to the rows .* got shape \[4\]", (Z, Z), {"mask": M[:, 0]}),
    (TypeError, "weight must be a torch.Tensor, got float", (Z, Z), {"weight": 1.0}),
    (ValueError, r"weight must broadcast to the rows .* got shape \[4, 6, 10\]", (Z, Z), {"weight": Z}),
    (ValueError, "weight gets no gradient", (Z, Z), {"weight": W.clone().requires_grad_()}),
    (ValueError, "weight is on meta, but the input is on cpu", (Z, Z), {"weight": W.to("meta")}),
    (ValueError, "reduction must be one of .* got 'batchmean'", (Z, Z), {"reduction": "batchmean"}),
    (ValueError, "backend must be None or one of .* got 'numpy'", (Z, Z), {"backend": "numpy"}),
    (ValueError, "backend='cuda' cannot run: this operator has no CUDA kernel", (Z, Z), {"backend": "cuda"}),
    (ValueError, "backend='triton' cannot run: .* no Triton kernel", (Z, Z), {"backend": "triton"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD)
def test_bad_input_names_the_argument(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^token_divergence: {message}"):
        token_divergence(*arguments, **options)


def test_settings_that_require_gradients_pass_where_nothing_is_recorded() -> None:
    expected = token_divergence(Z, -Z, weight=W)
    with torch.no_grad():
        value = token_divergence(Z, -Z, weight=W.clone().requires_grad_())
    assert torch.equal(value, expected)

"""token_divergence against the float64 specification, F.kl_div and its own identities."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import (
    assert_same_bits,
    gradients,
)
from support.divergence import (
    BACKENDS,
    DTYPES,
    KINDS,
    Case,
    assert_close_to_float64,
    composed_rows,
    strided,
)
from torch import Tensor

from softdimo_fast.ops.token_divergence import token_divergence


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

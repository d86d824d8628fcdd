"""distribution_matching_loss against token_divergence, the method's equations and float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

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
from softdimo_fast.ops.distribution_matching_loss import distribution_matching_loss
from softdimo_fast.ops.reference import divergence as specification
from softdimo_fast.ops.token_divergence import token_divergence

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NORMALIZATIONS = ("sum", "batch", "masked")
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": -0.2},
)


def student_gradient(
    teacher: Tensor, auxiliary: Tensor, mask: Tensor, student: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The value, and the gradient to a student full of NaN (its values are never read)."""
    if student is None:
        student = torch.full_like(auxiliary, torch.nan)
    value, (gradient,) = gradients(
        lambda z: distribution_matching_loss(z, teacher, auxiliary, mask, **options), (student,)
    )
    return value, gradient


def row_factors(mask: Tensor, normalization: str) -> Tensor:
    """What each row is multiplied by, written out sample by sample."""
    factors = torch.zeros(mask.shape, dtype=torch.double)
    for sample, counted in enumerate(mask):
        if normalization == "sum":
            factors[sample] = 1.0
        elif normalization == "batch":
            factors[sample] = 1 / len(mask)
        else:
            factors[sample] = 1 / (len(mask) * max(int(counted.sum()), 1))
    return factors * mask


def composed(
    auxiliary: Tensor, teacher: Tensor, mask: Tensor, uncond: Tensor | None = None, **options: Any
) -> Tensor:
    """What a user would write with log_softmax; its gradient to ``auxiliary`` is the student's."""
    scale, weight = options.get("guidance_scale", 1.0), options.get("weight")
    if uncond is not None:
        teacher = uncond + scale * (teacher - uncond)
    log_p = torch.log_softmax(teacher / options.get("teacher_temperature", 1.0), dim=-1)
    log_q = torch.log_softmax(auxiliary / options.get("auxiliary_temperature", 1.0), dim=-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options["kind"], options.get("beta"))
    assert beta is not None
    rows = ((1 - beta) * forward + beta * reverse) * (1.0 if weight is None else weight)
    return (rows * row_factors(mask, options["normalization"]).to(rows.dtype)).sum()


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, torch.dtype, dict[str, Any]]:
    """(auxiliary, teacher and perhaps uncond), mask, the student's dtype, options."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, vocabulary = (4, 80), draw(st.integers(1, 70) | st.sampled_from([128, 255, 520]))
    dtype, temperature = draw(st.sampled_from(DTYPES)), 10.0 ** draw(st.floats(-2, 2))
    size = min(draw(st.sampled_from([0.1, 1.0, 5.0, 30.0])) * temperature, 1e4)
    tensors = [
        (size * torch.randn(*rows, vocabulary)).to(dtype) for _ in range(draw(st.integers(2, 3)))
    ]
    if draw(st.booleans()):
        tensors = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    options = dict(draw(st.sampled_from(KINDS)))
    options["normalization"] = draw(st.sampled_from(NORMALIZATIONS))
    options["teacher_temperature"] = temperature
    options["auxiliary_temperature"] = temperature * draw(st.sampled_from([1.0, 1.5]))
    if len(tensors) == 3:
        options["guidance_scale"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(rows)
    mask = torch.rand(rows) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    mask[0] = mask[0] & draw(st.booleans())
    return tensors, mask, draw(st.sampled_from(DTYPES)), options


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_contract(
    backend: str, case: tuple[list[Tensor], Tensor, torch.dtype, dict[str, Any]]
) -> None:
    tensors, mask, dtype, options = case
    auxiliary, teacher, *uncond = tensors
    student = torch.full(auxiliary.shape, torch.nan, dtype=dtype)
    named = {"teacher_uncond_logits": uncond[0]} if uncond else {}
    value, gradient = student_gradient(
        teacher, auxiliary, mask, student, backend=backend, **named, **options
    )
    yardstick, (theirs,) = gradients(
        lambda z: composed(z, teacher, mask, *uncond, **options), (auxiliary,)
    )
    wide = [t.double() for t in tensors]
    truth, (true,) = gradients(lambda z: composed(z, wide[1], mask, *wide[2:], **options), wide[:1])
    is_wide = torch.float64 in (dtype, auxiliary.dtype)
    assert value.dtype == (torch.float64 if is_wide else torch.float32)
    assert gradient.dtype == dtype
    floor = 1e-12 if auxiliary.dtype == torch.float64 else 2e-6
    assert_contract(value, yardstick, truth, floor=floor)
    floor = max(floor, FLOORS[dtype], FLOORS[auxiliary.dtype])
    assert_contract(gradient, theirs.to(dtype), true, floor=floor, what="gradient of student")
    assert bool((gradient[~mask] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("options", KINDS)
def test_student_gets_the_gradient_of_the_auxiliary(
    backend: str, options: dict[str, Any], normalization: str
) -> None:
    """The true gradient of the value with respect to auxiliary_logits, 1 / T included."""
    teacher, auxiliary, uncond = torch.randn(3, 3, 5, 9, dtype=torch.double)
    mask, weight = torch.rand(3, 5) < 0.6, torch.rand(3, 5)
    mask[1] = False
    shared = options | {
        "teacher_uncond_logits": uncond, "guidance_scale": 1 + torch.rand(3, 1), "weight": weight,
        "teacher_temperature": 0.8,
    }  # fmt: skip
    value, gradient = student_gradient(
        teacher,
        auxiliary,
        mask,
        auxiliary_temperature=1.3,
        normalization=normalization,
        **shared,
        backend=backend,
    )
    factors = row_factors(mask, normalization)

    def divergence(z: Tensor) -> Tensor:
        rows = token_divergence(
            teacher, z, model_temperature=1.3, reduction="none", **shared, backend=backend
        )
        return (rows * factors).sum()

    expected, (true,) = gradients(divergence, (auxiliary,))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, true)
    assert bool((gradient[~mask] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_the_pseudo_losss(backend: str) -> None:
    """Method oracle 3: dL/dz = g / B, the gradient of Di[M]O's 1/2 |z - sg(z - g)|^2 / B."""
    student, teacher, auxiliary = torch.randn(3, 4, 6, 11, dtype=torch.double)
    mask = torch.rand(4, 6) < 0.6
    p, q = teacher.softmax(-1), auxiliary.softmax(-1)
    kl = (q * (q / p).log()).sum(-1, keepdim=True)
    for kind, g in (("forward_kl", q - p), ("reverse_kl", q * ((q / p).log() - kl))):
        g = torch.where(mask[..., None], g, 0.0)

        def pseudo_loss(z: Tensor, g: Tensor = g) -> Tensor:
            return 0.5 * ((z - (z - g).detach()) ** 2).sum() / 4

        _, (expected,) = gradients(pseudo_loss, (student,))
        _, gradient = student_gradient(
            teacher, auxiliary, mask, student, kind=kind, backend=backend
        )
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_means_add_up_whatever_the_split(backend: str) -> None:
    """ "sum" of the parts is "sum" of the whole: accumulation and world size do not change it."""
    teacher, auxiliary = torch.randn(2, 6, 5, 9, dtype=torch.double)
    mask = torch.rand(6, 5) < 0.6
    whole, whole_gradient = student_gradient(
        teacher, auxiliary, mask, normalization="sum", backend=backend
    )
    parts = [
        student_gradient(teacher[i], auxiliary[i], mask[i], normalization="sum", backend=backend)
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(value for value, _ in parts), whole)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_weights_give_no_gradient_without_guidance(backend: str) -> None:
    """Method oracle 4: the first step's gradient comes from the guidance alone."""
    logits, uncond = 4 * torch.randn(2, 3, 5, 50)
    mask = torch.ones(3, 5, dtype=torch.bool)
    for options in KINDS:
        for scale, zero in ((1.0, True), (2.0, False)):
            value, gradient = student_gradient(
                logits,
                logits.clone(),
                mask,
                teacher_uncond_logits=uncond,
                guidance_scale=scale,
                **options,
                backend=backend,
            )
            assert (float(value) == 0) == zero
            assert (float(gradient.abs().max()) == 0) == zero


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_beta_with_the_two_kl_as_end_points(backend: str) -> None:
    """Method oracle 2."""
    teacher, auxiliary = torch.randn(2, 3, 5, 9)
    mask = torch.rand(3, 5) < 0.6
    forward = student_gradient(teacher, auxiliary, mask, backend=backend)
    reverse = student_gradient(teacher, auxiliary, mask, kind="reverse_kl", backend=backend)
    for beta in (0.0, 1.0, -0.2, 2.0):
        mixed = student_gradient(
            teacher, auxiliary, mask, kind="jeffreys", beta=beta, backend=backend
        )
        for mine, first, second in zip(mixed, forward, reverse, strict=True):
            torch.testing.assert_close(mine, (1 - beta) * first + beta * second)
            if beta in (0, 1):
                assert_same_bits(mine, second if beta else first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_flows_to_teacher_or_auxiliary(backend: str) -> None:
    student, teacher, auxiliary, uncond = torch.randn(4, 3, 5, 9, dtype=torch.double).unbind()
    leaves = [t.clone().requires_grad_() for t in (student, teacher, auxiliary, uncond)]
    mask = torch.rand(3, 5) < 0.6
    value = distribution_matching_loss(
        *leaves[:3], mask, teacher_uncond_logits=leaves[3], guidance_scale=2.0, backend=backend
    )
    first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    assert [g is None for g in first] == [False, True, True, True]
    # That gradient is a constant: no second derivative reaches them, or the student.
    second = torch.autograd.grad(first[0].square().sum(), leaves, allow_unused=True)
    assert second == (None,) * 4
    frozen = distribution_matching_loss(student, *leaves[1:3], mask, backend=backend)
    assert not frozen.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_upstream_gradients_scale_and_their_derivative_is_the_gradient(
    backend: str, normalization: str
) -> None:
    teacher, auxiliary = torch.randn(2, 3, 5, 9, dtype=torch.double)
    student = torch.randn(3, 5, 9, dtype=torch.double, requires_grad=True)
    mask = torch.rand(3, 5) < 0.6
    upstream = torch.tensor(2.5, dtype=torch.double, requires_grad=True)
    value = distribution_matching_loss(
        student, teacher, auxiliary, mask, normalization=normalization, backend=backend
    )
    (scaled,) = torch.autograd.grad(value, student, upstream, create_graph=True)
    _, gradient = student_gradient(
        teacher, auxiliary, mask, normalization=normalization, backend=backend
    )
    torch.testing.assert_close(scaled, 2.5 * gradient)
    direction = torch.randn_like(gradient)
    (second,) = torch.autograd.grad(scaled, upstream, direction)
    torch.testing.assert_close(second, (gradient * direction).sum())


@pytest.mark.parametrize("reduction", NORMALIZATIONS)
@pytest.mark.parametrize("options", KINDS)
def test_specification_backward_is_the_derivative_of_its_forward(
    options: dict[str, Any], reduction: str
) -> None:
    """torch differentiates the specification's forward with respect to the auxiliary."""
    teacher, auxiliary, uncond = torch.randn(3, 3, 5, 9, dtype=torch.double)
    mask, weight = torch.rand(3, 5) < 0.6, torch.rand(3, 5)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options["kind"], options.get("beta"))
    assert beta is not None
    settings = (mask, uncond, 2.0, None, 0.8, 1.4, 1 - beta, beta, weight, reduction)
    upstream = torch.randn((), dtype=torch.double)
    _, (true,) = gradients(
        lambda z: specification.distribution_matching_loss(z, teacher, z, *settings),
        (auxiliary,),
        upstream,
    )
    ours = specification.distribution_matching_loss_backward(
        upstream, auxiliary, teacher, auxiliary, *settings, [True]
    )
    torch.testing.assert_close(ours, true)


# ---------------------------------------------------------------------------------------------------
# shapes, dtypes, special values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (2, 3, 2, 7), (0, 7), (3, 0, 7), (0, 3, 7)])
def test_any_leading_shape(backend: str, shape: tuple[int, ...], normalization: str) -> None:
    teacher, auxiliary = torch.randn(2, *shape)
    for fraction in (0.0, 0.5, 1.0):
        mask = torch.rand(shape[:-1]) < fraction
        value, gradient = student_gradient(
            teacher, auxiliary, mask, normalization=normalization, backend=backend
        )
        rows = token_divergence(
            teacher, auxiliary, mask=mask, reduction="none", backend=backend
        ).double()
        expected = (rows * row_factors(mask, normalization)).sum().float()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert gradient.shape == shape
        assert bool((gradient[~mask] == 0).all())
        if not mask.any():
            assert value == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_settings_broadcast(backend: str) -> None:
    teacher, auxiliary, uncond = torch.randn(3, 2, 3, 9)
    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        mask, weight, scale = torch.rand(shape) < 0.7, torch.rand(shape), 1 + torch.rand(shape)
        results = [
            student_gradient(
                teacher, auxiliary, m, weight=w, guidance_scale=s, teacher_uncond_logits=uncond,
                normalization="masked", backend=backend)
            for m, w, s in (
                (mask, weight, scale),
                tuple(t.expand(2, 3).contiguous() for t in (mask, weight, scale)),
            )
        ]  # fmt: skip
        for mine, theirs in zip(*results, strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_value_and_gradient(backend: str) -> None:
    mask = torch.tensor([[True, False, True]])
    for dtypes in itertools.product(DTYPES, repeat=3):
        student, teacher, auxiliary = (torch.randn(1, 3, 5).to(dtype) for dtype in dtypes)
        value, gradient = student_gradient(teacher, auxiliary, mask, student, backend=backend)
        assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        assert gradient.dtype == dtypes[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_unmasked_rows_and_the_student_are_never_read(
    backend: str, garbage: float, normalization: str
) -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    clean = torch.randn(3, 3, 2, 9)
    poisoned = torch.where(mask[..., None], clean, garbage)
    results = []
    for (teacher, auxiliary, uncond), fill in ((clean, 0.5), (poisoned, garbage)):
        results.append(
            student_gradient(
                teacher, auxiliary, mask, torch.full((3, 2, 9), fill), teacher_uncond_logits=uncond,
                guidance_scale=torch.where(mask, 2.0, fill), weight=torch.where(mask, 0.7, fill),
                normalization=normalization, backend=backend,
            )
        )  # fmt: skip
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs)
    assert bool((results[1][1][~mask] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_stay_alone(backend: str) -> None:
    teacher, auxiliary = torch.randn(2, 2, 3, 9)
    teacher[0, 1, 4] = torch.nan
    auxiliary[1, 0] = -torch.inf
    value, gradient = student_gradient(
        teacher, auxiliary, torch.ones(2, 3, dtype=torch.bool), backend=backend
    )
    broken = torch.tensor([[False, True, False], [True, False, False]])
    assert value.isnan()
    assert_same_bits(gradient.isnan(), broken[..., None].expand(2, 3, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_at_minus_infinity_in_every_distribution(backend: str) -> None:
    """A dropped [MASK] column: -inf everywhere changes nothing and gets no gradient."""
    teacher, auxiliary, uncond = torch.randn(3, 2, 3, 9)
    mask = torch.ones(2, 3, dtype=torch.bool)
    cut, cut_gradient = student_gradient(
        teacher, auxiliary, mask, teacher_uncond_logits=uncond, guidance_scale=2.0, backend=backend
    )
    wide = [F.pad(t, (0, 1), value=-torch.inf) for t in (teacher, auxiliary, uncond)]
    value, gradient = student_gradient(
        wide[0], wide[1], mask, teacher_uncond_logits=wide[2], guidance_scale=2.0, backend=backend
    )
    torch.testing.assert_close(value, cut)
    torch.testing.assert_close(gradient[..., :9], cut_gradient)
    assert bool((gradient[..., 9] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    teacher, auxiliary = torch.randn(2, 4, 5, 33)
    mask = torch.rand(4, 5) < 0.6
    value, gradient = student_gradient(teacher, auxiliary, mask, backend=backend)
    wide = torch.full((4, 5, 40), torch.nan)
    wide[..., :33] = teacher
    columns = auxiliary.transpose(1, 2).contiguous().transpose(1, 2)
    expanded = torch.zeros(()).expand(4, 5, 33)
    again, again_gradient = student_gradient(
        wide[..., :33], columns, mask.t().contiguous().t(), expanded, backend=backend
    )
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(again_gradient, gradient)


# ---------------------------------------------------------------------------------------------------
# torch


def small_call(normalization: str = "masked", **options: Any) -> tuple[Any, Tensor]:
    teacher, auxiliary, uncond = torch.randn(3, 3, 4, 7)
    mask, weight = torch.rand(3, 4) < 0.6, torch.rand(4)

    def run(student: Tensor) -> Tensor:
        return distribution_matching_loss(
            student, teacher, auxiliary, mask, teacher_uncond_logits=uncond, guidance_scale=2.0,
            weight=weight, normalization=normalization, kind="jeffreys", beta=0.3, **options,
        )  # fmt: skip

    return run, torch.randn(3, 4, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_bitwise_eager(backend: str) -> None:
    run, student = small_call(backend=backend)
    assert_compiles_bitwise(run, student)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_every_tensor_an_input(backend: str) -> None:
    run = partial(distribution_matching_loss, backend=backend)
    mask = torch.rand(3, 4) < 0.6
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    tensors = [torch.randn(3, 4, 7).bfloat16().requires_grad_() for _ in range(3)]
    results = []
    for fn in (run, compiled):
        value = fn(*tensors, mask)
        results.append((value.detach(), *torch.autograd.grad(value, tensors[0])))
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str) -> None:
    run, student = small_call("batch", backend=backend)
    assert_exports(run, student)


def operator_arguments(dtype: torch.dtype, normalization: str, bare: bool) -> tuple[Any, ...]:
    student, teacher, auxiliary, uncond = torch.randn(4, 3, 4, 7).to(dtype).unbind()
    student, mask, weight = student.clone().requires_grad_(), torch.rand(3, 4) < 0.6, torch.rand(4)
    if bare:
        settings: tuple[Any, ...] = (None, 1.0, None, 1.0, 1.0, 1.0, 0.0, None)
    else:
        settings = (uncond, 1.0, 1 + torch.rand(3, 1), 0.8, 1.4, 0.7, 0.3, weight)
    return (student, teacher, auxiliary, mask, *settings, normalization)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "normalization", "bare"),
    [
        (torch.float32, "masked", False),
        (torch.bfloat16, "batch", False),
        (torch.float64, "sum", True),
    ],
)
def test_opcheck(backend: str, dtype: torch.dtype, normalization: str, bare: bool) -> None:
    operators = torch.ops.softdimo if backend == "cpp" else torch.ops.softdimo_reference
    arguments = operator_arguments(dtype, normalization, bare)
    torch.library.opcheck(operators.distribution_matching_loss, arguments)
    grad = torch.randn((), requires_grad=not bare)
    detached = (arguments[0].detach(), *arguments[1:])
    statistics = operators.distribution_matching_loss(*detached)[1:] if backend == "cpp" else ()
    torch.library.opcheck(
        operators.distribution_matching_loss_backward, (grad, *detached, *statistics, [not bare])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    run, student = small_call(backend=backend)
    value, (gradient,) = gradients(run, (student,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, (again_gradient,) = gradients(run, (student,))
    assert_same_bits(value, again)
    assert_same_bits(gradient, again_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: str) -> None:
    run, student = small_call(backend=backend)
    value, (gradient,) = gradients(run, (student,))
    again, (replayed,) = gradients(lambda z: checkpoint(run, z, use_reentrant=False), (student,))
    assert_same_bits(value, again)
    assert_same_bits(gradient, replayed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_and_jvp_raise_clearly(backend: str) -> None:
    tensors, mask = torch.randn(3, 2, 3, 4, 8), torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"distribution_matching_loss does not support torch\.vmap"
    ):
        torch.vmap(partial(distribution_matching_loss, backend=backend))(*tensors, mask)
    for place, name in enumerate(("student_logits", "teacher_logits", "auxiliary_logits")):

        def run(z: Tensor, place: int = place) -> Tensor:
            return distribution_matching_loss(
                *tensors[:place], z, *tensors[place + 1 :], mask, backend=backend
            )

        with pytest.raises(RuntimeError, match=f"{name} carries a forward-mode tangent"):
            torch.func.jvp(run, (tensors[0],), (tensors[0],))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_under_compile_raises_clearly(backend: str) -> None:
    teacher, auxiliary = torch.randn(2, 2, 3, 8)
    student, mask = torch.randn(2, 3, 8, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    compiled = torch.compile(
        lambda z: distribution_matching_loss(z, teacher, auxiliary, mask, backend=backend)
    )
    upstream = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(student), student, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
def test_which_kernel_runs(backend: str | None, dtype: torch.dtype) -> None:
    student, teacher, auxiliary = torch.randn(3, 2, 4, 8, dtype=dtype).unbind()
    student, mask = student.clone().requires_grad_(), torch.ones(2, 4, dtype=torch.bool)
    call = partial(distribution_matching_loss, student, teacher, auxiliary, mask, backend=backend)
    ran = operators_run(lambda: call().backward())
    namespace = "softdimo_reference" if backend == "reference" else "softdimo"
    assert ran == [f"{namespace}::distribution_matching_loss{part}" for part in ("", "_backward")]
    explanation = explain(call.func, *call.args, backend=backend)
    assert explanation.backend == (backend or "cpp")


def test_explain_does_not_count_the_student() -> None:
    student, teacher, auxiliary = torch.randn(3, 6, 5, 100).unbind()
    mask = torch.ones(6, 5, dtype=torch.bool)
    explanation = explain(distribution_matching_loss, student, teacher, auxiliary.bfloat16(), mask)
    assert explanation.bytes == 3000 * (4 + 2)
    assert explanation.exponentials == 6000


# ---------------------------------------------------------------------------------------------------
# bad input


Z, M, W = torch.randn(4, 6, 10), torch.zeros(4, 6, dtype=torch.bool), torch.ones(4, 6)
G = torch.ones(4, 6, requires_grad=True)

BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "student_logits must be a torch.Tensor, got NoneType", (None, Z, Z, M), {}),
    (TypeError, "student_logits must have dtype .* got torch.int64", (Z.long(), Z, Z, M), {}),
    (ValueError, r"student_logits must have shape \[B, \.\.\., V\], got 1-d", (Z[0, 0], Z, Z, M), {}),
    (ValueError, "student_logits must have a vocabulary V >= 1", (Z[..., :0],) * 3 + (M,), {}),
    (TypeError, "teacher_logits must be a torch.Tensor, got list", (Z, [1.0], Z, M), {}),
    (ValueError, r"teacher_logits must have the shape of .* got \[6, 10\]", (Z, Z[0], Z, M), {}),
    (ValueError, r"auxiliary_logits must have the shape .* got \[4, 6, 9\]", (Z, Z, Z[..., :9], M), {}),
    (ValueError, "auxiliary_logits is on meta, but student_logits is on cpu", (Z, Z, Z.to("meta"), M), {}),
    (TypeError, "mask must be a bool tensor, got NoneType", (Z, Z, Z, None), {}),
    (TypeError, "mask must have dtype bool, got torch.float32", (Z, Z, Z, W), {}),
    (ValueError, r"mask must broadcast to the rows .* got shape \[4\]", (Z, Z, Z, M[:, 0]), {}),
    (ValueError, "kind must be one of .* got 'js'", (Z, Z, Z, M), {"kind": "js"}),
    (ValueError, "beta is required by kind='jeffreys', got None", (Z, Z, Z, M), {"kind": "jeffreys"}),
    (ValueError, "beta must be None for kind='forward_kl' .* got 0.5", (Z, Z, Z, M), {"beta": 0.5}),
    (ValueError, "teacher_uncond_logits is required .* got None", (Z, Z, Z, M), {"guidance_scale": 4.0}),
    (ValueError, "teacher_uncond_logits must have the shape", (Z, Z, Z, M), {"teacher_uncond_logits": Z[0]}),
    (ValueError, "guidance_scale gets no gradient", (Z, Z, Z, M), {"guidance_scale": G}),
    (ValueError, "teacher_temperature must be positive", (Z, Z, Z, M), {"teacher_temperature": 0.0}),
    (ValueError, "auxiliary_temperature must be positive", (Z, Z, Z, M), {"auxiliary_temperature": -1}),
    (TypeError, "weight must be a torch.Tensor, got int", (Z, Z, Z, M), {"weight": 1}),
    (ValueError, "weight must broadcast to the rows", (Z, Z, Z, M), {"weight": W[0, :5]}),
    (ValueError, "weight gets no gradient", (Z, Z, Z, M), {"weight": G}),
    (ValueError, "normalization must be one of .* got 'mean'", (Z, Z, Z, M), {"normalization": "mean"}),
    (ValueError, "backend must be None or one of .* got 'numpy'", (Z, Z, Z, M), {"backend": "numpy"}),
    (ValueError, "backend='cuda' cannot run: .* need CUDA tensors", (Z, Z, Z, M), {"backend": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD)
def test_bad_input_names_the_argument(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^distribution_matching_loss: {message}"):
        distribution_matching_loss(*arguments, **options)

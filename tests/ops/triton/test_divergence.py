"""The divergences on Triton against the float64 specification, on a device or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.contract import FLOORS, assert_contract
from support.soft_embedding import strided
from support.triton import DEVICE, DTYPES, needs_triton, quiet, where
from torch import Tensor

from softdimo_fast import distribution_matching_loss, explain, token_divergence
from softdimo_fast.ops.triton import divergence as kernels

pytestmark = [needs_triton, quiet, *where]

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": 0.3},
    {"kind": "jeffreys", "beta": -0.2},
)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in many chunks, at vocabularies that are small enough to interpret."""
    monkeypatch.setattr(kernels, "tile", lambda vocabulary: kernels.Tile(16, 16, 4))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def call(teacher: Tensor, model: Tensor, uncond: Tensor | None = None, **options: Any) -> Tensor:
    options = {"backend": "triton", "reduction": "none"} | options
    return token_divergence(teacher, model, teacher_uncond_logits=uncond, **options)


def composed(
    teacher: Tensor, model: Tensor, uncond: Tensor | None = None, *, kind: str, beta: float = 0.0,
    guidance_scale: float | Tensor = 1.0, teacher_temperature: float = 1.0, model_temperature: float = 1.0,
    mask: Tensor | None = None, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a user would write, row by row, in the inputs' own dtype."""
    if uncond is not None:
        scale = guidance_scale
        scale = scale.unsqueeze(-1).to(teacher.dtype) if isinstance(scale, Tensor) else scale
        teacher = uncond + scale * (teacher - uncond)
    log_p = torch.log_softmax(teacher / teacher_temperature, dim=-1)
    log_q = torch.log_softmax(model / model_temperature, dim=-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)
    rows = {"forward_kl": forward, "reverse_kl": reverse}.get(
        kind, (1 - beta) * forward + beta * reverse
    )
    rows = rows if weight is None else rows * weight
    return rows if mask is None else torch.where(mask, rows, 0.0)


def assert_close_to_float64(tensors: list[Tensor], **options: Any) -> None:
    """The rows and every gradient keep the numerics contract."""
    wide = [t.double() for t in tensors]
    truth, truth_grads = gradients(lambda *t: call(*t, **options, backend="reference"), wide)
    value, grads = gradients(lambda *t: call(*t, **options), tensors)
    yardstick, yardstick_grads = gradients(lambda *t: composed(*t, **options), tensors)
    assert value.dtype == torch.float32
    assert_contract(value, yardstick, truth, floor=2e-6)
    floor = max(2e-6, *(FLOORS[t.dtype] for t in tensors))
    for name, mine, theirs, true in zip(
        ("teacher", "model", "uncond"), grads, yardstick_grads, truth_grads, strict=False
    ):
        assert_contract(mine, theirs, true, floor=floor, what=f"gradient of {name}")


# ---------------------------------------------------------------------------------------------------
# values and gradients


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, kind) for kind in KINDS]
    + [(torch.bfloat16, KINDS[0]), (torch.float16, KINDS[2])],
)
def test_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = [(3 * randn(257, 45)).to(dtype) for _ in range(3)]
    options = options | {
        "guidance_scale": 2.5,
        "teacher_temperature": 0.8,
        "model_temperature": 1.3,
    }
    assert_close_to_float64(tensors, **options)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("options", [KINDS[0], KINDS[2]])
def test_rows_in_many_chunks(options: dict[str, Any]) -> None:
    """Peaks, and what one side rules out, in the first, a middle and the last chunk."""
    teacher, model = 3 * randn(2, 256, 70)
    for row, peak in enumerate((0, 15, 16, 40, 69)):
        teacher[row, peak] += 20
        model[row + 2, peak] += 20
        teacher[row + 7, peak] = model[row + 7, peak] = -torch.inf
    assert_close_to_float64([teacher, model], **options)


def test_one_row_a_program() -> None:
    """V beyond one chunk."""
    assert_close_to_float64([2 * randn(8, 1100), 2 * randn(8, 1100)], kind="forward_kl")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """Shapes, dtypes, layouts, masks, temperatures and scales up to one-hot rows."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, vocabulary, dtype = (16, 16), draw(st.integers(1, 64)), draw(st.sampled_from(DTYPES))
    hotter, cooler = 10.0 ** draw(st.floats(-3, 3)), 10.0 ** draw(st.floats(-3, 3))
    size = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    size = min(size * max(min(hotter, cooler), 1e-2), 1e4)
    layouts = st.sampled_from(["contiguous", "padded", "transposed", "columns"])
    model = size * randn(*rows, vocabulary)
    teacher = model + draw(st.sampled_from([0.1, 1.0])) * size * randn(*rows, vocabulary)
    options = dict(draw(st.sampled_from(KINDS)))
    options["teacher_temperature"] = hotter
    options["model_temperature"] = hotter if draw(st.booleans()) else cooler
    tensors = [strided(teacher.to(dtype), draw(layouts)), strided(model.to(dtype), draw(layouts))]
    if draw(st.booleans()):
        tensors.append((teacher + 0.3 * size * torch.randn_like(teacher)).to(dtype))
        options["guidance_scale"] = draw(st.sampled_from([0.0, 0.4, 1.0, 2.0, 7.5]))
        if draw(st.booleans()):
            options["guidance_scale"] = 3 * torch.rand(rows, device=DEVICE)
    if draw(st.booleans()):
        options["mask"] = torch.rand(rows, device=DEVICE) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(rows, device=DEVICE)
    return tensors, options


@given(case=cases())
@settings(max_examples=5)
def test_contract(case: tuple[list[Tensor], dict[str, Any]]) -> None:
    assert_close_to_float64(case[0], **case[1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    ("distance", "size", "offset"),
    [(1e-2, 1.0, 0.0), (1e-6, 1.0, 0.0), (1e-5, 20.0, 0.0), (1e-3, 3.0, 4096.0)],
)
def test_nearly_equal_logits_do_not_cancel(
    kind: str, distance: float, size: float, offset: float
) -> None:
    """Relative to float64, with no allowance for the error of a yardstick."""
    model = size * randn(256, 60) + offset
    tensors = [model + distance * size * randn(256, 60), model - offset]
    options = {"kind": kind, "teacher_temperature": 0.7, "model_temperature": 0.7}
    truth, truth_grads = gradients(
        lambda *t: call(*t, **options, backend="reference"), [t.double() for t in tensors]
    )
    value, grads = gradients(lambda *t: call(*t, **options), tensors)
    for mine, true in zip((value, *grads), (truth, *truth_grads), strict=True):
        assert float((mine - true).norm() / true.norm()) < 1e-6
    assert float(((value - truth).abs() / truth).max()) < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("distance", [1e-2, 1e-6])
def test_nearly_one_hot_rows(kind: str, distance: float) -> None:
    """Both distributions hold about 1 - distance at one entry, whose gradient cancels in q - p."""
    rows, vocabulary = 256, 60
    winner = torch.randint(vocabulary, (rows, 1))

    def one_hot(distance: float) -> Tensor:
        logits = torch.randn(rows, vocabulary, dtype=torch.double)
        others = logits.scatter(1, winner, -torch.inf).logsumexp(1, keepdim=True)
        peak = others + torch.log(torch.tensor(1 / distance - 1))
        return logits.scatter(1, winner, peak).float().to(DEVICE)

    tensors = [one_hot(distance), one_hot(distance / 2)]
    wide = [t.double() for t in tensors]
    _, truth = gradients(lambda *t: call(*t, kind=kind, backend="reference"), wide)
    _, grads = gradients(lambda *t: call(*t, kind=kind), tensors)
    for mine, true in zip(grads, truth, strict=True):
        error = (mine - true).abs().gather(1, winner.to(DEVICE))
        assert float((error / true.abs().gather(1, winner.to(DEVICE))).median()) < 2e-5
        assert float(mine.double().sum(1).abs().max()) <= 1e-6 * float(mine.abs().max())


@pytest.mark.parametrize("options", KINDS)
def test_equal_logits_give_exactly_nothing(options: dict[str, Any]) -> None:
    logits, uncond = 5 * randn(32, 50), randn(32, 50)
    for scale in (1.0, torch.ones(32, device=DEVICE)):
        value, grads = gradients(
            lambda *t, s=scale: call(*t, guidance_scale=s, **options),
            [logits, logits.clone(), uncond],
        )
        for found in (value, *grads):
            assert bool((found == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_sum_to_zero(dtype: torch.dtype) -> None:
    size = torch.logspace(-2, 1, 64, device=DEVICE)[:, None]
    tensors = [(randn(64, 60) * size).to(dtype) for _ in range(2)]
    _, grads = gradients(lambda *t: call(*t, kind="jeffreys", beta=0.3), tensors)
    for gradient in grads:
        sums, sizes = gradient.double().sum(1).abs(), gradient.double().abs().sum(1)
        assert bool((sums <= 4 * torch.finfo(dtype).eps * sizes + 1e-6).all())


def test_reductions_and_weights() -> None:
    tensors = list(randn(2, 4, 5, 11))
    mask = torch.tensor([True, False, True, True, False], device=DEVICE).expand(4, 5)
    weight = torch.rand(4, 5, device=DEVICE)
    weight[:, 1] = torch.nan  # in rows that do not count
    for options in ({}, {"mask": mask}, {"mask": mask, "weight": weight}):
        for reduction in ("none", "sum", "mean"):
            value, grads = gradients(lambda *t: call(*t, reduction=reduction, **options), tensors)  # noqa: B023
            true, true_grads = gradients(
                lambda *t: call(*t, reduction=reduction, backend="reference", **options),  # noqa: B023
                [t.double() for t in tensors],
            )
            for mine, exact in zip((value, *grads), (true, *true_grads), strict=True):
                torch.testing.assert_close(mine.double(), exact, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("normalization", ["sum", "batch", "masked"])
def test_distribution_matching_loss(normalization: str) -> None:
    """Value and gradient of the reference; the student is not read, the gradient has its dtype."""
    student = torch.full((3, 6, 20), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    teacher, auxiliary, uncond = 2 * randn(3, 3, 6, 20)
    mask, weight = torch.rand(3, 6, device=DEVICE) < 0.5, torch.rand(3, 6, device=DEVICE)
    mask[1] = False

    def run(backend: str, *logits: Tensor) -> tuple[Tensor, Tensor]:
        value, (gradient,) = gradients(
            lambda s: distribution_matching_loss(
                s, logits[0], logits[1], mask, kind="jeffreys", beta=0.3, guidance_scale=3.0,
                teacher_uncond_logits=logits[2], teacher_temperature=0.9, auxiliary_temperature=1.1,
                weight=weight, normalization=normalization, backend=backend,
            ),
            (student,),
        )  # fmt: skip
        return value, gradient

    value, gradient = run("triton", teacher, auxiliary, uncond)
    true, true_gradient = run("reference", teacher.double(), auxiliary.double(), uncond.double())
    torch.testing.assert_close(value.double(), true, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient, true_gradient, rtol=8e-3, atol=1e-7)
    assert bool((gradient[~mask] == 0).all())


# ---------------------------------------------------------------------------------------------------
# rows, special values, layouts


@pytest.mark.parametrize("options", KINDS[:3])
def test_special_values_are_those_of_the_reference(options: dict[str, Any]) -> None:
    inf, nan = torch.inf, torch.nan
    teacher, model, uncond = randn(3, 12, 37)
    teacher[0, 3], model[1, 4], teacher[2, 5], uncond[3, 6] = nan, nan, inf, inf
    teacher[4], model[5] = -inf, -inf
    teacher[6, :9] = model[6, :9] = uncond[6, :9] = -inf
    teacher[7, 2] = uncond[7, 2] = -inf  # q alone has it
    model[8, 2] = -inf  # p alone has it
    uncond[9, 1] = -inf
    for scale in (1.0, 0.5, 2.0):
        results = [
            gradients(
                lambda *t, b=backend, s=scale: call(*t, guidance_scale=s, backend=b, **options),
                [teacher, model, uncond],
            )
            for backend in ("triton", "reference")
        ]
        (value, grads), (true, true_grads) = results
        for mine, exact in zip((value, *grads), (true, *true_grads), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-4, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [1, 5])
def test_tiny_vocabularies_and_no_rows(vocabulary: int) -> None:
    for rows in (0, 3):
        value, grads = gradients(call, [randn(rows, vocabulary), randn(rows, vocabulary)])
        assert value.shape == (rows,)
        assert all(gradient.shape == (rows, vocabulary) for gradient in grads)
        if vocabulary == 1:
            assert not bool(value.any())
            assert not any(bool(gradient.any()) for gradient in grads)
    assert float(call(randn(0, 5), randn(0, 5), reduction="mean")) == 0


def test_rows_do_not_depend_on_the_batch() -> None:
    tensors = list(3 * randn(3, 70, 50))

    def run(pick: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gradients(
            lambda *t: call(*t, guidance_scale=2.0, kind="jeffreys", beta=0.4),
            [t[pick] for t in tensors],
        )

    value, grads = run(slice(None))
    for pick in (slice(1), slice(5, 9), torch.randperm(70).to(DEVICE), slice(None, None, 3)):
        part, parts = run(pick)
        assert_same_bits(part, value[pick])
        for mine, whole in zip(parts, grads, strict=True):
            assert_same_bits(mine, whole[pick])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_do_not_count_are_never_read(garbage: float) -> None:
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    clean = list(randn(3, 4, 30))
    scale = torch.tensor([2.0, garbage, 0.5, garbage], device=DEVICE)

    def run(tensors: list[Tensor], scale: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gradients(lambda *t: call(*t, guidance_scale=scale, mask=mask), tensors)

    value, grads = run([torch.where(mask[:, None], t, garbage) for t in clean], scale)
    true, true_grads = run(clean, torch.where(mask, scale, 1.0))
    for mine, exact in zip((value, *grads), (true, *true_grads), strict=True):
        assert_same_bits(mine, exact)
        assert bool((mine[~mask] == 0).all())


@pytest.mark.parametrize("vocabulary", [32, 35])
def test_any_strides(vocabulary: int) -> None:
    teacher, model = randn(2, 4, 6, vocabulary)
    expected = call(teacher, model)
    for form in ("padded", "transposed", "columns"):
        assert_same_bits(call(strided(teacher, form), strided(model, form)), expected)
    alike = call(teacher[:1].expand(4, 6, vocabulary), model)
    assert_same_bits(alike[0], expected[0])


@pytest.mark.parametrize("temperature", [1e-50, 1e-39, 1e37, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    tensors = list(randn(2, 4, 6))
    tensors[0][:, 1] = tensors[1][:, 1] = -torch.inf
    value = call(*tensors, teacher_temperature=temperature)
    if temperature == 1e-50:
        assert bool(value.isnan().all())
        return
    wide = [t.double() for t in tensors]
    truth = call(*wide, teacher_temperature=temperature, backend="reference")
    torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------
# torch


def test_opcheck() -> None:
    teacher, model, uncond = (t.requires_grad_() for t in randn(3, 2, 3, 6))
    mask, weight = torch.rand(2, 3, device=DEVICE) < 0.7, torch.rand(2, 3, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for reduction in ("none", "mean"):
        torch.library.opcheck(
            torch.ops.softdimo_triton.token_divergence,
            (teacher, model, uncond, 1.0, weight, 1.0, 2.0, 0.7, 0.3, mask, weight, reduction),
            test_utils=checks,
        )
    torch.library.opcheck(
        torch.ops.softdimo_triton.distribution_matching_loss,
        (model, teacher, uncond, mask, None, 1.0, None, 1.0, 1.0, 1.0, 0.0, None, "masked"),
        test_utils=checks,
    )


@pytest.mark.parametrize("wanted", range(1, 8))
def test_gradients_only_where_required(wanted: int) -> None:
    tensors = list(randn(3, 4, 9))
    options: dict[str, Any] = {"guidance_scale": 2.0, "kind": "jeffreys", "beta": 0.3}
    _, everything = gradients(lambda *t: call(*t, **options), tensors)
    leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
    call(*leaves, **options).sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
        if wanted >> i & 1:
            assert_same_bits(leaf.grad, full)
        else:
            assert leaf.grad is None


def test_double_backward_is_that_of_the_specification() -> None:
    tensors = list(randn(2, 4, 6))

    def second(backend: str, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in values]
        value = call(*leaves, backend=backend).square().sum()
        (gradient,) = torch.autograd.grad(value, leaves[1], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves)

    truth = second("reference", *[t.double() for t in tensors])
    for mine, true in zip(second("triton", *tensors), truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-6)


def test_compiles_and_exports() -> None:
    mask = torch.rand(5, device=DEVICE) < 0.7

    def run(teacher: Tensor, model: Tensor) -> Tensor:
        return call(teacher, model, mask=mask, reduction="mean")

    inputs = tuple(randn(2, 5, 20))
    assert_compiles_bitwise(run, *inputs)
    assert_exports(run, *inputs)


def test_which_kernel_runs() -> None:
    teacher, model = randn(2, 4, 10)
    assert operators_run(lambda: call(teacher, model)) == ["softdimo_triton::token_divergence"]
    found = explain(token_divergence, teacher.t(), model.t(), backend="triton")
    assert found.kernel == "softdimo_triton::token_divergence"
    assert found.notes == (
        "teacher_logits have stride 10 along V: one contiguous copy is made",
        "model_logits have stride 10 along V: one contiguous copy is made",
    )
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    loss = explain(distribution_matching_loss, model, teacher, model, mask, backend="triton")
    assert loss.kernel == "softdimo_triton::distribution_matching_loss"


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: .*an input is float64"):
        call(randn(2, 4).double(), randn(2, 4))

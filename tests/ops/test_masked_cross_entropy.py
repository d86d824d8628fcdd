"""masked_cross_entropy against float64, F.cross_entropy and its closed form."""

from __future__ import annotations

import itertools
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
    thread_count,
)
from support.contract import FLOORS, assert_contract
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops import _library
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.masked_cross_entropy import masked_cross_entropy
from softdimo_fast.ops.reference import cross_entropy as specification

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean")
INF = torch.inf


class Case(NamedTuple):
    """One call."""

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    smoothing: float = 0.0

    def call(self, backend: str | None = None, reduction: str = "none") -> Any:
        def run(logits: Tensor) -> Tensor:
            return masked_cross_entropy(
                logits, self.targets, self.mask, label_smoothing=self.smoothing, reduction=reduction,
                backend=backend,
            )  # fmt: skip

        return run

    def composed(self, reduction: str = "none") -> Any:
        """F.cross_entropy in the inputs' own dtype, with ignore_index for the rows left out."""
        counted = self.targets if self.mask is None else torch.where(self.mask, self.targets, -100)

        def run(logits: Tensor) -> Tensor:
            loss = F.cross_entropy(
                logits.flatten(0, -2), counted.flatten(), label_smoothing=self.smoothing, reduction=reduction
            )  # fmt: skip
            return loss.reshape(self.targets.shape) if reduction == "none" else loss

        return run


def random_case(rows: tuple[int, ...], vocabulary: int, smoothing: float = 0.0) -> Case:
    logits = torch.randn(*rows, vocabulary, dtype=torch.double)
    return Case(logits, torch.randint(vocabulary, rows), torch.rand(rows) < 0.6, smoothing)


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


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes, layouts, masks, smoothings and scales up to one-hot rows."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    rows, vocabulary = (16, 18), draw(st.integers(1, 70) | st.sampled_from([128, 255, 1025]))
    size = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    logits = (size * torch.randn(*rows, vocabulary)).to(draw(st.sampled_from(DTYPES)))
    logits = strided(
        logits, draw(st.sampled_from(["contiguous", "padded", "transposed", "columns"]))
    )
    targets = torch.randint(vocabulary, rows)
    if draw(st.booleans()):
        targets = torch.where(torch.rand(rows) < 0.8, logits.argmax(-1), targets)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return Case(logits, targets, mask, draw(st.sampled_from([0.0, 0.1, 0.9])))


def assert_close_to_float64(case: Case, backend: str, reduction: str = "none") -> None:
    upstream = None if reduction != "none" else torch.randn(case.targets.shape)
    wide = case._replace(logits=case.logits.double())
    truth, (true,) = gradients(wide.call("reference", reduction), (wide.logits,), upstream)
    value, (mine,) = gradients(case.call(backend, reduction), (case.logits,), upstream)
    yardstick, (theirs,) = gradients(case.composed(reduction), (case.logits,), upstream)
    assert value.dtype == (torch.float64 if case.logits.dtype == torch.float64 else torch.float32)
    assert mine.dtype == case.logits.dtype
    assert_contract(value, yardstick, truth)
    assert_contract(mine, theirs, true, floor=FLOORS[case.logits.dtype], what="gradient")


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
def test_contract(backend: str, case: Case) -> None:
    assert_close_to_float64(case, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_float64_equals_torch(reduction: str, smoothing: float, masked: bool) -> None:
    case = random_case((4, 5), 9, smoothing)
    case = case if masked else case._replace(mask=None)
    value, (gradient,) = gradients(case.call(reduction=reduction), (case.logits,))
    true, (true_gradient,) = gradients(case.composed(reduction), (case.logits,))
    torch.testing.assert_close(value, true, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-13, atol=1e-14)


def test_closed_form() -> None:
    """loss = lse - (1 - e) z_y - (e / V) sum z, dz = p - (1 - e) 1_y - e / V; each row sums to zero."""
    case = random_case((20,), 7, 0.1)._replace(mask=None)
    z, one_hot = case.logits, F.one_hot(case.targets, 7).double()
    value, (gradient,) = gradients(case.call(), (z,))
    expected = z.logsumexp(-1) - 0.9 * (z * one_hot).sum(-1) - 0.1 / 7 * z.sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, z.softmax(-1) - 0.9 * one_hot - 0.1 / 7)
    assert float(gradient.sum(-1).abs().max()) < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-9])
def test_confident_rows_keep_their_digits(backend: str, distance: float) -> None:
    """The target holds 1 - distance: the loss is about that distance, and so is its gradient."""
    rows, vocabulary = 256, 300
    logits = torch.randn(rows, vocabulary, dtype=torch.double)
    targets = torch.randint(vocabulary, (rows, 1))
    others = logits.scatter(1, targets, -INF).logsumexp(1, keepdim=True)
    logits = logits.scatter(1, targets, others + torch.log(torch.tensor(1 / distance - 1).double()))
    case = Case(logits.float(), targets.squeeze(1), None)
    truth, (true,) = gradients(
        case._replace(logits=case.logits.double()).call("reference"), (case.logits.double(),)
    )
    value, (mine,) = gradients(case.call(backend), (case.logits,))
    assert float(((value - truth).abs() / truth).max()) < 5e-6
    assert float(((mine - true).abs() / true.abs()).max()) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_sum_to_zero(backend: str, smoothing: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(256, 300) * torch.logspace(-2, 3, 256)[:, None]).to(dtype)
    case = Case(logits, torch.randint(300, (256,)), None, smoothing)
    _, (gradient,) = gradients(case.call(backend), (logits,))
    sums, sizes = gradient.double().sum(1).abs(), gradient.double().abs().sum(1)
    underflow = 300 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool((sums <= 4 * torch.finfo(dtype).eps * sizes + underflow).all())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reductions(smoothing: float) -> None:
    case = random_case((4, 5), 9, smoothing)
    assert case.mask is not None
    rows, (rows_gradient,) = gradients(case.call(), (case.logits,))
    plain = case._replace(mask=None).call()(case.logits)
    assert_same_bits(rows, torch.where(case.mask, plain, 0.0))
    for reduction, divisor in (("sum", 1), ("mean", case.mask.sum())):
        value, (gradient,) = gradients(case.call(reduction=reduction), (case.logits,))
        torch.testing.assert_close(value, rows.sum() / divisor)
        torch.testing.assert_close(gradient, rows_gradient / divisor)
    mean = masked_cross_entropy(case.logits, case.targets, case.mask, label_smoothing=smoothing)
    assert_same_bits(mean, case.call(reduction="mean")(case.logits))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 7), (0, 7), (3, 0, 5)])
def test_no_counted_row(reduction: str, shape: tuple[int, ...]) -> None:
    targets = torch.full(shape[:-1], -100)
    masks = [torch.zeros(shape[:-1], dtype=torch.bool)]
    if targets.numel() == 0:
        masks.append(None)
    for mask in masks:
        case = Case(torch.full(shape, torch.nan), targets, mask, 0.1)
        value, (gradient,) = gradients(case.call(reduction=reduction), (case.logits,))
        assert_same_bits(value, torch.zeros(shape[:-1] if reduction == "none" else ()))
        assert_same_bits(gradient, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (1,), (4, 1), (2, 1, 3, 5)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    logits, targets = torch.randn(shape), torch.randint(shape[-1], shape[:-1])
    value, (gradient,) = gradients(Case(logits, targets, None, 0.1).call(), (logits,))
    expected = F.cross_entropy(
        logits.reshape(-1, shape[-1]), targets.reshape(-1), reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(value, expected.reshape(shape[:-1]))
    assert gradient.shape == shape
    if shape[-1] == 1:
        assert all(bool((zero == 0).all()) for zero in (value, gradient))


def test_mask_broadcasts_to_the_rows() -> None:
    logits, targets = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        mask = torch.rand(shape) < 0.6
        results = [
            gradients(Case(logits, targets, m).call(reduction="mean"), (logits,))
            for m in (mask, mask.expand(2, 3).contiguous())
        ]
        assert_same_bits(results[0][0], results[1][0])
        assert_same_bits(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    case = random_case((4, 5), 33, 0.1)
    case = case._replace(logits=case.logits.float())
    value, (gradient,) = gradients(case.call(backend), (case.logits,))
    for layout in ("padded", "columns", "transposed"):
        view = case._replace(
            logits=strided(case.logits, layout),
            targets=case.targets.t().contiguous().t(),
            mask=case.mask.t().contiguous().t() if case.mask is not None else None,
        )
        again, (again_gradient,) = gradients(view.call(backend), (view.logits,))
        torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again_gradient, gradient, rtol=1e-6, atol=1e-6)
    row = case.logits[:1, :1].expand(4, 5, 33)
    expected = case.call(backend)(row.contiguous())
    torch.testing.assert_close(case.call(backend)(row), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# special values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits(backend: str, smoothing: float) -> None:
    """-inf drops an entry; it makes the loss infinite where it is the target, or smoothing asks for it."""
    logits = torch.randn(3, 6)
    logits[1, 4] = logits[2, 2] = -INF
    case = Case(logits, torch.tensor([2, 2, 2]), None, smoothing)
    value, (gradient,) = gradients(case.call(backend), (logits,))
    expected, (expected_gradient,) = gradients(case.composed(), (logits,))
    assert (value == INF).tolist() == [False, smoothing > 0, True]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_broken_rows_stay_alone(backend: str, smoothing: float) -> None:
    logits = torch.randn(5, 9)
    logits[1, 4], logits[1, 5], logits[2], logits[3, 0] = torch.nan, -INF, -INF, INF
    case = Case(logits, torch.randint(9, (5,)), None, smoothing)
    value, (gradient,) = gradients(case.call(backend), (logits,))
    broken = torch.tensor([False, True, True, True, False])
    assert_same_bits(value.isnan(), broken)
    assert_same_bits(gradient.isnan(), broken[:, None].expand(5, 9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, INF, -INF])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uncounted_rows_are_never_read(backend: str, garbage: float, reduction: str) -> None:
    mask = torch.tensor([True, False, True, False])
    logits, targets = torch.randn(4, 9), torch.randint(9, (4,))
    upstream = torch.where(mask, torch.rand(4), garbage) if reduction == "none" else None
    clean = Case(logits, targets, mask, 0.1)
    poisoned = clean._replace(
        logits=torch.where(mask[:, None], logits, garbage),
        targets=torch.where(mask, targets, torch.tensor([0, -100, 0, 2**62])),
    )
    results = [
        gradients(case.call(backend, reduction), (case.logits,), upstream)
        for case in (clean, poisoned)
    ]
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1][0], results[1][1][0])
    assert bool((results[1][1][0][~mask] == 0).all())


@pytest.mark.parametrize("target", [-100, -1, 9, 2**40])
def test_wrong_target_on_a_counted_row(target: int) -> None:
    """Raises in eager on the CPU; where values cannot be looked at, that row becomes NaN."""
    logits, targets = torch.randn(3, 9), torch.tensor([1, target, 2])
    with pytest.raises(
        ValueError, match=rf"targets must be in \[0, 9\) on counted rows, got {target} \(1 "
    ):
        masked_cross_entropy(logits, targets, None)
    masked_cross_entropy(logits, targets, targets != target)
    compiled = torch.compile(lambda z: Case(z, targets, None, 0.1).call()(z), fullgraph=True)
    value, (gradient,) = gradients(compiled, (logits,))
    wrong = torch.tensor([False, True, False])
    assert_same_bits(value.isnan(), wrong)
    assert_same_bits(gradient.isnan(), wrong[:, None].expand(3, 9))


# ---------------------------------------------------------------------------------------------------
# derivatives


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend: str, smoothing: float, reduction: str) -> None:
    case = random_case((3, 4), 6, smoothing)
    logits = case.logits.requires_grad_()
    assert torch.autograd.gradcheck(case.call(backend, reduction), (logits,))
    assert torch.autograd.gradgradcheck(case.call(backend, reduction), (logits,))


def test_second_derivatives_do_not_see_what_is_absent() -> None:
    """-inf entries and garbage in masked rows leave no NaN behind."""
    case = random_case((3, 4), 6)
    assert case.mask is not None
    logits = torch.where(case.mask[..., None], case.logits, torch.nan)
    logits[..., 2:4] = -INF
    case = case._replace(targets=torch.where(case.mask, 0, -100))
    logits.requires_grad_()
    upstream = torch.ones((), dtype=torch.double, requires_grad=True)
    value = case.call(reduction="sum")(logits)
    (first,) = torch.autograd.grad(value, logits, upstream, create_graph=True)
    direction = torch.randn_like(first)
    second, slope = torch.autograd.grad(first, (logits, upstream), direction)
    torch.testing.assert_close(slope, (first * direction).sum())
    # The Hessian of the loss is that of log sum exp: diag(p) - p p'.
    p = torch.where(case.mask[..., None], logits.detach(), 0.0).softmax(-1) * case.mask[..., None]
    expected = p * direction - p * (p * direction).sum(-1, keepdim=True)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_specification_backward_is_the_derivative_of_its_forward(
    infinite: bool, reduction: str
) -> None:
    case = random_case((3, 4), 6)
    if infinite:
        case.logits[0, :, 1:] = -INF
        case.targets[0] = 0
    logits = case.logits.requires_grad_()
    for smoothing in (0.0,) if infinite else (0.0, 0.2):
        arguments = (logits, case.targets, case.mask, smoothing, reduction)
        value = specification.masked_cross_entropy(*arguments)
        upstream = torch.randn_like(value)
        (theirs,) = torch.autograd.grad(value, logits, upstream)
        ours = specification.masked_cross_entropy_backward(upstream, *arguments, [True])
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_nothing_is_recorded_for_frozen_logits() -> None:
    case = random_case((3, 4), 6)
    assert not case.call()(case.logits).requires_grad


# ---------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_is_bitwise_eager(backend: str, dtype: torch.dtype, reduction: str) -> None:
    case = random_case((3, 4), 33, 0.1)
    assert_compiles_bitwise(case.call(backend, reduction), case.logits.to(dtype))


def test_compiled_with_targets_and_mask_as_inputs() -> None:
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        logits = torch.randn(rows, 9, requires_grad=True)
        targets, mask = torch.randint(9, (rows,)), torch.rand(rows) < 0.5
        results = []
        for fn in (masked_cross_entropy, compiled):
            value = fn(logits, targets, mask, label_smoothing=0.1)
            results.append((value.detach(), *torch.autograd.grad(value, logits)))
        for mine, theirs in zip(*results, strict=True):
            assert_same_bits(mine, theirs)


def test_exports() -> None:
    case = random_case((3, 4), 9, 0.1)
    assert_exports(case.call(None, "sum"), case.logits.float())


@pytest.mark.parametrize(
    ("dtype", "reduction", "masked"),
    [(torch.float32, "none", True), (torch.bfloat16, "mean", True), (torch.float64, "sum", False)],
)
def test_opcheck(dtype: torch.dtype, reduction: str, masked: bool) -> None:
    case = random_case((3, 4), 6)
    operators = torch.ops.softdimo_reference
    logits = case.logits.to(dtype).requires_grad_()
    arguments = (logits, case.targets, case.mask if masked else None, 0.1 * masked, reduction)
    torch.library.opcheck(operators.masked_cross_entropy, arguments)
    grad = torch.randn((3, 4) if reduction == "none" else (), requires_grad=True)
    torch.library.opcheck(operators.masked_cross_entropy_backward, (grad, *arguments, [True]))
    kernels = torch.ops.softdimo
    torch.library.opcheck(kernels.masked_cross_entropy, arguments)
    _, *saved = (t.detach() for t in kernels.masked_cross_entropy(*arguments))
    torch.library.opcheck(kernels.masked_cross_entropy_backward, (grad, *arguments, *saved))


def test_dtypes_of_value_and_gradient() -> None:
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        case = random_case((3, 4), 6)
        value, (gradient,) = gradients(case.call(reduction=reduction), (case.logits.to(dtype),))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype


def test_autocast_changes_nothing() -> None:
    case = random_case((3, 4), 33, 0.1)
    for dtype in (torch.float64, torch.float32):
        logits = case.logits.to(dtype)
        value, (gradient,) = gradients(case.call(), (logits,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, (again_gradient,) = gradients(case.call(), (logits,))
        assert_same_bits(value, again)
        assert_same_bits(gradient, again_gradient)


def test_activation_checkpointing() -> None:
    case = random_case((3, 4), 33, 0.1)
    value, (gradient,) = gradients(case.call(), (case.logits,))
    again, (replayed,) = gradients(
        lambda z: checkpoint(case.call(), z, use_reentrant=False), (case.logits,)
    )
    assert_same_bits(value, again)
    assert_same_bits(gradient, replayed)


def test_vmap_and_jvp_raise_clearly() -> None:
    logits, targets = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    with pytest.raises(RuntimeError, match=r"masked_cross_entropy does not support torch\.vmap"):
        torch.vmap(lambda z, t: masked_cross_entropy(z, t, None))(logits, targets)
    with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
        torch.func.jvp(lambda z: masked_cross_entropy(z, targets, None), (logits,), (logits,))


def test_double_backward_under_compile_raises_clearly() -> None:
    logits, targets = torch.randn(4, 8, requires_grad=True), torch.randint(8, (4,))
    value = torch.compile(lambda z: masked_cross_entropy(z, targets, None))(logits)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "library"), [({}, "softdimo"), ({"backend": "reference"}, "softdimo_reference")]
)
def test_which_kernel_runs(options: dict[str, Any], library: str, dtype: torch.dtype) -> None:
    logits, targets = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.randint(8, (4,))
    ran = operators_run(lambda: masked_cross_entropy(logits, targets, None, **options).backward())
    assert ran == [f"{library}::masked_cross_entropy{part}" for part in ("", "_backward")]
    explanation = explain(masked_cross_entropy, logits, targets, None, **options)
    assert explanation.backend == ("cpp" if library == "softdimo" else "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cuda_tensors_run_the_kernel(
    monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype
) -> None:
    """On fake tensors: the choice, and what the fakes give."""
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", None)
    with FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=dtype, device="cuda")
        targets = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        found: list[Tensor] = []
        names = operators_run(
            lambda: found.append(masked_cross_entropy(logits, targets, None, reduction=reduction))
        )
        explanation = explain(masked_cross_entropy, logits, targets, None)
        saved = torch.empty(2, 3, device="cuda")
        gradient = torch.ops.softdimo.masked_cross_entropy_backward(
            found[0], logits, targets, None, 0.0, reduction, saved, saved
        )
    assert explanation.backend == "cuda"
    assert names == ["softdimo::masked_cross_entropy"]
    assert found[0].dtype == torch.float32
    assert found[0].shape == ((2, 3) if reduction == "none" else ())
    assert (gradient.dtype, gradient.shape) == (dtype, logits.shape)
    assert found[0].device.type == gradient.device.type == "cuda"


def test_what_keeps_cuda_tensors_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        targets = torch.empty(3, dtype=torch.int64, device="cuda")
        logits = torch.empty(3, 5, device="cuda")
        for obstacle, given, text in (
            (None, logits.double(), "computes in float32, and logits are float64"),
            ("this build has no CUDA library", logits, "this build has no CUDA library"),
        ):
            monkeypatch.setattr(_library, "CUDA_OBSTACLE", obstacle)
            explanation = explain(masked_cross_entropy, given, targets, None)
            assert explanation.backend == "reference"
            assert text in explanation.reason
            with pytest.raises(ValueError, match=f"backend='cuda' cannot run: .*{text}"):
                masked_cross_entropy(given, targets, None, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_batch_or_on_threads(dtype: torch.dtype) -> None:
    """V beyond one chunk, and rows for several threads."""
    logits = (4 * torch.randn(90, 1500)).to(dtype)
    case = Case(logits, torch.randint(1500, (90,)), torch.rand(90) < 0.8, 0.1)
    value, (gradient,) = gradients(case.call("cpp"), (logits,))
    assert case.mask is not None
    for rows in (slice(3, 4), slice(50, 90)):
        part = Case(logits[rows], case.targets[rows], case.mask[rows], 0.1)
        again, (again_gradient,) = gradients(part.call("cpp"), (part.logits,))
        assert_same_bits(again, value[rows])
        assert_same_bits(again_gradient, gradient[rows])
    means = []
    for threads in (1, 3):
        with thread_count(threads):
            means.append(gradients(case.call("cpp", "mean"), (logits,)))
    assert_same_bits(means[0][0], means[1][0])
    assert_same_bits(means[0][1][0], means[1][1][0])


def test_explain_counts_every_input_once() -> None:
    logits, targets = torch.randn(6, 5, 100), torch.randint(100, (6, 5))
    explanation = explain(masked_cross_entropy, logits, targets, None)
    assert explanation.bytes == 4 * 3000 + 8 * 30 + 4
    assert explanation.exponentials == 3000
    rows = explain(masked_cross_entropy, logits.bfloat16(), targets, None, reduction="none")
    assert rows.bytes == 2 * 3000 + 8 * 30 + 4 * 30


# ---------------------------------------------------------------------------------------------------
# bad input


Z, T, M = torch.randn(4, 6, 10), torch.randint(10, (4, 6)), torch.zeros(4, 6, dtype=torch.bool)

BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "logits must be a torch.Tensor, got list", ([1.0], T, M), {}),
    (TypeError, "logits must have dtype .* got torch.int64", (Z.long(), T, M), {}),
    (TypeError, "logits must be a dense", (torch.eye(10).to_sparse(), T, M), {}),
    (ValueError, r"logits must have shape \[\.\.\., V\], got 0-d", (Z.sum(), T, M), {}),
    (ValueError, "logits must have a vocabulary V >= 1", (Z[..., :0], T, M), {}),
    (TypeError, "targets must be a torch.Tensor, got NoneType", (Z, None, M), {}),
    (TypeError, "targets must have dtype int64, got torch.int32", (Z, T.int(), M), {}),
    (ValueError, r"targets must have shape .* = \[4, 6\], got \[6\]", (Z, T[0], M), {}),
    (ValueError, r"targets must have shape .* = \[4, 6\], got \[4, 6, 10\]", (Z, Z.long(), M), {}),
    (ValueError, "targets is on meta, but logits is on cpu", (Z, T.to("meta"), M), {}),
    (ValueError, r"targets must be in \[0, 10\) on counted rows, got 10 \(24 ", (Z, T * 0 + 10, None), {}),
    (TypeError, "mask must be a bool tensor or None, got list", (Z, T, [True]), {}),
    (TypeError, "mask must have dtype bool, got torch.uint8", (Z, T, M.byte()), {}),
    (ValueError, r"mask must broadcast to the rows .* got shape \[4\]", (Z, T, M[:, 0]), {}),
    (ValueError, "mask is on meta, but the input is on cpu", (Z, T, M.to("meta")), {}),
    (TypeError, "label_smoothing must be a float, got str", (Z, T, M), {"label_smoothing": "0.1"}),
    (ValueError, r"label_smoothing must be in \[0, 1\), got 1", (Z, T, M), {"label_smoothing": 1}),
    (ValueError, r"label_smoothing must be in \[0, 1\), got -0.1", (Z, T, M), {"label_smoothing": -0.1}),
    (ValueError, "label_smoothing must be finite, got nan", (Z, T, M), {"label_smoothing": float("nan")}),
    (ValueError, "reduction must be one of .* got 'batchmean'", (Z, T, M), {"reduction": "batchmean"}),
    (ValueError, "backend must be None or one of .* got 'numpy'", (Z, T, M), {"backend": "numpy"}),
    (ValueError, "backend='cuda' cannot run: .* need CUDA tensors", (Z, T, M), {"backend": "cuda"}),
    (ValueError, "backend='triton' cannot run: .* no Triton kernel", (Z, T, M), {"backend": "triton"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD)
def test_bad_input_names_the_argument(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^masked_cross_entropy: {message}"):
        masked_cross_entropy(*arguments, **options)

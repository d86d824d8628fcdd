"""token_divergence and torch: derivatives of every order, compilation, export, arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.divergence import BACKENDS, DTYPES, KINDS, Case, small_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.reference import divergence as specification
from softdimo_fast.ops.token_divergence import token_divergence

INF = torch.inf

# ---------------------------------------------------------------------------------------------------
# derivatives


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
    (ValueError, "backend='cuda' cannot run: .* need CUDA tensors", (Z, Z), {"backend": "cuda"}),
    (ValueError, "backend='triton' cannot run: .* float64", (Z.double(), Z), {"backend": "triton"}),
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

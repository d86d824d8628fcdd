"""token_divergence on infinities, NaN, extreme temperatures and rows that do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import (
    assert_same_bits,
    gradients,
)
from support.divergence import BACKENDS, KINDS, Case, composed_rows

from softdimo_fast.ops.token_divergence import token_divergence

INF = torch.inf

# ---------------------------------------------------------------------------------------------------
# special values


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

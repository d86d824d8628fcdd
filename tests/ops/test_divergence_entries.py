"""How the C++ divergences read bfloat16, write it, and tell rows apart: by sums over blocks of entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits, gradients
from torch import Tensor

from softdimo_fast import distribution_matching_loss, token_divergence

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "forward_kl"},
    {"kind": "reverse_kl"},
    {"kind": "jeffreys", "beta": 0.3},
)
# Around the entries that vectors, pairs of vectors and chunks of every instruction set hold.
VOCABULARIES = st.integers(1, 70) | st.sampled_from([127, 128, 511, 512, 513, 1000, 1056])


def run(tensors: list[Tensor], upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    def call(teacher: Tensor, model: Tensor) -> Tensor:
        return token_divergence(teacher, model, reduction="none", backend="cpp", **options)

    value, grads = gradients(call, tensors, upstream)
    return [value, *grads]


def exact(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    def call(teacher: Tensor, model: Tensor) -> Tensor:
        return token_divergence(teacher, model, reduction="none", backend="reference", **options)

    value, grads = gradients(call, [t.double() for t in tensors])
    return [value, *grads]


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


# ---------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("options", KINDS)
@given(vocabulary=VOCABULARIES, seed=st.integers(0, 2**20))
def test_bfloat16_is_read_and_written_exactly(
    options: dict[str, Any], vocabulary: int, seed: int
) -> None:
    """The value as from float32; the gradients are those of float32, rounded once."""
    torch.manual_seed(seed)
    halves = [(3 * torch.randn(5, vocabulary)).bfloat16() for _ in range(2)]
    if vocabulary > 2:
        for logits in halves:
            logits[1, seed % vocabulary] = -torch.inf
    value, *grads = run(halves, **options)
    wide_value, *wide_grads = run([t.float() for t in halves], **options)
    torch.testing.assert_close(value, wide_value, rtol=2e-6, atol=1e-6)
    for gradient, wide in zip(grads, wide_grads, strict=True):
        # What float32 rounds otherwise may tip a rounding to bfloat16.
        bound = wide.abs() * 2.0**-8 + wide.abs().amax(1, keepdim=True) * 1e-6
        assert bool(((gradient.float() - wide).abs() <= bound).all())


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("broken", [torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_bfloat16_rows_that_are_broken_anywhere(place: int, broken: float, which: int) -> None:
    """Two entries lie in one word, where an infinity beside any number must stay one."""
    tensors = [torch.randn(3, 8).bfloat16() for _ in range(2)]
    tensors[which][1, place] = broken
    for found in run(tensors):
        rows = found.isnan().reshape(3, -1)
        assert rows.all(1).tolist() == [False, True, False]
        assert rows.any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("place", range(4))
def test_bfloat16_entries_at_minus_infinity_weigh_nothing(place: int) -> None:
    tensors = [torch.randn(3, 4).bfloat16() for _ in range(2)]
    for logits in tensors:
        logits[:, place] = -torch.inf
    kept = [v for v in range(4) if v != place]
    found, without = run(tensors), run([t[:, kept] for t in tensors])
    torch.testing.assert_close(found[0], without[0])
    for gradient, expected in zip(found[1:], without[1:], strict=True):
        torch.testing.assert_close(gradient[:, kept], expected)
        assert float(gradient[:, place].abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("word", [0x7FC00000, 0x7FFFFFFF, 0x7F800001])
def test_an_upstream_nan_makes_nan(dtype: torch.dtype, word: int) -> None:
    """Whatever its bits: rounding must not carry them into a number."""
    tensors = [torch.randn(2, 64).to(dtype) for _ in range(2)]
    upstream = torch.tensor([word, 0], dtype=torch.int32).view(torch.float32)
    for gradient in run(tensors, upstream)[1:]:
        assert gradient[0].isnan().all()
        assert not gradient[1].isnan().any()


def test_a_float32_student_of_bfloat16_logits() -> None:
    student, teacher, auxiliary = torch.randn(3, 4, 6, 200).unbind()
    teacher, auxiliary = teacher.bfloat16(), auxiliary.bfloat16()
    mask = torch.rand(4, 6) < 0.7
    found, truth = (
        gradients(
            lambda z, a=a, b=b: distribution_matching_loss(z, a, b, mask, backend="cpp"), (student,)
        )
        for a, b in ((teacher, auxiliary), (teacher.float(), auxiliary.float()))
    )
    torch.testing.assert_close(found[0], truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][0], truth[1][0], rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------------
# rows that are told apart


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("distance", [16, 32, 64])
def test_blocks_with_equal_sums_do_not_hide_a_difference(
    options: dict[str, Any], distance: int
) -> None:
    """Entries exchanged with their neighbours some vectors on: far from equal, entry by entry."""
    model = 2 * torch.randn(64, 512)
    teacher = model.reshape(64, -1, 2, distance).flip(2).reshape(64, 512).contiguous()
    for found, true in zip(
        run([teacher, model], **options), exact([teacher, model], **options), strict=True
    ):
        assert relative_error(found, true) < 1e-6


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("equal", [2, 4, 16, 400])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_equal_entries_do_not_drown_the_others(
    options: dict[str, Any], equal: int, share: float
) -> None:
    """The entries that agree hold `share` of both distributions; what differs keeps its digits."""
    tensors = [torch.randn(64, 500, dtype=torch.double) for _ in range(2)]
    tensors[0][:, :equal] = tensors[1][:, :equal]
    weights = [t.exp() for t in tensors]
    for weight in weights:
        weight[:, :equal] *= (
            share
            / (1 - share)
            * (weight[:, equal:].sum(1, keepdim=True) / weight[:, :equal].sum(1, keepdim=True))
        )
    logits = [weight.log().float() for weight in weights]
    for found, true in zip(run(logits, **options), exact(logits, **options), strict=True):
        assert relative_error(found, true) < 2e-6


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("depth", [80.0, 95.0, 200.0, 1e4, 1e30])
def test_entries_below_the_range_of_exp(options: dict[str, Any], depth: float) -> None:
    """Weights under 2^-126 count as nothing, their logits as what they are."""
    tensors = list(torch.randn(2, 64, 300))
    for logits in tensors:
        logits[:, ::3] -= depth
    tensors[1][:, 1] += 5
    for found, true in zip(run(tensors, **options), exact(tensors, **options), strict=True):
        assert relative_error(found, true) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_gradient_does_not_depend_on_the_other(dtype: torch.dtype) -> None:
    teacher, model = (2 * torch.randn(2, 40, 333)).to(dtype).unbind()
    for options in KINDS:
        _, both_teacher, both_model = run([teacher, model], **options)
        _, (alone,) = gradients(
            lambda b, o=options: token_divergence(teacher, b, reduction="none", backend="cpp", **o),
            (model,),
        )
        assert_same_bits(alone, both_model)
        _, (alone,) = gradients(
            lambda a, o=options: token_divergence(a, model, reduction="none", backend="cpp", **o),
            (teacher,),
        )
        assert_same_bits(alone, both_teacher)

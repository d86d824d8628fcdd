"""soft_embedding in C++: bfloat16 products in one and two terms, and truncation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits, gradients
from support.contract import assert_contract, relative_errors
from support.soft_embedding import Case, assert_close_to_float64, multiplies_bfloat16
from torch import Tensor

IN_BFLOAT16 = multiplies_bfloat16(
    Case(torch.randn(2, 9), torch.randn(9, 9).bfloat16(), None, None, {})
)


def run(case: Case, upstream: Tensor, backend: str = "cpp") -> tuple[Tensor, ...]:
    """Value and gradients; in float64 by the reference."""
    if backend == "reference":
        case, upstream = (
            case._replace(logits=case.logits.double(), codebook=case.codebook.double()),
            upstream.double(),
        )
    value, grads = gradients(case.call(backend), case.tensors(), upstream)
    return value, *grads


@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 1000, 64), (131, 77, 33), (40, 1, 9), (33, 600, 770)])
def test_bfloat16_codebooks(
    shape: tuple[int, int, int], dtype: torch.dtype, precision: str
) -> None:
    """In the contract against autocast's own expression; in two terms also against that in float32."""
    rows, vocabulary, width = shape
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    codebook, upstream = (
        torch.randn(vocabulary, width).bfloat16(),
        torch.randn(rows, width).bfloat16(),
    )
    case = Case(logits, codebook, None, None, {"precision": precision, "temperature": 0.7})
    assert_close_to_float64(case, "cpp")
    mine, truth = run(case, upstream), run(case, upstream, "reference")
    if precision == "high":
        wide, wide_grads = gradients(case.composed, case.tensors(), upstream)
        assert_contract(mine[0], wide, truth[0])
        assert_contract(mine[2], wide_grads[1], truth[2], what="gradient of codebook")
    if dtype == torch.float32 and vocabulary > 1:
        assert relative_errors(mine[1], truth[1])[0] < (3e-3 if precision == "default" else 3e-5)


@pytest.mark.skipif(not IN_BFLOAT16, reason="no bfloat16 products on this instruction set")
def test_two_terms_are_what_precision_high_buys() -> None:
    logits, codebook = torch.randn(256, 500) * 3, torch.randn(500, 64).bfloat16()
    upstream, errors = torch.randn(256, 64).bfloat16(), {}
    for precision in ("default", "high"):
        case = Case(logits, codebook, None, None, {"precision": precision})
        errors[precision] = relative_errors(
            run(case, upstream)[1], run(case, upstream, "reference")[1]
        )[0]
    assert errors["high"] < errors["default"] / 20


@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("distance", [3e-2, 4e-4, 2e-6])
def test_nearly_one_hot_rows_in_bfloat16(distance: float, precision: str) -> None:
    """delta from a bfloat16 e, or a sum of what was not rounded, loses these rows altogether."""
    rows, vocabulary, width = 256, 300, 24
    logits = torch.randn(rows, vocabulary, dtype=torch.float64)
    winner = torch.randint(vocabulary, (rows, 1))
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), dim=1, keepdim=True)
    logits = logits.scatter(1, winner, others + torch.log(torch.tensor((1 - distance) / distance)))
    codebook, upstream = (
        torch.randn(vocabulary, width).bfloat16(),
        torch.randn(rows, width).bfloat16(),
    )
    case = Case(logits.float(), codebook, None, None, {"precision": precision})
    mine, truth = run(case, upstream), run(case, upstream, "reference")
    assert relative_errors(mine[1], truth[1])[0] < 8e-3
    assert float(mine[1].double().sum(1).abs().max()) < 1e-5


@pytest.mark.parametrize("precision", ["default", "high"])
def test_bfloat16_products_do_not_depend_on_batch_or_threads(precision: str) -> None:
    logits, codebook = torch.randn(900, 300), torch.randn(300, 40).bfloat16()
    mask = torch.rand(900) < 0.3
    upstream, before = torch.randn(900, 40).bfloat16(), torch.get_num_threads()
    options = {"precision": precision, "mask_embedding": torch.randn(40).bfloat16()}

    def both(pick: Tensor | slice) -> tuple[Tensor, ...]:
        case = Case(logits[pick], codebook, None, None, {**options, "mask": mask[pick]})
        return run(case, upstream[pick])

    whole = both(slice(None))
    for threads in (2, 5):
        torch.set_num_threads(threads)
        try:
            for mine, first in zip(both(slice(None)), whole, strict=True):
                assert_same_bits(mine, first)
        finally:
            torch.set_num_threads(before)
    for pick in (torch.arange(1), torch.randperm(900), torch.arange(0, 900, 7)):
        value, dlogits, _ = both(pick)
        assert_same_bits(value, whole[0][pick])
        assert_same_bits(dlogits, whole[1][pick])


def test_special_values_in_bfloat16() -> None:
    logits = torch.randn(40, 600)
    logits[1, 17], logits[3, :500], logits[4, 550], logits[2] = (
        torch.nan,
        -torch.inf,
        torch.inf,
        -torch.inf,
    )
    value, dlogits, _ = run(
        Case(logits, torch.randn(600, 16).bfloat16(), None, None, {}), torch.ones(40, 16)
    )
    broken = torch.zeros(40, dtype=torch.bool)
    broken[[1, 2, 4]] = True
    assert torch.equal(value.isnan().all(dim=1), broken)
    assert torch.equal(value.isnan().any(dim=1), broken)
    assert torch.equal(dlogits.isnan().any(dim=1), broken)
    assert dlogits[3, :500].abs().max() == 0


TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 10**6}, {"top_p": 0.3}, {"top_p": 1.0}, {"top_k": 20, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("options", TRUNCATIONS)
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_truncation_is_the_references(
    dtype: torch.dtype, noise: bool, options: dict[str, Any]
) -> None:
    """The same entries (bfloat16 logits tie often), values and gradients; grouped, masked, T by row."""
    if noise:
        options = options | {"noise": "gumbel", "seed": 5}
    logits = (torch.randn(60, 2, 600) * 2).to(dtype)
    mask, temperature = torch.rand(60, 2) < 0.3, torch.rand(60, 2).double() + 0.5
    codebook, embedding = torch.randn(2, 600, 12).double(), torch.randn(2, 12).double()
    case = Case(logits, codebook, temperature, embedding, options | {"mask": mask})
    upstream = torch.randn(60, 2, 12).double()
    value, grads = gradients(case.call("cpp"), case.tensors(), upstream)
    truth, truths = gradients(case.call("reference"), case.tensors(), upstream)
    torch.testing.assert_close(value, truth)
    for mine, true in zip(grads, truths, strict=True):
        torch.testing.assert_close(mine, true)
    assert torch.equal(grads[0] == 0, truths[0] == 0)


@pytest.mark.parametrize("options", TRUNCATIONS)
def test_truncated_float32_rows(options: dict[str, Any]) -> None:
    logits = torch.randn(300, 1000) * 3
    codebook, upstream = torch.randn(1000, 24), torch.randn(300, 24)
    case = Case(logits, codebook, None, None, options | {"temperature": 0.8})
    value, grads = gradients(case.call("cpp"), case.tensors(), upstream)
    truth, truths = gradients(case.call("reference"), case.tensors(), upstream)
    assert torch.equal(grads[0] == 0, truths[0] == 0)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    for mine, true in zip(grads, truths, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=2e-6)
    picked, _ = gradients(
        case._replace(logits=logits[[7]]).call("cpp"), (logits[[7]], codebook), upstream[[7]]
    )
    assert_same_bits(picked, value[[7]])

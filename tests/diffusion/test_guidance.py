"""Classifier-free guidance: one convention, one batched pass."""

from __future__ import annotations

import pytest
import torch
from support.training import FAMILIES, transformer
from torch import Tensor

from softdimo_fast.diffusion import Draws, branch_logits, guidance_from_weight, guided_logits


def case(family: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    model, draws = transformer(family), Draws.of(0, 0, 5)
    embeddings = model.embed(draws.integers("tokens", model.vocabulary + 1, *model.token_shape))
    return model, embeddings.detach(), draws.integers("condition", 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_branches_equal_two_separate_passes(family: str) -> None:
    model, embeddings, condition = case(family)
    both = branch_logits(model, embeddings, condition, guided=True)  # type: ignore[arg-type]
    assert both.unconditional is not None
    torch.testing.assert_close(both.conditional, model.logits(embeddings, condition))
    none = model.unconditional(condition)
    torch.testing.assert_close(both.unconditional, model.logits(embeddings, none))
    one = branch_logits(model, embeddings, condition, guided=False)  # type: ignore[arg-type]
    assert one.unconditional is None
    assert torch.equal(one.conditional, model.logits(embeddings, condition))


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 2.0, 7.5, -1.0])
def test_guided_logits(scale: float) -> None:
    model, embeddings, condition = case("token")
    c = model.logits(embeddings, condition)
    u = model.logits(embeddings, model.unconditional(condition))
    guided = guided_logits(model, embeddings, condition, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(guided, u + scale * (c - u), atol=1e-5, rtol=1e-4)


def test_the_other_convention() -> None:
    c, u, w = torch.randn(4), torch.randn(4), 7.1
    s = guidance_from_weight(w)
    assert s == 1 + w
    torch.testing.assert_close(u + s * (c - u), c + w * (c - u))

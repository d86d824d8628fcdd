"""The head at wanted rows alone: the same numbers and gradients, and nothing computed elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES, build, conditions
from torch import Tensor

from softdimo_fast.diffusion import Draws, branch_logits, guided_logits

BATCH = 3


def case(family: str) -> tuple[Any, Tensor, Any, Tensor]:
    """A model, embeddings, their condition and some rows: all of one sample, some of another."""
    model, draws = build(family), Draws.of(0, 0, BATCH)
    tokens = draws.integers("tokens", model.vocabulary, *model.token_shape)
    length = model.token_shape[0]
    rows = torch.cat([torch.arange(length), 2 * length + torch.tensor([1, length - 1])])
    return model, model.embed(tokens).detach(), conditions(family, draws), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family: str) -> None:
    model, embeddings, condition, rows = case(family)
    hidden = model(embeddings, condition).detach().requires_grad_()
    some, every = model.head(hidden, rows), model.head(hidden).flatten(0, 1)[rows]
    assert some.shape == (len(rows), *model.token_shape[1:], model.vocabulary)
    torch.testing.assert_close(some, every)
    leaves = [hidden, *model.parameters()]
    weight = torch.randn(some.shape, generator=torch.Generator().manual_seed(1))
    got, expected = (
        torch.autograd.grad((logits * weight).sum(), leaves, allow_unused=True)
        for logits in (some, every)
    )
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
    none = model.head(hidden, rows[:0])
    assert none.shape == (0, *some.shape[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_computed_elsewhere(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states that are not wanted may hold anything, and :meth:`head_input` does not see them."""
    model, embeddings, condition, rows = case(family)
    hidden = model(embeddings, condition)
    wanted = torch.zeros(hidden.shape[:-1], dtype=torch.bool).view(-1)
    wanted[rows] = True
    broken = hidden.masked_fill(~wanted.view(*hidden.shape[:-1], 1), torch.nan)
    seen: list[torch.Size] = []
    head_input = type(model).head_input

    def watched(model: Any, hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return head_input(model, hidden)

    monkeypatch.setattr(type(model), "head_input", watched)
    torch.testing.assert_close(model.head(broken, rows), model.head(hidden, rows))
    assert seen == [(len(rows), hidden.shape[-1])] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_both_branches_of_guidance(family: str) -> None:
    model, embeddings, condition, rows = case(family)
    for guided in (False, True):
        some = branch_logits(model, embeddings, condition, guided=guided, rows=rows)
        every = branch_logits(model, embeddings, condition, guided=guided)
        for s, e in zip(some, every, strict=True):
            assert (s is None) == (e is None) == (not guided and s is not some.conditional)
            if s is not None and e is not None:
                torch.testing.assert_close(s, e.flatten(0, 1)[rows], rtol=1e-5, atol=1e-5)
    some_guided = guided_logits(model, embeddings, condition, 3.0, rows=rows)
    every_guided = guided_logits(model, embeddings, condition, 3.0)
    torch.testing.assert_close(some_guided, every_guided.flatten(0, 1)[rows], rtol=1e-4, atol=1e-4)


def test_maskgits_mask_column() -> None:
    model, embeddings, condition, rows = case("maskgit")
    hidden = model(embeddings, condition)
    some = model.head_with_mask(hidden, rows)
    assert some.shape == (len(rows), model.vocabulary + 1)
    torch.testing.assert_close(some, model.head_with_mask(hidden).flatten(0, 1)[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_whatever_the_number_of_rows(family: str) -> None:
    model, embeddings, condition, rows = case(family)
    hidden = model(embeddings, condition).detach()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.head, fullgraph=True, backend=backend, dynamic=True)
    for count in (len(rows), 5, 4):
        some = rows[:count].clone()
        torch.testing.assert_close(compiled(hidden, some), model.head(hidden, some))
    assert len(graphs) == 1

"""What the protocol promises, for every family: the package's transformer and one with grouped tokens."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_same_bits
from support.training import CONDITIONS, FAMILIES, VOCABULARY, transformer
from torch import Tensor
from torch.nn import functional

from softdimo_fast import linear_soft_embedding
from softdimo_fast.diffusion import Draws

DRAWS = Draws.of(0, 0, 6)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return transformer(request.param)


def tokens_of(model: torch.nn.Module, *, masks: bool = True) -> Tensor:
    return DRAWS.integers("tokens", model.vocabulary + masks, *model.token_shape)


def inputs(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return model.embed(tokens_of(model)).detach(), DRAWS.integers("condition", CONDITIONS)


def test_shapes(model: torch.nn.Module) -> None:
    embeddings, condition = inputs(model)
    rows = (6, *model.token_shape)
    hidden = model(embeddings, condition)
    assert hidden.shape[:2] == embeddings.shape[:2] == (6, model.token_shape[0])
    assert model.logits(embeddings, condition).shape == (*rows, VOCABULARY)
    assert model.soft_embed(torch.randn(*rows, VOCABULARY)).shape == embeddings.shape
    assert model.token_table.shape[-2] == model.vocabulary
    assert model.mask_id >= model.vocabulary
    assert model.unconditional(condition).shape == condition.shape
    names = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in model.embedding_parameters()} <= names


def test_a_one_hot_soft_embedding_is_the_hard_one(model: torch.nn.Module) -> None:
    tokens = tokens_of(model, masks=False)
    one_hot = functional.one_hot(tokens, VOCABULARY).float()
    # exp(-1e4) is 0: the softmax is one-hot to the last bit.
    assert_same_bits(model.soft_embed(1e4 * one_hot), model.embed(tokens))


def test_mask_rows(model: torch.nn.Module) -> None:
    tokens = tokens_of(model, masks=False)
    mask = DRAWS.uniform("mask", *model.token_shape) < 0.5
    hard = model.embed(model.masked_tokens(tokens, mask))
    logits = 1e4 * functional.one_hot(tokens, VOCABULARY).float()
    logits[mask] = torch.nan  # never read
    assert_same_bits(model.soft_embed(logits, mask=mask), hard)
    assert int((model.masked_tokens(tokens, mask) == model.mask_id).sum()) == int(mask.sum())


def test_the_soft_embedding_is_the_expected_hard_one(model: torch.nn.Module) -> None:
    logits = 2 * DRAWS.normal("logits", *model.token_shape, VOCABULARY)
    p = logits.softmax(-1)
    single = [torch.full(model.token_shape, v)[None] for v in range(VOCABULARY)]
    rows = torch.cat([model.embed(tokens) for tokens in single])
    weights = p.flatten(2) if p.dim() == 3 else p
    if p.dim() == 4:  # each group has its own part of the embedding
        parts = rows.unflatten(-1, (p.shape[2], -1))
        expected = torch.einsum("blgv,vlgd->blgd", p, parts).flatten(-2)
    else:
        expected = torch.einsum("blv,vld->bld", weights, rows)
    torch.testing.assert_close(model.soft_embed(logits), expected)
    hot = model.soft_embed(logits, temperature=2.0)
    torch.testing.assert_close(hot, model.soft_embed(logits / 2))


def test_the_head_may_be_sliced_and_fused(model: torch.nn.Module) -> None:
    """Columns and rows can be computed alone, and the logits need not be held."""
    embeddings, condition = inputs(model)
    hidden = model.head_input(model(embeddings, condition))
    logits = model.logits(embeddings, condition)
    weight, bias = model.head_weight, model.head_bias
    part = torch.einsum("blh,...vh->bl...v", hidden, weight[..., :5, :]) + bias[..., :5]
    torch.testing.assert_close(part, logits[..., :5])
    rows = model.head(model(embeddings, condition)[2:4])
    torch.testing.assert_close(rows, logits[2:4])
    if weight.dim() == 2:
        fused = linear_soft_embedding(hidden, weight, model.token_table, bias=bias)
        torch.testing.assert_close(fused, model.soft_embed(logits))


def test_features_are_the_layers_of_the_forward_pass(model: torch.nn.Module) -> None:
    embeddings, condition = inputs(model)
    layers = tuple(range(model.depth))
    every = model.features(embeddings, condition, layers)
    assert [f.shape[1] for f in every] == [model.token_shape[0] + 1] * model.depth
    assert_same_bits(every[-1][:, 1:], model(embeddings, condition))
    (first,) = model.features(embeddings, condition, (0,))
    assert_same_bits(first, every[0])
    assert not torch.equal(every[0], every[1])


def test_the_condition_matters_and_samples_do_not_mix(model: torch.nn.Module) -> None:
    embeddings, condition = inputs(model)
    logits = model.logits(embeddings, condition)
    for other in (1 - condition, model.unconditional(condition)):
        assert not torch.allclose(model.logits(embeddings, other), logits, atol=1e-3)
    torch.testing.assert_close(
        model.logits(embeddings[3:4], condition[3:4]), logits[3:4], atol=1e-5, rtol=1e-5
    )


def test_training_mode_draws_nothing(model: torch.nn.Module) -> None:
    embeddings, condition = inputs(model)
    state = torch.get_rng_state()
    assert_same_bits(
        model.train().logits(embeddings, condition), model.eval().logits(embeddings, condition)
    )
    assert torch.equal(state, torch.get_rng_state())


def test_grouped_expectations_factorise() -> None:
    """The product of the groups' laws over the joint vocabulary, enumerated, is the grouped embedding."""
    model = transformer("grouped")
    logits = 2 * DRAWS.normal("logits", *model.token_shape, VOCABULARY)
    p = logits.softmax(-1)
    expected = torch.zeros_like(model.soft_embed(logits))
    for first in range(VOCABULARY):
        for second in range(VOCABULARY):
            tokens = torch.tensor([first, second]).expand(1, *model.token_shape)
            expected += (p[:, :, 0, first] * p[:, :, 1, second])[..., None] * model.embed(tokens)
    torch.testing.assert_close(model.soft_embed(logits), expected)
    # Of bits that are -1 or 1 the expectation is 2 P(bit = 1) - 1.
    bits = torch.arange(VOCABULARY)[:, None] >> torch.arange(3) & 1
    chance = torch.einsum("blgv,vd->blgd", p, bits.float()).flatten(-2)
    torch.testing.assert_close(model.soft_embed(logits), 2 * chance - 1)

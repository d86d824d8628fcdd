"""What the two text-to-image transformers, MaskGen and Meissonic, must both do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.text_families import BATCH, TRANSFORMERS, Sizes, normal, tokens_of
from torch import Tensor
from torch.nn import functional

from softdimo_fast import linear_soft_embedding
from softdimo_fast.models.conditions import batch_size, concatenate, rows, select


@pytest.fixture(params=TRANSFORMERS)
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    build, condition = TRANSFORMERS[request.param]
    return build(), condition()


def test_shapes(family: tuple[Any, Any]) -> None:
    model, condition = family
    embeddings = model.embed(tokens_of(model))
    hidden = model(embeddings, condition)
    assert hidden.shape == embeddings.shape == (BATCH, *model.token_shape, hidden.shape[-1])
    logits = model.logits(embeddings, condition)
    assert logits.shape == (BATCH, *model.token_shape, model.vocabulary)
    assert_same_bits(model.generator_logits(model.generator_input(embeddings), condition), logits)
    assert model.soft_embed(logits).shape == embeddings.shape
    assert len(model.token_table) == model.vocabulary
    assert model.mask_id >= model.vocabulary


def test_a_one_hot_soft_embedding_is_the_hard_one(family: tuple[Any, Any]) -> None:
    """Oracles 5 and 10: Meissonic's, too, since its expectation comes before norm and convolution."""
    model, condition = family
    codes = tokens_of(model, masks=False)
    mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    hard = model.embed(model.masked_tokens(codes, mask))
    # exp(-1e4) is 0: the softmax is one-hot to the last bit.
    logits = 1e4 * functional.one_hot(codes, model.vocabulary).float()
    assert_same_bits(model.soft_embed(logits), model.embed(codes))
    logits[mask] = torch.nan  # never read
    soft = model.soft_embed(logits, mask=mask)
    assert_same_bits(soft, hard)
    assert_same_bits(model.logits(soft, condition), model.logits(hard, condition))


def test_the_soft_embedding_is_the_expected_row(family: tuple[Any, Any]) -> None:
    model, _ = family
    logits = 3 * normal(BATCH, *model.token_shape, model.vocabulary, seed=5)
    every = model.embed(torch.arange(model.vocabulary)[:, None])[:, 0]
    torch.testing.assert_close(model.soft_embed(logits), logits.softmax(-1) @ every)


def test_the_soft_gradient(family: tuple[Any, Any]) -> None:
    """Through the frozen network: what it is by way of probabilities and autograd."""
    model, condition = family
    model.requires_grad_(False)
    logits = normal(BATCH, *model.token_shape, model.vocabulary, seed=5).requires_grad_()
    weight = normal(*logits.shape, seed=6)

    def gradient(embeddings: Tensor) -> Tensor:
        value = (model.logits(embeddings, condition) * weight).sum()
        return torch.autograd.grad(value, logits)[0]

    ours = gradient(model.soft_embed(logits))
    plain = gradient(logits.softmax(-1) @ model.token_table)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    torch.testing.assert_close(ours.sum(-1), torch.zeros(logits.shape[:-1]), rtol=0, atol=1e-4)


def test_the_head_computes_real_columns_of_wanted_rows(family: tuple[Any, Any]) -> None:
    model, condition = family
    hidden = model(model.embed(tokens_of(model)), condition)
    logits = model.head(hidden)
    assert model.head_weight.shape[0] == model.vocabulary
    assert model.head_bias is None
    torch.testing.assert_close(model.head(hidden[1:2, 2:4]), logits[1:2, 2:4])
    torch.testing.assert_close(model.head_input(hidden) @ model.head_weight[:5].T, logits[..., :5])
    fused = linear_soft_embedding(model.head_input(hidden), model.head_weight, model.token_table)
    torch.testing.assert_close(fused, model.soft_embed(logits))


def test_train_mode_computes_the_same_and_draws_nothing(family: tuple[Any, Any]) -> None:
    """The published MaskGen masks its own input in train mode, at random."""
    model, condition = family
    embeddings = model.embed(tokens_of(model, masks=False))
    state = torch.get_rng_state()
    logits = model.train().logits(embeddings, condition)
    assert_same_bits(model.eval().logits(embeddings, condition), logits)
    assert torch.equal(state, torch.get_rng_state())


def test_the_call_changes_none_of_its_arguments(family: tuple[Any, Any]) -> None:
    model, condition = family
    tokens = tokens_of(model)
    embeddings = model.embed(tokens)
    before = [t.clone() for t in (tokens, embeddings, *condition)]
    model.logits(embeddings, condition)
    for tensor, copy in zip((tokens, embeddings, *condition), before, strict=True):
        assert_same_bits(tensor, copy)


def test_features_are_the_image_rows_after_blocks(family: tuple[Any, Any]) -> None:
    model, condition = family
    embeddings = model.embed(tokens_of(model))
    every = model.features(embeddings, condition, tuple(range(model.depth)))
    assert len({f.shape for f in every}) == 1
    assert every[0].shape[0] == BATCH
    assert all(not torch.equal(a, b) for a, b in pairwise(every))
    assert_same_bits(model.features(embeddings, condition, (1,))[0], every[1])
    swapped = model.features(embeddings, condition, (1, 0))
    assert_same_bits(swapped[0], every[1])
    assert_same_bits(swapped[1], every[0])
    assert model.features(embeddings, condition, ()) == []
    for layers in ((model.depth,), (-1,)):
        with pytest.raises(ValueError, match="features: layers must be numbers from 0 to"):
            model.features(embeddings, condition, layers)


def test_features_run_no_later_block(family: tuple[Any, Any]) -> None:
    model, condition = family
    embeddings = model.embed(tokens_of(model))
    with Sizes() as few:
        model.features(embeddings, condition, (0,))
    with Sizes() as all_of_them:
        model.features(embeddings, condition, (model.depth - 1,))
    assert sum("scaled_dot_product" in name for name in few.names) == 1
    assert sum("scaled_dot_product" in name for name in all_of_them.names) == model.depth


def test_no_attention_map_is_in_memory(family: tuple[Any, Any]) -> None:
    model, condition = family
    with torch.no_grad(), Sizes() as sizes:
        features = model.features(model.embed(tokens_of(model)), condition, (model.depth - 1,))
    joint = features[0].shape[1] + condition.text.shape[1]
    assert not [shape for shape in sizes.shapes if shape[-2:] == (joint, joint)]
    assert "aten::_softmax" not in sizes.names


def loss_and_gradients(model: Any, condition: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    tokens = tokens_of(model, masks=False)
    logits = model.logits(model.embed(model.masked_tokens(tokens, tokens % 2 == 0)), condition)
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def test_the_training_loss_reaches_every_parameter(family: tuple[Any, Any]) -> None:
    """Distributed training waits for parameters without gradient."""
    model, condition = family
    _, gradients = loss_and_gradients(model, condition)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    # The text queries of MaskGen's last block are in its files, and change nothing.
    dead = {name for name, gradient in gradients.items() if not gradient.any()}
    last = f"blocks.{model.depth - 1}.attn.add_q_proj"
    expected = {f"{last}.weight", f"{last}.bias"} if hasattr(model, "blocks") else set()
    assert expected <= dead
    # Adding one number to all keys of a head changes no softmax: these are zero up to rounding.
    assert all(
        name in expected or "add_k_proj.bias" in name or "to_k.bias" in name for name in dead
    )


def test_checkpointed_blocks_give_the_same_and_keep_less(family: tuple[Any, Any]) -> None:
    model, condition = family
    loss, gradients = loss_and_gradients(model, condition)
    plain = saved(model, condition)
    model.checkpoint_blocks = True
    again, recomputed = loss_and_gradients(model, condition)
    assert_same_bits(loss, again)
    for name, gradient in gradients.items():
        assert_same_bits(gradient, recomputed[name], name)
    assert saved(model, condition) < plain / 3


def saved(model: Any, condition: Any) -> int:
    """How many numbers the forward pass keeps for backward."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(model.embed(tokens_of(model)), condition)
    return kept


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiles_without_graph_breaks(family: tuple[Any, Any], checkpointed: bool) -> None:
    model, condition = family
    model.checkpoint_blocks = checkpointed
    torch._dynamo.reset()

    def both(tokens: Tensor) -> tuple[Tensor, ...]:
        logits = model.logits(model.embed(tokens), condition)
        inputs = model.generator_input(model.soft_embed(logits, mask=tokens == model.mask_id))
        other = model.unconditional(condition)
        return logits, model.generator_logits(inputs, other)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    tokens = tokens_of(model)
    for ours, expected in zip(compiled(tokens), both(tokens), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(family: tuple[Any, Any], dtype: torch.dtype) -> None:
    model, condition = family
    tokens = tokens_of(model)
    expected = model.logits(model.embed(tokens), condition)
    kept = {"score", "time", "micro", "prompt"}  # numbers that go into sinusoids stay float32
    cast = condition._replace(
        **{k: v.to(dtype) for k, v in condition._asdict().items() if k not in kept}
    )
    logits = model.to(dtype).logits(model.embed(tokens), cast)
    assert logits.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float64 else 0.1)


def test_autocast(family: tuple[Any, Any]) -> None:
    model, condition = family
    tokens = tokens_of(model)
    expected = model.logits(model.embed(tokens), condition)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(model.embed(tokens), condition)
    assert (logits.float() - expected).norm() / expected.norm() < 0.1


# ---- conditions --------------------------------------------------------------------------------------------


def test_samples_do_not_mix_and_every_field_counts(family: tuple[Any, Any]) -> None:
    model, condition = family
    embeddings = model.embed(tokens_of(model))
    logits = model.logits(embeddings, condition)
    alone = model.logits(embeddings[1:2], rows(condition, slice(1, 2)))
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-5, atol=1e-5)
    ignored = {"null_text", "null_pooled", "guidance", "prompt"}
    for name, tensor in condition._asdict().items():
        changed = condition._replace(**{name: tensor + 0.5})
        same = torch.equal(model.logits(embeddings, changed), logits)
        assert same == (name in ignored), name


def test_the_unconditional_branch(family: tuple[Any, Any]) -> None:
    model, condition = family
    other = model.unconditional(condition)
    assert_same_bits(other.text, condition.null_text)
    assert_same_bits(other.pooled, condition.null_pooled)
    kept = set(condition._fields) - {"text", "pooled"}
    for name in kept:
        assert getattr(other, name) is getattr(condition, name)
    both = concatenate(condition, other)
    assert batch_size(both) == 2 * BATCH
    embeddings = model.embed(tokens_of(model))
    pair = model.logits(torch.cat([embeddings, embeddings]), both)
    torch.testing.assert_close(pair[BATCH:], model.logits(embeddings, other), rtol=1e-5, atol=1e-5)
    mixed = select(torch.tensor([True, False, True]), other, condition)
    assert_same_bits(mixed.text[1], condition.text[1])
    assert_same_bits(mixed.text[2], condition.null_text[2])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_guidance_without_its_text_says_so(name: str) -> None:
    build, condition = TRANSFORMERS[name]
    model, lacking = build(), condition(null_text=None, null_pooled=None)
    assert lacking.null_text.shape[1] == 0
    model.logits(model.embed(tokens_of(model)), lacking)
    with pytest.raises(ValueError, match=r"null_text must have the shape .* got \[3, 0, 10\]"):
        model.unconditional(lacking)


def test_wrong_shapes_are_named(family: tuple[Any, Any]) -> None:
    model, condition = family
    embeddings = model.embed(tokens_of(model))
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(embeddings[:, 1:], condition), "embeddings"),
        (lambda: model(embeddings[..., 1:], condition), "embeddings|shape"),
        (lambda: model(embeddings, condition._replace(text=condition.text[..., 1:])), "text"),
        (lambda: model(embeddings, condition._replace(pooled=condition.pooled[:, 1:])), "pooled"),
        (lambda: model(embeddings[:2], condition), "condition.text"),
    ]
    for call, match in wrong:
        with pytest.raises((ValueError, RuntimeError), match=match):
            call()

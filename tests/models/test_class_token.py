"""What the MaskGIT and MaskBit transformers have in common, beyond the protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.maskgit_maskbit import assert_key_list, needs_key_lists
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.seeding import seeded

FAMILIES = ("maskgit", "maskbit")
# 16 positions, 17 rows: a number that no other size is, so that an attention map would show.
SIZES: dict[str, Any] = {
    "img_size": 64, "hidden_dim": 24, "depth": 3, "heads": 3, "mlp_dim": 40, "nclass": 5,
}  # fmt: skip


def small(family: str, **changes: Any) -> Any:
    """A model in float64 with all its weights random."""
    with seeded(0):
        if family == "maskgit":
            model: nn.Module = MaskGitTransformer(
                MaskGitConfig(**{"codebook_size": 13} | SIZES | changes)
            )
        else:
            model = MaskBitGenerator(
                MaskBitGeneratorConfig(**{"codebook_size": 64} | SIZES | changes)
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def inputs(model: Any, samples: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens, some of them [MASK], and labels."""
    generator = torch.Generator().manual_seed(1)
    shape = (samples, *model.token_shape)
    tokens = torch.randint(model.vocabulary + 1, shape, generator=generator)
    tokens[0] = model.mask_id
    return tokens, torch.randint(model.classes, (samples,), generator=generator)


# ---- against the formulas, written out from the state dict -------------------------------------------------


def attention(x: Tensor, weights: dict[str, Tensor], prefix: str, heads: int) -> Tensor:
    qkv = functional.linear(
        x, weights[f"{prefix}.in_proj_weight"], weights[f"{prefix}.in_proj_bias"]
    )
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
    )
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return linear(mixed, weights, f"{prefix}.out_proj")


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return functional.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps
    )


def maskgit_formula(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    w, config, gelu = model.state_dict(), model.config, functional.gelu
    codes, positions = config.codebook_size, tokens.shape[1]
    rows = torch.cat([tokens, codes + 1 + labels[:, None]], 1)
    x = w["tok_emb.weight"][rows] + w["pos_emb"]
    x = gelu(linear(norm(x, w, "first_layer.0", 1e-12), w, "first_layer.2"))
    x = linear(norm(x, w, "first_layer.4", 1e-12), w, "first_layer.6")
    for i in range(config.depth):
        at = f"transformer.layers.{i}"
        x = x + attention(norm(x, w, f"{at}.0.norm", 1e-5), w, f"{at}.0.fn.mha", config.heads)
        inner = gelu(linear(norm(x, w, f"{at}.1.norm", 1e-5), w, f"{at}.1.fn.net.0"))
        x = x + linear(inner, w, f"{at}.1.fn.net.3")
    x = gelu(linear(norm(x, w, "last_layer.0", 1e-12), w, "last_layer.2"))
    x = norm(x, w, "last_layer.4", 1e-12)
    logits = x @ w["tok_emb.weight"].T + w["bias"]
    return logits[:, :positions, :codes]


def maskbit_formula(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    w, config = model.state_dict(), model.config
    splits, bits = config.codebook_splits, config.split_bits
    columns = []
    for split in range(splits):
        for bit in range(bits):
            sign = (tokens[..., split] >> bit & 1) * 2.0 - 1
            columns.append(torch.where(tokens[..., split] == 2**bits, 0.0, sign))
    x = linear(torch.stack(columns, -1).double(), w, "input_proj")
    x = torch.cat([x, w["class_emb.weight"][labels][:, None]], 1) + w["pos_emb"]
    x = norm(x, w, "first_layer.0", 1e-12)
    for i in range(config.depth):
        at = f"transformer.layers.{i}"
        x = norm(x + attention(x, w, f"{at}.0.mha", config.heads), w, f"{at}.0.norm", 1e-12)
        inner = functional.gelu(linear(x, w, f"{at}.1.net.0"))
        x = norm(x + linear(inner, w, f"{at}.1.net.2"), w, f"{at}.1.norm", 1e-12)
    x = norm(functional.gelu(linear(x, w, "last_layer.0")), w, "last_layer.2", 1e-12)
    logits = linear(x[:, :-1], w, "prediction_layer")
    return logits.unflatten(-1, (splits, 2**bits))


FORMULAS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "maskgit": maskgit_formula,
    "maskbit": maskbit_formula,
}


@pytest.mark.parametrize("changes", [{}, {"heads": 1, "depth": 1, "img_size": 32, "nclass": 1}])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_formulas(family: str, changes: dict[str, Any]) -> None:
    model = small(family, **changes)
    tokens, labels = inputs(model)
    expected = FORMULAS[family](model, tokens, labels)
    torch.testing.assert_close(model.logits(model.embed(tokens), labels), expected)
    null = model.unconditional(labels)
    assert null.tolist() == [model.classes] * 3
    assert not torch.allclose(model.logits(model.embed(tokens), null), expected)


# ---- soft embeddings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_soft_embeddings_are_the_hard_path_bit_for_bit(family: str) -> None:
    model = small(family).float()
    tokens, labels = inputs(model)
    mask = tokens == model.mask_id
    codes = tokens.clamp(max=model.vocabulary - 1)
    peaks = 1e4 * functional.one_hot(codes, model.vocabulary).float()
    soft, hard = model.soft_embed(peaks, mask=mask), model.embed(tokens)
    assert_same_bits(soft, hard)
    assert_same_bits(model.logits(soft, labels), model.logits(hard, labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_soft_logits_of_a_frozen_network(family: str) -> None:
    model = small(family).requires_grad_(False)
    tokens, labels = inputs(model)
    leaf = torch.randn(*tokens.shape, model.vocabulary, dtype=torch.float64, requires_grad=True)

    def value(logits: Tensor) -> Tensor:
        return model.logits(model.soft_embed(logits), labels).tanh().sum()

    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-6 * torch.randn_like(leaf)
    with torch.no_grad():
        difference = value(leaf + step) - value(leaf - step)
    torch.testing.assert_close(2 * (gradient * step).sum(), difference, rtol=1e-5, atol=1e-12)
    assert float(gradient.sum(-1).abs().max()) < 1e-12


# ---- features, heads, memory, compilation ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_blocks_outputs(family: str) -> None:
    model = small(family)
    tokens, labels = inputs(model)
    embeddings, ran = model.embed(tokens), []
    for i, block in enumerate(model.transformer.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    last, first = model.features(embeddings, labels, (2, 0))
    assert last.shape == first.shape == (3, 17, 24)
    assert_same_bits(model(embeddings, labels), last[:, :-1])
    ran.clear()
    assert_same_bits(model.features(embeddings, labels, (0,))[0], first)
    assert ran == [0]  # the later blocks are not run
    assert model.features(embeddings, labels, ()) == []
    assert model.depth == 3
    for layer in (-1, 3):
        with pytest.raises(ValueError, match="layers must be numbers from 0 to 2"):
            model.features(embeddings, labels, (layer,))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_columns_of_the_head_can_be_computed_alone(family: str) -> None:
    model = small(family)
    tokens, labels = inputs(model)
    hidden = model(model.embed(tokens), labels)
    whole = model.head(hidden)
    some = model.head_input(hidden[:, 3:5]) @ model.head_weight.flatten(0, -2)[:4].T
    bias = model.head_bias if family == "maskbit" else model.head_bias[3:5]
    bias = bias.flatten()[:4] if family == "maskbit" else bias[:, :4]
    torch.testing.assert_close(some + bias, whole.flatten(2)[:, 3:5, :4])


class _Shapes(TorchDispatchMode):
    """The last two sizes of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, Tensor):
                self.found.add(tuple(result.shape[-2:]))
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_attention_map_is_in_memory(family: str) -> None:
    model = small(family).float()
    tokens, labels = inputs(model)
    embeddings = model.embed(tokens).detach().requires_grad_()
    with _Shapes() as shapes:
        model.logits(embeddings, labels).sum().backward()
    assert (17, 24) in shapes.found
    assert (17, 17) not in shapes.found


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_keep_less_and_change_nothing(family: str) -> None:
    model = small(family)
    tokens, labels = inputs(model)

    def step() -> tuple[Tensor, list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model.logits(model.embed(tokens), labels)
        # Not every parameter takes part: tables of unused classes, the bias of the class row.
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        return logits, [g for g in grads if g is not None], kept

    plain, plain_grads, plain_kept = step()
    assert not model.checkpoint_blocks
    model.checkpoint_blocks = True
    logits, grads, kept = step()
    assert_same_bits(logits, plain)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        assert_same_bits(ours, theirs)
    assert kept < plain_kept / 2


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_without_graph_breaks(family: str, checkpointed: bool) -> None:
    model = small(family)
    model.checkpoint_blocks = checkpointed
    tokens, labels = inputs(model)
    leaf = torch.randn(*tokens.shape, model.vocabulary, dtype=torch.float64, requires_grad=True)

    def value(logits: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        soft = model.logits(model.soft_embed(logits), labels)
        hard = model.logits(model.embed(tokens), model.unconditional(labels))
        (tapped,) = model.features(model.embed(tokens), labels, (1,))
        return (soft - hard).square().mean() + tapped.sum()

    torch._dynamo.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    expected, ours = value(leaf, tokens, labels), compiled(leaf, tokens, labels)
    torch.testing.assert_close(ours, expected)
    (grad,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dropped_out_in_any_mode(family: str) -> None:
    """The public Di[M]O code leaves dropout on in the teacher's targets."""
    model = small(family, dropout=0.5)
    tokens, labels = inputs(model)
    embeddings = model.embed(tokens)
    state = torch.get_rng_state()
    training = model.train().logits(embeddings, labels)
    assert_same_bits(training, model.eval().logits(embeddings, labels))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_not_written_to(family: str) -> None:
    """The published MaskBit writes the null class into the caller's labels."""
    model = small(family)
    tokens, labels = inputs(model)
    before = labels.clone()
    model.logits(model.embed(tokens), labels)
    model.unconditional(labels)
    assert torch.equal(labels, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors(family: str) -> None:
    model = small(family)
    tokens, labels = inputs(model)
    embeddings = model.embed(tokens)
    with pytest.raises(ValueError, match=r"embeddings must have shape \[B, 16, "):
        model(embeddings[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels of shape \[3\], got \[2\]"):
        model(embeddings, labels[:2])
    with pytest.raises(IndexError):
        model(embeddings, labels + model.classes + 1)
    for changes, message in (
        ({"heads": 5}, "heads"),
        ({"depth": 0}, "depth"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            small(family, **changes)


# ---- the published checkpoints -----------------------------------------------------------------------------

# Name of the key list -> the config of the full-size model, its keys, elements of its state dict.
FULL_SIZE: dict[str, tuple[Any, int, int]] = {
    "maskgit_transformer": (MaskGitConfig(), 305, 174_160_874),
    "maskbit_generator_10bit": (MaskBitGeneratorConfig(codebook_size=2**10), 301, 304_728_133),
    "maskbit_generator_12bit": (MaskBitGeneratorConfig(codebook_size=2**12), 301, 304_795_782),
    "maskbit_generator_14bit": (MaskBitGeneratorConfig(), 301, 304_929_031),
    "maskbit_generator_16bit": (MaskBitGeneratorConfig(codebook_size=2**16), 301, 305_193_480),
    "maskbit_generator_18bit": (MaskBitGeneratorConfig(codebook_size=2**18), 301, 305_720_329),
}


def full_size(name: str) -> nn.Module:
    config = FULL_SIZE[name][0]
    with torch.device("meta"):
        if isinstance(config, MaskGitConfig):
            return MaskGitTransformer(config)
        return MaskBitGenerator(config)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name: str) -> None:
    model = full_size(name)
    state = model.state_dict()
    _, keys, elements = FULL_SIZE[name]
    assert len(state) == keys
    assert sum(tensor.numel() for tensor in state.values()) == elements


@needs_key_lists
@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_key_lists_load_strictly_and_round_trip(name: str) -> None:
    assert_key_list(full_size(name), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_can_be_assigned_to_a_model_without_any(family: str) -> None:
    """Everything that a forward pass needs is in the state dict."""
    source = small(family)
    with torch.device("meta"):
        empty = type(source)(source.config)
    empty.load_state_dict(source.state_dict(), strict=True, assign=True)
    tokens, labels = inputs(source)
    assert_same_bits(
        empty.logits(empty.embed(tokens), labels), source.logits(source.embed(tokens), labels)
    )
    assert_same_bits(empty.token_table, source.token_table)

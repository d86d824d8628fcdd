"""MaskBit: bits and splits, expected bits, the lookup-free tokenizer and its quirks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.maskgit_maskbit import assert_key_list, needs_key_lists
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config
from softdimo_fast.models.maskbit import (
    MaskBitGenerator,
    MaskBitGeneratorConfig,
    join_splits,
    split_joint,
)
from softdimo_fast.models.maskbit_tokenizer import (
    MaskBitTokenizer,
    MaskBitTokenizerConfig,
    MaskBitTokenizerSizes,
)
from softdimo_fast.models.seeding import seeded

BITS = (10, 12, 14, 16, 18)


def generator(bits: int = 4, splits: int = 2, **sizes: Any) -> MaskBitGenerator:
    defaults: dict[str, Any] = {
        "img_size": 32, "hidden_dim": 12, "depth": 1, "heads": 2, "mlp_dim": 16, "nclass": 3,
        "codebook_size": 2**bits, "codebook_splits": splits,
    }  # fmt: skip
    with seeded(0):
        return MaskBitGenerator(MaskBitGeneratorConfig(**defaults | sizes))


def tokenizer(bits: int = 4, splits: int = 2, **sizes: Any) -> MaskBitTokenizer:
    defaults: dict[str, Any] = {
        "token_size": bits, "hidden_channels": 32, "channel_mult": (1, 2), "num_resolutions": 2,
        "num_res_blocks": 1,
    }  # fmt: skip
    config = MaskBitTokenizerConfig(
        config=MaskBitTokenizerSizes(**defaults | sizes), codebook_splits=splits, img_size=8
    )
    with seeded(0):
        model = MaskBitTokenizer(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


# ---- bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "splits"), [(4, 1), (4, 2), (6, 3), (10, 2), (8, 8)])
def test_bits_follow_each_other_lowest_first(bits: int, splits: int) -> None:
    model, each = generator(bits, splits), bits // splits
    joint = torch.arange(2**bits)
    tokens = split_joint(joint, splits, each)
    assert tokens.shape == (2**bits, splits)
    assert torch.equal(join_splits(tokens, each), joint)
    expected = torch.stack([joint >> k & 1 for k in range(bits)], -1) * 2.0 - 1
    assert_same_bits(model.embed(tokens), expected)
    assert model.token_shape == (4, splits)
    assert model.mask_id == model.vocabulary == 2**each
    assert model.bits_to_indices.tolist() == [2**k for k in range(each)]
    assert model.token_table.shape == (splits, 2**each, each)
    assert_same_bits(model.token_table[-1], expected[: 2**each, :each])


def test_a_masked_split_is_zero_and_the_other_is_not() -> None:
    model = generator(6, 2)
    tokens = torch.tensor([[[5, 8], [8, 2], [8, 8], [0, 7]]])
    bits = model.embed(tokens)[0]
    assert bits[0].tolist() == [1, -1, 1, 0, 0, 0]
    assert bits[1].tolist() == [0, 0, 0, -1, 1, -1]
    assert bits[2].tolist() == [0] * 6
    assert bits[3].tolist() == [-1, -1, -1, 1, 1, 1]
    assert_same_bits(model.mask_embedding, torch.zeros(2, 3))


@pytest.mark.parametrize(("bits", "splits"), [(4, 2), (6, 3), (6, 2)])
def test_expected_bits_are_those_of_the_joint_law(bits: int, splits: int) -> None:
    """Oracle 7: the joint law of all splits, enumerated; without masks and with a masked split."""
    model, codec = generator(bits, splits).double(), tokenizer(bits, splits).double()
    logits = 2 * random(3, 4, splits, model.vocabulary).double()
    joint = torch.arange(2**bits)
    tokens = split_joint(joint, splits, bits // splits)
    p = logits.softmax(-1)
    law = torch.stack([p[:, :, s, tokens[:, s]] for s in range(splits)]).prod(0)
    torch.testing.assert_close(law.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    expected = law @ model.embed(tokens)
    soft = model.soft_embed(logits)
    torch.testing.assert_close(soft, expected)
    # e = 2 P(bit = 1) - 1, and the same vector is what the decoder takes.
    ones = law @ (model.embed(tokens) > 0).double()
    torch.testing.assert_close(soft, 2 * ones - 1)
    torch.testing.assert_close(codec.decode_soft(logits), codec.decode_codes(expected))
    mask = torch.zeros(3, 4, splits, dtype=torch.bool)
    mask[:, 1::2, 0] = True
    masked = model.soft_embed(logits, mask=mask)
    each = bits // splits
    assert not masked[:, 1::2, :each].any()
    torch.testing.assert_close(masked[:, :, each:], expected[:, :, each:])
    torch.testing.assert_close(masked[:, ::2], expected[:, ::2])


def test_the_gradient_of_expected_bits() -> None:
    """dz_j = p_j (B_j . G - e . G): the closed form of method 7, a sum of 0 in each row."""
    model = generator(6, 2).double()
    leaf = random(2, 4, 2, 8).double().requires_grad_()
    upstream = random(2, 4, 6).double()
    (gradient,) = torch.autograd.grad((model.soft_embed(leaf) * upstream).sum(), leaf)
    p, g = leaf.softmax(-1), upstream.unflatten(-1, (2, 3))
    scores = torch.einsum("gvk,blgk->blgv", model.token_table, g)
    torch.testing.assert_close(gradient, p * (scores - (p * scores).sum(-1, keepdim=True)))


def test_the_head_is_split_major() -> None:
    model = generator(4, 2)
    hidden = random(2, 4, 12)
    flat = model.prediction_layer(model.last_layer(hidden))
    torch.testing.assert_close(model.head(hidden), flat.unflatten(-1, (2, 4)))
    assert model.head(hidden).shape[-1] == model.vocabulary  # no [MASK] column


def test_a_call_is_conditional_unless_asked_otherwise() -> None:
    """In the published code a call without a drop mask is unconditional."""
    model = generator().requires_grad_(False)
    bits = model.embed(torch.zeros(2, 4, 2, dtype=torch.int64))
    labels = torch.tensor([0, 2])
    rows = model.first_rows(bits, labels)
    label = model.class_emb.weight[labels] + model.pos_emb[0, -1]
    assert_same_bits(rows[:, -1], model.first_layer(label))
    null = model.first_rows(bits, model.unconditional(labels))
    assert_same_bits(null[0, -1], null[1, -1])
    assert_same_bits(
        null[0, -1], model.first_layer(model.class_emb.weight[3] + model.pos_emb[0, -1])
    )


def test_generator_config() -> None:
    assert [MaskBitGeneratorConfig(codebook_size=2**b).split_bits for b in BITS] == [5, 6, 7, 8, 9]
    for changes, message in (
        ({"codebook_size": 1000}, "codebook_size: must be a power of two"),
        ({"codebook_size": 2**15}, "codebook_splits: must be a number that divides 15"),
        ({"img_size": 250}, "input_stride: must be a number that divides 250"),
        ({"use_prenorm": True}, "use_prenorm: must be False"),
    ):
        with pytest.raises(_config.ConfigError, match=message):
            MaskBitGeneratorConfig(**changes)


# ---- the tokenizer -----------------------------------------------------------------------------------------


def test_bits_are_signs_and_zero_is_negative() -> None:
    model = tokenizer(4)
    latent = torch.tensor([0.0, -0.0, 1e-30, -1e-30]).view(1, 4, 1, 1).requires_grad_()
    quantized = model.quantize(latent)
    assert quantized.latent.flatten().tolist() == [-1, -1, 1, -1]
    assert quantized.codes.tolist() == [[[4]]]
    assert quantized.loss.item() == pytest.approx(0.25)
    # Straight-through.
    (gradient,) = torch.autograd.grad(quantized.latent.sum(), latent)
    assert_same_bits(gradient, torch.ones_like(latent))


@pytest.mark.parametrize(("bits", "splits"), [(4, 2), (6, 3), (10, 2)])
def test_tokens_and_their_codes(bits: int, splits: int) -> None:
    model = tokenizer(bits, splits)
    images = random(2, 3, 8, 8).clamp(-1, 1)
    tokens = model.encode(images)
    assert tokens.shape == (2, *model.token_shape) == (2, 16, splits)
    assert tokens.dtype == torch.int64
    # Images in [-1, 1] here, [0, 1] there.
    latent = model.encode_latent((images + 1) / 2)
    assert_same_bits(model.bits(tokens), latent.flatten(2).transpose(1, 2).sign())
    table = generator(bits, splits).token_table
    assert_same_bits(model.codebook, table)
    peaks = 1e4 * functional.one_hot(tokens, table.shape[1]).float()
    assert_same_bits(model.decode_soft(peaks), model.decode(tokens))
    published = model.decode_latent(latent.sign())
    assert_same_bits(model.decode(tokens), 2 * published - 1)
    assert model.quantize.codebook.shape == (2**bits, bits)
    joint = join_splits(tokens, bits // splits)
    assert_same_bits(model.quantize.codebook[joint], model.bits(tokens))


def test_the_shortcut_takes_the_second_convolution_not_the_input() -> None:
    model = tokenizer(num_res_blocks=2)
    same, changed = model.encoder.down[0].res_blocks[0], model.encoder.down[1].res_blocks[0]
    assert not hasattr(same, "nin_shortcut")
    assert changed.nin_shortcut.weight.shape == (64, 64, 1, 1)
    assert not hasattr(model.encoder.down[1].res_blocks[1], "nin_shortcut")

    def main(block: Any, x: Tensor) -> Tensor:
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            x = functional.conv2d(functional.silu(norm(x)), conv.weight, padding=1)
        return x

    x = random(2, 32, 6, 6)
    torch.testing.assert_close(same(x), x + main(same, x))
    hidden = main(changed, x)
    mixed = torch.einsum("oi,bihw->bohw", changed.nin_shortcut.weight[..., 0, 0], hidden)
    torch.testing.assert_close(changed(x), hidden + mixed)
    assert changed.conv1.bias is None


@pytest.mark.parametrize(("size", "pads"), [(6, (0, 1)), (7, (1, 1))])
def test_strided_convolutions_pad_as_same(size: int, pads: tuple[int, int]) -> None:
    down = tokenizer().encoder.down[0].down_conv
    x = random(1, 32, size, size)
    expected = functional.conv2d(functional.pad(x, (*pads, *pads)), down.weight, down.bias, 2)
    assert expected.shape[-1] == -(-size // 2)
    assert_same_bits(down(x), expected)


def test_the_decoder_runs_from_low_to_high_resolution() -> None:
    model = tokenizer(channel_mult=(1, 1, 2), num_resolutions=3)
    widths = [level.res_blocks[0].conv1.weight.shape[:2] for level in model.decoder.up]
    assert widths == [(64, 64), (32, 64), (32, 32)]
    assert [hasattr(level, "upsample_conv") for level in model.decoder.up] == [True, True, False]
    assert model.decode_latent(random(1, 4, 3, 2)).shape == (1, 3, 12, 8)


def test_grids() -> None:
    model = tokenizer()
    codes = random(1, 6, 4)
    image = model.decode_codes(codes, grid=(2, 3))
    assert image.shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match=r"6 codes do not fill the grid 2 x 2; give grid"):
        model.decode_codes(codes)
    tokens = torch.zeros(1, 6, 2, dtype=torch.int64)
    assert_same_bits(model.decode(tokens, grid=(2, 3)), model.decode(tokens, None, grid=(2, 3)))


def test_gradients_reach_the_bits_of_a_frozen_decoder() -> None:
    model = tokenizer().double().requires_grad_(False)
    leaf = random(1, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(model.decode_codes, (leaf,), fast_mode=True)
    torch._dynamo.reset()
    compiled = torch.compile(model.decode_codes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), model.decode_codes(leaf))


def test_tokenizer_config() -> None:
    published = {
        "config": {
            "model_class": "vqgan+", "quantizer_type": "lookup-free", "codebook_size": 1024,
            "token_size": 10, "commitment_cost": 0.25, "entropy_loss_weight": 0.02,
            "entropy_loss_temperature": 0.01, "entropy_gamma": 1.0, "num_channels": 3,
            "hidden_channels": 32, "channel_mult": [1, 1, 2], "num_resolutions": 3,
            "num_res_blocks": 1, "sample_with_conv": True,
        },
        "legacy": False,
    }  # fmt: skip
    config = _config.from_dict(MaskBitTokenizerConfig, published)
    assert config.config.widths == (32, 32, 64)
    assert config.codebook_splits == 2
    for changes, message in (
        ({"legacy": True}, "legacy: must be False"),
        ({"codebook_splits": 3}, "codebook_splits: must be a number that divides token_size = 14"),
    ):
        with pytest.raises(_config.ConfigError, match=message):
            MaskBitTokenizerConfig(**changes)
    for changes, message in (
        ({"num_resolutions": 4}, "channel_mult: must be 4 numbers"),
        ({"hidden_channels": 48}, "hidden_channels: must be a multiple of 32"),
        ({"sample_with_conv": False}, "sample_with_conv: must be True"),
        ({"quantizer_type": "lookup"}, "quantizer_type"),
    ):
        with pytest.raises(_config.ConfigError, match=message):
            MaskBitTokenizerSizes(**changes)


# ---- the published checkpoints -----------------------------------------------------------------------------

ELEMENTS = dict(
    zip(BITS, (54_479_255, 54_528_411, 54_718_879, 55_548_323, 59_228_583), strict=True)
)


def full_size(bits: int) -> MaskBitTokenizer:
    with torch.device("meta"):
        return MaskBitTokenizer(
            MaskBitTokenizerConfig(config=MaskBitTokenizerSizes(token_size=bits))
        )


@pytest.mark.parametrize("bits", BITS)
def test_full_size(bits: int) -> None:
    model = full_size(bits)
    state = model.state_dict()
    assert len(state) == 177
    assert sum(tensor.numel() for tensor in state.values()) == ELEMENTS[bits]
    assert model.token_shape == (256, 2)


@needs_key_lists
@pytest.mark.parametrize("bits", BITS)
def test_published_key_lists_load_strictly_and_round_trip(bits: int) -> None:
    assert_key_list(full_size(bits), f"maskbit_tokenizer_{bits}bit")

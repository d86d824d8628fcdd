"""The VQGAN: where attention is, the order of its levels, its quantiser, grids of any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.maskgit_maskbit import assert_key_list, needs_key_lists
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.vqgan import VqGan, VqGanConfig, VqGanSizes


def vqgan(**sizes: Any) -> VqGan:
    defaults: dict[str, Any] = {
        "z_channels": 6, "resolution": 8, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1,
        "attn_resolutions": (4,),
    }  # fmt: skip
    config = VqGanConfig(ddconfig=VqGanSizes(**defaults | sizes), n_embed=12, embed_dim=5)
    with seeded(0):
        model = VqGan(config)
        torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def test_tokens_and_their_codes() -> None:
    model = vqgan()
    images = random(2, 3, 8, 8).clamp(-1, 1)
    tokens = model.encode(images)
    assert tokens.shape == (2, *model.token_shape) == (2, 16)
    latent = model.encode_latent(images).flatten(2).transpose(1, 2)
    distance = torch.cdist(latent, model.codebook.expand(2, -1, -1))
    assert torch.equal(tokens, distance.argmin(-1))
    codes = model.codebook[tokens]
    assert_same_bits(model.decode(tokens), model.decode_codes(codes))
    peaks = 1e4 * functional.one_hot(tokens, 12).float()
    assert_same_bits(model.decode_soft(peaks), model.decode(tokens))
    # A [MASK] column, which the codebook does not know, is left out.
    more = torch.cat([peaks, torch.full((2, 16, 1), 1e6)], -1)
    assert_same_bits(model.decode_soft(more), model.decode(tokens))


def test_soft_codes_are_mixed_before_the_convolution() -> None:
    model = vqgan()
    logits = random(1, 16, 12)
    mixed = (logits.softmax(-1) @ model.codebook).transpose(1, 2).unflatten(2, (4, 4))
    expected = model.decoder(model.post_quant_conv(mixed))
    torch.testing.assert_close(model.decode_soft(logits), expected)


def test_the_quantiser_passes_gradients_straight_through() -> None:
    model = vqgan()
    latent = random(2, 5, 3, 4).requires_grad_()
    quantized = model.quantize(latent)
    nearest = model.codebook[quantized.codes].permute(0, 3, 1, 2)
    assert_same_bits(quantized.latent, nearest)
    error = (nearest - latent).square().mean()
    torch.testing.assert_close(quantized.loss, 1.25 * error)
    (gradient,) = torch.autograd.grad(quantized.latent.sum(), latent, retain_graph=True)
    assert_same_bits(gradient, torch.ones_like(latent))
    (commitment,) = torch.autograd.grad(quantized.loss, latent)
    torch.testing.assert_close(commitment, 0.5 * (latent - nearest).detach() / latent.numel())


def test_ties_go_to_the_first_code() -> None:
    model = vqgan()
    with torch.no_grad():
        model.quantize.embedding.weight[7] = model.quantize.embedding.weight[3]
    latent = model.codebook[7].view(1, 5, 1, 1)
    assert model.quantize(latent).codes.item() == 3


def test_attention_follows_the_nominal_resolution() -> None:
    model = vqgan(ch_mult=(1, 1, 2), attn_resolutions=(4,))
    assert [len(level.attn) for level in model.encoder.down] == [0, 1, 0]
    assert [len(level.attn) for level in model.decoder.up] == [0, 2, 0]
    assert model.encode(random(1, 3, 16, 12)).shape == (1, 12)  # attention at 8 x 6 here


def test_attention_is_one_head_over_positions() -> None:
    block = vqgan().decoder.mid.attn_1
    x = random(2, 64, 3, 4)
    normed = block.norm(x)
    query, key, value = (layer(normed).flatten(2) for layer in (block.q, block.k, block.v))
    weights = (torch.einsum("bci,bcj->bij", query, key) / 8).softmax(-1)  # 64^-0.5
    mixed = torch.einsum("bij,bcj->bci", weights, value).unflatten(2, (3, 4))
    torch.testing.assert_close(block(x), x + block.proj_out(mixed))


def test_levels_run_from_the_highest_number_down() -> None:
    model = vqgan(ch_mult=(1, 2, 3), attn_resolutions=(), resolution=16)
    shapes = [level.block[0].conv1.weight.shape[:2] for level in model.decoder.up]
    assert shapes == [(32, 64), (64, 96), (96, 96)]
    assert [level.upsample is not None for level in model.decoder.up] == [False, True, True]
    assert [level.downsample is not None for level in model.encoder.down] == [True, True, False]
    assert [len(level.block) for level in model.decoder.up] == [2, 2, 2]
    assert [len(level.block) for level in model.encoder.down] == [1, 1, 1]
    assert model.decode_latent(random(1, 5, 4, 4)).shape == (1, 3, 16, 16)


def test_the_shortcut_takes_the_input() -> None:
    block = vqgan().encoder.down[1].block[0]
    x = random(1, 32, 5, 5)
    hidden = block.conv2(functional.silu(block.norm2(block.conv1(functional.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), block.nin_shortcut(x) + hidden)
    assert block.nin_shortcut.weight.shape == (64, 32, 1, 1)
    assert block.norm1.eps == 1e-6


def test_downsampling_pads_right_and_bottom() -> None:
    down = vqgan().encoder.down[0].downsample
    x = random(1, 32, 6, 6)
    expected = functional.conv2d(
        functional.pad(x, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, 2
    )
    assert_same_bits(down(x), expected)
    assert expected.shape == (1, 32, 3, 3)


def test_grids() -> None:
    model = vqgan()
    tokens = torch.arange(12)[None]
    assert model.decode(tokens, grid=(3, 4)).shape == (1, 3, 6, 8)
    for call in (lambda: model.decode(tokens), lambda: model.decode(tokens, grid=(2, 5))):
        with pytest.raises(ValueError, match="12 codes do not fill the grid"):
            call()


def test_gradients_reach_the_codes_of_a_frozen_decoder() -> None:
    model = vqgan(attn_resolutions=(4, 8)).double().requires_grad_(False)
    leaf = random(1, 16, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(model.decode_codes, (leaf,), fast_mode=True)
    torch._dynamo.reset()
    compiled = torch.compile(model.decode_codes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), model.decode_codes(leaf))
    images = random(1, 3, 8, 8).double()
    encoder = torch.compile(model.encode_latent, fullgraph=True, backend="aot_eager")
    for given in (images, images.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(encoder(given), model.encode_latent(images))


def test_config() -> None:
    published = {
        "ddconfig": {
            "double_z": False, "z_channels": 24, "resolution": 16, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "attn_resolutions": [4],
            "dropout": 0.0,
        },
        "lossconfig": None, "n_embed": 1024, "embed_dim": 16,
    }  # fmt: skip
    model = VqGan(_config.from_dict(VqGanConfig, published))
    assert len(model.state_dict()) == 187
    assert model.token_shape == (16,)
    for changes, message in (
        ({"double_z": True}, "double_z: must be False"),
        ({"ch": 40}, "ch: must be a multiple of 32"),
        ({"resolution": 9}, "resolution: must be a multiple of 2"),
        ({"ch_mult": ()}, "ch_mult"),
    ):
        with pytest.raises(_config.ConfigError, match=message):
            vqgan(**changes)


def full_size() -> VqGan:
    with torch.device("meta"):
        return VqGan(VqGanConfig())


def test_full_size() -> None:
    state = full_size().state_dict()
    assert len(state) == 343
    assert sum(tensor.numel() for tensor in state.values()) == 72_141_699
    assert full_size().token_shape == (256,)


@needs_key_lists
def test_published_key_list_loads_strictly_and_round_trips() -> None:
    assert_key_list(full_size(), "maskgit_vqgan")

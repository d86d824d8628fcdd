"""Meissonic's VQ: against plain formulas; grids, image ranges, files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import text_references as reference
from support.checks import assert_same_bits
from support.text_families import (
    BATCH,
    MEISSONIC_VQ,
    assert_round_trip,
    meissonic_condition,
    meissonic_vq,
    normal,
    published_keys,
)
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config
from softdimo_fast.models.meissonic_vq import MeissonicVq, MeissonicVqConfig

WIDE = replace(
    MEISSONIC_VQ, block_out_channels=(6, 3), layers_per_block=2, vq_embed_dim=None,
    norm_num_groups=3, token_grid=(2, 3), in_channels=1, out_channels=2,
)  # fmt: skip


@pytest.fixture
def model() -> MeissonicVq:
    return meissonic_vq()


def unit_images(height: int = 16, width: int = 24, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(BATCH, channels, height, width, generator=generator)


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(13, (BATCH, *shape), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("config", [MEISSONIC_VQ, WIDE], ids=["plain", "two levels"])
def test_it_computes_what_the_formulas_say(config: MeissonicVqConfig) -> None:
    model = meissonic_vq(config).double()
    images = unit_images(8, 12, config.in_channels).double()
    latent = model.encode_latent(images)
    expected = reference.meissonic_vq_latent(model.state_dict(), config, images)
    torch.testing.assert_close(latent, expected, rtol=1e-9, atol=1e-9)
    decoded = model.decode_latent(latent)
    assert decoded.shape == (BATCH, config.out_channels, 8, 12)
    expected = reference.meissonic_vq_image(model.state_dict(), config, expected.detach())
    torch.testing.assert_close(decoded, expected, rtol=1e-9, atol=1e-9)


def test_tokens_are_the_nearest_codes(model: MeissonicVq) -> None:
    images = unit_images()
    vectors = model.encode_latent(images).permute(0, 2, 3, 1)
    distance = (vectors[..., None, :] - model.codebook).square().sum(-1)
    tokens = model.encode(2 * images - 1)
    assert tokens.shape == (BATCH, *model.token_shape) == (BATCH, 24)
    assert torch.equal(tokens, distance.argmin(-1).flatten(1))


def test_ranges(model: MeissonicVq) -> None:
    """[-1, 1] outside, [0, 1] as published inside; no clipping."""
    tokens = some_tokens(4, 6)
    codes = model.codebook[tokens]
    unit = model.decode_latent(codes.permute(0, 3, 1, 2))
    assert_same_bits(model.decode(tokens), 2 * unit - 1)
    assert_same_bits(model.decode(tokens.flatten(1)), 2 * unit - 1)
    assert_same_bits(model.decode_codes(codes.flatten(1, 2)), 2 * unit - 1)
    large = model.decode_codes(codes.detach() * 1e6).detach()
    assert bool((large.abs() > 1).any())


def test_the_condition_is_not_looked_at(model: MeissonicVq) -> None:
    tokens = some_tokens(24)
    assert_same_bits(model.decode(tokens, meissonic_condition()), model.decode(tokens))
    logits = normal(BATCH, 24, 13)
    given = model.decode_soft(logits, meissonic_condition())
    assert_same_bits(given, model.decode_soft(logits))


def test_soft_and_hard_codes_agree(model: MeissonicVq) -> None:
    tokens = some_tokens(24)
    logits = 1e4 * functional.one_hot(tokens, 13).float()
    assert_same_bits(model.decode_soft(logits), model.decode(tokens))
    grid = logits.unflatten(1, (4, 6))
    assert_same_bits(model.decode_soft(grid), model.decode(tokens))
    soft = normal(BATCH, 24, 13).requires_grad_()
    expected = model.decode_codes(soft.softmax(-1) @ model.codebook)
    ours = model.decode_soft(soft)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.square().sum(), soft)
    (plain,) = torch.autograd.grad(expected.square().sum(), soft)
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("grid", [(2, 2), (3, 5)])
def test_grids_of_any_size(model: MeissonicVq, grid: tuple[int, int]) -> None:
    images = model.decode(some_tokens(*grid))
    assert images.shape == (BATCH, 3, 4 * grid[0], 4 * grid[1])
    assert model.encode(images).shape == (BATCH, grid[0] * grid[1])
    with pytest.raises(ValueError, match=r"codes must have shape \[\*, 24, 3\]"):
        model.decode(some_tokens(grid[0] * grid[1]))


def test_compiles_without_graph_breaks(model: MeissonicVq) -> None:
    torch._dynamo.reset()

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.encode(images)
        return tokens, model.decode_soft(functional.one_hot(tokens, 13).float())

    images = 2 * unit_images() - 1
    compiled = torch.compile(both, fullgraph=True, backend="eager")(images)
    for ours, expected in zip(compiled, both(images), strict=True):
        torch.testing.assert_close(ours, expected)


# ---- files -------------------------------------------------------------------------------------------------


def test_the_published_file_fits() -> None:
    config = MeissonicVqConfig()
    assert config.code_width == 64
    assert_round_trip(lambda: MeissonicVq(config), published_keys("meissonic_vqvae"))


def test_the_config_of_a_published_file() -> None:
    published = {
        "_class_name": "VQModel", "_diffusers_version": "0.30.2", "_name_or_path": "vqvae",
        "act_fn": "silu", "block_out_channels": [128, 256, 256, 512, 768],
        "down_block_types": ["DownEncoderBlock2D"] * 5, "force_upcast": True, "in_channels": 3,
        "latent_channels": 64, "layers_per_block": 2, "lookup_from_codebook": True,
        "mid_block_add_attention": False, "norm_num_groups": 32, "norm_type": "group",
        "num_vq_embeddings": 8192, "out_channels": 3, "sample_size": 512,
        "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "vq_embed_dim": None,
    }  # fmt: skip
    config = MeissonicVqConfig.from_published(published, token_grid=(32, 48))
    kinds = dict.fromkeys(("down_block_types", "up_block_types"))
    assert replace(config, **kinds, force_upcast=False, token_grid=(64, 64)) == MeissonicVqConfig()
    assert config.token_grid == (32, 48)
    with pytest.raises(_config.ConfigError, match="channels"):
        MeissonicVqConfig.from_published({"channels": 3})
    assert _config.from_dict(MeissonicVqConfig, _config.to_dict(MEISSONIC_VQ)) == MEISSONIC_VQ


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mid_block_add_attention", True), ("norm_type", "spatial"), ("act_fn", "gelu"),
        ("block_out_channels", (4, 5)), ("block_out_channels", ()), ("vq_embed_dim", 0),
        ("down_block_types", ("DownEncoderBlock2D",)), ("token_grid", (0, 4)),
        ("up_block_types", ("AttnUpDecoderBlock2D",) * 3), ("layers_per_block", 0),
    ],
)  # fmt: skip
def test_other_kinds_are_refused(field: str, value: Any) -> None:
    with pytest.raises(_config.ConfigError, match=f"MeissonicVqConfig.{field}: must be"):
        replace(MEISSONIC_VQ, **{field: value})

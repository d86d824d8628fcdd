"""TA-TiTok: against plain formulas; text in the decoder, image ranges, files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import text_references as reference
from support.checks import assert_same_bits
from support.text_families import (
    BATCH,
    TATITOK,
    TEXT,
    Sizes,
    assert_round_trip,
    normal,
    published_keys,
    tatitok,
    text_condition,
)
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config
from softdimo_fast.models.tatitok import TaTiTok, TaTiTokConfig, VitSize

ODD = replace(
    TATITOK, codebook_size=5, token_size=3, num_latent_tokens=4, crop_size=9, vit_enc_patch_size=3,
    vit_dec_patch_size=9, text_context_length=2, text_embed_dim=7,
    decoder=VitSize(width=10, layers=1, heads=1),
)  # fmt: skip


@pytest.fixture
def model() -> TaTiTok:
    return tatitok()


def unit_images(config: TaTiTokConfig = TATITOK) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(BATCH, 3, config.crop_size, config.crop_size, generator=generator)


def some_tokens() -> Tensor:
    return torch.randint(11, (BATCH, 6), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("config", [TATITOK, ODD], ids=["plain", "odd sizes"])
def test_it_computes_what_the_formulas_say(config: TaTiTokConfig) -> None:
    model, images = tatitok(config).double(), unit_images(config).double()
    latent = model.encode_latent(images)
    assert latent.shape == (BATCH, config.token_size, 1, config.num_latent_tokens)
    expected = reference.tatitok_latent(model.state_dict(), config, images)
    torch.testing.assert_close(latent[:, :, 0].transpose(1, 2), expected, rtol=1e-9, atol=1e-9)
    text = normal(BATCH, config.text_context_length, config.text_embed_dim).double()
    decoded = model.decode_latent(latent, text)
    assert decoded.shape == images.shape
    expected = reference.tatitok_image(model.state_dict(), config, expected.detach(), text)
    torch.testing.assert_close(decoded, expected, rtol=1e-9, atol=1e-9)


def test_tokens_are_the_nearest_codes(model: TaTiTok) -> None:
    images = unit_images()
    vectors = model.encode_latent(images)[:, :, 0].transpose(1, 2)
    distance = (vectors[:, :, None] - model.codebook).square().sum(-1)
    assert torch.equal(model.encode(2 * images - 1), distance.argmin(-1))
    with torch.no_grad():
        model.codebook[7] = model.codebook[2]  # the lowest index on ties
    assert not bool((model.encode(2 * images - 1) == 7).any())


def test_ranges(model: TaTiTok) -> None:
    """[-1, 1] outside, [0, 1] as published inside; no clamping."""
    condition, tokens = text_condition(), some_tokens()
    codes = model.codebook[tokens]
    unit = model.decode_latent(codes.transpose(1, 2)[:, :, None], condition)
    assert_same_bits(model.decode(tokens, condition), 2 * unit - 1)
    assert_same_bits(model.decode_codes(codes, condition), 2 * unit - 1)
    assert bool((model.decode_codes(100 * codes, condition).abs() > 1).any())


def test_soft_and_hard_codes_agree(model: TaTiTok) -> None:
    condition, tokens = text_condition(), some_tokens()
    logits = 1e4 * functional.one_hot(tokens, 11).float()
    assert_same_bits(model.decode_soft(logits, condition), model.decode(tokens, condition))
    wide = torch.cat([logits, torch.full((BATCH, 6, 1), 2e4)], -1)  # a [MASK] column is left out
    assert_same_bits(model.decode_soft(wide, condition), model.decode(tokens, condition))
    soft = normal(BATCH, 6, 11).requires_grad_()
    expected = model.decode_codes(soft.softmax(-1) @ model.codebook, condition)
    ours = model.decode_soft(soft, condition)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.square().sum(), soft)
    (plain,) = torch.autograd.grad(expected.square().sum(), soft)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-4)
    assert bool(gradient.any())


def test_the_decoder_reads_the_text(model: TaTiTok) -> None:
    """That of the full tower, wherever guidance changes the generator's."""
    condition, tokens = text_condition(), some_tokens()
    image = model.decode(tokens, condition)
    assert_same_bits(model.decode(tokens, condition.guidance), image)
    other = condition._replace(guidance=condition.guidance.flip(0))
    assert not torch.allclose(model.decode(tokens, other), image, atol=1e-3)
    for name in ("text", "pooled", "score", "null_text"):
        changed = condition._replace(**{name: getattr(condition, name) + 1})
        assert_same_bits(model.decode(tokens, changed), image)
    # Text has positions of its own.
    turned = condition._replace(guidance=condition.guidance.flip(1))
    assert not torch.allclose(model.decode(tokens, turned), image, atol=1e-3)


@pytest.mark.parametrize(
    ("condition", "error", "match"),
    [
        (None, TypeError, "decoding needs the text"),
        (text_condition(guidance=None), ValueError, r"guidance must have shape .* \[3, 0, 10\]"),
        (normal(BATCH, TEXT + 1, 10), ValueError, r"guidance must have shape \[3, 5, 10\]"),
        (normal(1, TEXT, 10), ValueError, "guidance must have shape"),
    ],
)
def test_decoding_without_text_says_so(
    model: TaTiTok, condition: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        model.decode(some_tokens(), condition)


def test_the_encoder_sees_no_text_and_one_size(model: TaTiTok) -> None:
    assert model.encode(2 * unit_images() - 1).shape == (BATCH, 6)
    with pytest.raises(ValueError, match=r"images must have shape \[\*, 3, 12, 12\]"):
        model.encode(torch.zeros(1, 3, 12, 16))


def test_no_attention_map_is_in_memory(model: TaTiTok) -> None:
    with torch.no_grad(), Sizes() as sizes:
        model.decode(some_tokens(), text_condition())
    rows = 1 + 4 + 6 + TEXT
    assert not [shape for shape in sizes.shapes if shape[1:] == (2, rows, rows)]
    assert sum("scaled_dot_product" in name for name in sizes.names) == 2


def test_checkpointed_blocks_give_the_same(model: TaTiTok) -> None:
    condition = text_condition()

    def gradients() -> list[Tensor]:
        codes = model.codebook[some_tokens()].detach().requires_grad_()
        loss = model.decode_codes(codes, condition).square().sum()
        loss = loss + model.encode_latent(unit_images()).square().sum()
        return list(torch.autograd.grad(loss, [codes, model.latent_tokens]))

    plain = gradients()
    assert not model.checkpoint_blocks
    model.checkpoint_blocks = True
    assert model.encoder.checkpoint_blocks
    assert model.decoder.checkpoint_blocks
    for ours, expected in zip(gradients(), plain, strict=True):
        assert_same_bits(ours, expected)


def test_compiles_without_graph_breaks(model: TaTiTok) -> None:
    torch._dynamo.reset()
    condition = text_condition()

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.encode(images)
        return tokens, model.decode_soft(
            functional.one_hot(tokens, 11).float(), condition=condition
        )

    images = 2 * unit_images() - 1
    compiled = torch.compile(both, fullgraph=True, backend="eager")(images)
    for ours, expected in zip(compiled, both(images), strict=True):
        torch.testing.assert_close(ours, expected)


# ---- files -------------------------------------------------------------------------------------------------


def test_the_published_file_fits() -> None:
    assert_round_trip(lambda: TaTiTok(TaTiTokConfig()), published_keys("tatitok_bl128_vq"))


@pytest.mark.parametrize("module_has", [True, False])
@pytest.mark.parametrize("file_has", [True, False])
def test_the_training_buffer_follows_the_file(module_has: bool, file_has: bool) -> None:
    key = "quantize.embed_prob"
    weights = tatitok(replace(TATITOK, clustering_vq=file_has)).state_dict()
    assert (key in weights) == file_has
    if file_has:
        weights[key] = torch.rand(11)
    model = TaTiTok(replace(TATITOK, clustering_vq=module_has))
    model.load_state_dict(weights)
    returned = model.state_dict()
    assert returned.keys() == weights.keys()
    for name, tensor in weights.items():
        assert_same_bits(returned[name], tensor, name)
    with pytest.raises(RuntimeError, match="quantize"):
        model.load_state_dict(weights | {"quantize.other": torch.zeros(1)})


PUBLISHED: dict[str, Any] = {
    "model": {
        "vq_model": {
            "quantize_mode": "vq", "codebook_size": 8192, "token_size": 64, "use_l2_norm": False,
            "commitment_cost": 0.25, "clustering_vq": False, "vit_enc_model_size": "base",
            "vit_dec_model_size": "large", "vit_enc_patch_size": 16, "vit_dec_patch_size": 16,
            "num_latent_tokens": 128, "finetune_decoder": False, "is_legacy": False,
            "text_context_length": 77, "text_embed_dim": 768,
        }
    },
    "dataset": {"preprocessing": {"crop_size": 256, "resize_shorter_edge": 256}},
}  # fmt: skip


def test_the_config_of_a_published_file() -> None:
    published = replace(TaTiTokConfig(), clustering_vq=False)
    assert TaTiTokConfig.from_published(PUBLISHED) == published
    flat = PUBLISHED["model"]["vq_model"] | {"crop_size": 256}
    assert TaTiTokConfig.from_published(flat) == published
    sizes = {"base": {"width": 48, "layers": 2, "heads": 3}}
    small = TaTiTokConfig.from_published(PUBLISHED, vit_sizes=sizes)
    assert small.encoder == VitSize(width=48, layers=2, heads=3)
    assert small.decoder == published.decoder
    assert TaTiTokConfig.from_published(PUBLISHED | {"vit_sizes": sizes}) == small
    assert _config.from_dict(TaTiTokConfig, _config.to_dict(TATITOK)) == TATITOK


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantize_mode", "vae"), ("use_l2_norm", True), ("is_legacy", True),
        ("vit_enc_model_size", "huge"), ("codebook_size", 0), ("vit_dec_patch_size", 15),
    ],
)  # fmt: skip
def test_other_kinds_are_refused(name: str, value: Any) -> None:
    model = PUBLISHED["model"]["vq_model"] | {name: value}
    with pytest.raises(_config.ConfigError, match=f"{name}|name: must be"):
        TaTiTokConfig.from_published(PUBLISHED | {"model": {"vq_model": model}})


def test_a_file_that_does_not_say_is_of_the_legacy_kind() -> None:
    model = {k: v for k, v in PUBLISHED["model"]["vq_model"].items() if k != "is_legacy"}
    with pytest.raises(_config.ConfigError, match="is_legacy: must be False"):
        TaTiTokConfig.from_published({"model": {"vq_model": model}})
    with pytest.raises(_config.ConfigError, match="codebook_width"):
        TaTiTokConfig.from_published({"codebook_width": 3})

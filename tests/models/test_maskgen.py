"""MaskGen: against plain formulas; its table, tied head, files and conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import text_references as reference
from support.checks import assert_same_bits
from support.text_families import (
    BATCH,
    MASKGEN,
    assert_round_trip,
    maskgen,
    normal,
    published_keys,
    text_condition,
    tokens_of,
)

from softdimo_fast import _config
from softdimo_fast.models.joint_blocks import sinusoid
from softdimo_fast.models.maskgen import MaskGenConfig, MaskGenTransformer
from softdimo_fast.models.text_conditions import TextCondition


@pytest.fixture
def model() -> MaskGenTransformer:
    return maskgen()


# ---- against plain formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MASKGEN,
        replace(MASKGEN, decoder_depth=1, decoder_num_heads=4),
        replace(
            MASKGEN, codebook_size=7, num_latent_tokens=9, text_embed_dim=5, decoder_embed_dim=10,
            decoder_num_heads=1, decoder_depth=2, micro_condition_embed_dim=6,
        ),
    ],
    ids=["plain", "one block", "odd sizes"],
)  # fmt: skip
def test_it_computes_what_the_formulas_say(config: MaskGenConfig) -> None:
    model = maskgen(config).double()
    width = config.text_embed_dim
    condition = TextCondition.of(
        normal(BATCH, 4, width, seed=1).double(), normal(BATCH, width, seed=2).double(),
        score=torch.tensor([0.01, 0.02, 0.03]),  # arguments so small that float32 is exact enough
    )  # fmt: skip
    embeddings = model.embed(tokens_of(model)).detach()
    expected = reference.maskgen(model.state_dict(), config, embeddings, condition)
    torch.testing.assert_close(
        model.logits(embeddings, condition), expected, rtol=1e-6, atol=1e-6 * float(expected.std())
    )


def test_without_the_aesthetic_score() -> None:
    model = maskgen(replace(MASKGEN, micro_condition=False))
    assert model.cond_pooled_proj.in_features == MASKGEN.text_embed_dim
    condition = text_condition()
    vector = model.conditioning_vector(condition)
    assert_same_bits(vector, model.cond_pooled_proj(condition.pooled))


def test_the_score_is_the_one_asked_for(model: MaskGenTransformer) -> None:
    """The published sampler ignores its score argument; sine comes first, the argument is score x 100."""
    seen: list[Any] = []
    model.cond_pooled_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    condition = text_condition(score=5.25)
    model.logits(model.embed(tokens_of(model)), condition)
    (vector,) = seen
    frequencies = 1000.0 ** -(torch.arange(4) / 4)
    angles = 525 * frequencies
    expected = torch.cat([angles.sin(), angles.cos()]).expand(BATCH, 8)
    torch.testing.assert_close(vector[:, -8:], expected, rtol=0, atol=2e-4)
    assert_same_bits(vector[:, :-8], condition.pooled)


def test_frequencies_are_nearly_exact() -> None:
    for period in (1000.0, 10000.0):
        exact = period ** -(torch.arange(128, dtype=torch.float64) / 128)
        sines = sinusoid(torch.tensor(1.0), 256, max_period=period, sine_first=True)[:128]
        torch.testing.assert_close(sines.double(), exact.sin(), rtol=1e-6, atol=0)


# ---- table and head ----------------------------------------------------------------------------------------


def test_the_rows_of_the_table(model: MaskGenTransformer) -> None:
    """V codes, [MASK], and rows that nothing uses: 11 + 1 + (3 + 1)."""
    table = model.embeddings.weight
    assert len(table) == 16
    assert_same_bits(model.token_table, table[:11])
    assert_same_bits(model.mask_embedding, table[11])
    with pytest.raises(IndexError):
        model.embed(torch.full((1, 6), 12))


def test_the_head_is_tied_to_the_table(model: MaskGenTransformer) -> None:
    assert model.head_weight.data_ptr() == model.embeddings.weight.data_ptr()
    assert [id(p) for p in model.embedding_parameters()] == [id(model.embeddings.weight)]
    hidden = model(model.embed(tokens_of(model)), text_condition())
    assert_same_bits(model.head_input(hidden), hidden)
    whole = hidden @ model.embeddings.weight.T
    torch.testing.assert_close(model.head(hidden), whole[..., :11])


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [("maskgen_vq_l", MaskGenConfig.large()), ("maskgen_vq_xl", MaskGenConfig.extra_large())],
)
def test_the_published_files_fit(name: str, config: MaskGenConfig) -> None:
    """With the tied copy, as in ``.bin``, and without, as in ``.safetensors``."""
    published = published_keys(name)
    assert_round_trip(lambda: MaskGenTransformer(config), published, "lm_head.weight")
    del published["lm_head.weight"]
    assert_round_trip(lambda: MaskGenTransformer(config), published)


def test_a_tied_copy_must_be_one(model: MaskGenTransformer) -> None:
    """Oracle 11."""
    weights = model.state_dict()
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["embeddings.weight"].clone()
    other = MaskGenTransformer(MASKGEN)
    other.load_state_dict(weights)
    assert_same_bits(other.embeddings.weight, model.embeddings.weight)
    assert "lm_head.weight" in weights  # the caller's dict is left alone
    weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(RuntimeError, match=r"lm_head\.weight must equal embeddings\.weight"):
        other.load_state_dict(weights)
    del weights["lm_head.weight"], weights["embeddings.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embeddings.weight"):
        other.load_state_dict(weights)


def test_the_config_of_a_published_file() -> None:
    maskgen = {"decoder_embed_dim": 1280, "decoder_depth": 20, "decoder_num_heads": 16}
    published = {
        "experiment": {"project": "maskgen"},
        "model": {
            "vq_model": {"codebook_size": 8192, "token_size": 64, "num_latent_tokens": 128},
            "maskgen": maskgen | {"micro_condition": True, "dropout": 0.1},
        },
        "losses": {"label_smoothing": 0.1},
    }
    assert MaskGenConfig.from_published(published) == MaskGenConfig.extra_large()
    assert MaskGenConfig.from_published(maskgen) == MaskGenConfig.extra_large()
    with pytest.raises(_config.ConfigError, match="decoder_deep"):
        MaskGenConfig.from_published({"decoder_deep": 20})
    with pytest.raises(_config.ConfigError, match="maskgen"):
        MaskGenConfig.from_published({"model": {"vq_model": {}}})
    again = _config.from_dict(MaskGenConfig, _config.to_dict(MASKGEN))
    assert again == MASKGEN


@pytest.mark.parametrize(
    ("field", "value"),
    [("decoder_num_heads", 5), ("codebook_size", 0), ("micro_condition_embed_dim", 7)],
)
def test_impossible_sizes_are_refused(field: str, value: int) -> None:
    with pytest.raises(_config.ConfigError, match=f"MaskGenConfig.{field}: must be"):
        replace(MASKGEN, **{field: value})


# ---- conditions --------------------------------------------------------------------------------------------


def test_a_condition_from_parts() -> None:
    text, pooled = normal(BATCH, 4, 6), normal(BATCH, 6)
    plain = TextCondition.of(text, pooled)
    assert plain.score.tolist() == [6.5] * BATCH
    assert plain.guidance.shape == plain.null_text.shape == (BATCH, 0, 6)
    null = normal(1, 4, 6)
    full = TextCondition.of(text, pooled, score=torch.tensor([1.0, 2, 3]), null_text=null,
                            null_pooled=normal(1, 6), guidance=text)  # fmt: skip
    assert full.null_text.shape == text.shape
    assert full.null_pooled.shape == pooled.shape
    assert full.score.dtype == torch.float32

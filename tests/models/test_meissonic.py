"""Meissonic: against plain formulas; grids, timesteps, where mixtures and noise enter, files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import text_references as reference
from support.checks import assert_same_bits
from support.text_families import (
    BATCH,
    MEISSONIC,
    assert_round_trip,
    meissonic,
    meissonic_condition,
    normal,
    published_keys,
    tokens_of,
)
from torch import Tensor
from torch.nn import functional

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws, OneStepConfig, initial_tokens, one_step_logits, perturb
from softdimo_fast.models.meissonic import MeissonicConfig, MeissonicTransformer
from softdimo_fast.models.text_conditions import MeissonicCondition


@pytest.fixture
def model() -> MeissonicTransformer:
    return meissonic()


# ---- against plain formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        MEISSONIC,
        replace(MEISSONIC, downsample=False, upsample=False, token_grid=(3, 5)),
        replace(MEISSONIC, num_layers=0, num_single_layers=1, token_grid=(2, 2)),
        replace(
            MEISSONIC, num_layers=1, num_single_layers=0, attention_head_dim=6,
            num_attention_heads=3, pooled_projection_dim=18, axes_dims_rope=(0, 2, 4), vocab_size=8,
            codebook_size=7, token_grid=(6, 2), joint_attention_dim=3,
        ),
    ],
    ids=["plain", "no sampling", "single blocks", "double blocks"],
)  # fmt: skip
def test_it_computes_what_the_formulas_say(config: MeissonicConfig) -> None:
    model = meissonic(config).double()
    condition = MeissonicCondition.of(
        normal(BATCH, 4, config.joint_attention_dim, seed=1).double(),
        normal(BATCH, config.width, seed=2).double(),
        # Arguments so small that float32 sinusoids are exact enough.
        micro=normal(BATCH, 5, seed=3), time=torch.tensor([0.0, 0.001, 0.002]),
    )  # fmt: skip
    tokens = tokens_of(model).unflatten(1, config.token_grid)
    embeddings = model.embed(tokens).detach()
    expected = reference.meissonic(model.state_dict(), config, embeddings, condition)
    logits = model.logits(embeddings, condition)
    assert logits.shape == (*tokens.shape, config.codebook_size)
    torch.testing.assert_close(
        logits.permute(0, 3, 1, 2), expected, rtol=1e-6, atol=1e-6 * float(expected.std())
    )


# ---- tokens ------------------------------------------------------------------------------------------------


def test_the_rows_of_the_table(model: MeissonicTransformer) -> None:
    """13 codes, three rows that nothing uses, [MASK] last."""
    table = model.embed.embeddings.weight
    assert (len(table), model.vocabulary, model.mask_id) == (17, 13, 16)
    assert_same_bits(model.token_table, table[:13])
    assert_same_bits(model.mask_embedding, table[16])
    assert_same_bits(model.embed(tokens_of(model)), table[tokens_of(model)])


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (2, 10), (8, 8)])
def test_grids_of_any_size(model: MeissonicTransformer, grid: tuple[int, int]) -> None:
    """A grid is given as such; a sequence has the grid of the config."""
    tokens = torch.randint(13, (BATCH, *grid), generator=torch.Generator().manual_seed(0))
    condition = meissonic_condition()
    logits = model.logits(model.embed(tokens), condition)
    assert logits.shape == (BATCH, *grid, 13)
    other = meissonic(replace(MEISSONIC, token_grid=grid))
    flat = other.logits(other.embed(tokens.flatten(1)), condition)
    assert_same_bits(flat, logits.flatten(1, 2))
    features = other.features(other.embed(tokens.flatten(1)), condition, (0, 3))
    assert {f.shape for f in features} == {(BATCH, grid[0] * grid[1] // 4, 16)}


def test_odd_grids_are_refused(model: MeissonicTransformer) -> None:
    with pytest.raises(ValueError, match=r"multiples of 2, got \[3, 4\]"):
        model(model.embed(torch.zeros(BATCH, 3, 4, dtype=torch.long)), meissonic_condition())


def test_a_row_knows_its_row_and_column(model: MeissonicTransformer) -> None:
    """All text is at (0, 0, 0), where the first image row is; text order changes nothing but rounding."""
    cosine, sine = model.rotation(5, 2, 3, torch.zeros(1))
    assert cosine.shape == (11, 8)
    assert_same_bits(cosine[:6], torch.ones(6, 8))
    assert_same_bits(sine[:6], torch.zeros(6, 8))
    angle = torch.atan2(sine, cosine)
    # Axes (2, 4, 2): nothing turns by the first; row 1, column 2 is the last.
    expected = [0, 0, 1, 1, 0.01, 0.01, 2, 2]
    torch.testing.assert_close(angle[-1], torch.tensor(expected))
    condition = meissonic_condition()
    embeddings = model.embed(tokens_of(model))
    turned = condition._replace(text=condition.text.flip(1))
    torch.testing.assert_close(
        model.logits(embeddings, turned), model.logits(embeddings, condition), rtol=1e-4, atol=1e-4
    )


# ---- mixtures and noise ------------------------------------------------------------------------------------


def test_the_expectation_comes_before_the_norm(model: MeissonicTransformer) -> None:
    """Oracle 10: the mean of normalised rows is something else."""
    logits = 2 * normal(BATCH, *model.token_shape, 13, seed=1)
    model.requires_grad_(False)
    mixed = model.generator_input(model.soft_embed(logits))
    p = logits.softmax(-1)
    rows = model.embed.embeddings.weight[:13]
    normed = functional.rms_norm(p @ rows, (16,), model.embed.layer_norm.weight, 1e-6)
    expected = torch.einsum("blc,oc->blo", normed, model.embed.conv.weight[:, :, 0, 0])
    torch.testing.assert_close(mixed, expected)
    late = p @ model.generator_input(rows)
    assert not torch.allclose(mixed, late, atol=0.1 * float(late.std()))


def test_a_generators_noise_comes_after_the_convolution(model: MeissonicTransformer) -> None:
    draws, condition = Draws.of(3, 0, BATCH), meissonic_condition()
    one_step = OneStepConfig(initial_ratio=0.5, sigma=0.3)
    entered = model.generator_input(model.embed(initial_tokens(model, draws, 0.5)))
    noisy = perturb(entered, draws.normal("initial/noise", *entered.shape[1:]), 0.3)
    expected = model.head(model.forward_entered(noisy, condition))
    assert_same_bits(one_step_logits(model, condition, draws, one_step), expected)
    # The scale of the noise may follow what it is added to.
    scaled = replace(one_step, noise_scale="embedding")
    deviation = model.generator_input(model.token_table).std()
    noisy = perturb(entered, draws.normal("initial/noise", *entered.shape[1:]), 0.3, deviation)
    expected = model.head(model.forward_entered(noisy, condition))
    assert_same_bits(one_step_logits(model, condition, draws, scaled), expected)


def test_what_distillation_keeps_frozen(model: MeissonicTransformer) -> None:
    frozen = {id(parameter) for parameter in model.embedding_parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in frozen}
    assert names == {
        n for n, _ in model.named_parameters() if n.startswith(("embed.", "mlm_layer."))
    }
    assert len(names) == 6


# ---- timesteps ---------------------------------------------------------------------------------------------


def seen_time(model: MeissonicTransformer, condition: MeissonicCondition) -> Tensor:
    """What goes into the timestep's embedder."""
    seen: list[Any] = []
    embedder = model.time_text_embed.timestep_embedder
    with embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(model.embed(tokens_of(model)), condition)
    return seen[0]


def test_the_timestep_is_multiplied_by_1000(model: MeissonicTransformer) -> None:
    vector = seen_time(model, meissonic_condition(time=torch.tensor([0.0, 1.0, 63.0])))
    assert vector.shape == (BATCH, 256)
    # Frequency 1 comes first, cosine before sine.
    argument = torch.tensor([0.0, 1000.0, 63000.0])
    torch.testing.assert_close(vector[:, 0], argument.cos())
    torch.testing.assert_close(vector[:, 128], argument.sin())


def test_the_cast_of_the_public_recipe(model: MeissonicTransformer) -> None:
    """An integer cast there makes every mask ratio below 1 a timestep of 0: our default."""
    ratio = torch.tensor([0.02, 0.5, 0.98])
    cast = meissonic_condition(time=ratio.long())
    mask = torch.rand(BATCH, *model.token_shape) < 0.5
    assert model.masked_condition(meissonic_condition(), mask).time.tolist() == [0, 0, 0]
    assert_same_bits(seen_time(model, cast), seen_time(model, meissonic_condition()))


def test_the_timestep_of_the_mask() -> None:
    """As the published model was trained: 1000 x mask ratio."""
    model = meissonic(replace(MEISSONIC, timestep="mask_ratio"))
    mask = torch.zeros(BATCH, *model.token_shape, dtype=torch.bool)
    mask[1, :12] = mask[2] = True
    told = model.masked_condition(meissonic_condition(time=5.0), mask)
    assert told.time.tolist() == [0, 500, 1000]
    vector = seen_time(model, told)
    torch.testing.assert_close(vector[1, 0], torch.tensor(500_000.0).cos())
    assert model.timed_condition(told, 7.0).time.tolist() == [7, 7, 7]
    grid = mask.unflatten(1, (4, 6))
    assert_same_bits(model.masked_condition(told, grid).time, told.time)


# ---- files -------------------------------------------------------------------------------------------------


def test_the_published_file_fits() -> None:
    assert_round_trip(
        lambda: MeissonicTransformer(MeissonicConfig()), published_keys("meissonic_transformer")
    )


def test_without_sampling_there_is_none_in_the_file() -> None:
    config = replace(MEISSONIC, downsample=False, upsample=False)
    keys = meissonic(config).state_dict().keys()
    assert keys == {k for k in meissonic().state_dict() if not k.startswith(("down_", "up_"))}


def test_the_config_of_a_published_file() -> None:
    published = {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.30.2", "patch_size": 1,
        "in_channels": 64, "num_layers": 14, "num_single_layers": 28, "attention_head_dim": 128,
        "num_attention_heads": 8, "joint_attention_dim": 1024, "pooled_projection_dim": 1024,
        "guidance_embeds": False, "axes_dims_rope": [16, 56, 56], "vocab_size": 8256,
        "codebook_size": 8192, "downsample": True, "upsample": True,
    }  # fmt: skip
    assert MeissonicConfig.from_published(published) == MeissonicConfig()
    small = MeissonicConfig.from_published(published, token_grid=(32, 32), timestep="mask_ratio")
    assert (small.token_grid, small.timestep) == ((32, 32), "mask_ratio")
    with pytest.raises(_config.ConfigError, match="layers"):
        MeissonicConfig.from_published({"layers": 3})
    assert _config.from_dict(MeissonicConfig, _config.to_dict(MEISSONIC)) == MEISSONIC


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooled_projection_dim", 15), ("axes_dims_rope", (2, 4, 4)), ("axes_dims_rope", (3, 3, 2)),
        ("vocab_size", 13), ("upsample", False), ("guidance_embeds", True), ("token_grid", (3, 4)),
        ("num_layers", -1), ("timestep", "late"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused(field: str, value: Any) -> None:
    with pytest.raises(_config.ConfigError, match=f"MeissonicConfig.{field}"):
        replace(MEISSONIC, **{field: value})


def test_the_embedding_is_a_module_under_its_published_name(model: MeissonicTransformer) -> None:
    assert model.get_submodule("embed") is model.embed
    assert dict(model.named_children())["embed"] is model.embed
    weights = {k: 2 * v for k, v in model.state_dict().items()}
    tokens = tokens_of(model)
    doubled = torch.func.functional_call(
        model.embed, {"embeddings.weight": 2 * model.embed.embeddings.weight}, (tokens,)
    )
    assert_same_bits(doubled, 2 * model.embed(tokens))
    model.load_state_dict(weights)
    assert_same_bits(model.embed(tokens), doubled)


def test_a_condition_from_parts() -> None:
    plain = MeissonicCondition.of(normal(BATCH, 4, 6), normal(BATCH, 8))
    assert plain.micro.tolist() == [[1024, 1024, 0, 0, 6.0]] * BATCH
    assert plain.time.tolist() == [0] * BATCH
    assert plain.null_text.shape == (BATCH, 0, 6)
    times = MeissonicCondition.of(
        normal(BATCH, 4, 6), normal(BATCH, 8), time=torch.tensor([1, 2, 3]),
        micro=torch.ones(BATCH, 5), null_text=normal(4, 6), null_pooled=normal(8),
    )  # fmt: skip
    assert times.time.dtype == torch.float32
    assert times.null_pooled.shape == (BATCH, 8)

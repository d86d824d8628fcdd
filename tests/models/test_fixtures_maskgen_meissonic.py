"""Parity with the published MaskGen-VQ, TA-TiTok-VQ, Meissonic and its VQ, where their data is at hand.

Each fixture holds a small state dict under the published keys, inputs, and what the published implementation
computed from them, down to intermediate results; each output within the tolerance that it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from softdimo_fast.diffusion import mask_ratio, masked_count
from softdimo_fast.models.joint_blocks import sinusoid
from softdimo_fast.models.maskgen import MaskGenConfig, MaskGenTransformer
from softdimo_fast.models.meissonic import MeissonicConfig, MeissonicTransformer
from softdimo_fast.models.meissonic_vq import MeissonicVq, MeissonicVqConfig
from softdimo_fast.models.tatitok import TaTiTok, TaTiTokConfig
from softdimo_fast.models.text_conditions import MeissonicCondition, TextCondition

FOLDER = Path(__file__).parents[2].parent / "shared" / "fixtures"
Outputs = dict[str, Tensor]

pytestmark = pytest.mark.skipif(
    not (FOLDER / "maskgen_vq.json").is_file(), reason=f"no parity fixtures in {FOLDER}"
)


class Fixture:
    """One file: its description, state dict, inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.info: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        tensors = load_file(FOLDER / f"{name}.safetensors")
        self.weights, self.inputs, self.outputs = (
            {key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)}
            for kind in ("sd/", "in/", "out/")
        )

    def load(self, model: nn.Module) -> Any:
        model.load_state_dict(self.weights, strict=True)
        assert model.state_dict().keys() == self.weights.keys()
        return model.eval().requires_grad_(False)

    def tolerance(self, name: str) -> float:
        return float(self.info["outputs"][f"out/{name}"].get("suggested_atol", 0.0))


@contextmanager
def recorded(**modules: nn.Module) -> Iterator[dict[str, Any]]:
    """What each module gave, and under ``name/in`` what it was given first."""
    seen: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name], seen[f"{name}/in"] = output, inputs[0]

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def soft_gradient(function: Callable[[Tensor], Tensor], probs: Tensor, weight: Tensor) -> Tensor:
    probs = probs.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((function(probs) * weight).sum(), probs)
    return gradient


def blocks(name: str, modules: nn.ModuleList) -> dict[str, nn.Module]:
    return {f"{name}_{i}": module for i, module in enumerate(modules)}


# ---- what our models give for each output ------------------------------------------------------------------


def maskgen(fixture: Fixture) -> Outputs:
    given = fixture.inputs
    config = MaskGenConfig.from_published(fixture.info["constructor"])
    model: MaskGenTransformer = fixture.load(MaskGenTransformer(config))
    condition = TextCondition.of(
        given["condition"], given["condition_pooled"][:, 0], score=given["aesthetic_score"],
        null_text=given["null_condition"], null_pooled=given["null_condition_pooled"][:, 0],
    )  # fmt: skip
    other = model.unconditional(condition)
    table, probs = model.token_table, given["soft_probs"]
    out: Outputs = {"token_embeddings": model.embed(given["input_tokens"])}
    with recorded(
        text=model.text_embed_proj, vector=model.cond_pooled_proj, norm=model.norm,
        **blocks("block", model.blocks),
    ) as seen:  # fmt: skip
        out["logits_cond"] = model.logits(out["token_embeddings"], condition)
    out["text_proj"], out["final_norm"] = seen["text"], seen["norm"]
    out["cond_vector"] = seen["vector"][:, None]
    out["cond_pooled_concat"] = seen["vector/in"][:, None]
    for i in range(model.depth):
        text, out[f"block_{i}_x"] = seen[f"block_{i}"]
        if i + 1 < model.depth:
            out[f"block_{i}_context"] = text
    out["logits_uncond"] = model.logits(out["token_embeddings"], other)
    out["soft_embeddings"] = model.soft_embed(probs.log())
    out["soft_logits_cond"] = model.logits(out["soft_embeddings"], condition)
    out["soft_logits_uncond"] = model.logits(out["soft_embeddings"], other)
    remasked = model.soft_embed(probs.log(), mask=given["soft_remask"])
    out["soft_remasked_embeddings"] = remasked
    out["soft_remasked_logits_cond"] = model.logits(remasked, condition)
    out["soft_grad_probs"] = soft_gradient(
        lambda p: model.logits(p @ table, condition), probs, given["grad_weight"]
    )
    return out


def tatitok(fixture: Fixture) -> Outputs:
    given = fixture.inputs
    config = TaTiTokConfig.from_published(
        fixture.info["constructor"], vit_sizes=fixture.info["vit_sizes"]
    )
    model: TaTiTok = fixture.load(TaTiTok(config))
    text, image = given["text_guidance"], given["image"]
    out: Outputs = {}
    with recorded(**blocks("encoder_block", model.encoder.transformer)) as seen:
        out["encoder_z"] = model.encode_latent(image)
    out |= {name: rows.transpose(0, 1) for name, rows in seen.items() if "/" not in name}
    tokens = model.encode(2 * image - 1)
    out["encoder_codes"] = tokens[:, None]
    quantized = model.codebook[tokens].transpose(1, 2)[:, :, None]
    out["z_quantized"] = quantized
    out["encoder_code_margin"] = margin(out["encoder_z"][:, :, 0].transpose(1, 2), model.codebook)[
        :, None
    ]
    out["reconstruction"] = model.decode_latent(quantized, text)
    codes = given["codes"][:, 0]
    with recorded(
        pre=model.decoder.ln_pre, post=model.decoder.ln_post, out=model.decoder.conv_out,
        **blocks("decoder_block", model.decoder.transformer),
    ) as seen:  # fmt: skip
        out["decoded_codes"] = (model.decode(codes, text) + 1) / 2
    out["decoder_sequence_in"], out["decoder_ln_post"] = seen["pre/in"], seen["post"]
    out["decoder_ffn"] = seen["out/in"]
    for i in range(config.decoder.layers):
        out[f"decoder_block_{i}"] = seen[f"decoder_block_{i}"].transpose(0, 1)
    out["decoded_codes_null_text"] = (model.decode(codes, given["null_text_guidance"]) + 1) / 2
    probs = given["soft_probs"]
    out["soft_latents"] = (probs @ model.codebook).transpose(1, 2)[:, :, None]
    out["decoded_soft"] = (model.decode_soft(probs.log(), text) + 1) / 2
    out["soft_grad_probs"] = soft_gradient(
        lambda p: (model.decode_codes(p @ model.codebook, text) + 1) / 2,
        probs,
        given["grad_weight"],
    )
    return out


def margin(vectors: Tensor, table: Tensor) -> Tensor:
    """The gap of squared distances between the best and the second best code."""
    best = torch.cdist(vectors, table.expand(len(vectors), -1, -1)).square().sort(-1).values
    return best[..., 1] - best[..., 0]


def meissonic(fixture: Fixture) -> Outputs:
    given, info = fixture.inputs, fixture.info
    config = MeissonicConfig.from_published(
        info["constructor"], token_grid=tuple(info["sizes"]["token_grid"])
    )
    model: MeissonicTransformer = fixture.load(MeissonicTransformer(config))
    height, width = config.token_grid
    shared: dict[str, Any] = {
        "micro": given["micro_conds"], "null_text": given["null_encoder_hidden_states"],
        "null_pooled": given["null_pooled"],
    }  # fmt: skip

    def condition(time: str) -> MeissonicCondition:
        return MeissonicCondition.of(
            given["encoder_hidden_states"], given["pooled"], time=given[time], **shared
        )

    def logits(embeddings: Tensor, given: MeissonicCondition) -> Tensor:
        """``[B, codes, h, w]``, by way of a sequence."""
        flat = model.logits(embeddings.flatten(1, 2), given)
        return flat.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    asked = condition("timestep")
    other, table, probs = model.unconditional(asked), model.token_table, given["soft_probs"]
    out: Outputs = {"token_embeddings": model.embed(given["input_ids"])}
    with recorded(
        cond=model.cond_embed, text=model.encoder_proj_layer_norm, temb=model.time_text_embed,
        down=model.down_block["downsample"], image=model.project_to_hidden,
        back=model.project_from_hidden, up=model.up_block["upsample"],
        **blocks("double", model.transformer_blocks),
        **blocks("single", model.single_transformer_blocks),
    ) as seen:  # fmt: skip
        out["logits_cond"] = logits(out["token_embeddings"], asked)
    out |= {
        "cond_embed_in": seen["cond/in"], "cond_embed_out": seen["cond"],
        "text_tokens_in": seen["text"], "image_tokens_in": seen["image"],
        "temb": seen["temb"], "timestep_sinusoid": seen["temb/in"][:1],
        "project_from_hidden": seen["back"],
        "down_out": seen["down"].permute(0, 3, 1, 2), "up_out": seen["up"].permute(0, 3, 1, 2),
    }  # fmt: skip
    out["embed_out"] = model.generator_input(out["token_embeddings"]).permute(0, 3, 1, 2)
    out["rope_cos"], out["rope_sin"] = model.rotation(
        given["txt_ids"].shape[0], height // 2, width // 2, probs
    )
    for i in range(config.num_layers):
        out[f"double_{i}_text"], out[f"double_{i}_image"] = seen[f"double_{i}"]
    for i in range(config.num_single_layers):
        out[f"single_{i}"] = seen[f"single_{i}"]
    out["logits_uncond"] = logits(out["token_embeddings"], other)
    out["logits_cond_t0"] = logits(out["token_embeddings"], condition("timestep_zero"))
    with recorded(temb=model.time_text_embed) as seen:
        trained = condition("timestep_train")
        out["logits_cond_train_t"] = logits(out["token_embeddings"], trained)
    out["timestep_sinusoid_train"] = seen["temb/in"]
    out["soft_embeddings"] = model.soft_embed(probs.log())
    out["soft_embed_out"] = model.generator_input(out["soft_embeddings"]).permute(0, 3, 1, 2)
    out["soft_logits_cond"] = logits(out["soft_embeddings"], asked)
    out["soft_logits_uncond"] = logits(out["soft_embeddings"], other)
    remasked = model.soft_embed(probs.log(), mask=given["soft_remask"])
    out["soft_remasked_embeddings"] = remasked
    # As a grid, of any size.
    out["soft_remasked_logits_cond"] = model.logits(remasked, asked).permute(0, 3, 1, 2)
    out["soft_grad_probs"] = soft_gradient(
        lambda p: logits(p @ table, asked), probs, given["grad_weight"]
    )
    return out


def meissonic_vq(fixture: Fixture) -> Outputs:
    given, info = fixture.inputs, fixture.info
    config = MeissonicVqConfig.from_published(
        info["constructor"], token_grid=tuple(info["sizes"]["latent_grid"])
    )
    model: MeissonicVq = fixture.load(MeissonicVq(config))
    out: Outputs = {"encoder_latents": model.encode_latent(given["image"])}
    tokens = model.encode(2 * given["image"] - 1).unflatten(1, config.token_grid)
    out["encoder_codes"] = tokens
    latents = out["encoder_latents"].permute(0, 2, 3, 1).flatten(1, 2)
    out["encoder_code_margin"] = margin(latents, model.codebook).view(tokens.shape)
    codes = given["codes"]
    with recorded(
        post=model.post_quant_conv, mid=model.decoder.mid_block,
        **blocks("decoder_up", model.decoder.up_blocks),
    ) as seen:  # fmt: skip
        out["decoded_codes"] = (model.decode(codes.flatten(1)) + 1) / 2
    out["quantized"], out["post_quant"] = seen["post/in"], seen["post"]
    out["decoder_mid"] = seen["mid"]
    out |= {f"decoder_up_{i}": seen[f"decoder_up_{i}"] for i in range(3)}
    probs = given["soft_probs"]
    out["soft_latents"] = (probs @ model.codebook).permute(0, 3, 1, 2)
    out["decoded_soft"] = (model.decode_soft(probs.log().flatten(1, 2)) + 1) / 2
    out["soft_grad_probs"] = soft_gradient(
        lambda p: (model.decode_codes(p @ model.codebook) + 1) / 2, probs, given["grad_weight"]
    )
    return out


FAMILIES: dict[str, Callable[[Fixture], Outputs]] = {
    "maskgen_vq": maskgen,
    "tatitok_vq": tatitok,
    "meissonic_transformer": meissonic,
    "meissonic_vqvae": meissonic_vq,
}


@cache
def computed(name: str) -> tuple[Fixture, Outputs]:
    fixture = Fixture(name)
    return fixture, FAMILIES[name](fixture)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_output_is_within_its_tolerance(name: str) -> None:
    fixture, outputs = computed(name)
    assert outputs.keys() == fixture.outputs.keys()
    wrong = []
    for key, expected in fixture.outputs.items():
        output, tolerance = outputs[key], fixture.tolerance(key)
        assert output.shape == expected.shape, key
        error = float((output.double() - expected.double()).abs().max())
        if not error <= tolerance:
            wrong.append(f"{key}: {error:.2g} > {tolerance:.2g}")
    assert not wrong, wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_half_the_precision_is_not_enough(name: str) -> None:
    """The tolerances tell: weights rounded to bfloat16 fail."""
    fixture = Fixture(name)
    fixture.weights = {
        key: t.bfloat16().to(t.dtype) if t.is_floating_point() else t
        for key, t in fixture.weights.items()
    }
    outputs = FAMILIES[name](fixture)
    errors = {
        key: float((outputs[key].double() - expected.double()).abs().max())
        for key, expected in fixture.outputs.items()
    }
    assert sum(error > fixture.tolerance(key) for key, error in errors.items()) > len(errors) / 2


# ---- tables ------------------------------------------------------------------------------------------------


def table(name: str) -> Any:
    return json.loads((FOLDER / f"{name}_maskgen_meissonic.json").read_text())


@pytest.mark.parametrize(
    ("kind", "argument", "options"),
    [
        ("maskgen_aesthetic", "argument", {"max_period": 1000.0, "sine_first": True}),
        ("meissonic_micro", "value", {"max_period": 10000.0, "sine_first": False}),
        ("meissonic_timestep", "argument", {"max_period": 10000.0, "sine_first": False}),
    ],
)
def test_conditioning_vectors(kind: str, argument: str, options: dict[str, Any]) -> None:
    rows = table("conditioning")[kind]["rows"]
    vectors = sinusoid(torch.tensor([row[argument] for row in rows]), 256, **options)
    expected = torch.tensor([row["vector"] for row in rows])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=2e-6)


def test_the_arguments_of_the_conditioning_vectors() -> None:
    rows = table("conditioning")["meissonic_timestep"]["rows"]
    for row in rows:
        assert float(torch.tensor(float(row["value"])) * 1000) == row["argument"]
    for row in table("conditioning")["maskgen_aesthetic"]["rows"]:
        assert float(torch.tensor(row["score"]) * 100) == row["argument"]


def test_training_masks() -> None:
    rows = table("schedules")["training"]["rows"]
    u = torch.tensor([row["u"] for row in rows])
    for family, schedule, positions in (("maskgen", "arccos", 128), ("meissonic", "cosine", 4096)):
        ratio = mask_ratio(schedule, u)
        expected = torch.tensor([row[f"{family}_{schedule}_ratio"] for row in rows])
        torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=1.1e-6)
        counts = [row[f"{family}_masked_of_{positions}"] for row in rows]
        assert masked_count(ratio, positions).tolist() == counts

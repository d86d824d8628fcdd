"""Every output of the published MaskGIT and MaskBit models, on small weights, within its tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.maskgit_maskbit import (
    Fixture,
    assert_parity,
    build,
    fixture,
    needs_fixtures,
)
from torch import Tensor

from softdimo_fast import soft_embedding
from softdimo_fast.diffusion import guided_logits, perturb
from softdimo_fast.models.conditions import select
from softdimo_fast.models.maskbit import join_splits, split_joint

pytestmark = needs_fixtures
DTYPES = (torch.float32, torch.float64)


def gradients(value: Tensor, cotangent: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((value * cotangent).sum(), leaves)


# ---- MaskGIT -----------------------------------------------------------------------------------------------


def stream(model: Any, embeddings: Tensor, condition: Tensor) -> dict[str, Tensor]:
    """The residual stream at every depth, and what the head multiplies, class row included."""
    outputs = model.features(embeddings, condition, tuple(range(model.depth)))
    rows = [model.first_rows(embeddings, condition), *outputs]
    named = {f"hidden/{i}": row for i, row in enumerate(rows)}
    return named | {"last": model.last_layer(rows[-1])}


def maskgit_outputs(model: Any, data: Fixture, dtype: torch.dtype) -> dict[str, Tensor]:
    given, labels = data.part("in", dtype), data.tensors["in/labels"]
    null = model.unconditional(labels)
    embeddings = model.embed(given["codes"].flatten(1))

    def logits(embeddings: Tensor, condition: Tensor) -> Tensor:
        columns: Tensor = model.head_with_mask(model(embeddings, condition))
        torch.testing.assert_close(model.logits(embeddings, condition), columns[..., :-1])
        return columns

    class_row = model.tok_emb.weight[model.mask_id + 1 + labels]
    table_rows = torch.cat([embeddings, class_row[:, None]], 1)
    outputs = stream(model, embeddings, labels) | {
        "tok_emb": table_rows,
        "tok_emb_plus_pos": table_rows + model.pos_emb,
        "logits_cond": logits(embeddings, labels),
        "logits_uncond": logits(embeddings, null),
        "logits_mixed_drop": logits(embeddings, select(given["drop_label"], null, labels)),
        "logits_cfg_s3": guided_logits(model, embeddings, labels, 3.0, head=model.head_with_mask),
    }
    for sigma in (0.1, 0.3):
        noisy = perturb(embeddings, given["noise"], sigma)
        outputs[f"logits_noise_{sigma}"] = logits(noisy, labels)
    # The probabilities enter as logits log p, and the logits themselves: both ways of the fixture.
    torch.testing.assert_close(given["soft_logits"].softmax(-1), given["soft_probs"])
    leaf = given["soft_logits"].clone().requires_grad_()
    soft = model.soft_embed(leaf)
    outputs["soft_emb"] = soft
    outputs["logits_soft"] = logits(soft, labels)
    outputs["grad_soft_emb"], outputs["grad_soft_logits"] = gradients(
        outputs["logits_soft"], given["cotangent"], soft, leaf
    )
    masked = model.soft_embed(given["soft_logits"], mask=given["soft_mask"])
    outputs["logits_soft_masked"] = logits(masked, labels)
    return outputs


# ---- VQGAN -------------------------------------------------------------------------------------------------


def vqgan_outputs(model: Any, data: Fixture, dtype: torch.dtype) -> dict[str, Tensor]:
    given = data.part("in", dtype)
    latent = model.encode_latent(given["images"])
    quantized = model.quantize(latent)
    codes, rectangle = given["codes"], given["codes_rect"]
    looked_up = model.codebook[codes].permute(0, 3, 1, 2)
    assert torch.equal(model.encode(given["images"]), quantized.codes.flatten(1))
    leaf = given["soft_logits"].flatten(1, 2).clone().requires_grad_()
    soft = soft_embedding(leaf, model.codebook)
    image = model.decode_codes(soft)
    torch.testing.assert_close(image, model.decode_soft(leaf))
    grad_latent, grad_logits = gradients(image, given["cotangent"], soft, leaf)
    grid = codes.shape[1:]
    return {
        "enc": model.encoder(given["images"]),
        "z": latent,
        "z_q": quantized.latent,
        "codes": quantized.codes,
        "vq_loss": quantized.loss.reshape(1),
        "recon": model.decode_latent(quantized.latent),
        "image_from_codes": model.decode(codes.flatten(1)),
        "image_from_codes_rect": model.decode(rectangle.flatten(1), grid=rectangle.shape[1:]),
        "codebook_latent": looked_up,
        "soft_latent": soft.transpose(1, 2).unflatten(2, grid),
        "image_from_latent": model.decode_latent(given["latent"]),
        "image_soft": image,
        "grad_soft_latent": grad_latent.transpose(1, 2).unflatten(2, grid),
        "grad_soft_logits": grad_logits.unflatten(1, grid),
    }


# ---- MaskBit -----------------------------------------------------------------------------------------------


def maskbit_outputs(model: Any, data: Fixture, dtype: torch.dtype) -> dict[str, Tensor]:
    given, labels = data.part("in", dtype), data.tensors["in/labels"]
    null, tokens = model.unconditional(labels), given["tokens"]
    mixed = select(given["drop_label"], null, labels)
    bits, split_bits = model.embed(tokens), model.config.split_bits
    leaf = given["soft_logits"].clone().requires_grad_()
    soft = model.soft_embed(leaf)
    soft_masked = model.soft_embed(given["soft_logits"], mask=given["soft_mask"])
    logits_soft = model.logits(soft, labels)
    grad_bits, grad_logits = gradients(logits_soft, given["cotangent"], soft, leaf)
    joint = join_splits(given["plain_tokens"], split_bits)
    return stream(model, bits, labels) | {
        "input_bits": bits,
        "input_proj": model.input_proj(bits),
        "logits_cond": model.logits(bits, labels),
        "logits_uncond": model.logits(bits, null),
        "logits_mixed_drop": model.logits(bits, mixed),
        # A published call without a drop mask drops every label, and says so in the caller's tensor.
        "logits_mask_none": model.logits(bits, null),
        "labels_after_mask_none": null,
        "labels_after_mixed_drop": mixed,
        "soft_bits": soft,
        "soft_bits_masked": soft_masked,
        "logits_soft": logits_soft,
        "logits_soft_masked": model.logits(soft_masked, labels),
        "grad_soft_bits": grad_bits,
        "grad_soft_logits": grad_logits,
        "combined": joint.float(),
        "split": split_joint(joint, model.token_shape[1], split_bits),
    }


def maskbit_tokenizer_outputs(model: Any, data: Fixture, dtype: torch.dtype) -> dict[str, Tensor]:
    given = data.part("in", dtype)
    latent = model.encode_latent(given["images"])
    quantized, edge = model.quantize(latent), model.quantize(given["z_edge"])
    splits, split_bits = model.token_shape[1], model.split_bits
    # The protocol's images are in [-1, 1], the published ones in [0, 1].
    encoded = model.encode(2 * given["images"] - 1)
    assert torch.equal(join_splits(encoded, split_bits), quantized.codes.flatten(1))
    tokens = split_joint(given["tokens"], splits, split_bits)
    image = (model.decode(tokens) + 1) / 2
    leaf = given["soft_bits"].clone().requires_grad_()
    from_bits = model.decode_latent(leaf)
    torch.testing.assert_close(
        model.decode_codes(leaf.flatten(2).transpose(1, 2)), 2 * from_bits - 1
    )
    (grad_bits,) = gradients(from_bits, given["cotangent"], leaf)
    return {
        "z": latent,
        "z_q": quantized.latent,
        "tokens": quantized.codes,
        "commitment_loss": quantized.loss.reshape(1),
        "quantizer_loss": quantized.loss.reshape(1),
        "recon": model.decode_latent(quantized.latent),
        "image_from_tokens": image,
        "image_from_tokens_float": image,
        "token_bits": model.bits(tokens),
        "z_edge_tokens": edge.codes,
        "z_edge_q": edge.latent,
        "image_from_bits": from_bits,
        "grad_soft_bits": grad_bits,
    }


OUTPUTS = {
    "maskgit_transformer": maskgit_outputs,
    "maskgit_transformer_odd": maskgit_outputs,
    "maskgit_vqgan": vqgan_outputs,
    "maskbit_generator_10bit": maskbit_outputs,
    "maskbit_generator_14bit": maskbit_outputs,
    "maskbit_tokenizer_10bit": maskbit_tokenizer_outputs,
    "maskbit_tokenizer_14bit": maskbit_tokenizer_outputs,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_parity(name: str, dtype: torch.dtype) -> None:
    data, model = fixture(name), build(name, dtype)
    assert_parity(data, OUTPUTS[name](model, data, dtype))


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_state_dict_round_trips(name: str) -> None:
    published, ours = fixture(name).part("sd"), build(name).state_dict()
    # The order is told by the JSON: the tensor file sorts its names.
    listed = [key for key in fixture(name).facts["tensors"] if key.startswith("sd/")]
    assert [f"sd/{key}" for key in ours] == listed
    for key, tensor in published.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["maskbit_generator_10bit", "maskbit_generator_14bit"])
def test_labels_are_not_written_to(name: str) -> None:
    data, model = fixture(name), build(name)
    labels = data.tensors["in/labels"].clone()
    model.logits(model.embed(data.tensors["in/tokens"]), labels)
    assert torch.equal(labels, data.tensors["in/labels"])


@pytest.mark.parametrize("name", ["maskbit_tokenizer_10bit", "maskbit_tokenizer_14bit"])
def test_decode_soft_decodes_expected_bits(name: str) -> None:
    model = build(name)
    shape = (2, 16, model.token_shape[1], model.codebook.shape[1])
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("blgv,gvd->blgd", logits.softmax(-1), model.codebook).flatten(-2)
    torch.testing.assert_close(model.decode_soft(logits), model.decode_codes(expected))

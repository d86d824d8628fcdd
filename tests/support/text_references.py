"""MaskGen, TA-TiTok, Meissonic and its VQ once more, in plain formulas over a state dict, in float64.

Attention is a softmax of products in memory; nothing is shared with the package but the numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


def double(weights: Weights) -> Weights:
    return {key: tensor.detach().double() for key, tensor in weights.items()}


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"].flatten(1))
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _erf_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return _standardised(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def _waves(values: Tensor, width: int, period: float) -> tuple[Tensor, Tensor]:
    half = width // 2
    angles = values.double()[..., None] * period ** (-torch.arange(half).double() / half)
    return angles.sin(), angles.cos()


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def _parts(w: Weights, name: str, vector: Tensor, count: int) -> list[Tensor]:
    return list(_linear(w, f"{name}.linear", _silu(vector))[:, None].chunk(count, -1))


def _feed_forward(w: Weights, name: str, x: Tensor) -> Tensor:
    return _linear(w, f"{name}.net.2", _tanh_gelu(_linear(w, f"{name}.net.0.proj", x)))


def _turn(x: Tensor, angles: Tensor | None) -> Tensor:
    """Pairs of channels ``[B, T, heads, d]`` as complex numbers, times exp(i angle)."""
    if angles is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def _projected(w: Weights, names: list[str], x: Tensor, heads: int, angles: Any) -> list[Tensor]:
    """Queries, keys and values; RMS norms of the first two where there are any."""
    found = []
    for name, norm in zip(names, names[3:], strict=False):
        rows = _linear(w, name, x).unflatten(-1, (heads, -1))
        rows = _rms(w, norm, rows) if f"{norm}.weight" in w else rows
        found.append(_turn(rows, angles))
    return [*found, _linear(w, names[2], x).unflatten(-1, (heads, -1))]


def _joint(
    w: Weights, b: str, text: Tensor, image: Tensor, vector: Tensor, heads: int, angles: Any
) -> tuple[Tensor, Tensor]:
    last = f"{b}.ff_context.net.2.weight" not in w
    a = f"{b}.attn."
    image_parts = _parts(w, f"{b}.norm1", vector, 6)
    text_parts = _parts(w, f"{b}.norm1_context", vector, 2 if last else 6)
    shift, scale = text_parts[1::-1] if last else text_parts[:2]
    text_in = _standardised(text, 1e-6) * (1 + scale) + shift
    image_in = _standardised(image, 1e-6) * (1 + image_parts[1]) + image_parts[0]
    count = text.shape[1]
    text_angles, image_angles = (
        (angles[:count], angles[count:]) if angles is not None else (None,) * 2
    )
    names = [
        a + n for n in ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
    ]
    of_text = _projected(w, names, text_in, heads, text_angles)
    names = [a + n for n in ("to_q", "to_k", "to_v", "norm_q", "norm_k")]
    of_image = _projected(w, names, image_in, heads, image_angles)
    rows = _softmax_attention(*(torch.cat(pair, 1) for pair in zip(of_text, of_image, strict=True)))
    image = image + image_parts[2] * _linear(w, f"{a}to_out.0", rows[:, count:])
    hidden = _standardised(image, 1e-6) * (1 + image_parts[4]) + image_parts[3]
    image = image + image_parts[5] * _feed_forward(w, f"{b}.ff", hidden)
    if last:
        return text, image
    text = text + text_parts[2] * _linear(w, f"{a}to_add_out", rows[:, :count])
    hidden = _standardised(text, 1e-6) * (1 + text_parts[4]) + text_parts[3]
    return text + text_parts[5] * _feed_forward(w, f"{b}.ff_context", hidden), image


def maskgen(weights: Weights, config: Any, embeddings: Tensor, condition: Any) -> Tensor:
    """Logits ``[B, N, V]``."""
    w = double(weights)
    sines, cosines = _waves(condition.score * 100, config.micro_condition_embed_dim, 1000)
    pooled = torch.cat([condition.pooled.double(), sines, cosines], -1)
    vector = _linear(w, "cond_pooled_proj", pooled)
    text = _linear(w, "text_embed_proj", condition.text.double())
    image = embeddings.double() + w["pos_embed"]
    for i in range(config.decoder_depth):
        text, image = _joint(w, f"blocks.{i}", text, image, vector, config.decoder_num_heads, None)
    scale, shift = _parts(w, "norm", vector, 2)
    hidden = _standardised(image, 1e-6) * (1 + scale) + shift
    return hidden @ w["embeddings.weight"][: config.codebook_size].T


def _angles(config: Any, text: int, height: int, width: int) -> Tensor:
    """``[text + height * width, head width / 2]``."""
    rows = [(0, 0, 0)] * text + [(0, i, j) for i in range(height) for j in range(width)]
    columns = [
        torch.tensor(rows).double()[:, axis, None]
        * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        for axis, size in enumerate(config.axes_dims_rope)
    ]
    return torch.cat(columns, -1)


def meissonic(weights: Weights, config: Any, embeddings: Tensor, condition: Any) -> Tensor:
    """Logits ``[B, codes, h, w]`` of table rows or mixtures ``[B, h, w, D]``."""
    w = double(weights)
    sines, cosines = _waves(condition.micro, 256, 10000)
    micro = torch.cat([cosines, sines], -1).flatten(1)
    pooled = _linear(w, "cond_embed.linear_1", torch.cat([condition.pooled.double(), micro], -1))
    pooled = _linear(w, "cond_embed.linear_2", _silu(pooled))
    sines, cosines = _waves(condition.time * 1000, 256, 10000)
    vector = torch.zeros_like(pooled)
    for name, x in (("timestep", torch.cat([cosines, sines], -1)), ("text", pooled)):
        layer = f"time_text_embed.{name}_embedder.linear"
        vector = vector + _linear(w, f"{layer}_2", _silu(_linear(w, f"{layer}_1", x)))
    text = _rms(
        w, "encoder_proj_layer_norm", _linear(w, "context_embedder", condition.text.double())
    )
    x = _linear(w, "embed.conv", _rms(w, "embed.layer_norm", embeddings.double()))
    if config.downsample:
        x = _rms(w, "down_block.downsample.norm", x)
        patches = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        x = torch.einsum("bhiwjc,ocij->bhwo", patches, w["down_block.downsample.conv.weight"])
    height, width = x.shape[1:3]
    image = _linear(w, "project_to_hidden", _rms(w, "project_to_hidden_norm", x.flatten(1, 2)))
    count, heads = text.shape[1], config.num_attention_heads
    angles = _angles(config, count, height, width)
    for i in range(config.num_layers):
        text, image = _joint(w, f"transformer_blocks.{i}", text, image, vector, heads, angles)
    rows = torch.cat([text, image], 1)
    for i in range(config.num_single_layers):
        b = f"single_transformer_blocks.{i}"
        shift, scale, gate = _parts(w, f"{b}.norm", vector, 3)
        entered = _standardised(rows, 1e-6) * (1 + scale) + shift
        names = [f"{b}.attn.{n}" for n in ("to_q", "to_k", "to_v", "norm_q", "norm_k")]
        attended = _softmax_attention(*_projected(w, names, entered, heads, angles))
        mixed = _tanh_gelu(_linear(w, f"{b}.proj_mlp", entered))
        rows = rows + gate * _linear(w, f"{b}.proj_out", torch.cat([attended, mixed], -1))
    x = _linear(w, "project_from_hidden", _rms(w, "project_from_hidden_norm", rows[:, count:]))
    x = x.unflatten(1, (height, width))
    if config.upsample:
        x = _rms(w, "up_block.upsample.norm", x)
        x = torch.einsum("bhwc,coij->bhiwjo", x, w["up_block.upsample.conv.weight"])
        x = x.flatten(3, 4).flatten(1, 2)
    x = _rms(w, "mlm_layer.layer_norm", _linear(w, "mlm_layer.conv1", x))
    return _linear(w, "mlm_layer.conv2", x).permute(0, 3, 1, 2)


def _vit(w: Weights, name: str, rows: Tensor, layers: int, heads: int) -> Tensor:
    rows = _layer_norm(w, f"{name}.ln_pre", rows)
    for i in range(layers):
        b = f"{name}.transformer.{i}"
        x = _layer_norm(w, f"{b}.ln_1", rows)
        qkv = x @ w[f"{b}.attn.in_proj_weight"].T + w[f"{b}.attn.in_proj_bias"]
        attended = _softmax_attention(*(t.unflatten(-1, (heads, -1)) for t in qkv.chunk(3, -1)))
        rows = rows + _linear(w, f"{b}.attn.out_proj", attended)
        x = _erf_gelu(_linear(w, f"{b}.mlp.c_fc", _layer_norm(w, f"{b}.ln_2", rows)))
        rows = rows + _linear(w, f"{b}.mlp.c_proj", x)
    return rows


def tatitok_latent(weights: Weights, config: Any, images: Tensor) -> Tensor:
    """``[B, N, token_size]`` of images in [0, 1]."""
    w, p, batch = double(weights), config.vit_enc_patch_size, len(images)
    patches = images.double().unflatten(3, (-1, p)).unflatten(2, (-1, p))
    x = torch.einsum("bchiwj,ocij->bhwo", patches, w["encoder.patch_embed.weight"]).flatten(1, 2)
    x = x + w["encoder.patch_embed.bias"]
    first = w["encoder.class_embedding"].expand(batch, -1, -1)
    image = torch.cat([first, x], 1) + w["encoder.positional_embedding"]
    latents = w["latent_tokens"] + w["encoder.latent_token_positional_embedding"]
    rows = torch.cat([image, latents.expand(batch, -1, -1)], 1)
    rows = _vit(w, "encoder", rows, config.encoder.layers, config.encoder.heads)
    rows = _layer_norm(w, "encoder.ln_post", rows[:, image.shape[1] :])
    return _linear(w, "encoder.conv_out", rows)


def tatitok_image(weights: Weights, config: Any, codes: Tensor, text: Tensor) -> Tensor:
    """Images in [0, 1] of codes ``[B, N, token_size]``."""
    w, p, batch = double(weights), config.vit_dec_patch_size, len(codes)
    side = config.crop_size // p
    first = w["decoder.class_embedding"].expand(batch, -1, -1)
    blank = w["decoder.mask_token"].expand(batch, side * side, -1)
    image = torch.cat([first, blank], 1) + w["decoder.positional_embedding"]
    latents = _linear(w, "decoder.decoder_embed", codes.double())
    latents = latents + w["decoder.latent_token_positional_embedding"]
    guide = _linear(w, "decoder.text_guidance_proj", text.double())
    guide = guide + w["decoder.text_guidance_positional_embedding"]
    rows = torch.cat([image, latents, guide], 1)
    rows = _vit(w, "decoder", rows, config.decoder.layers, config.decoder.heads)
    rows = _layer_norm(w, "decoder.ln_post", rows[:, 1 : 1 + side * side])
    pixels = _linear(w, "decoder.ffn.0", rows)
    canvas = torch.empty(batch, 3, side * p, side * p, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            patch = pixels[:, row * side + column].view(batch, p, p, 3).permute(0, 3, 1, 2)
            canvas[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] = patch
    return _convolution(w, "decoder.conv_out", canvas, padding=(1, 1, 1, 1))


def _convolution(
    w: Weights, name: str, x: Tensor, *, padding: tuple[int, int, int, int], stride: int = 1
) -> Tensor:
    """By the patches that each output pixel sees; padding is (left, right, top, bottom)."""
    kernel = w[f"{name}.weight"]
    size = kernel.shape[-1]
    windows = functional.pad(x, padding).unfold(2, size, stride).unfold(3, size, stride)
    y = torch.einsum("bchwij,ocij->bohw", windows, kernel)
    return y + w[f"{name}.bias"][:, None, None]


def _group_norm(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    flat = x.unflatten(1, (groups, -1)).flatten(2)
    normed = _standardised(flat, 1e-6).view_as(x)
    return normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def _residual(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    y = x
    for i in (1, 2):
        y = _silu(_group_norm(w, f"{name}.norm{i}", y, groups))
        y = _convolution(w, f"{name}.conv{i}", y, padding=(1, 1, 1, 1))
    if f"{name}.conv_shortcut.weight" in w:
        x = _convolution(w, f"{name}.conv_shortcut", x, padding=(0, 0, 0, 0))
    return x + y


def meissonic_vq_latent(weights: Weights, config: Any, images: Tensor) -> Tensor:
    """``[B, D, h, w]`` of images in [0, 1]."""
    w, groups, levels = double(weights), config.norm_num_groups, len(config.block_out_channels)
    x = _convolution(w, "encoder.conv_in", images.double(), padding=(1, 1, 1, 1))
    for i in range(levels):
        level = f"encoder.down_blocks.{i}"
        for j in range(config.layers_per_block):
            x = _residual(w, f"{level}.resnets.{j}", x, groups)
        if i + 1 < levels:
            x = _convolution(w, f"{level}.downsamplers.0.conv", x, padding=(0, 1, 0, 1), stride=2)
    for j in range(2):
        x = _residual(w, f"encoder.mid_block.resnets.{j}", x, groups)
    x = _silu(_group_norm(w, "encoder.conv_norm_out", x, groups))
    x = _convolution(w, "encoder.conv_out", x, padding=(1, 1, 1, 1))
    return _convolution(w, "quant_conv", x, padding=(0, 0, 0, 0))


def meissonic_vq_image(weights: Weights, config: Any, latent: Tensor) -> Tensor:
    """Images in [0, 1] of codes ``[B, D, h, w]``."""
    w, groups, levels = double(weights), config.norm_num_groups, len(config.block_out_channels)
    x = _convolution(w, "post_quant_conv", latent.double(), padding=(0, 0, 0, 0))
    x = _convolution(w, "decoder.conv_in", x, padding=(1, 1, 1, 1))
    for j in range(2):
        x = _residual(w, f"decoder.mid_block.resnets.{j}", x, groups)
    for i in range(levels):
        level = f"decoder.up_blocks.{i}"
        for j in range(config.layers_per_block + 1):
            x = _residual(w, f"{level}.resnets.{j}", x, groups)
        if i + 1 < levels:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _convolution(w, f"{level}.upsamplers.0.conv", x, padding=(1, 1, 1, 1))
    x = _silu(_group_norm(w, "decoder.conv_norm_out", x, groups))
    return _convolution(w, "decoder.conv_out", x, padding=(1, 1, 1, 1))

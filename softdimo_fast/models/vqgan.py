"""The VQGAN of Taming Transformers: MaskGIT's tokenizer.

Source: Esser et al., "Taming transformers for high-resolution image synthesis" (arXiv 2012.09841).
Parameter names are those of the published checkpoint, which loads into the default sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.conv_tokenizer import (
    Quantized,
    codes_to_latent,
    group_norm,
    latent_to_codes,
    upsample,
)
from softdimo_fast.models.protocol import Tokenizer

COMMITMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class VqGanSizes:
    """Of encoder and decoder; the defaults are those of the checkpoint that MaskGIT uses.

    Attributes:
        double_z: False; True is for the variational autoencoder.
        z_channels: of the encoder's output and the decoder's input.
        resolution: height and width of the images of ``token_shape``; it says where attention is, also
            for images of other sizes.
        in_channels, out_ch: channels of the images in and out.
        ch: width at full resolution.
        ch_mult: width at each resolution, full resolution first, in multiples of ch.
        num_res_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
        attn_resolutions: the resolutions with attention.
        dropout: it is accepted, and never applied; 0 in the published model.
    """

    double_z: bool = False
    z_channels: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require(not self.double_z, self, "double_z", self.double_z, "False")
        for name in ("z_channels", "in_channels", "out_ch", "ch", "num_res_blocks"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require(
            self.ch % 32 == 0, self, "ch", self.ch, "a multiple of 32, the norms' groups"
        )
        _config.require(
            len(self.ch_mult) >= 1 and min(self.ch_mult) >= 1, self, "ch_mult", self.ch_mult,
            "at least one number, each >= 1",
        )  # fmt: skip
        _config.require_range(self, "resolution", self.resolution, minimum=1)
        _config.require(
            self.resolution % self.scale == 0, self, "resolution", self.resolution,
            f"a multiple of {self.scale}, the scale between image and codes",
        )  # fmt: skip
        _config.require_range(self, "dropout", self.dropout, minimum=0, below=1)

    @property
    def scale(self) -> int:
        """Pixels per code, in each direction."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, full resolution first."""
        return tuple(self.ch * m for m in self.ch_mult)

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level (0 is full resolution) are followed by attention."""
        return self.resolution // 2**level in self.attn_resolutions


@dataclass(frozen=True, kw_only=True)
class VqGanConfig:
    """Of a :class:`VqGan`: the published constructor's arguments.

    Attributes:
        ddconfig: encoder and decoder.
        lossconfig: none; the perceptual and adversarial losses are no part of this package.
        n_embed: V, codes.
        embed_dim: D, their length.
    """

    ddconfig: VqGanSizes = field(default_factory=VqGanSizes)
    lossconfig: None = None
    n_embed: int = 1024
    embed_dim: int = 256

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("n_embed", "embed_dim"):
            _config.require_range(self, name, getattr(self, name), minimum=1)


class _ResBlock(nn.Module):
    """Two convolutions, added to their input (through a 1 x 1 convolution where the width changes)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = group_norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)
        self.widens = width != out

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if self.widens else x)


class _Attention(nn.Module):
    """Attention over the positions with one head, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            latent_to_codes(layer(normed))[:, None] for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        grid = (x.shape[2], x.shape[3])
        added: Tensor = x + self.proj_out(codes_to_latent(attended, grid))
        return added


class _Downsample(nn.Module):
    """Half the size: padded at the right and the bottom alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class _Upsample(nn.Module):
    """Twice the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(upsample(x))
        return doubled


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention or none, and the way to the next one."""

    def __init__(self, width: int, out: int, blocks: int, *, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(out) for _ in range(blocks if attends else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(width, width)
        self.attn_1 = _Attention(width)
        self.block_2 = _ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class _Encoder(nn.Module):
    def __init__(self, sizes: VqGanSizes) -> None:
        super().__init__()
        widths, blocks = sizes.widths, sizes.num_res_blocks
        before, last = (sizes.ch, *widths), len(widths) - 1
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _Level(before[i], width, blocks, attends=sizes.attends(i))
            if i < last:
                level.downsample = _Downsample(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class _Decoder(nn.Module):
    def __init__(self, sizes: VqGanSizes) -> None:
        super().__init__()
        widths, blocks = sizes.widths, sizes.num_res_blocks + 1
        before = (*widths[1:], widths[-1])
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _Level(before[i], width, blocks, attends=sizes.attends(i))
            if i > 0:
                level.upsample = _Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], sizes.out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):  # numbered from full resolution
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _NearestCode(nn.Module):
    """Each vector of the latent to the nearest code, the lowest number on ties."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, latent: Tensor) -> Quantized:
        table = self.embedding.weight
        vectors = latent_to_codes(latent)
        # Half precision would choose another code where two are about as near.
        with torch.autocast(latent.device.type, enabled=False):
            # |c|^2 - 2 v.c: the constant |v|^2 changes no minimum.
            distance = table.square().sum(-1) - 2 * (vectors.to(table.dtype) @ table.T)
        ids = distance.argmin(-1).unflatten(1, latent.shape[2:])
        nearest = self.embedding(ids).permute(0, 3, 1, 2)
        loss = (nearest - latent.detach()).square().mean() + COMMITMENT * (
            (nearest.detach() - latent).square().mean()
        )
        # Not latent + (nearest - latent): that would be the code only up to rounding.
        straight = nearest.detach() + (latent - latent.detach())
        return Quantized(straight, ids, loss)


class VqGan(Tokenizer):
    """A code for each 16 x 16 pixels (at the default sizes); images in about [-1, 1], never clamped.

    The codebook, where soft embeddings are formed, lies before ``post_quant_conv``. Other image sizes than
    ``resolution`` can be coded: pass the grid of the codes to decode where it is not square.
    """

    Config = VqGanConfig

    def __init__(self, config: VqGanConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.ddconfig
        self.token_shape = ((sizes.resolution // sizes.scale) ** 2,)
        self.encoder = _Encoder(sizes)
        self.decoder = _Decoder(sizes)
        self.quantize = _NearestCode(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(sizes.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, sizes.z_channels, 1)

    def encode_latent(self, images: Tensor) -> Tensor:
        """``[B, D, h, w]``, in the space of the codebook, before quantisation."""
        latent: Tensor = self.quant_conv(self.encoder(images))
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images of vectors ``[B, D, h, w]`` in the space of the codebook; differentiable."""
        images: Tensor = self.decoder(self.post_quant_conv(latent))
        return images

    def encode(self, images: Tensor) -> Tensor:
        quantized: Quantized = self.quantize(self.encode_latent(images))
        return quantized.codes.flatten(1)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def decode_codes(
        self, codes: Tensor, condition: Condition = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Images of code vectors ``[B, L, D]``; the ``grid`` (h, w) is square if not given."""
        return self.decode_latent(codes_to_latent(codes, grid))

    def decode(
        self, tokens: Tensor, condition: Condition = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Images of tokens ``[B, L]``; the ``grid`` (h, w) is square if not given."""
        return self.decode_codes(F.embedding(tokens, self.codebook), grid=grid)

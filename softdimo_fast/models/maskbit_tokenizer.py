"""The MaskBit tokenizer: a convolutional autoencoder whose latent is quantised to its signs.

Source: Weber et al., "MaskBit: embedding-free image generation via bit tokens" (arXiv 2409.16211), and
lookup-free quantisation (arXiv 2310.05737). Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.conv_tokenizer import (
    Quantized,
    codes_to_latent,
    group_norm,
    upsample,
)
from softdimo_fast.models.maskbit import bit_weights, split_joint, token_signs
from softdimo_fast.models.protocol import Tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskBitTokenizerSizes:
    """The published model section; the defaults are those of the 14-bit checkpoint.

    Attributes:
        model_class, quantizer_type: the one kind that the published checkpoints are of.
        codebook_size: not used; there are 2^token_size codes.
        token_size: bits of a position.
        commitment_cost: weight of mean((sign - z)^2).
        entropy_loss_weight, entropy_loss_temperature, entropy_gamma: of the entropy term in training,
            which this package does not have.
        num_channels: of the images.
        hidden_channels: width at full resolution.
        channel_mult: width at each resolution, full resolution first, in multiples of hidden_channels.
        num_resolutions: the length of channel_mult.
        num_res_blocks: residual blocks at each resolution.
        sample_with_conv: True, convolutions between the resolutions.
    """

    model_class: Literal["vqgan+"] = "vqgan+"
    quantizer_type: Literal["lookup-free"] = "lookup-free"
    codebook_size: int = 2**14
    token_size: int = 14
    commitment_cost: float = 0.25
    entropy_loss_weight: float = 0.02
    entropy_loss_temperature: float = 0.01
    entropy_gamma: float = 1.0
    num_channels: int = 3
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_resolutions: int = 5
    num_res_blocks: int = 2
    sample_with_conv: bool = True

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("token_size", "num_channels", "hidden_channels", "num_res_blocks"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        mult = self.channel_mult
        _config.require(
            len(mult) == self.num_resolutions >= 1 and min(mult) >= 1, self, "channel_mult", mult,
            f"{self.num_resolutions} numbers >= 1 (num_resolutions)",
        )  # fmt: skip
        _config.require(
            self.hidden_channels % 32 == 0, self, "hidden_channels", self.hidden_channels,
            "a multiple of 32, the groups of the norms",
        )  # fmt: skip
        _config.require(
            self.sample_with_conv, self, "sample_with_conv", self.sample_with_conv, "True"
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, full resolution first."""
        return tuple(self.hidden_channels * m for m in self.channel_mult)


@dataclass(frozen=True, kw_only=True)
class MaskBitTokenizerConfig:
    """Of a :class:`MaskBitTokenizer`: the published constructor's arguments, and what it is used for.

    Attributes:
        config: sizes.
        legacy: False; the published checkpoints have the other decoder.
        codebook_splits: tokens of a position, as in the generator.
        img_size: height and width of the images of ``token_shape``. Others can be coded too.
    """

    config: MaskBitTokenizerSizes = field(default_factory=MaskBitTokenizerSizes)
    legacy: bool = False
    codebook_splits: int = 2
    img_size: int = 256

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require(not self.legacy, self, "legacy", self.legacy, "False")
        _config.require_range(self, "codebook_splits", self.codebook_splits, minimum=1)
        bits = self.config.token_size
        _config.require(
            bits % self.codebook_splits == 0, self, "codebook_splits", self.codebook_splits,
            f"a number that divides token_size = {bits}",
        )  # fmt: skip
        _config.require_range(self, "img_size", self.img_size, minimum=1)


class _SameConv(nn.Conv2d):
    """TensorFlow's "same" padding: ceil(size / stride) outputs, the odd pad at the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(
            reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


class _ResBlock(nn.Module):
    """Two convolutions, added to their input.

    Where the width changes, the published block takes its 1 x 1 shortcut of the second convolution's output
    (the input reaches the output through the convolutions alone). Checkpoints need just that.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = _SameConv(width, out, 3, bias=False)
        self.norm2 = group_norm(out)
        self.conv2 = _SameConv(out, out, 3, bias=False)
        if width != out:
            self.nin_shortcut = _SameConv(out, out, 1, bias=False)
        self.widens = width != out

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(hidden) if self.widens else x)


class _Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next one."""

    def __init__(self, width: int, out: int, blocks: int, resample: str | None = None) -> None:
        super().__init__()
        self.res_blocks = nn.Sequential(
            *(_ResBlock(width if i == 0 else out, out) for i in range(blocks))
        )
        if resample == "down":
            self.down_conv = _SameConv(out, out, 3, stride=2)
        if resample == "up":
            self.upsample_conv = _SameConv(out, out, 3)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(x)
        if self.resample == "down":
            x = self.down_conv(x)
        if self.resample == "up":
            x = self.upsample_conv(upsample(x))
        return x


class _Encoder(nn.Module):
    def __init__(self, sizes: MaskBitTokenizerSizes) -> None:
        super().__init__()
        widths, blocks = sizes.widths, sizes.num_res_blocks
        before, last = (widths[0], *widths), len(widths) - 1
        self.conv_in = _SameConv(sizes.num_channels, widths[0], 3, bias=False)
        self.down = nn.Sequential(
            *(
                _Level(before[i], width, blocks, "down" if i < last else None)
                for i, width in enumerate(widths)
            )
        )
        self.mid = _Level(widths[-1], widths[-1], blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = _SameConv(widths[-1], sizes.token_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, sizes: MaskBitTokenizerSizes) -> None:
        super().__init__()
        widths, blocks = sizes.widths[::-1], sizes.num_res_blocks
        before, last = (widths[0], *widths), len(widths) - 1
        self.conv_in = _SameConv(sizes.token_size, widths[0], 3)
        self.mid = _Level(widths[0], widths[0], blocks)
        self.up = nn.Sequential(
            *(
                _Level(before[i], width, blocks, "up" if i < last else None)
                for i, width in enumerate(widths)
            )
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = _SameConv(widths[-1], sizes.num_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.mid(self.conv_in(x)))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _SignQuantizer(nn.Module):
    """Each number of the latent to its sign; 0 and -0 count as negative."""

    bits_to_indices: Tensor
    codebook: Tensor

    def __init__(self, bits: int, commitment_cost: float) -> None:
        super().__init__()
        self.commitment_cost = commitment_cost
        self.register_buffer("bits_to_indices", bit_weights(bits))
        signs = token_signs(torch.arange(1 << bits), self.bits_to_indices)
        self.register_buffer("codebook", 2.0 * signs - 1)

    def forward(self, latent: Tensor) -> Quantized:
        positive = latent > 0
        signs = torch.where(positive, 1.0, -1.0).to(latent.dtype)
        codes = (positive * self.bits_to_indices[:, None, None]).sum(1)
        loss = self.commitment_cost * (signs - latent).square().mean()
        # Not latent + (signs - latent): that would be the sign only up to rounding.
        return Quantized(signs + (latent - latent.detach()), codes, loss)


class MaskBitTokenizer(Tokenizer):
    """``bits`` bits for each 16 x 16 pixels (at the default sizes), in ``codebook_splits`` tokens.

    :meth:`encode`, :meth:`decode_codes` and :meth:`decode` take and give images in [-1, 1], as every
    tokenizer of this package does, and tokens ``[B, L, splits]`` (``join_splits`` of
    ``softdimo_fast.models.maskbit`` makes them the published joint ids). The checkpoints were trained on
    images in [0, 1]: that is the range of :meth:`encode_latent` and :meth:`decode_latent`. Neither clamps.
    A code is the ``bits`` bits of a position, split 0 first, lowest bit first: -1, +1, or what is expected.
    """

    Config = MaskBitTokenizerConfig

    def __init__(self, config: MaskBitTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes, splits = config.config, config.codebook_splits
        side = config.img_size
        for _ in range(sizes.num_resolutions - 1):
            side = -(-side // 2)
        self.token_shape = (side * side, splits)
        self.split_bits = sizes.token_size // splits
        self.encoder = _Encoder(sizes)
        self.decoder = _Decoder(sizes)
        self.quantize = _SignQuantizer(sizes.token_size, sizes.commitment_cost)

    def encode_latent(self, images: Tensor) -> Tensor:
        """``[B, bits, h, w]``, before quantisation, of images in [0, 1]."""
        latent: Tensor = self.encoder(images)
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images in [0, 1] of bits ``[B, bits, h, w]``, hard or expected; differentiable."""
        images: Tensor = self.decoder(latent)
        return images

    def encode(self, images: Tensor) -> Tensor:
        quantized: Quantized = self.quantize(self.encode_latent((images + 1) / 2))
        return split_joint(quantized.codes.flatten(1), self.token_shape[1], self.split_bits)

    @property
    def codebook(self) -> Tensor:
        """``[splits, V, bits / splits]``: the bits of each token, the same for all splits."""
        table = self.quantize.codebook[: 1 << self.split_bits, : self.split_bits]
        return table.expand(self.token_shape[1], -1, -1)

    def decode_codes(
        self, codes: Tensor, condition: Condition = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Images in [-1, 1] of bits ``[B, L, bits]``; the ``grid`` (h, w) is square if not given."""
        return 2 * self.decode_latent(codes_to_latent(codes, grid)) - 1

    def decode(
        self, tokens: Tensor, condition: Condition = None, *, grid: tuple[int, int] | None = None
    ) -> Tensor:
        return self.decode_codes(self.bits(tokens), grid=grid)

    def bits(self, tokens: Tensor) -> Tensor:
        """-1 and +1, ``[B, L, bits]``, of tokens ``[B, L, splits]``."""
        signs = token_signs(tokens, self.quantize.bits_to_indices[: self.split_bits])
        return (2 * signs - 1).flatten(-2).to(self.decoder.conv_in.weight.dtype)

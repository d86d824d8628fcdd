"""A small convolutional VQ autoencoder whose codebook follows its encoder by exponential averages.

Source: van den Oord et al., "Neural discrete representation learning" (NeurIPS 2017), appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.protocol import Tokenizer


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """Sizes of a :class:`VectorQuantizer`. Images are ``[channels, 2 * grid, 2 * grid]``."""

    vocabulary: int = 64
    code_width: int = 16
    width: int = 24
    channels: int = 1
    grid: int = 4

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("vocabulary", "code_width", "width", "channels", "grid"):
            _config.require_range(self, name, getattr(self, name), minimum=1)


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.body(x)
        return added


class VectorQuantizer(Tokenizer):
    """``grid * grid`` tokens an image.

    Buffers ``codes`` (the codebook), ``usage`` and ``totals`` (exponential averages of how often each code
    was chosen, and of the vectors that chose it) are trained by
    :class:`softdimo_fast.trainers.TokenizerMethod`, not by gradients.
    """

    Config = VectorQuantizerConfig
    codes: Tensor
    usage: Tensor
    totals: Tensor

    def __init__(self, config: VectorQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_shape = (config.grid * config.grid,)
        width, code = config.width, config.code_width
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 4, 2, 1),
            Residual(width),
            nn.Conv2d(width, code, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code, width, 3, padding=1),
            Residual(width),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            Residual(width),
            nn.GELU(),
            nn.Conv2d(width, config.channels, 3, padding=1),
        )
        self.register_buffer("codes", torch.randn(config.vocabulary, code))
        self.register_buffer("usage", torch.ones(config.vocabulary))
        self.register_buffer("totals", self.codes.clone())

    @property
    def codebook(self) -> Tensor:
        return self.codes

    def encode_vectors(self, images: Tensor) -> Tensor:
        """``[B, L, D]``, before quantisation."""
        encoded: Tensor = self.encoder(images)
        return encoded.flatten(2).transpose(1, 2)

    def nearest(self, vectors: Tensor) -> Tensor:
        """int64 ``[B, L]``: the nearest code of each vector, the lowest index on ties."""
        # Half precision would choose another code where two are about as near.
        with torch.autocast(vectors.device.type, enabled=False):
            # |c|^2 - 2 v.c: the constant |v|^2 changes no minimum.
            products = vectors.to(self.codes.dtype) @ self.codes.T
            distance = self.codes.square().sum(-1) - 2 * products
        return distance.argmin(-1)

    def encode(self, images: Tensor) -> Tensor:
        return self.nearest(self.encode_vectors(images))

    def decode_codes(self, codes: Tensor, condition: Condition = None) -> Tensor:
        grid = self.config.grid
        decoded: Tensor = self.decoder(codes.transpose(1, 2).unflatten(2, (grid, grid)))
        return decoded

    def decode(self, tokens: Tensor, condition: Condition = None) -> Tensor:
        return self.decode_codes(self.codes[tokens])

"""The VQ image tokenizer of Meissonic, the one of aMUSEd: 16 x 16 pixels a token, no attention.

Sources: VQGAN (arXiv 2012.09841), aMUSEd (arXiv 2401.01808), Meissonic (arXiv 2410.08261). Parameter names
are those of the published diffusers folder ``MeissonFlow/Meissonic/vqvae``, which fits the default sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.joint_blocks import require_shape
from softdimo_fast.models.protocol import Tokenizer
from softdimo_fast.models.quantize import nearest_codes

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MeissonicVqConfig:
    """Sizes of a :class:`MeissonicVq`, under the names of the published constructor.

    Attributes:
        in_channels, out_channels: of the images.
        block_out_channels: width of each level, from full resolution down; every level but the last halves.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: of the encoder's output and the decoder's input.
        vq_embed_dim: width of a code; None: latent_channels.
        num_vq_embeddings: V.
        norm_num_groups: of the group norms.
        down_block_types, up_block_types, act_fn, norm_type, mid_block_add_attention: other kinds than these
            are refused.
        sample_size, scaling_factor, lookup_from_codebook, force_upcast: of the published config; they change
            nothing here.
        token_grid: height and width (h, w) of the tokens of a sequence; no argument of the published
            constructor.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    latent_channels: int = 64
    vq_embed_dim: int | None = None
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    act_fn: str = "silu"
    norm_type: str = "group"
    mid_block_add_attention: bool = False
    sample_size: int = 512
    scaling_factor: float = 0.18215
    lookup_from_codebook: bool = True
    force_upcast: bool = False
    token_grid: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "in_channels", "out_channels", "layers_per_block", "latent_channels",
            "num_vq_embeddings", "norm_num_groups",
        ):  # fmt: skip
            _config.require_range(self, name, getattr(self, name), minimum=1)
        groups, levels = self.norm_num_groups, len(self.block_out_channels)
        down, up = self.down_block_types, self.up_block_types
        requirements: dict[str, tuple[bool, str]] = {
            "block_out_channels": (
                levels > 0 and all(n > 0 and n % groups == 0 for n in self.block_out_channels),
                f"positive multiples of norm_num_groups = {groups}, at least one",
            ),
            "down_block_types": (
                down in (None, ("DownEncoderBlock2D",) * levels),
                "DownEncoderBlock2D for every level",
            ),
            "up_block_types": (
                up in (None, ("UpDecoderBlock2D",) * levels), "UpDecoderBlock2D for every level"
            ),
            "act_fn": (self.act_fn == "silu", "'silu'"),
            "norm_type": (self.norm_type == "group", "'group'"),
            "mid_block_add_attention": (not self.mid_block_add_attention, "False"),
            "vq_embed_dim": (self.code_width > 0, "positive"),
            "token_grid": (min(self.token_grid) > 0, "positive numbers"),
        }  # fmt: skip
        for name, (holds, expected) in requirements.items():
            _config.require(holds, self, name, getattr(self, name), expected)

    @property
    def code_width(self) -> int:
        """D."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    @classmethod
    def from_published(cls, published: Mapping[str, Any], **own: Any) -> MeissonicVqConfig:
        """The sizes in a published ``config.json``; ``own`` is ``token_grid``.

        Raises:
            ConfigError: an unknown field, a value of another type, or one that is refused.
        """
        # _class_name, _diffusers_version, _name_or_path
        sizes = {name: value for name, value in published.items() if not name.startswith("_")}
        return _config.from_dict(cls, sizes | own)


class _Residual(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, added to the input."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=EPS)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv1(F.silu(self.norm1(x)))
        mixed = self.conv2(F.silu(self.norm2(mixed)))
        return mixed + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        # Padding at the bottom and on the right alone.
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class _Level(nn.Module):
    """Residual blocks at one resolution, then the step to the next; ``sampler`` is None where there is none.

    Args:
        name: of the list that holds the step: ``"downsamplers"`` or ``"upsamplers"``.
    """

    def __init__(
        self, width: int, out: int, blocks: int, groups: int, name: str, sampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _Residual(width if i == 0 else out, out, groups) for i in range(blocks)
        )
        self.step = name
        if sampler is not None:
            self.add_module(name, nn.ModuleList([sampler]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for layer in getattr(self, self.step, ()):
            x = layer(x)
        return x


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: MeissonicVqConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)], width, config.layers_per_block, groups, "downsamplers",
                _Down(width) if i + 1 < len(widths) else None,
            )
            for i, width in enumerate(widths)
        )  # fmt: skip
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        latent: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return latent


class _Decoder(nn.Module):
    def __init__(self, config: MeissonicVqConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            _Level(
                widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, "upsamplers",
                _Up(width) if i + 1 < len(widths) else None,
            )
            for i, width in enumerate(widths)
        )  # fmt: skip
        self.mid_block = _Middle(widths[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latent))
        for level in self.up_blocks:
            x = level(x)
        images: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return images


class _Codebook(nn.Module):
    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)


class MeissonicVq(Tokenizer):
    """One token for each 16 x 16 pixels (at the default sizes), in row-major order.

    :meth:`encode`, :meth:`decode_codes` and :meth:`decode` take and give images in [-1, 1], as every
    tokenizer of this package does. The checkpoint was trained on images in [0, 1]: that is the range of
    :meth:`encode_latent` and :meth:`decode_latent`. Nothing is clipped, and the published scaling factor is
    never applied.

    Tokens and codes may be given as grids, ``[B, h, w]`` and ``[B, h, w, D]``, of any size; sequences
    ``[B, L]`` and ``[B, L, D]`` have the grid of the config.
    """

    Config = MeissonicVqConfig

    def __init__(self, config: MeissonicVqConfig) -> None:
        super().__init__()
        self.config = config
        self.token_shape = (config.token_grid[0] * config.token_grid[1],)
        width = config.code_width
        self.encoder = _Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, width, 1)
        self.quantize = _Codebook(config.num_vq_embeddings, width)
        self.post_quant_conv = nn.Conv2d(width, config.latent_channels, 1)
        self.decoder = _Decoder(config)

    def encode_latent(self, images: Tensor) -> Tensor:
        """``[B, D, h, w]``, before quantisation, of images in [0, 1]."""
        latent: Tensor = self.quant_conv(self.encoder(images))
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Images in [0, 1] of code vectors ``[B, D, h, w]``, hard or expected; differentiable."""
        images: Tensor = self.decoder(self.post_quant_conv(latent))
        return images

    def encode(self, images: Tensor) -> Tensor:
        """int64 tokens ``[B, h w]`` of images in [-1, 1] of any size that the levels divide."""
        rows = self.encode_latent((images + 1) / 2).flatten(2).transpose(1, 2)
        return nearest_codes(rows, self.codebook)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def decode_codes(self, codes: Tensor, condition: Condition = None) -> Tensor:
        width = self.config.code_width
        if codes.dim() == 3:
            require_shape(self, "codes", codes, None, *self.token_shape, width)
            codes = codes.unflatten(1, self.config.token_grid)
        require_shape(self, "codes", codes, None, None, None, width)
        return 2 * self.decode_latent(codes.permute(0, 3, 1, 2)) - 1

    def decode(self, tokens: Tensor, condition: Condition = None) -> Tensor:
        return self.decode_codes(F.embedding(tokens, self.codebook))

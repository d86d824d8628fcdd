"""TA-TiTok-VQ, the text-aware one-dimensional image tokenizer of MaskGen.

Source: "Democratizing text-to-image masked generative models with compact text-aware one-dimensional tokens"
(arXiv 2501.07730). Parameter names are the published ones; ``tatitok_bl128_vq`` fits the default sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.models.class_token import SelfAttention
from softdimo_fast.models.conditions import Condition
from softdimo_fast.models.joint_blocks import require_shape, run_block
from softdimo_fast.models.protocol import Tokenizer
from softdimo_fast.models.quantize import nearest_codes
from softdimo_fast.models.text_conditions import TextCondition

CHANNELS = 3
# The published transformer sizes: width, layers, heads.
VIT_SIZES: Mapping[str, tuple[int, int, int]] = {
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """A transformer of the tokenizer.

    Attributes:
        width: of the rows.
        layers: blocks.
        heads: of each attention; the weights do not tell.
    """

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("width", "layers", "heads"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require(
            self.width % self.heads == 0, self, "heads", self.heads,
            f"a divisor of width = {self.width}",
        )  # fmt: skip

    @classmethod
    def published(cls, name: str) -> VitSize:
        """One of the published sizes."""
        _config.require_choice(cls, "name", name, VIT_SIZES)
        width, layers, heads = VIT_SIZES[name]
        return cls(width=width, layers=layers, heads=heads)


@dataclass(frozen=True, kw_only=True)
class TaTiTokConfig:
    """Sizes of a :class:`TaTiTok`, under the names of the published constructor where it has them.

    Attributes:
        codebook_size: V.
        token_size: width of a code.
        num_latent_tokens: tokens of an image.
        crop_size: height and width of the images.
        vit_enc_patch_size, vit_dec_patch_size: pixels of a patch, in each direction.
        encoder, decoder: the transformers; published by the names "base" and "large".
        text_context_length, text_embed_dim: tokens of the text, and their width.
        clustering_vq: whether a fresh module holds the buffer ``quantize.embed_prob`` of the codebook's
            training. Nothing here uses it; loading adds or drops it as the file has it.
    """

    codebook_size: int = 8192
    token_size: int = 64
    num_latent_tokens: int = 128
    crop_size: int = 256
    vit_enc_patch_size: int = 16
    vit_dec_patch_size: int = 16
    encoder: VitSize = VitSize(width=768, layers=12, heads=12)
    decoder: VitSize = VitSize(width=1024, layers=24, heads=16)
    text_context_length: int = 77
    text_embed_dim: int = 768
    clustering_vq: bool = True

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in (
            "codebook_size", "token_size", "num_latent_tokens", "crop_size", "vit_enc_patch_size",
            "vit_dec_patch_size", "text_context_length", "text_embed_dim",
        ):  # fmt: skip
            _config.require_range(self, name, getattr(self, name), minimum=1)
        for name in ("vit_enc_patch_size", "vit_dec_patch_size"):
            _config.require(
                self.crop_size % getattr(self, name) == 0, self, name, getattr(self, name),
                f"a divisor of crop_size = {self.crop_size}",
            )  # fmt: skip

    @classmethod
    def from_published(
        cls, published: Mapping[str, Any], *, vit_sizes: Mapping[str, Any] | None = None
    ) -> TaTiTokConfig:
        """The sizes in a published ``config.json``, or in a flat dict of the same names.

        Args:
            published: the nested dict, of which ``model.vq_model`` and the ``crop_size`` of
                ``dataset.preprocessing`` are read, or these as one flat dict. A key ``vit_sizes`` in it
                counts as the argument.
            vit_sizes: other transformers under the names of :data:`VIT_SIZES`, as dicts of width, layers
                and heads.

        Raises:
            ConfigError: a value is out of range, or the file describes another kind of tokenizer: continuous
                tokens, normalised codes, the legacy pixel head.
        """
        sizes = dict(vit_sizes or published.get("vit_sizes") or {})
        found = dict(published)
        if "model" in published:
            _config.require(
                "vq_model" in published["model"], cls, "model", sorted(published["model"]),
                "a dict with vq_model",
            )  # fmt: skip
            # Of these sections, settings of training and data are left alone.
            known = {*cls.__dataclass_fields__, *PUBLISHED_KINDS, *ENCODER_DECODER}
            # Where a file does not say, the published class takes the legacy form.
            found = {"is_legacy": True}
            found |= {k: v for k, v in published["model"]["vq_model"].items() if k in known}
            data = published.get("dataset", {}).get("preprocessing", {})
            found |= {k: v for k, v in data.items() if k == "crop_size"}
        for name in ("vit_sizes", "commitment_cost", "finetune_decoder"):
            found.pop(name, None)
        for name, kind in PUBLISHED_KINDS.items():
            value = found.pop(name, kind)
            _config.require(value == kind, cls, name, value, repr(kind))
        for name, role in ENCODER_DECODER.items():
            size = found.pop(name, None)
            if size in sizes:
                found[role] = sizes[size]
            elif size is not None:
                found[role] = _config.to_dict(VitSize.published(size))
        return _config.from_dict(cls, found)


# Published settings -> the only value that this tokenizer is.
PUBLISHED_KINDS: Mapping[str, Any] = {
    "quantize_mode": "vq", "use_l2_norm": False, "is_legacy": False
}  # fmt: skip
# Published settings -> the field of the config whose size they name.
ENCODER_DECODER: Mapping[str, str] = {
    "vit_enc_model_size": "encoder", "vit_dec_model_size": "decoder"
}  # fmt: skip


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return mixed


class _Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        mixed: Tensor = x + self.mlp(self.ln_2(x))
        return mixed


class _Vit(nn.Module):
    """What encoder and decoder share: a class row, patch rows, latent rows, blocks between two norms."""

    def __init__(self, size: VitSize, patches: int, latents: int) -> None:
        super().__init__()
        width = size.width
        self.checkpoint_blocks = False
        self.patches, self.latents = patches, latents
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(latents, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Block(width, size.heads) for _ in range(size.layers))
        self.ln_post = nn.LayerNorm(width)

    def run(self, patches: Tensor, latents: Tensor, *rest: Tensor) -> Tensor:
        """All rows after the blocks, of patch rows ``[B, P, D]`` and latent rows ``[B, N, D]``."""
        first = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        image = torch.cat([first, patches], dim=1) + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding
        rows: Tensor = self.ln_pre(torch.cat([image, latents, *rest], dim=1))
        for block in self.transformer:
            rows = run_block(block, self.checkpoint_blocks, rows)
        return rows


class _Encoder(_Vit):
    def __init__(self, config: TaTiTokConfig) -> None:
        patch, width = config.vit_enc_patch_size, config.encoder.width
        super().__init__(config.encoder, (config.crop_size // patch) ** 2, config.num_latent_tokens)
        self.patch_embed = nn.Conv2d(CHANNELS, width, patch, patch)
        self.conv_out = nn.Conv2d(width, config.token_size, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """``[B, N, token_size]`` of images in [0, 1]."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        latents = latent_tokens.expand(len(images), -1, -1).to(patches.dtype)
        rows = self.ln_post(self.run(patches, latents)[:, 1 + self.patches :])
        return F.linear(rows, self.conv_out.weight.flatten(1), self.conv_out.bias)


class _Decoder(_Vit):
    def __init__(self, config: TaTiTokConfig) -> None:
        patch, width = config.vit_dec_patch_size, config.decoder.width
        side = config.crop_size // patch
        super().__init__(config.decoder, side * side, config.num_latent_tokens)
        self.patch, self.side = patch, side
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.text_guidance_positional_embedding = nn.Parameter(
            torch.empty(config.text_context_length, width)
        )
        self.decoder_embed = nn.Linear(config.token_size, width)
        # A 1x1 convolution in the published file.
        self.ffn = nn.Sequential(nn.Conv2d(width, patch * patch * CHANNELS, 1))
        self.conv_out = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.text_guidance_proj = nn.Linear(config.text_embed_dim, width)

    def forward(self, codes: Tensor, text: Tensor) -> Tensor:
        """Images in [0, 1] of codes ``[B, N, token_size]`` and text ``[B, T, W]``."""
        latents = self.decoder_embed(codes)
        blank = self.mask_token.expand(len(codes), self.patches, -1).to(latents.dtype)
        guidance = self.text_guidance_proj(text) + self.text_guidance_positional_embedding
        rows = self.run(blank, latents, guidance)
        image: Tensor = self.conv_out(self.pixels(self.ln_post(rows[:, 1 : 1 + self.patches])))
        return image

    def pixels(self, rows: Tensor) -> Tensor:
        """``[B, 3, height, width]`` of patch rows: channels are (row, column, colour), colour fastest."""
        head = self.ffn[0]
        assert isinstance(head, nn.Conv2d)
        flat = F.linear(rows, head.weight.flatten(1), head.bias)
        parts = flat.unflatten(2, (self.patch, self.patch, CHANNELS))
        grid = parts.unflatten(1, (self.side, self.side))
        image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return image


class _Codebook(nn.Module):
    embed_prob: Tensor | None

    def __init__(self, config: TaTiTokConfig) -> None:
        super().__init__()
        self.register_buffer(
            "embed_prob", torch.zeros(config.codebook_size) if config.clustering_vq else None
        )
        self.embedding = nn.Embedding(config.codebook_size, config.token_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Published files hold ``embed_prob`` or do not; the buffer follows the file."""
        found: Tensor | None = state_dict.get(prefix + "embed_prob")
        if found is None:
            self.embed_prob = None
        elif self.embed_prob is None:
            self.embed_prob = torch.empty_like(found, device=self.embedding.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TaTiTok(Tokenizer):
    """Images as 128 tokens without a grid (at the default sizes); the decoder reads the text of the image.

    :meth:`encode`, :meth:`decode_codes` and :meth:`decode` take and give images in [-1, 1], as every
    tokenizer of this package does. The checkpoints were trained on images in [0, 1]: that is the range of
    :meth:`encode_latent` and :meth:`decode_latent`. Nothing is clamped.

    The condition of decoding is a :class:`TextCondition` with ``guidance``, or that tensor itself:
    ``[B, text_context_length, text_embed_dim]``. Other than MaskGen, which takes the text tower's penultimate
    block, the decoder takes the full tower after its final norm.
    """

    Config = TaTiTokConfig

    def __init__(self, config: TaTiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.token_shape = (config.num_latent_tokens,)
        self.latent_tokens = nn.Parameter(
            torch.empty(config.num_latent_tokens, config.encoder.width)
        )
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Codebook(config)
        self._initialize()

    def _initialize(self) -> None:
        """For training from nothing; a checkpoint replaces all of it."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)
            for name, parameter in part.named_parameters(recurse=False):
                if "embedding" in name or name in ("mask_token", "latent_tokens"):
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            if isinstance(part, SelfAttention):
                nn.init.xavier_uniform_(part.in_proj_weight)

    @property
    def checkpoint_blocks(self) -> bool:
        """Recompute each block in backward instead of keeping what is inside it."""
        return self.decoder.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool) -> None:
        self.encoder.checkpoint_blocks = self.decoder.checkpoint_blocks = value

    def encode_latent(self, images: Tensor) -> Tensor:
        """``[B, token_size, 1, N]``, before quantisation, of images ``[B, 3, side, side]`` in [0, 1]."""
        side = self.config.crop_size
        require_shape(self, "images", images, None, CHANNELS, side, side)
        latents: Tensor = self.encoder(images, self.latent_tokens)
        return latents.transpose(1, 2)[:, :, None]

    def decode_latent(self, latent: Tensor, condition: Condition) -> Tensor:
        """Images in [0, 1] of code vectors ``[B, token_size, 1, N]``, hard or expected; differentiable."""
        config = self.config
        require_shape(self, "latent", latent, None, config.token_size, 1, config.num_latent_tokens)
        text = condition.guidance if isinstance(condition, TextCondition) else condition
        if not isinstance(text, Tensor):
            raise TypeError(
                "TaTiTok: decoding needs the text: condition must be a TextCondition with guidance, or "
                f"that tensor, got {type(text).__name__}"
            )
        require_shape(
            self, "guidance", text, len(latent), config.text_context_length, config.text_embed_dim
        )
        image: Tensor = self.decoder(latent[:, :, 0].transpose(1, 2), text)
        return image

    def encode(self, images: Tensor) -> Tensor:
        latent = self.encode_latent((images + 1) / 2)
        return nearest_codes(latent[:, :, 0].transpose(1, 2), self.codebook)

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def decode_codes(self, codes: Tensor, condition: Condition = None) -> Tensor:
        return 2 * self.decode_latent(codes.transpose(1, 2)[:, :, None], condition) - 1

    def decode(self, tokens: Tensor, condition: Condition = None) -> Tensor:
        return self.decode_codes(F.embedding(tokens, self.codebook), condition)

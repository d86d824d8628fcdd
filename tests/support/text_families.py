"""Small text-to-image models with weights far from special values, conditions, published key lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softdimo_fast.models.maskgen import MaskGenConfig, MaskGenTransformer
from softdimo_fast.models.meissonic import MeissonicConfig, MeissonicTransformer
from softdimo_fast.models.meissonic_vq import MeissonicVq, MeissonicVqConfig
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.tatitok import TaTiTok, TaTiTokConfig, VitSize
from softdimo_fast.models.text_conditions import MeissonicCondition, TextCondition

KEY_LISTS = Path(__file__).parents[2].parent / "shared" / "design" / "checkpoints"
BATCH, TEXT = 3, 5

# The tokens of MaskGen are those of TA-TiTok, the tokens of Meissonic those of its VQ.
MASKGEN = MaskGenConfig(
    codebook_size=11, num_latent_tokens=6, text_embed_dim=10, condition_num_classes=3,
    decoder_embed_dim=12, decoder_depth=3, decoder_num_heads=3, micro_condition_embed_dim=8,
)  # fmt: skip
TATITOK = TaTiTokConfig(
    codebook_size=11, token_size=4, num_latent_tokens=6, crop_size=12, vit_enc_patch_size=4,
    vit_dec_patch_size=6, text_context_length=TEXT, text_embed_dim=10,
    encoder=VitSize(width=12, layers=2, heads=3), decoder=VitSize(width=16, layers=2, heads=2),
)  # fmt: skip
MEISSONIC = MeissonicConfig(
    num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=10, pooled_projection_dim=16, axes_dims_rope=(2, 4, 2), vocab_size=17,
    codebook_size=13, token_grid=(4, 6),
)  # fmt: skip
MEISSONIC_VQ = MeissonicVqConfig(
    block_out_channels=(4, 6, 8), layers_per_block=1, latent_channels=5, vq_embed_dim=3,
    num_vq_embeddings=13, norm_num_groups=2, token_grid=(4, 6),
)  # fmt: skip


def perturbed(build: Callable[[], Any], *, scale: float = 0.2) -> Any:
    """A model in which no bias is 0 and no norm the identity."""
    with seeded(0):
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def maskgen(config: MaskGenConfig = MASKGEN) -> MaskGenTransformer:
    model: MaskGenTransformer = perturbed(lambda: MaskGenTransformer(config))
    return model


def tatitok(config: TaTiTokConfig = TATITOK) -> TaTiTok:
    model: TaTiTok = perturbed(lambda: TaTiTok(config))
    return model


def meissonic(config: MeissonicConfig = MEISSONIC) -> MeissonicTransformer:
    model: MeissonicTransformer = perturbed(lambda: MeissonicTransformer(config))
    return model


def meissonic_vq(config: MeissonicVqConfig = MEISSONIC_VQ) -> MeissonicVq:
    model: MeissonicVq = perturbed(lambda: MeissonicVq(config))
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_condition(batch: int = BATCH, **options: Any) -> TextCondition:
    width = MASKGEN.text_embed_dim
    return TextCondition.of(
        normal(batch, TEXT, width, seed=1), normal(batch, width, seed=2),
        **{
            "score": torch.linspace(4, 7, batch), "null_text": normal(TEXT, width, seed=3),
            "null_pooled": normal(width, seed=4), "guidance": normal(batch, TEXT, width, seed=5),
        } | options,
    )  # fmt: skip


def meissonic_condition(batch: int = BATCH, **options: Any) -> MeissonicCondition:
    text, pooled = MEISSONIC.joint_attention_dim, MEISSONIC.pooled_projection_dim
    return MeissonicCondition.of(
        normal(batch, TEXT, text, seed=1), normal(batch, pooled, seed=2),
        **{
            "null_text": normal(TEXT, text, seed=3), "null_pooled": normal(pooled, seed=4),
        } | options,
    )  # fmt: skip


# Family -> a small model and a condition of some samples.
TRANSFORMERS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "maskgen": (maskgen, text_condition),
    "meissonic": (meissonic, meissonic_condition),
}


def tokens_of(model: Any, *, masks: bool = True, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(model.vocabulary, (batch, *model.token_shape), generator=generator)
    if masks:
        hidden = torch.rand(codes.shape, generator=generator) < 0.4
        codes = model.masked_tokens(codes, hidden)
    return codes


def published_keys(name: str) -> dict[str, Tensor]:
    """A published state dict on the meta device; skips where the lists are not at hand."""
    path = KEY_LISTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no key lists of the published checkpoints in {KEY_LISTS}")
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in json.loads(path.read_text()).items()
    }


def assert_round_trip(
    build: Callable[[], nn.Module], published: dict[str, Tensor], *tied: str
) -> None:
    """A full-size model takes the published state dict strictly and gives it back, less ``tied`` copies."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict(published, strict=True, assign=True)
    returned = model.state_dict()
    assert returned.keys() == published.keys() - set(tied)
    for key, tensor in returned.items():
        assert (tensor.shape, tensor.dtype) == (published[key].shape, published[key].dtype), key


class Sizes(TorchDispatchMode):
    """The operators run within it, and the shapes of all that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        self.shapes += [tuple(t.shape) for t in _tensors(result)]
        return result


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return (
        [t for part in result for t in _tensors(part)] if isinstance(result, tuple | list) else []
    )

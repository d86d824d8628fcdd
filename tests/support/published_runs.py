"""Tiny published teachers on the disk, with tokenizers, tokens and prompts, and the recipes' runs on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.data.token_file import TokenFileWriter
from softdimo_fast.models import build, save_pretrained
from softdimo_fast.models.text_conditions import MeissonicCondition, TextCondition
from softdimo_fast.recipes import recipe
from softdimo_fast.recipes.published_models import classes_of
from support.published import SIZES

RECIPES = ("maskgit", "maskbit", "maskgen_l", "maskgen_xl", "meissonic")
TEXT_RECIPES = RECIPES[2:]
FAMILY = {
    "maskgit": "maskgit", "maskbit": "maskbit", "maskgen_l": "maskgen_vq",
    "maskgen_xl": "maskgen_vq", "meissonic": "meissonic",
}  # fmt: skip
TOKENIZER = {
    "maskgit": "maskgit_vqgan", "maskbit": "maskbit_tokenizer", "maskgen_vq": "tatitok_vq",
    "meissonic": "meissonic_vqvae",
}  # fmt: skip
PROMPTS = ("a red cat", "two boats", "the sea")
TEXT, WIDTH = 5, 12  # of the tiny text encoders
IMAGES = 6

# What the sizes of the families lack to fit each other.
MATCH: dict[str, dict[str, Any]] = {
    "maskgit": {"codebook_size": 20},
    "maskgit_vqgan": {
        "ddconfig": {
            "z_channels": 8, "resolution": 4, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
            "attn_resolutions": [2],
        }
    },
    "maskbit_tokenizer": {"img_size": 4},
    "meissonic": {"token_grid": [4, 4]},
    "meissonic_vqvae": {"token_grid": [4, 4]},
}  # fmt: skip


def tiny_model(family: str, *, seed: int = 0, **sizes: Any) -> Any:
    """Every weight moved away from where it was initialised, so that nothing is 0 or the identity."""
    model = build(family, copy.deepcopy(SIZES[family]) | MATCH.get(family, {}) | sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def features(texts: Sequence[str], *shape: int) -> Tensor:
    """Numbers that depend on each text alone, ``[B, *shape]``."""
    rows = []
    for text in texts:
        seed = int.from_bytes(text.encode()[:7].ljust(7, b"."), "big")
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


def maskgen_encoder(texts: Sequence[str]) -> TextCondition:
    """A text encoder without a network."""
    return TextCondition.of(
        features(texts, TEXT, WIDTH), features(texts, WIDTH),
        null_text=features([""], TEXT, WIDTH), null_pooled=features([""], WIDTH),
        guidance=features(texts, TEXT, WIDTH),
    )  # fmt: skip


def meissonic_encoder(texts: Sequence[str]) -> MeissonicCondition:
    """Another."""
    return MeissonicCondition.of(
        features(texts, TEXT, WIDTH), features(texts, 32),
        null_text=features(["bad"], TEXT, WIDTH), null_pooled=features(["bad"], 32),
    )  # fmt: skip


ENCODERS = {"maskgen_vq": maskgen_encoder, "meissonic": meissonic_encoder}


def brightness(images: Tensor, condition: Any) -> Tensor:
    """A reward."""
    return images.flatten(1).mean(1)


@dataclass(frozen=True)
class Files:
    """A family's files.

    Attributes:
        settings: that name them, for ``--set``.
    """

    root: Path
    family: str

    @property
    def encoder(self) -> Any:
        return ENCODERS.get(self.family)

    @property
    def settings(self) -> list[str]:
        names = {"teacher": "teacher", "tokenizer": "tokenizer", "real_tokens": "real.sdt"}
        paths = [f"{name}={self.root / file}" for name, file in names.items()]
        return [*paths, f"text.prompts={self.root / 'prompts.txt'}"]


def write_files(root: Path, family: str) -> Files:
    """Teacher, tokenizer, prompts and real tokens of a family in ``root``."""
    root.mkdir(exist_ok=True)
    teacher, tokenizer = tiny_model(family), tiny_model(TOKENIZER[family], seed=1)
    save_pretrained(teacher, root / "teacher")
    save_pretrained(tokenizer, root / "tokenizer")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    classes = classes_of(teacher) or len(PROMPTS)
    with TokenFileWriter(
        root / "real.sdt", vocabulary=teacher.vocabulary, token_shape=teacher.token_shape,
        classes=classes,
    ) as writer:  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(
            teacher.vocabulary, (IMAGES, *teacher.token_shape), generator=generator
        )
        writer.append(tokens, torch.arange(IMAGES) % classes)
    return Files(root, family)


def tiny_run(name: str, method: str, files: Files, *changes: str) -> Any:
    """A recipe's run, on the CPU, of two steps."""
    settings = [*files.settings]
    if method != "tteo":
        settings += [
            "trainer.device=cpu", "trainer.steps=2", "trainer.batch_size=4",
            "trainer.accumulation=2", "trainer.checkpoint_every=1", "trainer.autocast=none",
        ]  # fmt: skip
    else:
        settings = [s for s in settings if not s.startswith(("teacher", "real_tokens"))]
        settings += ["device=cpu", "samples=3", "search.candidates=2", "search.iterations=2"]
    settings += ["bits=8"] if files.family == "maskbit" else []
    if method == "adversarial_longer":
        settings += ["start=none", "generator.warmup_steps=1"]
    return _config.override(recipe(name, method), [*settings, *changes])

"""Tiny CLIP models in folders, as transformers and open_clip write them; no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softdimo_fast.models.text_encoders import ClipText, TextFeatures

CONTEXT, WIDTH, POOLED, LAYERS, HEADS = 12, 32, 24, 3, 2
IMAGE, PATCH = 32, 8
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_letters() -> list[str]:
    """The printable letters that stand for the 256 bytes in a byte-level encoding (as GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_byte_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer without merges: a token is a byte, or the last one of a word."""
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    return _write_tokenizer(folder, {word: i for i, word in enumerate(words)}, [])


def write_published_tokenizer(folder: Path) -> Path:
    """CLIP's own byte-pair encoding, from the copy in open_clip."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    vocabulary = {
        {"<start_of_text>": START, "<end_of_text>": END}.get(word, word): number
        for word, number in tokenizer.encoder.items()
    }
    return _write_tokenizer(folder, vocabulary, [" ".join(pair) for pair in merges])


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
                "model_max_length": CONTEXT,
            }
        )
    )
    return folder


def transformers_clip(folder: Path, *, seed: int = 0, vocabulary: int = 514) -> Any:
    """A tiny ``CLIPModel``, saved in ``folder`` without a tokenizer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokens = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 1}
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "hidden_act": "quick_gelu",
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={
            **shape, **tokens, "vocab_size": vocabulary, "max_position_embeddings": CONTEXT,
            "projection_dim": POOLED,
        },
        vision_config={
            **shape, "image_size": IMAGE, "patch_size": PATCH, "projection_dim": POOLED
        },
        projection_dim=POOLED,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config).eval()
        for parameter in model.parameters():  # biases and norms are no longer 0 and 1
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": POOLED,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS,
        "head_width": WIDTH // HEADS,
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": HEADS,
        "layers": LAYERS,
    },
}  # fmt: skip


def open_clip_model(folder: Path, *, seed: int = 0) -> Any:
    """A tiny open_clip ``CLIP``, saved in ``folder`` as open_clip's hub repositories are."""
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**OPEN_CLIP_CONFIG).eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_CONFIG}))
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return model


class ByteTower(ClipText):
    """A text tower of the tests' own, for what stands around towers: tokens are bytes, features are sums."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(256, WIDTH), self._bytes)
        self.calls: list[list[str]] = []
        generator = torch.Generator().manual_seed(0)
        model: Any = self.model
        model.weight.data = torch.randn(256, WIDTH, generator=generator)

    def _bytes(self, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        return torch.tensor([[*p.encode()[:CONTEXT].ljust(CONTEXT, b"\0")] for p in prompts])

    def features(self, ids: Tensor) -> TextFeatures:
        rows = self.model(ids)
        return TextFeatures(rows, rows.cumsum(1), rows.sum(1))

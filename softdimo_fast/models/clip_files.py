"""CLIP models from local folders, through transformers or open_clip: both are optional packages.

Nothing here reaches for the network, unless a hub id is given instead of a path. A file that is missing, or a
weight that is missing in a file, is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softdimo_fast.models.files import ModelFileError, _tensors
from softdimo_fast.models.hub import download

Library = Literal["transformers", "open_clip"]
# Prompts -> token ids, int64 [B, T].
Tokenize = Callable[[Sequence[str]], Tensor]

EXTRA = 'pip install "softdimo-fast[rewards]"'
OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def local_path(source: str | Path, revision: str | None = None) -> Path:
    """``source``, or the copy of what it names on the hub, if there is no such path.

    Args:
        source: a path, or a hub id ``owner/name`` or ``owner/name/path``.
        revision: of the repository; name a commit, so that tomorrow's files are today's.

    Raises:
        FileNotFoundError: there is no such path, and it is no hub id or the hub does not give it.
        ImportError: a hub id without the hub extra.
    """
    path = Path(source)
    if path.exists():
        return path
    # Of a whole pipeline, the text encoder and its tokenizer.
    wanted, unwanted = ["*.safetensors", "*.bin", "*.json", "*.txt"], ["transformer/*", "vqvae/*"]
    return download(str(source), revision, wanted=wanted, unwanted=unwanted)


def library_of(path: Path) -> Library:
    """Which library's files these are; transformers' where both lie in a folder.

    Raises:
        FileNotFoundError: they are neither's.
    """
    if path.is_file():
        return "open_clip"
    if (path / "config.json").exists():
        return "transformers"
    if (path / OPEN_CLIP_CONFIG).exists():
        return "open_clip"
    raise FileNotFoundError(
        f"{path} holds no CLIP model: config.json (transformers) or {OPEN_CLIP_CONFIG} is missing"
    )


# ---------------------------------------------------------------------------------------------------
# transformers


def load_transformers(kind: str, folder: Path, **config: Any) -> Any:
    """The model in a transformers folder, float32 on the CPU, frozen.

    Args:
        kind: of transformers' classes, ``CLIPModel`` or ``CLIPTextModelWithProjection``; the latter takes
            its part of a whole model's file.
        folder: with ``config.json`` and the weights.
        config: settings that replace the folder's.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: a file is missing.
        ModelFileError: the file lacks weights, or holds some of another shape.
    """
    transformers = _import("transformers")
    _require(folder, ("config.json",))
    _require_one(folder, TRANSFORMERS_WEIGHTS)
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()  # it lists the other tower's weights; what is missing is told below
    try:
        # The class is named, and no code comes from the folder.
        model, found = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **config
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelFileError(f"{folder} is no {kind}: {error}") from error
    finally:
        log.set_verbosity(verbosity)
    missing = sorted(str(key) for key in found["missing_keys"] if "position_ids" not in key)
    if missing or found["mismatched_keys"]:
        raise ModelFileError(
            f"{folder} does not fit {kind}: missing {missing[:5]}, of another shape "
            f"{sorted(map(str, found['mismatched_keys']))[:5]}"
        )
    return frozen(model.float())


def transformers_tokenizer(folder: Path, length: int, *, pad: int | None = None) -> Tokenize:
    """The CLIP tokenizer in a transformers folder.

    Args:
        folder: with ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.
        length: T; longer texts are cut, and keep their end token.
        pad: the id behind the end token; None: the tokenizer's own. With a causal tower it changes the rows
            behind the end, which joint attention reads, and never the pooled output.

    Raises:
        ImportError, FileNotFoundError: the package or a file is missing.
    """
    transformers = _import("transformers")
    _require(
        folder,
        TOKENIZER_FILES[:1] if (folder / TOKENIZER_FILES[0]).exists() else TOKENIZER_FILES[1:],
    )
    kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    tokenizer = kind.from_pretrained(folder, local_files_only=True)
    filling = tokenizer.pad_token_id if pad is None else pad

    def tokenize(prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(prompts), truncation=True, max_length=length)["input_ids"]
        return torch.tensor([row + [filling] * (length - len(row)) for row in ids])

    return tokenize


# ---------------------------------------------------------------------------------------------------
# open_clip


def load_open_clip(
    source: Path, architecture: str, *, text_only: bool = False, quick_gelu: bool | None = None
) -> Any:
    """The model in an open_clip folder or file, float32 on the CPU, frozen.

    Args:
        source: a folder with ``open_clip_config.json`` and the weights, or a file of weights (a state dict,
            or a dict that holds one as ``state_dict``).
        architecture: open_clip's name of what a file holds; a folder says it itself.
        text_only: without the image tower.
        quick_gelu: the activation is OpenAI's approximation; None: as the architecture says.

    Raises:
        ImportError: open_clip is missing.
        FileNotFoundError: a file is missing.
        ModelFileError: the file is damaged, or its keys or shapes are others.
    """
    open_clip = _import("open_clip")
    if source.is_dir():
        _require(source, (OPEN_CLIP_CONFIG,))
        config = json.loads((source / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        file = _require_one(source, OPEN_CLIP_WEIGHTS)
    else:
        config, file = open_clip.get_model_config(architecture), source
        if config is None:
            raise ValueError(f"open_clip knows no architecture {architecture!r}")
    if quick_gelu is not None:
        config = {**config, "quick_gelu": quick_gelu}
    text = config.get("text_cfg", {})
    if config.get("custom_text") or "hf_model_name" in text:
        raise ModelFileError(f"{source} is no plain CLIP model: its text tower is another")
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
        model = open_clip.CLIP(**config)
    tensors = _tensors(file)
    tensors = dict(tensors.get("state_dict", tensors))
    if text_only:
        del model.visual
        tensors = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ModelFileError(f"{file} does not fit its architecture: {error}") from error
    return frozen(model.float())


def open_clip_tokenizer(length: int) -> Tokenize:
    """The byte-pair encoding that open_clip brings along: texts are cleaned first, zeros follow the end."""
    tokenizer = _import("open_clip").SimpleTokenizer(context_length=length)
    return lambda prompts: tokenizer(list(prompts)).long()


# ---------------------------------------------------------------------------------------------------


def frozen(model: nn.Module) -> nn.Module:
    """``model`` in eval mode, without gradients of its own."""
    return model.requires_grad_(False).eval()


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"CLIP models need {name}, which cannot be imported ({error}): {EXTRA}"
        ) from error


def _require(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing")


def _require_one(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no weights: one of {', '.join(names)} is missing")

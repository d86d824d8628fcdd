"""Model files: our own folders (safetensors and JSON), and the published checkpoints as they are.

    FOLDER/model.safetensors    weights under the published keys
    FOLDER/model.json           family, sizes, sha256 of the weights, and of the file they came from

Published files are read without executing anything (``weights_only``), and strictly: a key that is missing,
unknown or of another shape is an error that lists keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast._files import write_atomically
from softdimo_fast._version import __version__
from softdimo_fast.models.hub import download
from softdimo_fast.models.registry import build, describe, rebuild

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
CONFIG = "config.json"  # beside published weights
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth", "*.ckpt")
HUB_FILES = (*WEIGHT_FILES, "*.json")
# The folders of a diffusers pipeline that hold models of ours.
PIPELINE_FOLDERS = ("transformer", "vqvae")


class ModelFileError(RuntimeError):
    """A model file is damaged, or is not what it was taken for."""


@dataclass(frozen=True)
class _Layout:
    """How a family's published file differs from a plain state dict.

    Attributes:
        marks: keys that no other family has, by which it is known.
        wrapper: the entry that holds the state dict, in files that have more.
        dropped: prefixes of keys that belong to training alone.
        renamed: old prefixes -> new ones.
    """

    marks: tuple[str, ...]
    wrapper: str | None = None
    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    "maskgit": _Layout(("tok_emb.weight", "first_layer.6.weight"), wrapper="model_state_dict"),
    "maskgit_vqgan": _Layout(
        ("quant_conv.weight", "decoder.mid.block_1.norm1.weight"),
        wrapper="state_dict",
        dropped=("loss.",),
    ),
    "maskbit": _Layout(
        ("input_proj.weight", "prediction_layer.weight"), renamed={"token_emb.": "input_proj."}
    ),
    "maskbit_tokenizer": _Layout(("quantize.codebook", "quantize.bits_to_indices")),
    "maskgen_vq": _Layout(("text_embed_proj.weight", "cond_pooled_proj.weight")),
    "tatitok_vq": _Layout(("decoder.text_guidance_proj.weight", "decoder.ffn.0.weight")),
    "meissonic": _Layout(("mlm_layer.conv1.weight", "encoder_proj_layer_norm.weight")),
    "meissonic_vqvae": _Layout(("quant_conv.weight", "decoder.mid_block.resnets.0.norm1.weight")),
}


# Families whose published folders hold their sizes in a config.json.
CONFIGURED = ("maskgen_vq", "tatitok_vq", "meissonic", "meissonic_vqvae")


# ---------------------------------------------------------------------------------------------------
# reading


def from_pretrained(
    source: str | Path,
    *,
    family: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Any:
    """The model in a folder of ours, in a published file or folder, or in a repository of the hub.

    Args:
        source: a path; if there is no such path, a hub id ``owner/name`` or, for a folder or file in the
            repository, ``owner/name/path`` (needs the ``hub`` extra).
        family: of a published file; None tells it by its keys.
        sizes: of a published file, under the published constructor's names; None takes them from a
            ``config.json`` beside it, else the published model's, as far as shapes do not say otherwise.
        revision: of a hub repository; name a commit, so that tomorrow's file is today's.

    Returns:
        The model in eval mode, float32, on the CPU.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ModelFileError: a file is damaged, of an unknown family, or does not fit the sizes.
        ConfigError: the sizes are wrong.
        ImportError: a hub id without the hub extra.
    """
    return read_pretrained(source, family=family, sizes=sizes, revision=revision)[0]


def read_pretrained(
    source: str | Path,
    *,
    family: str | None = None,
    sizes: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[Any, Path]:
    """The model of :func:`from_pretrained`, and the weight file that it was read from."""
    path = Path(source)
    if not path.exists():
        # Not what lies deeper: a folder's model is in the folder itself.
        path = download(str(source), revision, wanted=HUB_FILES, unwanted=["*/*"])
    if (path / DESCRIPTION).exists():
        return _read_own(path), path / WEIGHTS
    config = None
    if path.is_dir():
        config = _read_config(path / CONFIG) if (path / CONFIG).exists() else None
        path = _weight_file(path)
    tensors = _tensors(path)
    family = family or _family_of(path, tensors)
    tensors = _clean(family, tensors)
    sizes = sizes if sizes is not None else (config or _published_sizes(path, family, tensors))
    return _filled(build(family, sizes), tensors, path), path


def _read_own(folder: Path) -> Any:
    weights = folder / WEIGHTS
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        expected = description["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{folder / DESCRIPTION} is damaged ({error!r})") from error
    found = sha256(weights)
    if found != expected:
        raise ModelFileError(
            f"{weights} is damaged: its sha256 is {found}, {DESCRIPTION} says {expected}"
        )
    return _filled(rebuild(description), _tensors(weights), weights)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{file} must be a JSON object of sizes: {error}") from error
    if not isinstance(config, dict):
        raise ModelFileError(f"{file} must be a JSON object of sizes, got {type(config).__name__}")
    return config


def _weight_file(folder: Path) -> Path:
    """The one file with weights; safetensors where there is a choice of forms."""
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ModelFileError(f"{folder} holds several weight files ({names}): name one")
    lack = f"from_pretrained: {folder} holds no weights ({', '.join(WEIGHT_FILES)})"
    if (folder / "model_index.json").exists() or any(
        (folder / name).is_dir() for name in PIPELINE_FOLDERS
    ):
        names = " or ".join(f"{name}/" for name in PIPELINE_FOLDERS)
        lack += f"; of a diffusers pipeline name the subfolder, {names}"
    raise FileNotFoundError(lack)


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what the unpickler refuses to execute comes as its own error class
        raise ModelFileError(f"{path} is no file of plain tensors: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ModelFileError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)


def _unwrapped(tensors: dict[str, Any], wrapper: str | None) -> dict[str, Any]:
    inner = tensors.get(wrapper) if wrapper is not None else None
    return dict(inner) if isinstance(inner, Mapping) else tensors


def _family_of(path: Path, tensors: dict[str, Any]) -> str:
    for family, layout in LAYOUTS.items():
        keys = _clean(family, tensors)
        if all(mark in keys for mark in layout.marks):
            return family
    some = ", ".join(list(tensors)[:5])
    raise ModelFileError(
        f"{path} is of no family that is known ({', '.join(LAYOUTS)}); its keys begin with {some}"
    )


def _clean(family: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The state dict of a published file: unwrapped, renamed, without what only training needs."""
    _config.require_choice("from_pretrained", "family", family, tuple(LAYOUTS))
    layout = LAYOUTS[family]
    cleaned = {}
    for key, value in _unwrapped(tensors, layout.wrapper).items():
        if key.startswith(layout.dropped) and layout.dropped:
            continue
        for old, new in layout.renamed.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        cleaned[key] = value
    return cleaned


def _published_sizes(path: Path, family: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What differs between the published models of a family and can be read off the shapes."""

    def require(there: bool, expected: str) -> None:
        if not there:
            some = ", ".join(list(tensors)[:5])
            raise ModelFileError(
                f"{path} is no file of {family}: expected {expected}; its keys begin with {some}"
            )

    def shape(key: str) -> tuple[int, int]:
        tensor = tensors.get(key)
        require(isinstance(tensor, Tensor) and tensor.ndim == 2, f"a matrix {key}")
        rows, columns = tensors[key].shape
        return rows, columns

    if family == "maskbit":
        return {"codebook_size": 2 ** shape("input_proj.weight")[1]}
    if family == "maskbit_tokenizer":
        codes, bits = shape("quantize.codebook")
        return {"config": {"codebook_size": codes, "token_size": bits}}
    if family == "maskgen_vq":
        width = shape("embeddings.weight")[1]
        blocks = {key.split(".")[1] for key in tensors if re.match(r"blocks\.\d+\.", key)}
        require(bool(blocks), "keys blocks.0 and on")
        return {"decoder_embed_dim": width, "decoder_depth": len(blocks)}
    return {}


def _filled(model: Any, tensors: Mapping[str, Any], path: Path) -> Any:
    """``model`` with exactly these weights."""
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ModelFileError(
            f"{path} does not fit {type(model).__name__} of these sizes: {error}"
        ) from error
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# writing


def save_pretrained(model: nn.Module, folder: str | Path, *, source: Path | None = None) -> Path:
    """Writes a model to ``folder``, whole or not at all.

    Args:
        model: of a known family.
        folder: must not hold a model yet.
        source: the file it came from: its name and sha256 are recorded.

    Raises:
        FileExistsError: ``folder`` holds something already.
        OSError: it cannot be written; nothing is left behind.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"save_pretrained: {folder} holds something already")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        document = {
            **describe(model),
            "sha256": sha256(unfinished / WEIGHTS),
            "softdimo_fast": __version__,
        }
        if source is not None:
            document["source"] = {"file": source.name, "sha256": sha256(source)}
        write_atomically(unfinished / DESCRIPTION, json.dumps(document, indent=1).encode())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def save_published(model: nn.Module, path: str | Path) -> Path:
    """Writes the weights as the published file has them: wrapped, under its keys, by its ending.

    A ``.safetensors`` of a family that is published with a ``config.json`` gets one beside it, unless there
    is one already: :func:`from_pretrained` reads their folder.

    Raises:
        FileExistsError: there is something at ``path`` already.
        ValueError: its ending is none of a weight file's.
        OSError: it cannot be written; nothing is left behind.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"save_published: {path} exists already")
    description = describe(model)
    family = description["family"]
    layout = LAYOUTS.get(family, _Layout(()))
    tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        tied = dict(getattr(model, "TIED_KEYS", {}))
        write_atomically(path, save(tensors, metadata={"format": "pt", **tied}))
        config = path.with_name(CONFIG)
        if family in CONFIGURED and not config.exists():
            write_atomically(config, json.dumps(description["config"], indent=1).encode())
        return path
    if path.suffix not in (".pth", ".bin", ".ckpt", ".pt"):
        raise ValueError(
            f"save_published: path must end in .safetensors, .pth, .bin or .ckpt, got {path}"
        )
    for copy, original in getattr(model, "TIED_KEYS", {}).items():
        tensors[copy] = tensors[original]
    content: dict[str, Any] = tensors if layout.wrapper is None else {layout.wrapper: tensors}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The files of one checkpoint: how they are written, and how each is verified before it is believed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from softdimo_fast._config import JSON
from softdimo_fast._version import __version__

FORMAT = 1
_MAX_JSON = 2**28  # bytes; a longer one is not ours
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors|state\.json|config\.json")


class DamageError(Exception):
    """Why a checkpoint cannot be written or used."""


def write_files(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, JSON]],
) -> None:
    """Writes everything into an empty folder and brings it to the disk.

    Raises:
        DamageError: a value cannot be saved.
        OSError, SafetensorError: a file cannot be written.
    """
    from safetensors.torch import save_file

    for name, group in tensors.items():
        if not _GROUP.fullmatch(name):
            raise DamageError(f"tensors cannot be called {name!r}: letters, digits, _ and - only")
        try:
            save_file(_separate(name, group), folder / f"{name}.safetensors")
        except (TypeError, ValueError, KeyError) as error:  # a dtype that safetensors has not
            raise DamageError(f"{name}: {error}") from error
    for name, document in documents.items():
        _require_json(document, name)
        _write_json(folder / f"{name}.json", document)
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        "format": FORMAT,
        "softdimo_fast": __version__,
        "torch": torch.__version__,
        "step": step,
        "files": files,
    }
    _write_json(folder / "manifest.json", {**manifest, "digest": _manifest_digest(manifest)})
    sync(folder / "manifest.json")
    sync(folder)


def _separate(name: str, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory: what safetensors can write."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in group.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = f"{tensor.layout} on {tensor.device}"
            raise DamageError(f"{name}: {key!r} must be a dense tensor with values, it is {kind}")
        dense = tensor.detach().cpu().contiguous()
        memory = dense.untyped_storage().data_ptr()
        if memory in seen or dense.is_conj() or dense.is_neg():
            dense = dense.resolve_conj().resolve_neg().clone()
        seen.add(memory)
        separate[key] = dense
    return separate


def _require_json(value: object, where: str) -> None:
    """Refuses what would come back as something else, such as NaN or a key that is a number."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DamageError(f"{where}: keys must be text, got {key!r}")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_json(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, bool | int | str | float)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise DamageError(f"{where}: must be a value that JSON has, got {value!r}")


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_files(
    path: Path, step: int, groups: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]], tuple[str, ...]]:
    """The groups of tensors, and the documents "state" and "config", of the checkpoint in ``path``.

    Args:
        groups: the names of those to read; None reads all. Of the others the size alone is verified.

    Returns:
        The groups that were read, the documents, and the names of all groups there are.

    Raises:
        DamageError: anything is not as it was written.
    """
    from safetensors.torch import load_file

    tensors, documents, names = {}, {}, []
    for name, (size, digest) in _read_manifest(path, step).items():
        file = path / name
        there = _regular_size(file)
        if there != size:
            raise DamageError(f"{name} has {there} bytes, {size} were written")
        if file.suffix != ".json":
            names.append(file.stem)
            if groups is not None and file.stem not in groups:
                continue
        if _sha256(file) != digest:
            raise DamageError(f"{name} is not what was written: its sha256 differs")
        if file.suffix == ".json":
            documents[file.stem] = _read_json(file)
            continue
        try:
            tensors[file.stem] = load_file(file)
        except Exception as error:  # whatever a made-up file brings the reader to raise
            raise DamageError(f"{name}: {type(error).__name__}: {error}") from error
    return tensors, documents, tuple(names)


def _read_manifest(path: Path, step: int) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file; names that could lead out of the folder do not pass."""
    manifest = _read_json(path / "manifest.json")
    version = manifest.get("format")
    if version != FORMAT:
        raise DamageError(f"manifest.json has format {version!r}, this version reads {FORMAT}")
    digest = manifest.pop("digest", None)
    try:
        intact = digest == _manifest_digest(manifest)
    except RecursionError:  # made up: the writer takes less depth than the reader
        intact = False
    if not intact or manifest.get("step") != step:
        raise DamageError("manifest.json is not what was written")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"state.json", "config.json"} <= set(files):
        raise DamageError("manifest.json does not list state.json and config.json")
    found = {}
    for name, entry in files.items():
        size = entry.get("size") if isinstance(entry, dict) else None
        sha256 = entry.get("sha256") if isinstance(entry, dict) else None
        if not _FILE.fullmatch(name) or type(size) is not int or not isinstance(sha256, str):
            raise DamageError(
                f"manifest.json lists {name[:80]!r}, which is no file of a checkpoint"
            )
        found[name] = (size, sha256)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    if _regular_size(path) > _MAX_JSON:
        raise DamageError(f"{path.name} is too long")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path.name} is malformed: {error}") from error
    if not isinstance(document, dict):
        raise DamageError(f"{path.name} is malformed: no object")
    return document


def _regular_size(path: Path) -> int:
    """The size of a file that is no link, pipe or device."""
    try:
        status = path.lstat()
    except OSError as error:
        raise DamageError(f"{path.name}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamageError(f"{path.name} is no regular file")
    return status.st_size


def _manifest_digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints of one process: written whole or not at all, verified when read, free of code.

    checkpoints/
      latest                     the newest checkpoint's name, for people and scripts
      step_00000100/
        NAME.safetensors         one for each group of tensors
        state.json  config.json
        manifest.json            size and sha256 of each file, and its own digest

A checkpoint is written to ``step_N.tmp``, brought to the disk and renamed: whenever the process dies, what is
called ``step_N`` is complete. What else can happen to a file (truncation, a flipped bit, which safetensors
alone would load without a word) the digests find.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast._config import JSON
from softdimo_fast.trainers._checkpoint_files import DamageError, read_files, sync, write_files
from softdimo_fast.trainers.restore import (
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    restore,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "discard_after",
    "find",
    "load",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "restore",
    "save",
]

# ".old": being replaced by another of the same step. ".tmp": not complete.
_NAME = re.compile(r"step_([0-9]{8,18})(\.old|\.tmp)?")


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``load`` found.

    Attributes:
        path: its folder.
        step: the number of steps that were done.
        tensors: the groups of tensors that were read, by name.
        state: the run's other state.
        config: what the run was made with.
        names: of all groups there are, read or not.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: dict[str, Any]
    names: tuple[str, ...]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under ``name``; CheckpointError, with the names there are, if there is none."""
        if name not in self.tensors:
            there = ", ".join(sorted(self.names)) or "none"
            lack = "read no" if name in self.names else "no"
            raise CheckpointError(
                f"{self.path}: {lack} tensors called {name!r}; there are: {there}"
            )
        return self.tensors[name]


# ---- saving ------------------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    config: Mapping[str, JSON],
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of ``step`` and then removes all but the newest ``keep``.

    Tensors may be shared, tied, non-contiguous or on any device; each is saved in full, with its dtype.
    A checkpoint of the same step is replaced.

    Args:
        folder: that holds the run's checkpoints; made if missing.
        step: the number of steps done; no later checkpoint may be there (see ``discard_after``).
        tensors: groups of tensors; a group's name is made of letters, digits, "_" and "-".
        state: other state, strict JSON.
        config: what the run was made with, strict JSON.
        keep: at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written (disk full, folder not writable, ...), or a value cannot be
            saved. Nothing half written stays, and earlier checkpoints are as they were.
    """
    folder = Path(folder)
    if keep < 1 or not 0 <= step < 10**18:
        raise ValueError(f"save: step must be >= 0 and keep >= 1, got step {step} and keep {keep}")
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    with _failures_told(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        later = [path.name for path in find(folder) if _step(path) > step]
        if later:
            raise DamageError(
                f"{', '.join(later)} are later; a run that goes back calls discard_after first"
            )
        try:
            temporary.mkdir()
            write_files(temporary, step, tensors, {"state": state, "config": config})
            _put_in_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    try:
        sync(folder)
        _tidy(folder)
        _write_latest(folder, final.name)
    except OSError as error:
        raise CheckpointError(
            f"{final} is complete, but the list of names in {folder} could not be written: {error}"
        ) from error
    for path in find(folder)[keep:]:
        _remove(path)
    return final


@contextmanager
def _failures_told(folder: Path, step: int) -> Iterator[None]:
    """CheckpointError, with what is left, in place of whatever stopped the writing."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, DamageError) as error:
        there = find(folder)
        left = f"{there[0].name} is untouched" if there else "there is no earlier one"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written in {folder}: {error}. "
            f"Nothing half written was left; {left}."
        ) from error


def _put_in_place(temporary: Path, final: Path) -> None:
    """Renames; one of the same step steps aside meanwhile, where ``_tidy`` finds it after a kill."""
    replacing = final.exists()
    if replacing:
        final.rename(_aside(final))
    try:
        temporary.rename(final)
    except BaseException:
        if replacing:
            _aside(final).rename(final)
        raise


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def _write_latest(folder: Path, name: str) -> None:
    temporary = folder / "latest.tmp"
    try:
        temporary.write_text(f"{name}\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(folder / "latest")
        sync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Ends what a killed process had begun."""
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        kept = path.with_suffix("")
        if match and match[2] == ".old" and not kept.exists():
            path.rename(kept)
        elif match and match[2]:
            shutil.rmtree(path, ignore_errors=True)  # one that cannot be removed is in nobody's way


def _remove(path: Path) -> None:
    """Renames before removing, so that a kill leaves no half of a checkpoint under its name."""
    doomed = path.with_suffix(".tmp")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        message = f"the old checkpoint {path} could not be removed: {error}"
        warnings.warn(message, CheckpointWarning, stacklevel=3)


def discard_after(folder: str | Path, step: int) -> None:
    """Removes the checkpoints later than ``step``: the run goes on from there, on another course.

    Raises:
        OSError: the folder cannot be changed.
    """
    folder = Path(folder)
    later = [path for path in find(folder) if _step(path) > step]
    if not later:
        return
    _tidy(folder)
    for path in later:
        _remove(path.with_suffix(""))
    left = find(folder)
    if left:
        _write_latest(folder, left[0].name)
    else:
        (folder / "latest").unlink(missing_ok=True)


# ---- loading -----------------------------------------------------------------------------------------------


def find(folder: str | Path) -> list[Path]:
    """The checkpoints in ``folder``, the newest first, by name; whether they are intact ``load`` finds."""
    folder = Path(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    complete = [
        folder / name
        for name in names
        if (match := _NAME.fullmatch(name))
        and (not match[2] or (match[2] == ".old" and name.removesuffix(".old") not in names))
    ]
    return sorted(complete, key=_step, reverse=True)


def load(
    folder: str | Path,
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    groups: Collection[str] | None = None,
) -> Checkpoint:
    """The newest intact checkpoint in ``folder``, or that of ``step``. Changes nothing there.

    A damaged one is passed over with a CheckpointWarning; that of a given ``step`` is not.

    Args:
        folder: that holds the run's checkpoints.
        step: of the one wanted.
        device: of the tensors.
        groups: the names of the groups of tensors to read, where they are there; None reads all, and ``()``
            config and state alone. Sizes of all files are verified, and digests of those that are read.

    Raises:
        CheckpointError: none can be used; each is named with the reason.
    """
    folder = Path(folder)
    damages: list[str] = []
    for path in find(folder):
        if step not in (None, _step(path)):
            continue
        try:
            tensors, documents, names = read_files(path, _step(path), groups)
        except (DamageError, OSError) as error:
            damages.append(f"{path}: {error}")
            continue
        if step is None:
            _warn_of_damage(folder, damages, path)
        # Only now: a device that is not there is no damage.
        placed = {
            name: {key: tensor.to(device) for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        state, config = documents["state"], documents["config"]
        return Checkpoint(path, _step(path), placed, state, config, names)
    raise _none_usable(folder, step, damages)


def _warn_of_damage(folder: Path, damages: list[str], used: Path) -> None:
    pointer = folder / "latest"
    with suppress(OSError, ValueError):
        name = pointer.read_text(encoding="utf-8")[:100].strip()
        if name not in {path.with_suffix("").name for path in find(folder)}:
            damages = [*damages, f"{pointer} names {name!r}, which is not there"]
    if damages:
        lines = "\n  ".join(damages)
        message = f"not every checkpoint is intact; {used} is used:\n  {lines}"
        warnings.warn(message, CheckpointWarning, stacklevel=3)


def _none_usable(folder: Path, step: int | None, damages: list[str]) -> CheckpointError:
    if damages:
        return CheckpointError("no usable checkpoint:\n  " + "\n  ".join(damages))
    there = ", ".join(path.name for path in find(folder)) or "none"
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    return CheckpointError(f"{wanted} in {folder}; there are: {there}")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])

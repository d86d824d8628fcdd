"""What a command refuses."""

from __future__ import annotations

import os
from pathlib import Path


class UsageError(Exception):
    """An argument that a command cannot work with; the message is for the user."""


def require_folder(option: str, folder: Path) -> None:
    """Makes a folder for what a command writes, before any work.

    Raises:
        UsageError: it cannot be made, or not be written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} must be a folder that can be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} must be a folder that can be written in, got {folder}")

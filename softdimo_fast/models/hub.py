"""Model sources on the hub: ``owner/name``, or ``owner/name/path`` of a folder or file in the repository.

Published files often lie in subfolders, as ``MeissonFlow/Meissonic/transformer``. Of a repository only the
folder or file that is named is downloaded.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(/[^/]+)*")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is written as ``owner/name`` or ``owner/name/path``."""
    return bool(_ID.fullmatch(source)) and not {".", ".."} & set(source.split("/"))


def download(
    source: str,
    revision: str | None = None,
    *,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
) -> Path:
    """The local copy of the folder or file that a hub id names.

    Args:
        source: the id.
        revision: of the repository; name a commit, so that tomorrow's files are today's.
        wanted: patterns of the files of a folder, relative to it; their ``*`` matches a ``/`` too.
        unwanted: of these, patterns of those to leave.

    Raises:
        FileNotFoundError: it is no hub id, or the hub does not give it.
        ImportError: the hub extra is missing.
    """
    if not is_hub_id(source):
        raise FileNotFoundError(f"there is no file or folder {source}")
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f'{source} is no local path; to load from the hub: pip install "softdimo-fast[hub]"'
        ) from error
    owner, name, *inside = source.split("/")
    at = "".join(f"{glob.escape(part)}/" for part in inside)
    allowed = [f"{at}{pattern}" for pattern in wanted]
    try:
        root = Path(
            snapshot_download(
                f"{owner}/{name}",
                revision=revision,
                allow_patterns=[at.removesuffix("/"), *allowed] if inside else allowed,
                ignore_patterns=[f"{at}{pattern}" for pattern in unwanted],
            )
        )
    except Exception as error:  # of the hub's client, or of the network below it
        raise FileNotFoundError(
            f"there is no file or folder {source}, and the hub does not give it: {error}"
        ) from error
    path = root.joinpath(*inside)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or folder {source}, and {owner}/{name} on the hub holds no "
            f"{'/'.join(inside)}"
        )
    return path

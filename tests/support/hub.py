"""A hub in a local folder: a client with huggingface_hub's ``snapshot_download``, for one without network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest


class LocalHub:
    """``root/owner/name/...`` holds the repositories.

    Attributes:
        asked: repository and revision of each download.
    """

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: Sequence[str],
        ignore_patterns: Sequence[str] = (),
    ) -> str:
        """Copies what some of the first patterns match and none of the others, as the client filters."""
        self.asked.append((repo_id, revision))
        repository = self.root / repo_id
        if repo_id.count("/") != 1 or not repository.is_dir():
            raise RuntimeError(f"404: no repository {repo_id}")
        copy = self.cache / repo_id / str(len(self.asked))
        copy.mkdir(parents=True)
        for file in (path for path in repository.rglob("*") if path.is_file()):
            name = file.relative_to(repository).as_posix()
            allowed = any(fnmatchcase(name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatchcase(name, pattern) for pattern in ignore_patterns):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy / name)
        return str(copy)

    def copied(self) -> list[str]:
        """The files of the last download."""
        copy = self.cache / self.asked[-1][0] / str(len(self.asked))
        return sorted(
            path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
        """In place of the client."""
        client = SimpleNamespace(snapshot_download=self.snapshot_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)
        return self

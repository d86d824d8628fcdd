"""A folder of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of steps 100 and 200."""
    folder = tmp_path / "checkpoints"
    save(folder, 100)
    save(folder, 200)
    return folder

"""Runs Python in a process of its own: for what only a fresh import shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run_python(
    *arguments: str,
    folder: Path = ROOT,
    environment: dict[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` with the package of ``folder`` first on the path, and no SOFTDIMO_ variable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOFTDIMO_")}
    library_folder = os.environ.get("SOFTDIMO_LIBRARY_DIR")
    if folder == ROOT and library_folder is not None:
        kept["SOFTDIMO_LIBRARY_DIR"] = library_folder
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(folder), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def unbuilt_package(folder: Path) -> Path:
    """Copies the package and its command to ``folder``, without the compiled libraries."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "softdimo_fast", folder / "softdimo_fast", ignore=ignore)
    shutil.copy2(ROOT / "softdimo_command.py", folder)
    return folder

"""A small checkpoint to damage, and what the tests ask of a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from softdimo_fast.trainers import checkpoint


def save(folder: Path, step: int, value: float | None = None, **options: Any) -> Path:
    """A small checkpoint whose weights are all ``value``, by default the step."""
    weight = torch.full((40, 5), float(step if value is None else value))
    return checkpoint.save(
        folder,
        step,
        tensors={"model": {"weight": weight, "bias": torch.arange(7)}},
        state={"samples": step * 64},
        config={"steps": 500},
        **options,
    )


def weight(loaded: checkpoint.Checkpoint) -> float:
    return float(loaded.group("model")["weight"][0, 0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

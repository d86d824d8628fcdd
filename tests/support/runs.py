"""Runs of the digits recipes cut to a handful of steps, in folders beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softdimo_fast import _config
from softdimo_fast.recipes import recipe
from softdimo_fast.recipes.build import build_trainer

SHORT = (
    "trainer.steps=4",
    "trainer.batch_size=16",
    "trainer.checkpoint_every=2",
    "trainer.log_every=2",
)
FEW = ("data.plain_copies=1", "data.augmented_copies=0")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "reward_classifier": (*SHORT, "model.width=16"),
    "judge": (*SHORT, "model.width=4"),
    "tokenizer": (
        *SHORT, "model.width=4", "model.code_width=4", "model.vocabulary=16", "method.start_step=1"
    ),
    "teacher": (
        *SHORT, *FEW, "model.width=16", "model.depth=2", "model.heads=2", "model.vocabulary=16"
    ),
    "distillation": (*SHORT, "generator.warmup_steps=1", *FEW),
    "control": (*SHORT, "generator.warmup_steps=1", *FEW),
    "adversarial": (*SHORT, "generator.warmup_steps=1", *FEW),
    "reward": (*SHORT, "generator.warmup_steps=1", *FEW),
    "tteo": ("samples=20",),
}  # fmt: skip


def tiny(method: str, *changes: str, seed: int = 0) -> Any:
    """The run config of a method, with few steps and small models."""
    overrides = [*OVERRIDES[method], *changes]
    return _config.override(recipe("digits", method, seed=seed), overrides)


def train(root: Path, method: str, *changes: str, name: str | None = None) -> Path:
    """Runs it in ``root/name`` (by default the method's name), which is returned."""
    folder = root / (name or method)
    build_trainer(tiny(method, *changes), folder).run()
    return folder

"""``softdimo train``: one method of a recipe, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tyro

from softdimo_fast import _config
from softdimo_fast.cli.errors import UsageError
from softdimo_fast.recipes import recipe
from softdimo_fast.trainers.progress import TerminalProgress


def run(
    method: tyro.conf.Positional[str],
    recipe_name: tyro.conf.Positional[str],
    out: Path | None = None,
    seed: int = 0,
    config: Path | None = None,
    set: tuple[str, ...] = (),  # the option's name, and nothing here needs the builtin
    resume: bool = False,
) -> int:
    """Trains one method of a recipe: tokenizer, teacher, distillation, adversarial, reward, ...

    A run that needs others (a distillation its teacher and tokenizer) looks for them beside its own folder,
    under the names in its configuration.

    Args:
        method: `softdimo config RECIPE` lists them.
        recipe_name: for instance digits.
        out: the run folder; runs/METHOD if not given.
        seed: of everything random.
        config: a JSON file with the whole configuration, as `softdimo config --json --method` prints it.
        set: settings to change, as trainer.steps=100 distillation.guidance_scale=2.
        resume: go on from the newest checkpoint in the folder.
    """
    from softdimo_fast.recipes.build import build_trainer
    from softdimo_fast.recipes.runs import TestTimeRun

    settings = load_settings(recipe_name, method, seed, config, set)
    if isinstance(settings, TestTimeRun):
        raise UsageError(f"{method} trains nothing: it is `softdimo tteo {recipe_name}`")
    folder = Path("runs") / method if out is None else out
    trainer = build_trainer(settings, folder)
    if resume:
        trainer.resume()
    steps = settings.trainer.steps
    trainer.progress = TerminalProgress(steps, method, first=trainer.step)
    try:
        trainer.run()
    finally:
        trainer.progress.close()
    print(f"{method}: {steps} steps, in {folder}")
    return 0


def load_settings(
    recipe_name: str, method: str, seed: int, config: Path | None, changes: tuple[str, ...]
) -> Any:
    """The recipe's config, or that of a file, with changes; checked before any work."""
    settings = recipe(recipe_name, method, seed=seed)
    if config is not None:
        try:
            document = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"--config {config} is no JSON: {error}") from error
        settings = _config.from_dict(type(settings), document)
    return _config.override(settings, list(changes))

"""``softdimo train``: one method of a recipe, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from softdimo_fast import _config
from softdimo_fast.cli.arguments import Changes, ConfigFile, MethodName, RecipeName, Seed
from softdimo_fast.cli.errors import UsageError, require_folder
from softdimo_fast.recipes import recipe
from softdimo_fast.trainers import checkpoint
from softdimo_fast.trainers.progress import TerminalProgress


def run(
    method: MethodName,
    recipe_name: RecipeName,
    out: Annotated[
        Path | None, arg(metavar="PATH", help_behavior_hint="(default: runs/METHOD)")
    ] = None,
    seed: Seed = None,
    config: ConfigFile = None,
    set: Changes = (),  # the option's name, and nothing here needs the builtin
    resume: bool = False,
) -> int:
    """Trains one method of a recipe: tokenizer, teacher, distillation, adversarial, reward, ...

    A run that needs others (a distillation its teacher and tokenizer) looks for them beside its own folder,
    under the names in its configuration. Those on published teachers take paths instead: --set
    teacher=PATH tokenizer=PATH ...; what must be given is said where it is missing.

    Args:
        method: `softdimo config RECIPE` lists them.
        recipe_name: digits, maskgit, maskbit, maskgen_l, maskgen_xl or meissonic.
        out: the run folder.
        seed: of everything random.
        config: a JSON file with the whole configuration, in place of the recipe's, as
            `softdimo config RECIPE --method METHOD --json` prints it.
        set: settings to change, as trainer.steps=100 distillation.guidance_scale=2.
        resume: go on from the newest checkpoint in the folder.
    """
    from softdimo_fast.recipes.build import build_trainer
    from softdimo_fast.recipes.published_runs import PublishedTestTimeRun
    from softdimo_fast.recipes.runs import TestTimeRun

    settings = load_settings(recipe_name, method, seed, config, set)
    if isinstance(settings, TestTimeRun | PublishedTestTimeRun):
        raise UsageError(f"{method} trains nothing: it is `softdimo tteo {recipe_name}`")
    folder = Path("runs") / method if out is None else out
    _require_state(folder, resume=resume)
    trainer = build_trainer(settings, folder)
    require_folder("--out", folder)
    if resume:
        trainer.resume()
    steps = settings.trainer.steps
    trainer.progress = TerminalProgress(steps, method, first=trainer.step)
    trainer.run()
    print(f"{method}: {steps} steps, in {folder}")
    return 0


def _require_state(folder: Path, *, resume: bool) -> None:
    begun = bool(checkpoint.find(folder / "checkpoints"))
    if begun and not resume:
        raise UsageError(
            f"{folder} holds a run already: --resume goes on with it, --out names another folder"
        )
    if resume and not begun:
        raise UsageError(
            f"--resume: {folder} holds no run (no checkpoint was found); leave it out to start one"
        )


def load_settings(
    recipe_name: str, method: str, seed: int | None, config: Path | None, changes: tuple[str, ...]
) -> Any:
    """The recipe's config, or that of a file, with changes; checked before any work."""
    settings = recipe(recipe_name, method, seed=seed)
    if config is not None:
        if seed is not None:
            raise UsageError(f"--seed {seed}: the seed is that in --config; --set changes it")
        try:
            document = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"--config {config} is no JSON: {error}") from error
        settings = _config.from_dict(type(settings), document)
    return _config.override(settings, list(changes))

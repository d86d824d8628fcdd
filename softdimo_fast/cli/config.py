"""``softdimo config``: what a recipe consists of."""

from __future__ import annotations

import json as json_format
from functools import partial
from typing import Annotated, Any

from tyro.conf import arg

from softdimo_fast import _config
from softdimo_fast.cli.arguments import RecipeName, Seed
from softdimo_fast.recipes import RECIPES, recipe
from softdimo_fast.recipes.published import is_open, open_settings
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun

OUR_DEFAULT = "(our default: the paper leaves it open)"


def run(
    recipe_name: RecipeName,
    method: Annotated[
        str | None, arg(metavar="METHOD", help_behavior_hint="(default: all of them)")
    ] = None,
    seed: Seed = None,
    json: bool = False,
) -> int:
    """Prints the full configuration of a recipe: every setting that decides what a run computes.

    Args:
        recipe_name: digits, maskgit, maskbit, maskgen_l, maskgen_xl or meissonic.
        method: only this one of its methods.
        seed: of the run.
        json: print JSON; that of one method `softdimo train --config` reads.
    """
    _config.require_choice("", "recipe", recipe_name, tuple(RECIPES))
    methods = list(RECIPES[recipe_name]) if method is None else [method]
    configs = {name: recipe(recipe_name, name, seed=seed) for name in methods}
    if json:
        documents = {name: _config.to_dict(config) for name, config in configs.items()}
        shown = documents if method is None else documents[method]
        print(json_format.dumps(shown, indent=1))
        return 0
    for name, config in configs.items():
        print(
            f"# softdimo train {name} {recipe_name}"
            if name != "tteo"
            else f"# softdimo tteo {recipe_name}"
        )
        print(_config.render(config, note=partial(_note, open_settings(recipe_name, name))))
        print("", *_memory(recipe_name, config), sep="\n")
    return 0


def _memory(recipe_name: str, config: Any) -> list[str]:
    """What a run on a published teacher holds, at the published sizes."""
    if not isinstance(config, PublishedGeneratorRun):
        return []
    from softdimo_fast.recipes.published_memory import estimate, published_models

    lines = estimate(config, *published_models(recipe_name, config.bits)).lines()
    lines.append("(float32, without activations, rewards and text encoders)")
    return ["# memory of the device", *(f"#   {line}" for line in lines), ""]


def _note(settings: tuple[str, ...], field: str) -> str:
    return OUR_DEFAULT if is_open(field, settings) else ""

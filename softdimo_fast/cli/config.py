"""``softdimo config``: what a recipe consists of."""

from __future__ import annotations

import json as json_format
from typing import Annotated

from tyro.conf import arg

from softdimo_fast import _config
from softdimo_fast.cli.arguments import RecipeName
from softdimo_fast.recipes import RECIPES, recipe


def run(
    recipe_name: RecipeName,
    method: Annotated[
        str | None, arg(metavar="METHOD", help_behavior_hint="(default: all of them)")
    ] = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Prints the full configuration of a recipe: every setting that decides what a run computes.

    Args:
        recipe_name: digits.
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
        print(_config.render(config), end="\n\n")
    return 0

"""Recipes: functions that return a full, typed, frozen run config for a method, a teacher and a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softdimo_fast import _config
from softdimo_fast.recipes import digits, published

# Recipe -> method -> function of the seed, which has a default.
RECIPES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "digits": {
        "judge": digits.judge,
        "reward_classifier": digits.reward_classifier,
        "tokenizer": digits.tokenizer,
        "teacher": digits.teacher,
        "distillation": digits.distillation,
        "control": digits.control,
        "adversarial": digits.adversarial,
        "reward": digits.reward,
        "tteo": digits.tteo,
    },
    **published.recipes(),
}


def recipe(name: str, method: str, *, seed: int | None = None) -> Any:
    """The run config of a recipe's method.

    Args:
        seed: of everything random; None takes the recipe's own (0 for digits, the published one else).

    Raises:
        ConfigError: there is no such recipe or method; the nearest is named.
    """
    _config.require_choice("", "recipe", name, tuple(RECIPES))
    _config.require_choice("", "method", method, tuple(RECIPES[name]))
    function = RECIPES[name][method]
    return function() if seed is None else function(seed)

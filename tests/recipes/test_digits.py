"""The digits recipes: valid, complete in JSON, and functions of the seed in every run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from softdimo_fast import _config
from softdimo_fast.recipes import RECIPES, digits, recipe
from softdimo_fast.recipes.runs import GeneratorRun, TeacherRun, TestTimeRun

METHODS = tuple(RECIPES["digits"])


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        _config.ConfigError,
        match=r"^recipe: must be .*'digits'.* got 'digit'; did you mean 'digits'",
    ):
        recipe("digit", "teacher")
    with pytest.raises(
        _config.ConfigError, match=r"^method: .* got 'teachr'; did you mean 'teacher'"
    ):
        recipe("digits", "teachr")


@pytest.mark.parametrize("method", METHODS)
def test_json_gives_the_same_config_back(method: str) -> None:
    config = recipe("digits", method, seed=4)
    document = json.loads(json.dumps(_config.to_dict(config)))
    assert _config.from_dict(type(config), document) == config
    assert _config.render(config)


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_changes_the_seed_alone(method: str) -> None:
    first, second = (_config.to_dict(recipe("digits", method, seed=seed)) for seed in (0, 11))
    changes = _config.difference(first, second)
    name = "seed" if method == "tteo" else "trainer.seed"
    assert changes == [f"{name}: 0 -> 11"]
    assert recipe("digits", method) == recipe("digits", method, seed=0)


def _all_names(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}{key}"
            yield from _all_names(item, f"{where}{key}.")


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_named_as_overrides_take_it(method: str) -> None:
    config = recipe("digits", method)
    known = _config.names(type(config))
    assert set(_all_names(_config.to_dict(config))) <= set(known)


def test_inputs_are_other_methods_of_the_recipe() -> None:
    for method in METHODS:
        config = recipe("digits", method)
        names = [
            getattr(config, field, None)
            for field in ("tokenizer", "teacher", "reward_classifier", "start", "generator")
        ]
        assert {name for name in names if isinstance(name, str)} <= set(METHODS)


def test_sizes_agree() -> None:
    teacher, tokenizer = digits.teacher(), digits.tokenizer()
    assert isinstance(teacher, TeacherRun)
    assert teacher.model.vocabulary == tokenizer.model.vocabulary == digits.VOCABULARY
    assert teacher.model.length == tokenizer.model.grid**2 == digits.LENGTH
    assert teacher.model.conditions == digits.CONDITIONS


def test_the_gan_and_its_control_differ_in_the_gan_alone() -> None:
    """Otherwise the bar on their ratio would measure something else."""
    control, gan = (_config.to_dict(recipe("digits", name)) for name in ("control", "adversarial"))
    fields = {line.split(":")[0] for line in _config.difference(control, gan)}
    assert {name.split(".")[0] for name in fields} <= {"adversarial", "generator"}
    # Adam's first moment is the GAN's habit; nothing else of the generator may differ.
    assert {name for name in fields if name.startswith("generator")} <= {
        "generator.optimizer.betas"
    }
    assert isinstance(digits.control(), GeneratorRun)
    assert digits.control().trainer == digits.adversarial().trainer
    distillation = digits.adversarial().distillation
    assert distillation is not None
    assert distillation.guidance_scale == 2.0


def test_the_search_uses_the_generators_own_input() -> None:
    search = digits.tteo()
    assert isinstance(search, TestTimeRun)
    assert search.search.one_step == digits.distillation().generator.one_step
    assert (search.search.optimizer, search.search.iterations) == ("sgd", 4)

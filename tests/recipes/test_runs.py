"""Run configs refuse what no run can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from softdimo_fast import _config
from softdimo_fast.recipes import digits, recipe
from softdimo_fast.recipes.runs import DigitsData, GeneratorRun, TestTimeRun


def test_a_generator_needs_a_loss() -> None:
    run = digits.distillation()
    with pytest.raises(_config.ConfigError, match=r"GeneratorRun\.distillation: must be set where"):
        replace(run, distillation=None)
    gan = digits.adversarial()
    assert replace(gan, distillation=None).distillation is None


def test_data_without_images_is_refused() -> None:
    with pytest.raises(_config.ConfigError, match=r"DigitsData\.plain_copies: must be at least 1"):
        DigitsData(plain_copies=0, augmented_copies=0)
    with pytest.raises(_config.ConfigError, match=r"augmented_copies: must be a number >= 0"):
        DigitsData(augmented_copies=-1)
    assert DigitsData(plain_copies=0).augmented_copies > 0


@pytest.mark.parametrize(
    ("method", "assignment", "message"),
    [
        ("teacher", "trainer.stps=3", r"trainer\.stps: no such field .*did you mean 'trainer.steps'"),
        ("teacher", "steps=3", r"steps: no such field .*did you mean 'sampler\.steps' or 'trainer\.steps'"),
        ("teacher", "trainer.steps=many", r"trainer\.steps: must be an integer, got 'many'"),
        ("teacher", "trainer.steps=0", r"trainer\.steps: must be a number >= 1, got 0"),
        ("teacher", "trainer.batch_size=1.5", r"trainer\.batch_size: must be an integer"),
        ("judge", "model.width=0", r"model\.width: must be a number >= 1, got 0"),
        ("judge", "model.image_size=9", r"model\.image_size: must be even, got 9"),
        ("adversarial", "adversarial.loss=hing", r"adversarial\.loss: .*did you mean 'hinge'"),
        ("tteo", "search.decode=hard", r"search\.decode: must be one of 'sample', 'argmax', 'soft'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(method: str, assignment: str, message: str) -> None:
    with pytest.raises(_config.ConfigError, match=message):
        _config.override(recipe("digits", method), [assignment])


def test_settings_of_a_term_that_is_off_turn_it_on() -> None:
    run: Any = _config.override(digits.distillation(), ["reward.weight=0.5"])
    assert isinstance(run, GeneratorRun)
    assert run.reward is not None
    assert run.reward.weight == 0.5
    off = _config.override(run, ["reward=none"])
    assert off == digits.distillation()


def test_the_search_needs_a_sample() -> None:
    with pytest.raises(_config.ConfigError, match=r"TestTimeRun\.samples: must be a number >= 1"):
        TestTimeRun(samples=0)

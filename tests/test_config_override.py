"""Overrides as typed on the command line: typed, validated, and the inverse of the listing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.configs import GAN, RUN, Precision, Run

from softdimo_fast._config import ConfigError, override


@pytest.mark.parametrize(
    ("assignment", "name", "expected"),
    [
        ("trainer.steps=100", "trainer.steps", 100),
        (" trainer.steps = -7 ", "trainer.steps", -7),
        ("trainer.save=False", "trainer.save", False),
        ("trainer.optimizer.lr=1e-3", "trainer.optimizer.lr", 1e-3),
        ("trainer.optimizer.betas=.5, .9", "trainer.optimizer.betas", (0.5, 0.9)),
        ("trainer.optimizer.betas=[0.5, 1]", "trainer.optimizer.betas", (0.5, 1.0)),
        ("trainer.profile=power", "trainer.profile", "power"),
        ("gan=none", "gan", None),
        ("gan.layers=", "gan.layers", ()),
        ("gan.layers=4", "gan.layers", (4,)),
        ('gan={"weight": 2}', "gan", GAN(weight=2.0)),
        ("out=a=b c", "out", Path("a=b c")),
        ("name=none", "name", "none"),
        ('name="quoted\\n"', "name", "quoted\n"),
        ("limit=3", "limit", 3),
        ("limit=3.0", "limit", 3.0),
        ("limit=auto", "limit", "auto"),
        ("limit=null", "limit", None),
        ("precision=bf16", "precision", Precision.HALF),
    ],
)
def test_override(assignment: str, name: str, expected: object) -> None:
    value: Any = override(RUN, [assignment])
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_are_validated_together_and_the_last_counts() -> None:
    assert override(Run(name="x"), ["gan.layers=1", "gan.weight=2", "gan.weight=3"]).gan == GAN(
        weight=3.0, layers=(1,)
    )
    assert override(RUN, []) == RUN
    with pytest.raises(ConfigError, match=r"gan\.weight: is missing"):
        override(Run(name="x"), ["gan.layers=1"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainer.steps", "must be name=value"),
        ("trainer.step=1", "trainer.step: no such field of Run; did you mean 'trainer.steps'?"),
        ("steps=1", "steps: no such field of Run; did you mean 'trainer.steps'?"),
        ("=1", "no such field of Run"),
        ("trainer.steps.x=1", "trainer.steps.x: no such field"),
        ("trainer.steps=1e3", "trainer.steps: must be an integer, got '1e3'"),
        ("trainer.steps=", "trainer.steps: must be an integer, got ''"),
        ("trainer.steps=" + "9" * 5000, "trainer.steps: must be an integer, got '999"),
        ("trainer.save=yes", "trainer.save: must be true or false, got 'yes'"),
        ("trainer.optimizer.lr=nan", "trainer.optimizer.lr: must be a finite number, got 'nan'"),
        ("trainer.optimizer.lr=-1", "trainer.optimizer.lr: must be a number > 0"),
        ("trainer.optimizer.betas=[0.5", "trainer.optimizer.betas: must be a list of 2"),
        ("trainer.optimizer.betas=1,2,3", "trainer.optimizer.betas: must be a list of 2"),
        ("trainer.profile=Power", "got 'Power'; did you mean 'power'?"),
        ("trainer=1", "trainer: must be the fields of Trainer, got '1'"),
        ("gan={", "gan: must be the fields of GAN or none, got '{'"),
        ('name="x', "name: must be text"),
        ("gan.layers=" + "[" * 100_000, "gan.layers: must be a list"),
    ],
)
def test_refused_overrides(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RUN, [assignment])
    assert message in str(caught.value)


def test_a_group_given_whole_cannot_be_changed_in_part() -> None:
    with pytest.raises(ConfigError, match=r"gan\.weight: is no group: gan is"):
        override(RUN, ['gan={"weight": 1}', "gan.weight=2"])

"""Typed configs: exact round trips, errors that name the field, checks, digests, listings."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from support.configs import GAN, RUN, SGD, Optimizer, Run, Trainer, runs

from softdimo_fast import _config
from softdimo_fast._config import ConfigError, from_dict, override, render, to_dict

# ---- to and from JSON --------------------------------------------------------------------------------------


@given(runs)
def test_json_round_trip_is_exact(run: Run) -> None:
    data = json.loads(json.dumps(to_dict(run), allow_nan=False))
    again = from_dict(Run, data)
    assert again == run
    assert type(again.limit) is type(run.limit)
    assert _config.digest(again) == _config.digest(run)


def test_json_form() -> None:
    data = to_dict(RUN)
    assert data["out"] == "runs"
    assert data["precision"] == "fp32"
    assert data["gan"] == {"weight": 0.5, "layers": [1, 3]}
    assert data["trainer"]["optimizer"] == {"lr": 3e-4, "betas": [0.9, 0.99]}  # type: ignore[index]


def test_an_integer_is_a_float_and_left_out_fields_take_defaults() -> None:
    run = from_dict(Run, {"name": "x", "trainer": {"optimizer": {"lr": 1, "betas": [0, 1]}}})
    assert isinstance(run.trainer.optimizer, Optimizer)
    assert isinstance(run.trainer.optimizer.lr, float)
    assert run.trainer.steps == 600


def nested(**values: Any) -> dict[str, Any]:
    """``nested(trainer__steps=1)`` is {"name": "x", "trainer": {"steps": 1}}."""
    data: dict[str, Any] = {"name": "x"}
    for name, value in values.items():
        *groups, last = name.split("__")
        inner = data
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            nested(trainer__stepz=1),
            "trainer.stepz: no such field of Trainer; did you mean 'steps'?",
        ),
        (nested(quux=1), "quux: no such field of Run; its fields are name, trainer, gan"),
        (nested(trainer__steps="10"), "trainer.steps: must be an integer, got '10'"),
        (nested(trainer__steps=1.0), "trainer.steps: must be an integer, got 1.0"),
        (nested(trainer__steps=True), "trainer.steps: must be an integer, got True"),
        (nested(trainer__save=1), "trainer.save: must be true or false, got 1"),
        (nested(trainer__save="true"), "trainer.save: must be true or false, got 'true'"),
        (nested(trainer=3), "trainer: must be the fields of Trainer, got 3"),
        (nested(name=7), "name: must be text, got 7"),
        (nested(out=7), "out: must be a path, got 7"),
        (
            nested(trainer__optimizer__lr=math.nan, trainer__optimizer__betas=[0, 1]),
            "trainer.optimizer.lr: must be a finite number, got nan",
        ),
        (
            nested(trainer__optimizer__lr=True, trainer__optimizer__betas=[0, 1]),
            "trainer.optimizer.lr: must be a finite number, got True",
        ),
        (
            nested(trainer__optimizer__lr=-1, trainer__optimizer__betas=[0, 1]),
            "trainer.optimizer.lr: must be a number > 0 and <= 1, got -1",
        ),
        (
            nested(trainer__optimizer__betas=[0.9, "x"]),
            "trainer.optimizer.betas[1]: must be a finite number, got 'x'",
        ),
        (
            nested(trainer__optimizer__betas=[0.9]),
            "trainer.optimizer.betas: must be a list of 2: a finite number, a finite number, got [0.9]",
        ),
        (
            nested(trainer__profile="powr"),
            "trainer.profile: must be one of 'constant', 'power', got 'powr'; did you mean 'power'?",
        ),
        (nested(precision="bf17"), "got 'bf17'; did you mean 'bf16'?"),
        (nested(gan={}), "gan.weight: is missing, expected a finite number"),
        (nested(gan={"weight": 1, "layers": [1, None]}), "gan.layers[1]: must be an integer"),
        (nested(gan={"weight": 10**400}), "gan.weight: must be a finite number, got 1000"),
        (nested(gan=1), "gan: must be the fields of GAN or none, got 1"),
        (nested(limit=[1]), "limit: must be an integer or a finite number or 'auto' or none"),
        (
            nested(trainer__optimizer={"kind": "sgd", "betas": [1, 2]}),
            "trainer.optimizer.betas: no such field of SGD",
        ),
        ({}, "name: is missing, expected text"),
        (nested(trainer={5: 1}), "trainer.5: no such field of Trainer"),
        ([1], "must be the fields of Run, got [1]"),
    ],
)
def test_refused_data(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data)
    assert message in str(caught.value)


def test_a_union_of_configs_is_told_by_its_tag_or_its_fields() -> None:
    def optimizer(**fields: Any) -> object:
        return from_dict(Trainer, {"optimizer": fields}).optimizer

    assert optimizer(kind="sgd") == SGD()
    assert optimizer(kind="sgd", lr=1) == SGD(lr=1.0)
    assert optimizer(betas=[0.5, 0.5]) == Optimizer(betas=(0.5, 0.5))
    with pytest.raises(
        ConfigError, match=r"optimizer: unclear whether Optimizer or SGD is meant, got"
    ):
        optimizer(lr=0.1)


def test_values_that_json_cannot_say() -> None:
    with pytest.raises(ConfigError, match=r"gan\.weight: must be a value that JSON has, got inf"):
        to_dict(Run(name="x", gan=GAN(weight=math.inf)))
    with pytest.raises(ConfigError, match=r"notes\[1\]: must be a value that JSON has"):
        to_dict(Run(name="x", notes=("a", {1})))  # type: ignore[arg-type]


def test_an_annotation_that_no_config_can_have() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        value: complex = 1j

    with pytest.raises(TypeError, match="value: a config field cannot be of type"):
        _config.convert(complex, 1j, "value")
    with pytest.raises(ConfigError):
        to_dict(Odd())


def test_the_error_survives_pickling() -> None:
    error = ConfigError("must be 1, got 2", field="steps", owner="Trainer")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "Trainer.steps: must be 1, got 2"
    assert (again.field, again.owner) == ("steps", "Trainer")


# ---- checks ------------------------------------------------------------------------------------------------


def test_checks_name_class_field_and_value() -> None:
    with pytest.raises(
        ConfigError, match=r"^Optimizer\.lr: must be a number > 0 and <= 1, got 2\.0$"
    ):
        Optimizer(lr=2.0)
    with pytest.raises(ConfigError, match=r"^Optimizer\.lr: must be a finite number, got '1'$"):
        Optimizer(lr="1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Optimizer\.betas\[0\]: must be a finite number"):
        Optimizer(betas=("a", 0.1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^Loop\.steps: must be even, got 3$"):
        _config.require(False, "Loop", "steps", 3, "even")
    _config.require(True, Trainer, "steps", 3, "odd")


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (1, {"minimum": 1}, True),
        (1, {"above": 1}, False),
        (1, {"maximum": 1}, True),
        (1, {"below": 1}, False),
        (0.5, {"above": 0, "below": 1}, True),
        (math.nan, {}, False),
        (math.inf, {"minimum": 0}, False),
        (True, {"minimum": 0}, False),
        ("1", {"minimum": 0}, False),
        (10**400, {}, False),
    ],
)
def test_range(value: Any, bounds: dict[str, float], holds: bool) -> None:
    if holds:
        _config.require_range("C", "f", value, **bounds)
    else:
        with pytest.raises(ConfigError, match=r"C\.f: must be a (finite )?number"):
            _config.require_range("C", "f", value, **bounds)


def test_choice() -> None:
    _config.require_choice(Trainer, "profile", "power", ("constant", "power"))
    with pytest.raises(
        ConfigError, match=r"^Trainer\.profile: .*got 'pwer'; did you mean 'power'\?$"
    ):
        _config.require_choice(Trainer, "profile", "pwer", ("constant", "power"))
    with pytest.raises(ConfigError):
        _config.require_choice(Trainer, "count", True, (1, 2))


# ---- digest, difference, listing ---------------------------------------------------------------------------


def test_digest_is_canonical() -> None:
    one = {"b": 1, "a": [1.0, {"c": None}]}
    assert _config.digest(one) == _config.digest({"a": [1, {"c": None}], "b": 1.0})
    assert _config.digest(one) != _config.digest({**one, "b": True})
    assert _config.digest({"a": 1.5}) != _config.digest({"a": 1})
    assert len(_config.digest(RUN)) == 64


def test_difference() -> None:
    new = override(RUN, ["trainer.steps=100", "gan=none", 'name="1"'])
    assert _config.difference(to_dict(RUN), to_dict(new)) == [
        'name: digits -> "1"',
        "trainer.steps: 600 -> 100",
        'gan: {"weight": 0.5, "layers": [1, 3]} -> none',
    ]
    assert _config.difference({"a": 1, "b": None}, {"a": 1.0, "c": None}) == [
        "c: (absent) -> none",
        "b: none -> (absent)",
    ]
    assert _config.difference({"a": 1}, {"a": True}) == ["a: 1 -> true"]


@given(runs, runs)
def test_difference_is_empty_exactly_when_the_digests_agree(one: Run, two: Run) -> None:
    assert _config.difference(to_dict(one), to_dict(one)) == []
    lines = _config.difference(to_dict(one), to_dict(two))
    assert (not lines) == (_config.digest(one) == _config.digest(two))


@given(runs)
def test_override_takes_back_what_render_shows(run: Run) -> None:
    rows = list(_config._rows(run, ""))
    again = override(
        Run(name="other", gan=None if run.gan is None else GAN(weight=9.0), trainer=run.trainer),
        [f"{name}={value}" for name, value, _ in rows],
    )
    assert again == run


def test_render() -> None:
    assert render(override(RUN, ["notes="]), width=75).splitlines()[:8] == [
        "name                    = digits       # of the run.",
        "",
        "trainer.steps           = 600          # of the optimizer.",
        "",
        "trainer.optimizer.lr    = 0.0003       # learning rate after the warm-up.",
        "trainer.optimizer.betas = [0.9, 0.99]  # decay rates of the moments, first and",
        "                                       # second.",
        "",
    ]


def test_notes_follow_what_a_field_means_and_stay_whole() -> None:
    remark = "(a remark that is long enough not to fit beside most meanings)"
    plain = render(RUN)
    assert render(RUN, note=lambda name: remark).count(remark) == plain.count(" = ")
    assert render(RUN, note=lambda name: "") == plain
    lines = render(RUN, note=lambda name: "!" if name == "name" else "").splitlines()
    assert lines[0].endswith("# of the run. !")
    assert lines[1:] == plain.splitlines()[1:]


def test_render_without_help_or_fields() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare:
        value: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Empty:
        pass

    assert render(Bare()) == "value = 1"
    assert render(Empty()) == ""


def test_descriptions_are_inherited() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Child(Optimizer):
        """A child.

        Attributes:
            decay, floor: of ``weights``,
                both.

        Raises:
            nothing: at all.
        """

        decay: float = 0.0
        floor: float = 0.0

    assert _config.descriptions(Child) == {
        "lr": "learning rate after the warm-up.",
        "betas": "decay rates of the moments, first and second.",
        "decay": "of weights, both.",
        "floor": "of weights, both.",
    }
    assert _config.names(Child) == ["lr", "betas", "decay", "floor"]


def test_names() -> None:
    found = _config.names(Run)
    assert found[:3] == ["name", "trainer", "trainer.steps"]
    assert {"trainer.optimizer.kind", "trainer.optimizer.betas", "gan.layers"} < set(found)
    assert len(set(found)) == len(found)


def test_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import importlib.util, sys, types; p = types.ModuleType('softdimo_fast');"
        "p.__path__ = [sys.argv[1]]; sys.modules['softdimo_fast'] = p;"
        "import softdimo_fast._config; assert 'torch' not in sys.modules, 'torch'"
    )
    folder = Path(_config.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)

"""Typed configs: frozen keyword-only dataclasses, checked in full before any work starts.

A config class validates itself in ``__post_init__`` with the ``require_*`` helpers; it never changes itself
there. What its fields mean stands in the ``Attributes:`` section of its docstring, once, where ``help()``
and editors show it; ``render`` prints it from there::

    @dataclass(frozen=True, kw_only=True)
    class OptimizerConfig:
        '''AdamW.

        Attributes:
            lr: learning rate after the warm-up.
        '''

        lr: float = 3e-4

        def __post_init__(self) -> None:
            require_types(self)
            require_range(self, "lr", self.lr, above=0)

Fields may be bool, int, float, str, Path, Enum, Literal, tuple, another config, and unions of these. Of two
configs in a union, the one meant is told by a Literal field, or else by the names of its fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from softdimo_fast._config_types import (
    JSON,
    ConfigError,
    Text,
    brief,
    convert,
    did_you_mean,
    field_names,
    is_choice,
    is_number,
    join,
    one_of,
    show,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "JSON",
    "ConfigError",
    "descriptions",
    "difference",
    "digest",
    "from_dict",
    "names",
    "override",
    "render",
    "require",
    "require_choice",
    "require_range",
    "require_types",
    "to_dict",
]

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


# ---- checks for __post_init__ ------------------------------------------------------------------------------


def require(condition: bool, owner: object, field: str, value: object, expected: str) -> None:
    """Raises ConfigError "OWNER.FIELD: must be EXPECTED, got VALUE" unless the condition holds.

    Args:
        condition: that must hold.
        owner: the config, its class or a name.
        field: the name of the field, dotted below ``owner``.
        value: what the field is.
        expected: what it must be; continues "must be".
    """
    if not condition:
        _refuse(owner, field, value, expected)


def require_choice(owner: object, field: str, value: object, choices: Iterable[object]) -> None:
    """Raises ConfigError, with the nearest choice, unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not any(is_choice(value, choice) for choice in choices):
        nearest = did_you_mean(value, [str(choice) for choice in choices])
        _refuse(owner, field, value, one_of(choices), nearest)


def require_range(
    owner: object,
    field: str,
    value: float,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ConfigError unless ``value`` is a finite number within the bounds.

    ``minimum`` and ``maximum`` belong to the range, ``above`` and ``below`` do not.
    """
    bounds = {">=": minimum, ">": above, "<=": maximum, "<": below}
    words = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)
    expected = f"a number {words}".strip() if words else "a finite number"
    require(is_number(value), owner, field, value, expected)
    holds = (
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    require(holds, owner, field, value, expected)


def require_types(config: DataclassInstance) -> None:
    """Raises ConfigError unless every field of ``config`` holds what its annotation says."""
    hints = get_type_hints(type(config), include_extras=True)
    for name in field_names(type(config)):
        try:
            convert(hints[name], getattr(config, name), name)
        except ConfigError as error:
            raise ConfigError(
                error.problem, field=error.field, owner=type(config).__name__
            ) from None


def _refuse(owner: object, field: str, value: object, expected: str, more: str = "") -> NoReturn:
    if not isinstance(owner, str):
        owner = (owner if isinstance(owner, type) else type(owner)).__name__
    raise ConfigError(f"must be {expected}, got {brief(value)}{more}", field=field, owner=owner)


# ---- to and from JSON --------------------------------------------------------------------------------------


def to_dict(config: DataclassInstance) -> dict[str, JSON]:
    """The config as JSON: nested dicts, tuples as lists, paths as text, enums as their values.

    Raises:
        ConfigError: a field holds what JSON cannot say, such as NaN.
    """
    return _plain_fields(config, "")


def _plain_fields(config: DataclassInstance, where: str) -> dict[str, JSON]:
    names = field_names(type(config))
    return {name: _plain(getattr(config, name), join(where, name)) for name in names}


def _plain(value: object, where: str) -> JSON:
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_fields(value, where)
    if isinstance(value, tuple | list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ConfigError(f"must be a value that JSON has, got {brief(value)}", field=where)


def from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """The config of class ``cls`` that ``to_dict`` wrote; fields left out take their defaults.

    int is taken for float; nothing else is converted.

    Raises:
        ConfigError: an unknown or missing field, a value of another type, NaN or infinity, a choice that does
            not exist, or what the class itself refuses; the message gives the dotted name.
    """
    config: ConfigT = convert(cls, data, "")
    return config


def digest(config: DataclassInstance | Mapping[str, JSON]) -> str:
    """sha256 (hexadecimal) of the config, or of its ``to_dict``, as canonical JSON; 1 and 1.0 are equal."""
    data = to_dict(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(_canonical(data).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two ``to_dict``: lines such as "trainer.steps: 100 -> 200", in the new order."""
    return list(_changes(old, new, ""))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in [*new, *(key for key in old if key not in new)]:
        name, before, after = join(where, key), old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, name)
        elif (key in old) != (key in new) or _canonical(before) != _canonical(after):
            shown = show(before) if key in old else "(absent)"
            yield f"{name}: {shown} -> {show(after) if key in new else '(absent)'}"


def _canonical(value: object) -> str:
    return json.dumps(_integers(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _integers(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _integers(item) for key, item in value.items()}
    return [_integers(item) for item in value] if isinstance(value, list | tuple) else value


# ---- overrides and listing ---------------------------------------------------------------------------------


def names(cls: type[DataclassInstance]) -> list[str]:
    """The dotted names of all fields, groups before their members."""
    found = []
    hints = get_type_hints(cls, include_extras=True)
    for name in field_names(cls):
        found.append(name)
        for group in _groups(hints[name]):
            found += [join(name, inner) for inner in names(group)]
    return list(dict.fromkeys(found))


def _groups(hint: Any) -> list[Any]:
    """The config classes that a type is or, as a union, may be."""
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return [group for member in get_args(hint) for group in _groups(member)]
    return [hint] if dataclasses.is_dataclass(hint) else []


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """The config with fields replaced: ``override(config, ["trainer.steps=100", "trainer.betas=.9,.99"])``.

    Values are written as ``render`` shows them: ``none``, ``true``, ``1e-4``, text without quotes, lists as
    ``1,2`` or as JSON, a whole group as a JSON object. The result is validated once all are in place; of two
    values for a field the last counts. A field of an optional group that is none makes the group.

    Raises:
        ConfigError: as ``from_dict``, and for an assignment that is not ``name=value``.
    """
    data, known = to_dict(config), names(type(config))
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ConfigError(f"must be name=value, such as {known[-1]}=..., got {assignment!r}")
        if name not in known:
            # A name without its group is the commonest slip: "steps" for "trainer.steps".
            ends = [full for full in known if full.split(".")[-1] == name]
            meant = " or ".join(map(repr, ends))
            hint = f"; did you mean {meant}?" if ends else did_you_mean(name, known)
            raise ConfigError(f"no such field of {type(config).__name__}{hint}", field=name)
        _assign(data, name, Text(text))
    return from_dict(type(config), data)


def _assign(data: dict[str, JSON], name: str, text: Text) -> None:
    *groups, last = name.split(".")
    for i, group in enumerate(groups):
        inner = data.get(group)
        if inner is not None and not isinstance(inner, dict):
            whole = ".".join(groups[: i + 1])
            raise ConfigError(f"is no group: {whole} is {brief(inner)}", field=name)
        data[group] = data = inner if inner is not None else {}
    data[last] = text


def descriptions(cls: type) -> dict[str, str]:
    """What the ``Attributes:`` section of the docstring says of each field, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        inside: bool = False
        entry: list[str] = []  # the fields that the present entry is about: "a, b: of both."
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            head = re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line)
            if line.strip() and not line.startswith(" "):
                inside, entry = line.strip() == "Attributes:", []
            elif inside and head:
                entry = head[1].split(", ")
                found.update(dict.fromkeys(entry, head[2]))
            elif inside and line.strip():
                found.update({name: f"{found[name]} {line.strip()}".strip() for name in entry})
    markup = re.compile(r"``|:\w+:`~?([^`]+)`")  # "``x``" and ":func:`x`" are "x" to a reader
    return {name: markup.sub(lambda match: match[1] or "", text) for name, text in found.items()}


def render(
    config: DataclassInstance, *, width: int = 110, note: Callable[[str], str] = lambda name: ""
) -> str:
    """The config as an aligned listing, one ``dotted.name = value  # what it means`` per field.

    Values are written so that ``override`` takes each ``name=value`` back; groups stand apart. What ``note``
    says of a dotted name follows what the field means.
    """
    rows = list(_rows(config, ""))
    if not rows:
        return ""
    names_width = max(len(name) for name, _, _ in rows)
    values_width = min(24, max(len(value) for _, value, _ in rows))
    lines: list[str] = []
    for i, (name, value, text) in enumerate(rows):
        if i and rows[i - 1][0].rpartition(".")[0] != name.rpartition(".")[0]:
            lines.append("")
        line = f"{name:{names_width}} = {value:{values_width}}"
        room = max(40, width - len(line) - 4)
        parts, remark = textwrap.wrap(text, room), note(name)
        if remark and parts and len(parts[-1]) + len(remark) < room:
            parts[-1] += f" {remark}"
        elif remark:
            parts.append(remark)  # whole, so that it can be searched for
        for part in parts:
            lines.append(f"{line}  # {part}")
            line = " " * len(line)
        if not parts:
            lines.append(line.rstrip())
    return "\n".join(lines)


def _rows(config: DataclassInstance, where: str) -> Iterator[tuple[str, str, str]]:
    help_texts = descriptions(type(config))
    for name in field_names(type(config)):
        value, full = getattr(config, name), join(where, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _rows(value, full)
        else:
            yield full, show(_plain(value, full)), help_texts.get(name, "")

"""The values of config fields: read as the field's annotation says, described and shown in messages.

The public functions are in ``_config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


class ConfigError(ValueError):
    """A config that cannot be meant: the message names the field, its value and what was expected.

    Attributes:
        field: the dotted name of the field, below ``owner``.
        owner: the config class, as long as its place in the whole config is not known.
        problem: the message without the field.
    """

    def __init__(self, problem: str, *, field: str = "", owner: str = "") -> None:
        name = join(owner, field)
        super().__init__(f"{name}: {problem}" if name else problem)
        self.problem, self.field, self.owner = problem, field, owner

    def under(self, where: str) -> ConfigError:
        """The same error, of the config that stands at ``where`` in a larger one."""
        return ConfigError(self.problem, field=join(where, self.field))


class Text(str):
    """A value as typed on the command line: read according to the type of its field."""

    __slots__ = ()


class _MismatchError(Exception):
    """A value is not of the wanted type."""


def convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``; ConfigError at the dotted name ``where``."""
    origin = get_origin(hint)
    if origin is Annotated:
        return convert(get_args(hint)[0], value, where)
    try:
        if origin in (Union, types.UnionType):
            return _convert_union(hint, value, where)
        if origin is tuple:
            return _convert_tuple(get_args(hint), value, where)
        if origin is Literal:
            return next(choice for choice in get_args(hint) if is_choice(value, choice))
        if isinstance(hint, type) and issubclass(hint, Enum):
            return next(m for m in hint if value is m or is_choice(value, m.value))
        if dataclasses.is_dataclass(hint):
            return _convert_fields(hint, value, where)
        if hint in _SCALARS:
            return _SCALARS[hint](value)
    except (_MismatchError, StopIteration):
        raise _mismatch(hint, value, where) from None
    raise TypeError(f"{where}: a config field cannot be of type {hint}")


def _convert_fields(cls: Any, value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if isinstance(value, Text):
        value = _decoded(value, "{")
    if not isinstance(value, Mapping):
        raise _MismatchError
    names, hints = field_names(cls), get_type_hints(cls, include_extras=True)
    for key in value:
        if key not in names:
            nearest = did_you_mean(key, names) or f"; its fields are {', '.join(names)}"
            raise ConfigError(f"no such field of {cls.__name__}{nearest}", field=join(where, key))
    arguments = {key: convert(hints[key], item, join(where, key)) for key, item in value.items()}
    for field in dataclasses.fields(cls):
        defaults = (field.default, field.default_factory)
        required = field.init and all(value is dataclasses.MISSING for value in defaults)
        if required and field.name not in arguments:
            expected = _describe(hints[field.name])
            raise ConfigError(f"is missing, expected {expected}", field=join(where, field.name))
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise error.under(where) from None


def _convert_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, Text):
        if value.startswith("["):
            value = _decoded(value, "[")
        else:
            value = [Text(part.strip()) for part in value.split(",")] if value else []
    if not isinstance(value, list | tuple):
        raise _MismatchError
    if items[-1:] == (...,):
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise _MismatchError
    pairs = zip(items, value, strict=True)
    return tuple(convert(item, part, f"{where}[{i}]") for i, (item, part) in enumerate(pairs))


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    members = get_args(hint)
    groups = [member for member in members if dataclasses.is_dataclass(member)]
    if groups and isinstance(value, Text) and value.startswith("{"):
        value = _decoded(value, "{")
    if groups and isinstance(value, Mapping):
        return convert(_meant(groups, value, where), value, where)
    results, deeper = [], None
    for member in members:
        try:
            results.append(convert(member, value, where))
        except ConfigError as error:
            deeper = error if error.field != where else deeper
    if not results:
        raise deeper or _mismatch(hint, value, where)
    # "5" may be a number or text, 5 an int or a float: the value's own type, else the narrowest.
    same = [result for result in results if type(result) is type(value)]
    return min(same or results, key=lambda result: _WIDTH.get(type(result), 0))


def _meant(groups: list[Any], value: Mapping[str, Any], where: str) -> Any:
    """The config class among ``groups`` whose Literal fields agree with ``value``, else whose names do."""

    def fit(group: Any) -> tuple[int, int]:
        hints, names = get_type_hints(group), field_names(group)
        tags = [name for name in names if get_origin(hints[name]) is Literal and name in value]
        agree = [any(is_choice(value[tag], c) for c in get_args(hints[tag])) for tag in tags]
        return 2 * sum(agree) - len(agree), sum(1 if key in names else -1 for key in value)

    fits = [fit(group) for group in groups]
    if fits.count(max(fits)) > 1:
        which = " or ".join(group.__name__ for group in groups)
        raise ConfigError(f"unclear whether {which} is meant, got {brief(value)}", field=where)
    return groups[fits.index(max(fits))]


def _decoded(text: Text, opening: str) -> Any:
    try:
        value = json.loads(text) if text.startswith(opening) else None
    except (ValueError, RecursionError):
        value = None
    if value is None:
        raise _MismatchError
    return value


def _none(value: Any) -> None:
    if value is not None and not (isinstance(value, Text) and value.lower() in ("none", "null")):
        raise _MismatchError


def _bool(value: Any) -> bool:
    if isinstance(value, Text):
        value = {"true": True, "false": False}.get(value.lower())
    if not isinstance(value, bool):
        raise _MismatchError
    return value


def _int(value: Any) -> int:
    if isinstance(value, Text) and re.fullmatch(r"[+-]?[0-9]{1,4000}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _MismatchError
    return value


def _float(value: Any) -> float:
    try:
        value = float(value) if isinstance(value, Text) else value
    except ValueError:
        raise _MismatchError from None
    if not is_number(value):
        raise _MismatchError
    return float(value)


def _str(value: Any) -> str:
    if isinstance(value, Text):
        value = _decoded(value, '"') if value.startswith('"') else str(value)
    if not isinstance(value, str):
        raise _MismatchError
    return value


def _path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(_str(value))


_SCALARS: dict[Any, Any] = {
    types.NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    Path: _path,
}
_WIDTH: dict[type, int] = {float: 1, type(Path()): 2, str: 3}


def is_number(value: object) -> bool:
    """A finite int or float that a float can hold."""
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:
        return False


def is_choice(value: object, choice: object) -> bool:
    if isinstance(value, Text):
        return str(value) in (str(choice), show(choice))
    return type(value) is type(choice) and value == choice


def _mismatch(hint: Any, value: Any, where: str) -> ConfigError:
    nearest = did_you_mean(value, [str(choice) for choice in _choices(hint)])
    return ConfigError(f"must be {_describe(hint)}, got {brief(value)}{nearest}", field=where)


def _describe(hint: Any) -> str:
    """What a value of this type is, in words that continue "must be"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in args)
    if origin is tuple and args[-1:] == (...,):
        return f"a list, each item {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(_describe(item) for item in args)}"
    if _choices(hint):
        return one_of(_choices(hint))
    if dataclasses.is_dataclass(hint):
        return f"the fields of {getattr(hint, '__name__', hint)}"
    return _WORDS.get(hint, str(hint))


_WORDS: dict[Any, str] = {
    types.NoneType: "none",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    Path: "a path",
}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal, an enum or a union with one of them names."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return tuple(member.value for member in hint)
    if get_origin(hint) in (Annotated, Union, types.UnionType):
        return tuple(choice for member in get_args(hint) for choice in _choices(member))
    return ()


def one_of(choices: Iterable[object]) -> str:
    """The choices in words."""
    shown = [repr(choice) for choice in choices]
    return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """ "; did you mean NAME?", or nothing when none is near."""
    found = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def brief(value: object) -> str:
    """The value in a message."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def show(value: object) -> str:
    """The value as ``override`` reads it back, whatever the type of its field."""
    if isinstance(value, str):
        # Text that could be read as something else, or could not be seen, stands in quotes.
        plain = (
            value.isprintable() and value == value.strip() and value[:1] not in ("", '"', "[", "{")
        )
        return value if plain and not _is_other(value) else json.dumps(value)
    return "none" if value is None else json.dumps(value)


def _is_other(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("none", "null", "true", "false")
    return True


def field_names(cls: Any) -> list[str]:
    """The names of the fields that the constructor takes."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def join(*names: object) -> str:
    """A dotted name; empty parts are left out."""
    return ".".join(str(name) for name in names if name != "")

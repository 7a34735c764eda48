"""Frozen dataclasses from plain mappings, built strictly: no key is dropped, no type is guessed."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from beartype.door import is_bearable

from efficient_attn.errors import UserError, unknown

T = TypeVar("T")


def build(cls: type[T], options: Mapping[str, Any], *, where: str) -> T:
    """An instance of the dataclass `cls` with `options` as its fields.

    `where` names the options in messages ("config.train", "linformer"). Lists become tuples and
    integers become floats where the field asks for that; nothing else is converted. A field whose
    type is itself a dataclass takes a mapping, a tuple of them mappings.

    Raises:
        UserError: an unknown name, a value of another type, or whatever `cls.__post_init__`
        refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise unknown(f"option of {where}", name, fields)
        values[name] = _coerce(value, fields[name], where=f"{where}.{name}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _coerce(value: Any, hint: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return build(hint, value, where=where)
    if isinstance(value, list):
        value = tuple(value)
    members = typing.get_args(hint) or (hint,)
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple:
        value = tuple(
            _coerce(x, members[0], where=f"{where}[{i}]") if isinstance(x, Mapping) else x
            for i, x in enumerate(value)
        )
    if isinstance(value, int) and not isinstance(value, bool) and float in members:
        value = float(value) if int not in members else value
    if not _fits(value, hint):
        raise UserError(f"{where} must be {describe(hint)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value!r}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value is of this type: no bool for an int, and every element of a tuple fits."""
    members = typing.get_args(hint) or (hint,)
    if isinstance(value, tuple):  # of which beartype tries one element, drawn at random
        kinds = [kind for kind in (hint, *members) if typing.get_origin(kind) is tuple]
        return any(all(_fits(x, typing.get_args(kind)[0]) for x in value) for kind in kinds)
    if isinstance(value, bool) and bool not in members and not _literal(hint, value):
        return False
    return is_bearable(value, hint)


def _literal(hint: Any, value: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal and value in typing.get_args(hint)


def describe(hint: Any) -> str:
    """A type hint in words: `int`, `one of 'a', 'b'`, `float or None`."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if typing.get_origin(hint) is tuple:
        return "a tuple of " + describe(args[0])
    if args:
        return " or ".join(describe(a) for a in args)
    name = getattr(hint, "noun", getattr(hint, "__name__", str(hint)))
    return "None" if hint is type(None) else name


def at_least(options: Any, least: int, *names: str) -> None:
    """Raise UserError unless each of these fields of a dataclass is `least` or more."""
    for name in names:
        value = getattr(options, name)
        require(value >= least, f"{name} must be at least {least}, not {value}")


def positive_or_none(options: Any, *names: str) -> None:
    """Raise UserError unless each of these fields of a dataclass is None or above 0."""
    for name in names:
        value = getattr(options, name)
        require(value is None or value > 0, f"{name}={value} must be positive")


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)

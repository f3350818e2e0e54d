"""JSON objects that gere wrote: read and checked here, so that no other code meets a value of a wrong type.

A format is a `NamedTuple` or a dataclass. The types of its fields say what is accepted; a field with a default may be
missing, and a field that the format does not know is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gere._files import read_regular
from gere.errors import GeReError, brief

T = TypeVar("T")
# Makes the error of a format from the place, what was expected there, and what was found.
Fail = Callable[[str, str, str], GeReError]
MOST_BYTES = 2**26


class MisfitError(ValueError):
    """A value has another type than its format says; `place`, `expected` and `found` say which."""

    def __init__(self, place: str, expected: str, found: object) -> None:
        super().__init__(f"{place}: {expected} expected, {brief(found)} found")
        self.place, self.expected, self.found = place, expected, brief(found)


def read_record(path: Path, form: type[T], fail: Fail, *, most: int = MOST_BYTES, others: bool = False) -> T:
    """Read a file of one JSON object.

    Args:
        path: The file; not a device or a pipe.
        form: The format.
        fail: Makes the error about a file that cannot be read or has another form.
        most: Bytes that the file may have.
        others: Leave out fields that the format does not know, since the file is that of another program.
    """
    return parse_record(read_raw(path, fail, most=most), path, form, fail, others=others)


def read_raw(path: Path, fail: Fail, *, most: int = MOST_BYTES) -> bytes:
    """Read the bytes of such a file."""
    try:
        return read_regular(path, most)
    except (OSError, ValueError) as error:
        raise fail(str(path), "a file that can be read", f"{type(error).__name__}: {error}") from error


def parse_record(raw: bytes, path: Path, form: type[T], fail: Fail, *, others: bool = False) -> T:
    """Read the bytes of a file as `read_record` does."""
    try:
        content = json.loads(raw)
        if others and isinstance(content, dict):
            content = {name: value for name, value in content.items() if name in get_type_hints(form)}
        return typed(content, form)  # type: ignore[no-any-return]
    except MisfitError as error:
        place = f"{path}, {error.place}" if error.place else str(path)
        raise fail(place, error.expected, error.found) from error
    # Brackets that are nested too deep raise a RecursionError.
    except (ValueError, RecursionError) as error:
        raise fail(str(path), "a JSON object", f"{type(error).__name__}: {error}") from error


def typed(value: Any, hint: Any, place: str = "") -> Any:
    """Return a value of JSON as an object of the type `hint`; or raise a `MisfitError`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, inner, place)
    if origin is list:
        _require(isinstance(value, list), place, "a list", value)
        return [typed(item, inner[0], f"{place}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), place, "an object", value)
        return {name: typed(item, inner[1], _below(place, name)) for name, item in value.items()}
    if origin is Literal:
        _require(type(value) is type(inner[0]) and value in inner, place, " or ".join(map(repr, inner)), value)
        return value
    if hint is float:
        return _number(value, place)
    if hint in (str, int, bool, None, type(None)):
        # `type` and not `isinstance`: True is an int, too.
        sound = type(value) is (type(None) if hint is None else hint)
        _require(sound and (hint is not int or -(2**63) <= value < 2**63), place, _name(hint), value)
        return value
    return _record(value, hint, place)


def _record(value: Any, form: Any, place: str) -> Any:
    _require(isinstance(value, dict), place, "an object", value)
    hints, defaults = _fields(form)
    for name in value:
        _require(name in hints, place, f"an object of {', '.join(hints)}", f"a field {brief(name)}")
    for name in hints:
        _require(name in value or name in defaults, _below(place, name), "a field", "nothing")
    return form(**{name: typed(item, hints[name], _below(place, name)) for name, item in value.items()})


@cache
def _fields(form: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Return the types of the fields of a format, and the names of those that may be missing."""
    hints = get_type_hints(form)
    if dataclasses.is_dataclass(form):
        needed = {
            field.name
            for field in dataclasses.fields(form)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        return hints, frozenset({*hints} - needed)
    return hints, frozenset(form._field_defaults)


def _one_of(value: Any, hints: tuple[Any, ...], place: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    # A place inside of the value is worth more than the list of the types.
    if len(others) == 1:
        return typed(value, others[0], place)
    for hint in others:
        try:
            return typed(value, hint, place)
        except MisfitError:
            continue
    raise MisfitError(place, " or ".join(map(_name, hints)), value)


def _number(value: Any, place: str) -> float:
    number = math.nan
    if type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:  # JSON has integers of any size
            number = math.inf
    _require(math.isfinite(number), place, "a finite number", value)
    return number


def _name(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
    return names.get(hint, "null" if hint in (None, type(None)) else "an object or a list")


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _require(ok: bool, place: str, expected: str, found: object) -> None:
    if not ok:
        raise MisfitError(place, expected, found)

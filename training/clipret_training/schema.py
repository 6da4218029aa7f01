"""Types and ranges of settings. msgspec checks each setting; `clipret.schema` checks whole files.

Messages describe the allowed values in words that come from the same types, because msgspec's own messages name only
the violated bound and use the terms of JSON (Expected `int | null`, got `str`).
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from clipret.errors import ClipretError

__all__ = [
    "MANY",
    "Count",
    "Degrees",
    "Factor",
    "Number",
    "PartialShare",
    "Positive",
    "PositiveShare",
    "Share",
    "Whole",
    "check",
    "check_fields",
    "describe",
    "hints",
    "takes_text",
]

MANY = 10**9  # the maximum of values without a natural limit: no infinity and nothing that overflows
_FINITE = sys.float_info.max

Whole = Annotated[int, Meta(ge=0, le=MANY)]
Count = Annotated[int, Meta(ge=1, le=MANY)]
Number = Annotated[float, Meta(ge=-_FINITE, le=_FINITE)]
Factor = Annotated[float, Meta(ge=0, le=_FINITE)]
Positive = Annotated[float, Meta(gt=0, le=_FINITE)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Degrees = Annotated[float, Meta(ge=0, le=45)]
PartialShare = Annotated[float, Meta(ge=0, lt=1)]


def check(what: str, value: Any, hint: Any) -> None:
    """Check the type and range of a value.

    Args:
        what: The name of the value in messages.
        value: A value from TOML or the command line.
        hint: A type, with a range such as `Annotated[int, Meta(ge=1)]`.

    Raises:
        ClipretError: The value is wrong. The message has the allowed values and the closest one.

    Examples:
        >>> check("epochs", 0, Count)
        Traceback (most recent call last):
        clipret.errors.ClipretError: epochs is 0: it must be a whole number from 1 to 1e+09
    """
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        near = difflib.get_close_matches(str(value), _words(hint), n=1, cutoff=0.4)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ClipretError(f"{what} is {value!r}{guess}: it must be {describe(hint)}") from error


def check_fields(settings: Any, prefix: str = "") -> None:
    """Check the types and ranges of all fields of a dataclass.

    The values do not change: msgspec would convert a learning rate of 1 to 1.0, and the run would get another identity.

    Args:
        settings: An instance of a dataclass whose types have ranges.
        prefix: Comes before the names of the fields in messages.

    Raises:
        ClipretError: A field has the wrong type or is out of range.
    """
    for name, hint in hints(type(settings)).items():
        check(prefix + name, getattr(settings, name), hint)


def hints(kind: Any) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields with their ranges, by name."""
    named = typing.get_type_hints(kind, include_extras=True)
    return {field.name: named[field.name] for field in dataclasses.fields(kind)}


def describe(hint: Any) -> str:
    """Describe a type in words.

    Examples:
        >>> describe(Share | None)
        'a finite number from 0 to 1 or left out'
    """
    return " or ".join(map(_description, _members(hint)))


def takes_text(hint: Any) -> bool:
    """Return whether a string can be a value of this type."""
    return any(kind is str or typing.get_origin(kind) is Literal for kind in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _description(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}
    if kind is types.NoneType:
        return "left out"
    match typing.get_origin(kind):
        case typing.Literal:
            return f"one of {', '.join(_words(kind))}"
        case typing.Annotated:
            plain, meta = typing.get_args(kind)
            return _description(plain) + _range(meta)
        case builtin if builtin is tuple:
            return f"a list of {', '.join(_words(kind)) or 'strings'}"
    return names[kind]


def _range(meta: Meta) -> str:
    if meta.min_length is not None:
        return f", at least {meta.min_length}"
    low = f" from {meta.ge:g}" if meta.ge is not None else f" above {meta.gt:g}" if meta.gt is not None else ""
    low = "" if meta.ge == -_FINITE else low
    if meta.lt is not None:
        return f"{low}{' to' if meta.ge is not None else ' and'} below {meta.lt:g}"
    return low if meta.le in (None, _FINITE) else f"{low}{' to' if meta.ge is not None else ' up to'} {meta.le:g}"


def _words(hint: Any) -> list[str]:
    """The strings that a type allows, if it is a choice."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [word for part in typing.get_args(hint) if not isinstance(part, Meta) for word in _words(part)]

"""The types and ranges of settings, checked by msgspec one by one; files are checked whole by `clipret.schema`.

What is allowed is said in words made of the same types: msgspec's own message names only the bound that is missed, in
the words of JSON (Expected `int | null`, got `str`).
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

MANY = 10**9  # where there is no other limit: neither infinity nor what no machine word holds
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
    """Let a value pass that is of a type and in its range.

    Args:
        what: What a message calls the value.
        value: As TOML or the command line gives it.
        hint: A type, with ranges as `Annotated[int, Meta(ge=1)]`.

    Raises:
        ClipretError: It is another; the message says what is allowed, and the choice that is near.
    """
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        near = difflib.get_close_matches(str(value), _words(hint), n=1, cutoff=0.4)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise ClipretError(f"{what} is {value!r}{guess}: it must be {describe(hint)}") from None


def check_fields(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass.

    Values stay as they are: msgspec would make 1.0 of a learning rate of 1, and so another run of one from before.

    Args:
        settings: An instance whose fields have types with ranges.
        prefix: What stands before the names of its fields in a message.

    Raises:
        ClipretError: A field has a value of another type or out of its range.
    """
    for name, hint in hints(type(settings)).items():
        check(prefix + name, getattr(settings, name), hint)


def hints(kind: Any) -> Mapping[str, Any]:
    """The types of a dataclass's fields, by name, with their ranges."""
    named = typing.get_type_hints(kind, include_extras=True)
    return {field.name: named[field.name] for field in dataclasses.fields(kind)}


def describe(hint: Any) -> str:
    """A type as a reader of a message wants it: `Share | None` is "a finite number from 0 to 1 or left out"."""
    return " or ".join(map(_description, _members(hint)))


def takes_text(hint: Any) -> bool:
    """Whether a text may be a value of this type."""
    return any(kind is str or typing.get_origin(kind) is Literal for kind in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _description(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    if kind is types.NoneType:
        return "left out"
    match typing.get_origin(kind):
        case typing.Literal:
            return f"one of {', '.join(_words(kind))}"
        case typing.Annotated:
            plain, meta = typing.get_args(kind)
            return _description(plain) + _range(meta)
        case builtin if builtin is tuple:
            return f"a list of {', '.join(_words(kind)) or 'texts'}"
    return names[kind]


def _range(meta: Meta) -> str:
    if meta.min_length is not None:
        return f", {meta.min_length} at least"
    low = f" from {meta.ge:g}" if meta.ge is not None else f" above {meta.gt:g}" if meta.gt is not None else ""
    low = "" if meta.ge == -_FINITE else low
    if meta.lt is not None:
        return f"{low}{' to' if meta.ge is not None else ' and'} below {meta.lt:g}"
    return low if meta.le in (None, _FINITE) else f"{low}{' to' if meta.ge is not None else ' up to'} {meta.le:g}"


def _words(hint: Any) -> list[str]:
    """The texts that a type allows, where they can be named."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [word for part in typing.get_args(hint) if not isinstance(part, Meta) for word in _words(part)]

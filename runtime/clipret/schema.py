"""Validate parsed files with msgspec: types and ranges are declared once, and an error is one line.

msgspec reports the field and what is allowed there. The line adds the value, the choices of a Literal and the keys of
objects.
"""

import re
import reprlib
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

__all__ = ["Amount", "Count", "Filled", "Hash", "checked"]

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(gt=0)]
Filled = Annotated[str, msgspec.Meta(pattern=r"\S")]
Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A sha256 digest in hex."""


def checked(value: object, schema: type[T]) -> T:
    """Convert parsed JSON or TOML to the type that a schema declares.

    Args:
        value: Dicts, lists, strings and numbers.
        schema: A `msgspec.Struct`, or a container of structs.

    Raises:
        ValueError: The value does not match. The message is one line with the field, its value and what is allowed.

    Examples:
        >>> checked(0, Count)
        Traceback (most recent call last):
        ValueError: it is 0: expected int >= 1
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        expected, _, path = str(error).replace("`", "").partition(" - at $")
        where, bad_value, hint = _walk(path, value, schema)
        if expected.startswith("Object "):  # a missing or unknown field: the value would not help
            raise ValueError(f"{where or 'it'}: {expected.removeprefix('Object ')}") from error
        if get_origin(hint) is Literal:
            expected = f"expected one of {', '.join(map(str, get_args(hint)))}"
        raise ValueError(
            f"{where or 'it'} is {reprlib.repr(bad_value)}: {expected[0].lower()}{expected[1:]}"
        ) from error


def _walk(path: str, value: Any, hint: Any) -> tuple[str, Any, Any]:
    """Resolve msgspec's path to the field's name, the value there, and its declared type."""
    where = ""
    for step in re.findall(r"\.\w+|\[\d+\]|\[\.\.\.\]", path):
        hint = _plain(hint)
        if step == "[...]":  # an entry of an object, whose key msgspec does not report
            hint = get_args(hint)[1]
            key = next(key for key, entry in value.items() if not _fits(entry, hint))
            where, value = f"{where}.{key}", value[key]
        elif step.startswith("["):
            hint, value, where = get_args(hint)[0], value[int(step[1:-1])], where + step
        else:
            hint = get_type_hints(hint, include_extras=True)[step[1:]]
            value, where = value[step[1:]], where + step
    return where.removeprefix("."), value, _plain(hint)


def _plain(hint: Any) -> Any:
    """Strip the ranges and an optional None from a type."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return _plain(kinds[0]) if type(None) in get_args(hint) and len(kinds) == 1 else hint


def _fits(value: object, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True

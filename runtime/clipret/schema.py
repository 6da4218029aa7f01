"""What a file must hold, by msgspec: types and ranges are declared once, and what is wrong is one line.

msgspec names the place and what is allowed. The line adds the value, the choices of a Literal and the keys of objects.
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
"""Of sha256, in hex."""


def checked(value: object, schema: type[T]) -> T:
    """Parsed JSON or TOML as what a schema says.

    Args:
        value: Dicts, lists, texts and numbers.
        schema: A `msgspec.Struct`, or a container of some.

    Raises:
        ValueError: It is something else. The text is one line with the field, its value and what is allowed.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        said, _, path = str(error).replace("`", "").partition(" - at $")
        where, found, hint = _walk(path, value, schema)
        if said.startswith("Object "):  # a field that is missing or unknown: the value would say nothing
            raise ValueError(f"{where or 'it'}: {said.removeprefix('Object ')}") from None
        if get_origin(hint) is Literal:
            said = f"expected one of {', '.join(map(str, get_args(hint)))}"
        raise ValueError(f"{where or 'it'} is {reprlib.repr(found)}: {said[0].lower()}{said[1:]}") from None


def _walk(path: str, value: Any, hint: Any) -> tuple[str, Any, Any]:
    """The place that msgspec means, the value there, and what it should be."""
    where = ""
    for step in re.findall(r"\.\w+|\[\d+\]|\[\.\.\.\]", path):
        hint = _plain(hint)
        if step == "[...]":  # an entry of an object, whose key msgspec does not tell
            hint = get_args(hint)[1]
            key = next(key for key, one in value.items() if not _fits(one, hint))
            where, value = f"{where}.{key}", value[key]
        elif step.startswith("["):
            hint, value, where = get_args(hint)[0], value[int(step[1:-1])], where + step
        else:
            hint = get_type_hints(hint, include_extras=True)[step[1:]]
            value, where = value[step[1:]], where + step
    return where.removeprefix("."), value, _plain(hint)


def _plain(hint: Any) -> Any:
    """A type without its ranges, and without the None that it may be."""
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

"""Options that hold several settings: --rerank adapt=50,hubness=nnn and their like."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Settings", "merged"]


class Settings(click.ParamType[Any]):
    """KEY=VALUE, several with commas between them, for the fields of a dataclass; becomes a dict of typed values.

    Args:
        owner: The dataclass.
        leave_out: Fields that have options of their own.
        files: Further keys, whose values are paths.
    """

    name = "settings"

    def __init__(self, owner: type, *, leave_out: Sequence[str] = (), files: Sequence[str] = ()) -> None:
        hints = get_type_hints(owner)
        self._kinds = {field.name: hints[field.name] for field in fields(owner) if field.name not in leave_out}
        self._kinds |= dict.fromkeys(files, Path)
        self._defaults = {field.name: field.default for field in fields(owner) if field.default is not MISSING}

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 (click's own signature)
        return "KEY=VALUE[,…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Mapping):
            return value
        found: dict[str, Any] = {}
        for part in str(value).split(","):
            key, equals, text = part.partition("=")
            key = key.strip().replace("-", "_")
            if key not in self._kinds:
                near = difflib.get_close_matches(key, self._kinds, n=1)
                self.fail(f"{part!r} sets nothing: {f'did you mean {near[0]}?' if near else self.told()}", param, ctx)
            if key in found:
                self.fail(f"{key} is set twice: keep one of the values.", param, ctx)
            try:
                found[key] = _typed(self._kinds[key], text.strip() if equals else None)
            except ValueError as error:
                self.fail(f"{part!r} cannot be used: {key} is {error}.", param, ctx)
        return found

    def told(self) -> str:
        """The keys and what each is left alone, for a message."""
        shown = [f"{name}={self._defaults[name]}" if name in self._defaults else name for name in self._kinds]
        return f"the settings are {', '.join(shown)}."

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 (click names both by keyword)
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        before, comma, start = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}=") for name in self._kinds if name.startswith(start)]


def merged(given: Sequence[Mapping[str, Any]], option: str) -> dict[str, Any]:
    """The settings of an option that was given several times. Raises click.UsageError for a key that is there twice."""
    result: dict[str, Any] = {}
    for one in given:
        for key in one.keys() & result.keys():
            raise click.UsageError(f"{option} sets {key} twice: keep one of the values.")
        result |= one
    return result


def _typed(kind: Any, text: str | None) -> Any:
    """A value of this type. Raises ValueError that says what it has to be. A key alone switches a flag on."""
    if get_origin(kind) is UnionType:
        kind = next(one for one in get_args(kind) if one is not type(None))
    if kind is bool:
        try:
            return {None: True, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text]
        except KeyError:
            raise ValueError("true or false") from None
    if text is None:
        raise ValueError("given as KEY=VALUE")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return text
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    return kind(text)

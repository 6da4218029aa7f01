"""Options that take several settings, such as --rerank adapt=50,hubness=nnn."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Settings", "merged"]


class Settings(click.ParamType[Any]):
    """KEY=VALUE pairs separated by commas, for the fields of a dataclass; becomes a dict of typed values.

    A comma that no known key follows belongs to the value before it, where that is a text: an SQL expression needs no
    escapes.

    Args:
        owner: The dataclass.
        leave_out: Fields that have options of their own.
        files: Further keys, whose values are paths.
        first: The key that a leading value without "KEY=" sets.
    """

    name = "settings"

    def __init__(
        self, owner: type, *, leave_out: Sequence[str] = (), files: Sequence[str] = (), first: str | None = None
    ) -> None:
        hints = get_type_hints(owner)
        self._kinds = {field.name: hints[field.name] for field in fields(owner) if field.name not in leave_out}
        self._kinds |= dict.fromkeys(files, Path)
        self._defaults = {field.name: field.default for field in fields(owner) if field.default is not MISSING}
        self._first = first

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 (click's own signature)
        return f"{self._first.upper()}[,KEY=VALUE…]" if self._first else "KEY=VALUE[,…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Mapping):
            return value
        settings: dict[str, Any] = {}
        for key, part, text in self._split(str(value)):
            if key not in self._kinds:
                near = difflib.get_close_matches(key, self._kinds, n=1)
                hint = f"did you mean {near[0]}?" if near else self.describe()
                self.fail(f"{part!r} is not a setting: {hint}", param, ctx)
            if key in settings:
                self.fail(f"{key} is set twice: keep one of the values.", param, ctx)
            try:
                settings[key] = _typed(self._kinds[key], text)
            except ValueError as error:
                self.fail(f"{part!r} is not valid: {key} must be {error}.", param, ctx)
        return settings

    def _split(self, value: str) -> Iterator[tuple[str, str, str | None]]:
        """Key, source text and value of each setting; a key alone has no value."""
        pending: tuple[str, str, str | None] | None = None
        for number, part in enumerate(value.split(",")):
            name, equals, text = part.partition("=")
            key = name.strip().replace("-", "_")
            if key in self._kinds:
                if pending:
                    yield pending
                pending = key, part, text.strip() if equals else None
            elif pending and pending[2] is not None and _is_text(self._kinds.get(pending[0])):
                pending = pending[0], f"{pending[1]},{part}", f"{pending[2]},{part}"
            else:
                if pending:
                    yield pending
                first = number == 0 and self._first is not None
                pending = (str(self._first), part, part) if first else (key, part, text.strip() if equals else None)
        if pending:
            yield pending

    def describe(self) -> str:
        """The keys and their defaults, for a message."""
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


def merged(values: Sequence[Mapping[str, Any]], option: str) -> dict[str, Any]:
    """The settings of an option that may be repeated. Raises click.UsageError for a key that is set twice."""
    settings: dict[str, Any] = {}
    for value in values:
        for key in value.keys() & settings.keys():
            raise click.UsageError(f"{option} sets {key} twice: keep one of the values.")
        settings |= value
    return settings


def _is_text(kind: Any) -> bool:
    return kind in (str, Path) or bool({str, Path} & set(get_args(kind)))


def _typed(kind: Any, text: str | None) -> Any:
    """`text` as a value of this type; a key alone (None) turns a flag on. Raises ValueError that says what is valid."""
    if get_origin(kind) in (UnionType, Union):
        kind = next(option for option in get_args(kind) if option is not type(None))
    if kind is bool:
        try:
            return {None: True, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text]
        except KeyError as error:
            raise ValueError("true or false") from error
    if text is None:
        raise ValueError("given a value, as KEY=VALUE")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return text
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError as error:
            raise ValueError("a whole number" if kind is int else "a number") from error
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    return kind(text)

"""Shell completion: what a half-typed command of clipret-search can become."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipret.errors import ClipretError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["MarkedFolder", "column_names", "gallery_columns", "list_columns"]

_HEAD = 1 << 16  # bytes of a list in which its header is looked for


class MarkedFolder(click.Path):
    """A folder that a file in it makes a gallery or a bundle: those are offered first, then any folder to go on in."""

    def __init__(self, marker: str, otherwise: str = "dir") -> None:
        super().__init__(path_type=Path)
        self._marker, self._otherwise = marker, otherwise  # what is offered where there is no such folder

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 (click names both by keyword)
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        before, slash, start = incomplete.rpartition("/")
        try:
            names = sorted(
                one.name
                for one in Path(f"{before}{slash}").expanduser().iterdir()
                if one.name.startswith(start) and (one / self._marker).is_file()
            )
        except OSError:
            names = []
        if names:
            return [CompletionItem(f"{before}{slash}{name}") for name in names]
        return [CompletionItem(incomplete, type=self._otherwise)]


def gallery_columns(context: click.Context, _parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The columns of the gallery that was named before, for the last word of an expression."""
    from clipret.gallery.gallery import Gallery
    from clipret.tables import OWN_COLUMNS

    try:
        with Gallery.open(_given(context)["gallery"]) as gallery:
            return _offered([*gallery.columns(), *OWN_COLUMNS], incomplete)
    except (KeyError, ClipretError):
        return []


def list_columns(context: click.Context, _parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The columns of the list that was named before."""
    given = _given(context)
    named = [given[name] for name in ("queries", "captions", "texts") if name in given]
    named += map(str, context.params.get("places") or context.args)
    headers = [header for one in named if Path(one).is_file() and (header := _header(Path(one)))]
    return _offered(headers[0], incomplete) if headers else []


def column_names(kinds: Sequence[str]) -> "Callable[[click.Context, click.Parameter, str], list[CompletionItem]]":
    """Completes KIND=NAME: the kinds, then the columns of the file that was named before."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        kind, equals, start = incomplete.partition("=")
        if not equals:
            return [CompletionItem(f"{name}=") for name in kinds if name.startswith(kind)]
        return [CompletionItem(f"{kind}={item.value}") for item in list_columns(context, parameter, start)]

    return complete


def _given(context: click.Context) -> dict[str, str]:
    """The command's arguments so far. click gives up sorting them once the last option lacks its value."""
    names = [str(one.name) for one in context.command.params if isinstance(one, click.Argument)]
    return dict(zip(names, context.args, strict=False)) | {
        name: str(context.params[name]) for name in names if context.params.get(name)
    }


def _offered(columns: Iterable[str], incomplete: str) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    before, space, start = incomplete.rpartition(" ")
    return [CompletionItem(f"{before}{space}{column}") for column in columns if column.startswith(start)]


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            line = file.read(_HEAD).decode("utf-8-sig", "ignore").splitlines()[0]
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return list(json.loads(line))
        return next(csv.reader([line], delimiter=max(",\t;|", key=line.count)))
    except (OSError, ValueError, IndexError, csv.Error):
        return []

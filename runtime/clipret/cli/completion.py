"""Shell completion: what a half-typed command of clipret-search can become; and clipret-search completion."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clipret.errors import ClipretError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["MarkedFolder", "completion", "gallery_columns", "list_columns"]

_HEAD = 1 << 16  # bytes of a list in which its header is looked for


class MarkedFolder(click.Path):
    """A folder that a file in it makes a gallery or a bundle: those are offered first, then any folder to go on in."""

    def __init__(self, marker: str) -> None:
        super().__init__(path_type=Path)
        self._marker = marker

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
        return [CompletionItem(incomplete, type="dir")]


def gallery_columns(context: click.Context, _parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The columns of the gallery that was named before, for the last word of an expression."""
    from clipret.gallery.gallery import Gallery
    from clipret.sources.item import RESERVED

    try:
        with Gallery.open(_given(context)["gallery"]) as gallery:
            return _offered([*gallery.columns(), *RESERVED], incomplete)
    except (KeyError, ClipretError):
        return []


def list_columns(context: click.Context, _parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """The columns of the list that was named before."""
    given = _given(context)
    named = next((given[name] for name in ("queries", "source", "captions", "texts") if name in given), None)
    return [] if named is None else _offered(_header(Path(named)), incomplete)


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


@click.command(
    epilog="Example:  clipret-search completion bash > ~/.local/share/bash-completion/completions/clipret-search"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete clipret-search with the tab key.

    It completes commands, options and their choices, galleries, bundles and files, and the columns that --where and
    its like can name.

    \b
    bash   clipret-search completion bash > ~/.local/share/bash-completion/completions/clipret-search
    zsh    clipret-search completion zsh > "${fpath[1]}/_clipret-search"    (then start zsh anew)
    fish   clipret-search completion fish > ~/.config/fish/completions/clipret-search.fish

    For one session of bash:  eval "$(clipret-search completion bash)"
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    made = kind(context.find_root().command, {}, "clipret-search", "_CLIPRET_SEARCH_COMPLETE")
    click.echo(kind.source_template % made.source_vars())

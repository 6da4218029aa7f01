"""What the three commands share: errors as one line, progress bars, small tables."""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from clipret.errors import ClipretError, printable

__all__ = ["DefaultGroup", "Group", "LazyGroup", "headed", "progress", "show_table", "stages"]

T = TypeVar("T")


class Group(click.Group):
    """A command with subcommands. A ClipretError becomes one line on stderr and exit status 1, a warning one line;
    usage errors stay click's, with status 2; Ctrl-C is one line and status 130, as of a process that SIGINT ends.

    Colours go to terminals alone, and not where NO_COLOR is set.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        def show(message: Warning | str, *_: Any) -> None:
            click.echo(f"{click.style(self.name, fg='yellow')}: {printable(str(message))}", err=True)

        if os.environ.get("NO_COLOR"):
            kwargs.setdefault("color", False)
        colour: bool | None = kwargs.get("color")

        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            # Pillow warns of oddities of single images; those that matter are errors (see clipret.images.decode).
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                return super().main(*args, **kwargs)
            except ClipretError as error:
                message = str(error)
            except MemoryError as error:
                message = f"there is not enough memory ({error}): make the batch smaller, or use a larger machine"
            except OSError as error:  # of the results on stdout, above all: the library's own are ClipretErrors
                place = error.filename or "the output or the working folder"
                message = f"{place} cannot be used ({error.strerror or error}): free space, or choose another place"
            click.echo(f"{click.style(self.name, fg='red', bold=True)}: {printable(message)}", err=True, color=colour)
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo(f"{self.name}: interrupted", err=True)
            context.exit(130)


class LazyGroup(Group):
    """A command whose subcommands are imported when they are called for, and all of them for --help.

    Args:
        lazy: The sections of the help text; in each, "module:attribute" of every subcommand by its name.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, Mapping[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = lazy
        self._lazy = {name: target for section in lazy.values() for name, target in section.items()}

    def list_commands(self, context: click.Context) -> list[str]:  # noqa: ARG002 (click's own signature)
        return list(self._lazy)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self._lazy))
        for title, names in self._sections.items():
            commands = [(name, self.get_command(context, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands if command])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in self._lazy:
            return None
        module, _, attribute = self._lazy[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class DefaultGroup(Group):
    """A command whose subcommand named `default` may be left out: `clipret-export SOURCE BUNDLE`."""

    default = "export"

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = [self.default, *args]
        return super().parse_args(context, args)


def progress(items: Iterable[T], *, total: int | None = None, desc: str = "", unit: str = "it") -> Iterable[T]:
    """`items` behind a progress bar on stderr, which stays silent when stderr is no terminal."""
    from tqdm import tqdm  # not at the top: a query shows no bar and should not pay for it

    bar: Iterable[T] = tqdm(items, total=total, desc=desc, unit=unit, disable=None, dynamic_ncols=True, leave=False)
    return bar


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Inside the block, stage("loading") shows on stderr what is being done and since when, if stderr is a terminal."""
    from tqdm import tqdm

    with tqdm(disable=None, bar_format="{desc} [{elapsed}]", leave=False) as bar:

        def stage(what: str) -> None:
            bar.set_description_str(what)
            bar.refresh()

        yield stage


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, numbers to the right; wide (Chinese) characters count as two columns."""
    table = [list(header), *map(list, rows)]
    widths = [max(_width(row[column]) for row in table) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in table:
        cells = []
        for value, width, right in zip(row, widths, numeric, strict=True):
            pad = " " * (width - _width(value))
            cells.append(pad + value if right else value + pad)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def headed(text: str) -> str:
    """`text` with its first line in bold, for click.echo, which leaves that out where it writes to no terminal."""
    head, end, rest = text.partition("\n")
    return f"{click.style(head, bold=True)}{end}{rest}"


def _width(text: str) -> int:
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).rstrip("%").isdigit()

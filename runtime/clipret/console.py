"""Shared by the three commands: errors in one line, progress bars, small tables."""

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import click

from clipret import logs
from clipret.errors import ClipretError, printable

__all__ = ["DefaultGroup", "Group", "LazyGroup", "headed", "progress", "show_table", "stages"]

T = TypeVar("T")
_LOGGING = "clipret.logging"
_log = logging.getLogger(__name__)


class Group(click.Group):
    """A command with subcommands.

    A ClipretError is printed as one line on stderr and exits with status 1; a warning is one line. Usage errors are
    click's, with status 2. Ctrl-C is one line and status 130, as for a process that SIGINT ends.

    Output is coloured only on terminals, and not if NO_COLOR is set. -v, --log-level and --log-format are options of
    the group and of each of its commands. CLIPRET_DEBUG=1 in the environment shows the traceback of an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_logging(self, hidden=False)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(_add_logging(cmd), name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        def show(message: Warning | str, *_: Any) -> None:
            if logs.is_json():
                _log.warning(printable(str(message)))
            else:
                click.echo(f"{click.style(self.name, fg='yellow')}: {printable(str(message))}", err=True)

        if os.environ.get("NO_COLOR"):
            kwargs.setdefault("color", False)
        colour: bool | None = kwargs.get("color")

        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            # Pillow warns about oddities of single images; those that matter are errors (see clipret.images.decode).
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                return super().main(*args, **kwargs)
            except ClipretError as error:
                self._report(error, str(error), colour)
            except MemoryError as error:
                message = f"out of memory ({error}): use a smaller batch size or a larger machine"
                self._report(error, message, colour)
            except OSError as error:  # mostly from writing results to stdout: the library raises ClipretError
                path = error.filename or "the output or the working folder"
                message = f"{path} cannot be used ({error.strerror or error}): free space, or choose another path"
                self._report(error, message, colour)
            finally:
                logs.reset()
            sys.exit(1)

    def _report(self, error: BaseException, message: str, colour: bool | None) -> None:
        debug = bool(os.environ.get("CLIPRET_DEBUG")) or _log.isEnabledFor(logging.DEBUG)
        if logs.is_json():
            _log.error(printable(message), exc_info=error if debug else None)
            return
        if debug:
            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        click.echo(f"{click.style(self.name, fg='red', bold=True)}: {printable(message)}", err=True, color=colour)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo(f"{self.name}: interrupted", err=True)
            context.exit(130)


def _add_logging(command: click.Command, *, hidden: bool = True) -> click.Command:
    """Add -v, --log-level and --log-format to a command once; `hidden` leaves them out of the help text."""

    def level(context: click.Context, _option: click.Parameter, value: int | str | None) -> None:
        if value:
            name = value if isinstance(value, str) else "info" if value == 1 else "debug"
            context.meta.setdefault(_LOGGING, {})["level"] = name
            logs.configure(**context.meta[_LOGGING])

    def form(context: click.Context, _option: click.Parameter, value: str | None) -> None:
        if value:
            context.meta.setdefault(_LOGGING, {})["form"] = value
            logs.configure(**context.meta[_LOGGING])

    if not any(parameter.name == "log_level" for parameter in command.params):
        command.params += [
            click.Option(
                ["-v", "--verbose"],
                count=True,
                expose_value=False,
                callback=level,
                hidden=hidden,
                help="Log progress to stderr; -vv for details. This and the next two also work after a command.",
            ),
            click.Option(
                ["--log-level"],
                type=click.Choice(logs.LEVELS),
                expose_value=False,
                callback=level,
                hidden=hidden,
                help="Log messages of this level and above.",
            ),
            click.Option(
                ["--log-format"],
                type=click.Choice(get_args(logs.Format)),
                expose_value=False,
                callback=form,
                hidden=hidden,
                help="Text, or one JSON object per line, warnings and errors included.",
            ),
        ]
    return command


class LazyGroup(Group):
    """A command whose subcommands are imported when they are used; --help imports them all.

    Args:
        lazy: For each section of the help text, the "module:attribute" of every subcommand by its name.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, Mapping[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sections = lazy
        self._lazy = {name: target for section in lazy.values() for name, target in section.items()}

    def list_commands(self, context: click.Context) -> list[str]:  # noqa: ARG002 (click's own signature)
        return list(self._lazy)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self._lazy))
        for section, names in self._sections.items():
            commands = [(name, self.get_command(context, name)) for name in names]
            with formatter.section(section):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands if command])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in self._lazy:
            return None
        module, _, attribute = self._lazy[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return _add_logging(command)


class DefaultGroup(Group):
    """A command with a default subcommand, whose name may be left out: `clipret-export SOURCE BUNDLE`."""

    default = "export"

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        first = 0  # after the options of the group
        while first < len(args) and args[first].startswith(("-v", "--verbose", "--log-")):
            first += 2 if args[first] in ("--log-level", "--log-format") else 1
        if args[first:] and args[first] not in self.commands and args[first] not in ("-h", "--help", "--version"):
            args = [*args[:first], self.default, *args[first:]]
        return super().parse_args(context, args)


def progress(items: Iterable[T], *, total: int | None = None, desc: str = "", unit: str = "it") -> Iterable[T]:
    """Iterate with a progress bar on stderr; there is none if stderr is not a terminal.

    Args:
        items: What to iterate over.
        total: Number of items, if known.
        desc: Label of the bar.
        unit: What is counted.
    """
    from tqdm import tqdm  # imported late: a query shows no bar

    bar: Iterable[T] = tqdm(items, total=total, desc=desc, unit=unit, disable=None, dynamic_ncols=True, leave=False)
    return bar


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current stage and its elapsed time on stderr, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(disable=None, bar_format="{desc} [{elapsed}]", leave=False) as bar:

        def stage(what: str) -> None:
            _log.info(what)
            bar.set_description_str(what)
            bar.refresh()

        yield stage


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned text; numbers are right-aligned, wide (Chinese) characters count as two columns.

    Examples:
        >>> print(show_table(("name", "n"), [("a", "7"), ("b", "12")]))
        name   n
        a      7
        b     12
    """
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
    """Make the first line bold, for click.echo, which strips the style if it does not write to a terminal."""
    head, end, rest = text.partition("\n")
    return f"{click.style(head, bold=True)}{end}{rest}"


def _width(text: str) -> int:
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).rstrip("%").isdigit()

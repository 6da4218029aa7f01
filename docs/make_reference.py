"""Writes docs/reference/: every option of every command, as the commands' own --help has it.

    python docs/make_reference.py            # after a change to a command

A test compares the files with what this writes into another folder, which may be named behind it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from clipret.cli import main as search
from clipret_export.cli import main as export
from clipret_training.cli import main as train

COMMANDS: tuple[click.Group, ...] = (train, export, search)
OUT = Path(__file__).parent / "reference"
WIDTH = 110


def commands(group: click.Group) -> Iterator[tuple[str, click.Command, click.Context]]:
    """The whole name of each command below a group, itself first, the others by name; and what it is called in."""

    def below(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
        yield context.command_path, command, context
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                if child is not None and not child.hidden:
                    yield from below(child, click.Context(child, parent=context, info_name=name, terminal_width=WIDTH))

    settings = {name: group.context_settings[name] for name in ("help_option_names",)}
    return below(group, click.Context(group, info_name=group.name, terminal_width=WIDTH, **settings))


def page(group: click.Group) -> str:
    """A group's page, in Markdown."""
    head = f"# Options of {group.name}\n\nWritten by `python docs/make_reference.py` from `--help`; "
    parts = [head + "[the guides](../README.md) say by example what one does with them.\n"]
    parts += [
        f"## {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
        for name, command, context in commands(group)
    ]
    return "\n".join(parts)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    out.mkdir(exist_ok=True)
    for group in COMMANDS:
        (out / f"{group.name}.md").write_text(page(group), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Results in a terminal: images above the table, links to files in it."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from clipret.console import headed, show_table
from clipret.errors import printable
from clipret.search.searcher import Hit

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Way", "hits_table", "seen", "show_option", "way"]

Way = Literal["kitty", "sixel", "links", "none"]

_HEIGHT = 128  # pixels of a row of images
_MOST = 30  # images of a query

show_option = click.option(
    "--show",
    type=click.Choice(["auto", "kitty", "sixel", "links", "none"]),
    default="auto",
    show_default=True,
    help="Show images in the terminal, or links to the files; auto: what the terminal supports. In a pipe: none.",
)


def way(show: str) -> Way:
    """How to show images on stdout; "none" when it is not a terminal."""
    if show == "none" or sys.stdout is None or not sys.stdout.isatty():
        return "none"
    if show == "auto":
        from clipret.cli.terminal import detect

        return detect(os.environ)
    return show  # type: ignore[return-value]  # click has checked it


def seen(hits: Sequence[Hit], how: Way) -> str:
    """The first images side by side, numbered by rank; empty when the terminal cannot show them."""
    if how not in ("kitty", "sixel") or not hits:
        return ""
    from clipret.cli.terminal import kitty, pixels_across, sixel, strip
    from clipret.images.decode import thumbnail
    from clipret.images.walk import ImageError
    from clipret.sources.source import read_stored

    found: list[Image.Image | None] = []
    for hit in hits[:_MOST]:
        try:
            found.append(thumbnail(read_stored(hit.file.parent, hit.file.name).content, 4 * _HEIGHT))
        except ImageError:
            found.append(None)
    return (kitty if how == "kitty" else sixel)(strip(found, pixels_across(), _HEIGHT))


def hits_table(hits: Sequence[Hit], how: Way) -> str:
    """Rank, score and path of each."""
    rows = [(str(hit.rank), f"{hit.score:.4f}", printable(hit.path)) for hit in hits]
    head, *lines = headed(show_table(("rank", "score", "path"), rows)).splitlines()
    if how == "none":
        return "\n".join([head, *lines])
    from clipret.cli.terminal import link

    shown = [head]
    for line, hit, (_, _, path) in zip(lines, hits, rows, strict=True):
        there = line.endswith(path) and hit.file.is_file()  # a member of an archive cannot be opened
        shown.append(line[: -len(path)] + link(hit.file, path) if there else line)
    return "\n".join(shown)

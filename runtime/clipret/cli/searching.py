"""What the commands that search share."""

from collections.abc import Sequence
from pathlib import Path

import click

from clipret.cli.options import Runtime
from clipret.gallery.gallery import Gallery
from clipret.inference.encoder import Encoder
from clipret.openers import open_searchable
from clipret.search.searcher import Forms, Searcher

__all__ = ["gallery_facts", "open_searcher"]


def open_searcher(place: Path | str, runtime: Runtime, templates: Forms = ("{}",)) -> Searcher:
    """A searcher over a gallery, or over the collection of milvus+URI."""
    opened = open_searchable(place)
    if not isinstance(opened, Gallery) and opened.changing:
        click.echo(f"{opened.name} is being changed, or an export was interrupted: run the export again", err=True)
    return Searcher(opened, Encoder(opened.bundle(runtime.bundle), runtime.config), templates=templates)


def gallery_facts(searcher: Searcher) -> Sequence[tuple[str, str]]:
    manifest = searcher.encoder.bundle.manifest
    return (("images", f"{searcher.searched.count():,}"), ("model", f"{manifest.model} {manifest.precision}"))

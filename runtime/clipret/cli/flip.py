"""clipret-search mirror: flip averaging."""

from pathlib import Path

import click

from clipret.cli.options import (
    FILE,
    GALLERY,
    SHOWN,
    Runtime,
    json_option,
    print_json,
    runtime_options,
)
from clipret.console import progress
from clipret.errors import ClipretError, printable
from clipret.gallery.gallery import Gallery
from clipret.indexing.flip import mirror_gallery
from clipret.inference.encoder import Encoder

__all__ = ["mirror"]


@click.command(epilog="Example:  clipret-search mirror gallery/ mirrored/")
@click.argument("gallery", type=GALLERY)
@click.argument("out", type=FILE)
@runtime_options
@json_option
def mirror(
    gallery: Path,
    out: Path,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Make the gallery OUT, whose rows are the mean of each picture of GALLERY and its mirror image.

    A second opinion on every picture ("flip averaging") for one more pass of the image tower. OUT is searched like
    any gallery, with the same bundle. Run it again to go on after an interruption, or after GALLERY has grown.
    """
    with Gallery.open(gallery) as opened:
        encoder = Encoder(opened.bundle(runtime.bundle), runtime.config)
        added, skipped = mirror_gallery(
            opened, out, encoder, lambda starts: progress(starts, desc="mirror", unit="4096 pictures")
        )
    for path, reason in skipped[:SHOWN]:
        click.echo(f"skipped: {printable(path)}: {reason}", err=True)
    if skipped and not added:
        raise ClipretError(f"none of the {len(skipped)} pictures could be mirrored; the first: {skipped[0][1]}")
    if as_json:
        print_json({"added": added, "skipped": [{"path": path, "reason": reason} for path, reason in skipped]})
        return
    click.echo(f"{out}: {added} pictures added, {len(skipped)} skipped")

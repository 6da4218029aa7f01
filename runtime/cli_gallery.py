"""clipret-search index, remove, compact, info: what a gallery holds."""

from functools import partial
from pathlib import Path

import click

from clipret.bundle import Bundle
from clipret.cli_options import (
    FILE,
    SHOWN,
    device_option,
    engine_option,
    image_column_option,
    image_root_option,
    json_option,
    print_json,
    threads_option,
    where_list_option,
    where_option,
)
from clipret.compaction import compact_gallery
from clipret.console import progress, show_table
from clipret.encoder import Encoder
from clipret.errors import ClipretError, printable
from clipret.gallery import Gallery
from clipret.indexing import IndexReport, index_pictures
from clipret.sources import open_source
from clipret.towers import EngineChoice

__all__ = ["compact", "index", "info", "remove"]


@click.command(epilog="Example:  clipret-search index bundle/ list.csv gallery/ --where \"split = 'val'\"")
@click.argument("bundle", type=FILE)
@click.argument("source", type=FILE)
@click.argument("gallery", type=FILE)
@image_column_option
@image_root_option
@where_list_option
@click.option("--prune", is_flag=True, help="Also delete pictures that SOURCE no longer names.")
@click.option("--fast-decode", is_flag=True, help="Let JPEGs be shrunk while they are decoded; see above.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures an engine call.")
@click.option(
    "--picture-timeout", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds a picture may take."
)
@device_option
@engine_option
@threads_option
@json_option
def index(
    bundle: Path,
    source: Path,
    gallery: Path,
    image_column: str | None,
    image_root: Path | None,
    where: str | None,
    prune: bool,
    fast_decode: bool,
    batch_size: int,
    picture_timeout: float,
    device: str,
    engine: EngineChoice,
    threads: int | None,
    as_json: bool,
) -> None:
    """Encode the pictures of SOURCE with BUNDLE into GALLERY.

    \b
    SOURCE is
      a folder, walked recursively, or one picture
      a .csv, .tsv or .jsonl list with a column of paths; its other columns become metadata, for query --where
      .tar shards (webdataset), as shards/{000..127}.tar or a folder of them; .json and .txt beside a picture are
        its metadata
      a .zip, or a .parquet with paths or with the pictures themselves

    Run it again to add new and changed pictures, after an interruption too: what GALLERY holds already is not encoded
    twice, not even under another name. Pictures that cannot be read are skipped, counted, and named with the
    reason in GALLERY/skipped.tsv.

    --fast-decode reads large JPEGs two to four times faster; pixels then differ a little from those that the model
    was trained on (benchmarks/README.md has the figures).
    """
    encoder = Encoder(
        Bundle.open(bundle),
        device=device,
        engine=engine,
        threads=threads,
        batch_size=batch_size,
        fast_decode=fast_decode,
        picture_timeout=picture_timeout,
    )
    opened = open_source(source, image_column=image_column, image_root=image_root, where=where)
    encoder.image_tower  # noqa: B018 (a bundle that cannot encode must fail before a gallery is made)
    exists = (gallery / "gallery.json").exists()
    target = Gallery.open(gallery) if exists else Gallery.create(gallery, encoder.bundle, opened.root)
    shown = partial(progress, total=opened.count, desc="index", unit="pictures")
    with target:
        report = index_pictures(target, encoder, opened, shown, prune=prune)
        total = len(target)
    for path, reason in report.skipped[:SHOWN]:
        click.echo(printable(f"skipped {path}: {reason}"), err=True)
    if len(report.skipped) > SHOWN:
        click.echo(f"… and {len(report.skipped) - SHOWN} more in {target.path / 'skipped.tsv'}", err=True)
    if as_json:
        print_json(_as_dict(report, total))
        return
    removed = f", {report.removed} removed" if prune else ""
    click.echo(
        f"{target.path}: {total} pictures ({report.added} added, {report.changed} changed, "
        f"{report.unchanged} unchanged, {len(report.skipped)} skipped{removed}), {report.rate:.0f} pictures/s"
    )
    stages = report.stages
    if report.seconds > 1:  # shorter, and there is nothing to make faster
        click.echo(
            f"{report.seconds:.1f} s: engine {stages.engine_seconds:.1f}, waiting for pixels {stages.wait_seconds:.1f} "
            f"(decoding took {stages.decode_seconds:.1f} in its threads), writing {report.write_seconds:.1f}; "
            f"the limit is the {report.limit}",
            err=True,
        )


def _as_dict(report: IndexReport, total: int) -> dict[str, object]:
    stages = report.stages
    return {
        "added": report.added,
        "changed": report.changed,
        "copied": report.copied,
        "unchanged": report.unchanged,
        "removed": report.removed,
        "skipped": [{"path": path, "reason": reason} for path, reason in report.skipped],
        "total": total,
        "seconds": round(report.seconds, 3),
        "pictures_per_second": round(report.rate, 2),
        "decode_seconds": round(stages.decode_seconds, 3),
        "wait_seconds": round(stages.wait_seconds, 3),
        "engine_seconds": round(stages.engine_seconds, 3),
        "write_seconds": round(report.write_seconds, 3),
        "limit": report.limit,
    }


@click.command(epilog='Example:  clipret-search remove gallery/ red/0.jpg 17 --where "hour < 6"')
@click.argument("gallery", type=FILE)
@click.argument("pictures", nargs=-1)
@where_option
def remove(gallery: Path, pictures: tuple[str, ...], where: str | None) -> None:
    """Delete pictures from GALLERY: by path, by id, or all for which --where holds.

    The picture files are not touched. Nothing finds the pictures any more at once; clipret-search compact gives the
    room of their rows back. An index run adds them again while their files are in its source.
    """
    if not pictures and where is None:
        raise click.UsageError("name pictures by path or id, or choose them with --where")
    with Gallery.open(gallery) as opened:
        with opened.writing():
            ids = [_id(opened, name) for name in pictures]
            if where is not None:
                ids += opened.select(where).tolist()
            removed = opened.remove(ids)
        click.echo(f"{opened.path}: {removed} removed, {len(opened)} pictures left")


def _id(gallery: Gallery, name: str) -> int:
    """A picture may be called 17: a path goes before an id."""
    if name in gallery.database.by_path([name]) or not (name.isascii() and name.isdecimal() and len(name) < 19):
        return gallery.id_of(name)
    if not len(gallery.select(f"id = {name}")):
        raise ClipretError(f"{gallery.path} holds no picture {name}: clipret-search query --json shows ids")
    return int(name)


@click.command(epilog="Example:  clipret-search compact gallery/")
@click.argument("gallery", type=FILE)
def compact(gallery: Path) -> None:
    """Write GALLERY anew without its deleted rows, in few large files.

    Worth it after many small additions or many deletions: searches get faster and the room of deleted rows comes back.
    They find the same before and after; a service goes on while this runs. It needs room for the rows a second time.
    """
    with Gallery.open(gallery) as opened:
        dropped = compact_gallery(opened, partial(progress, desc="compact", unit="shards"))
        click.echo(f"{opened.path}: {len(opened)} pictures, {dropped} deleted rows dropped")


@click.command(epilog="Example:  clipret-search info gallery/ --duplicates")
@click.argument("gallery", type=FILE)
@click.option("--duplicates", is_flag=True, help="Also list the pictures whose files are equal byte for byte.")
@json_option
def info(gallery: Path, duplicates: bool, as_json: bool) -> None:
    """Tell what GALLERY holds: pictures, files, the model, and the columns that --where can use."""
    with Gallery.open(gallery) as opened:
        stored = opened.read()
        groups = opened.duplicates()
        size = sum(_size(file) for file in opened.path.iterdir())
        facts = {
            "pictures": len(opened),
            "deleted rows": len(stored.ids) - len(opened),
            "shards": len(stored.shards),
            "bytes": size,
            "embedding": f"float16 [{opened.info.embedding_dim}]",
            "duplicates": sum(map(len, groups)) - len(groups),
            "root": opened.info.root,
            "bundle": opened.info.bundle,
            "fingerprint": opened.info.fingerprint,
            "columns": ["id", "path", "size", "mtime_ns", "hash", *opened.columns()],
        }
    if as_json:
        print_json(facts | ({"duplicate_groups": groups} if duplicates else {}))
        return
    lines = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in facts.items()]
    click.echo(show_table(("of the gallery", ""), [(name, printable(value)) for name, value in lines]))
    for group in groups if duplicates else []:
        click.echo("\n" + "\n".join(map(printable, group)))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a writer has just renamed it
        return 0

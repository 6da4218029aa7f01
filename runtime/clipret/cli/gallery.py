"""clipret-search index, remove, compact, info: the contents of a gallery."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from clipret.bundle import Bundle
from clipret.cli.options import (
    GALLERY,
    PLACE,
    SHOWN,
    bundle_option,
    column_option,
    encoder_options,
    image_root_option,
    json_option,
    print_json,
    where_list_option,
    where_option,
)
from clipret.console import headed, progress, show_table
from clipret.errors import ClipretError, printable
from clipret.gallery.compaction import compact_gallery
from clipret.gallery.gallery import Gallery
from clipret.indexing.index import IndexReport, index_images
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder
from clipret.sources.source import Item, Source, open_source
from clipret.tables import OWN_COLUMNS

__all__ = ["compact", "index", "info", "remove"]


def _open_encoder(bundle: Bundle, config: EncoderConfig) -> Encoder:
    encoder = Encoder(bundle, config)
    encoder.image_tower  # noqa: B018 (a bundle that cannot encode must fail before a gallery is made)
    return encoder


@click.command(epilog="Example:  clipret-search index bundle/ list.csv gallery/ --where \"split = 'val'\"")
@click.argument("places", type=PLACE, nargs=-1, required=True, metavar="BUNDLE SOURCE... GALLERY | GALLERY SOURCE...")
@column_option("image")
@image_root_option
@where_list_option
@click.option("--prune", is_flag=True, help="Also delete images that are no longer in any SOURCE.")
@click.option("--flip", is_flag=True, help="In a new GALLERY: average each image with its horizontal flip; see above.")
@bundle_option
@encoder_options
@click.option("--ray", metavar="auto|HOST:PORT", help="Spread the work over a Ray cluster; see above.")
@click.option(
    "--workers", type=click.IntRange(1), help="With --ray: number of encoders; default: one per GPU, or what fits."
)
@json_option
def index(
    places: tuple[Path | str, ...],
    image_column: str | None,
    image_root: Path | None,
    where: str | None,
    prune: bool,
    flip: bool,
    bundle: Path | None,
    config: EncoderConfig,
    ray: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Encode the images of each SOURCE with BUNDLE into GALLERY.

    \b
    clipret-search index BUNDLE SOURCE... GALLERY    create or update a gallery
    clipret-search index GALLERY SOURCE...           add to an existing gallery, with its own bundle

    \b
    SOURCE is
      a folder, walked recursively, or one image
      a .csv, .tsv or .jsonl annotations file with a column of paths; its other columns become metadata, which
        query --where can use
      .tar shards (webdataset), as shards/{000..127}.tar or a folder of them; an image's .json and .txt are its
        metadata
      a .zip, or a .parquet file with paths or with the images themselves
      images, .tar or .parquet files in an object store: s3://bucket/shards/{000..999}.tar, gs://…, hdfs://…

    Run the command again to add new and changed images, or to continue after an interruption: images that GALLERY
    already has are not encoded twice, even under another name. Images that cannot be read are skipped, counted, and
    listed with the reason in GALLERY/skipped.tsv. Images that are no longer in any SOURCE stay, unless --prune is
    given. Images below GALLERY's root (see clipret-search info) are named relative to it, others by absolute path.

    --flip stores the mean of each image's embedding and its horizontal flip's, which takes a second pass of the image
    tower. GALLERY remembers the setting.

    --encoder fast_decode reads large JPEGs two to four times faster. Pixels then differ slightly from those that the
    model was trained on (figures: benchmarks/README.md), so use it for all images of a gallery or for none.

    --ray auto spreads the work over this machine's Ray cluster, or over this machine alone if it has none;
    --ray HOST:PORT over another cluster. The bundle and local sources must have the same path on every machine;
    GALLERY is written on this one. See docs/cluster.md.
    """
    if workers is not None and ray is None:
        raise click.UsageError("--workers is the number of encoders on a cluster: add --ray")
    model, sources, folder = _places(places, bundle)
    encoder = _open_encoder(model, config) if ray is None else None  # what cannot encode must fail before all else
    opened = _joined(
        [open_source(one, image_column=image_column, image_root=image_root, where=where) for one in sources]
    )

    def target() -> Gallery:
        if not (folder / "gallery.json").exists():
            return Gallery.create(folder, model, opened.root, flipped=flip)
        held = Gallery.open(folder)
        if flip and not held.info.flipped:
            raise ClipretError(f"gallery {folder} was made without --flip: leave --flip out, or choose a new folder")
        # A run that found nothing has made it.
        return held if len(held) or places[0] == folder else held.rooted(opened.root)

    if encoder is not None:
        with target() as into:
            _fill(into, opened, as_json, partial(index_images, into, encoder, opened, prune=prune), prune=prune)
        return
    from clipret.indexing.ray_cluster import connect, index_on_cluster
    from clipret.indexing.ray_worker import Settings

    flipped = flip or ((folder / "gallery.json").exists() and Gallery.open(folder).info.flipped)
    settings = Settings(model.path.absolute(), model.fingerprint, config, flipped)
    with connect(str(ray), settings, workers) as pool, target() as into:
        click.echo(f"{pool.workers} workers of {pool.settings.encoder.threads} threads", err=True)
        _fill(into, opened, as_json, partial(index_on_cluster, into, pool, opened, prune=prune), prune=prune)


def _places(places: Sequence[Path | str], bundle: Path | None) -> tuple[Bundle, Sequence[Path | str], Path]:
    """The bundle, the sources and the gallery that a command line names, in either of its two forms."""
    first, last = places[0], places[-1]
    if isinstance(first, Path) and (first / "gallery.json").is_file():
        if len(places) < 2:
            raise click.UsageError(f"{first} is a gallery: name the images to add after it")
        with Gallery.open(first) as held:
            return held.bundle(bundle), places[1:], first
    if len(places) < 3:
        raise click.UsageError("name BUNDLE SOURCE... GALLERY, or GALLERY SOURCE... for an existing gallery")
    if bundle is not None:
        raise click.UsageError("--bundle is for the form GALLERY SOURCE...: here the bundle is the first argument")
    if isinstance(first, str) or isinstance(last, str):
        raise click.UsageError("a bundle and a gallery are local folders")
    return Bundle.open(first), places[1:-1], last


def _joined(sources: Sequence[Source]) -> Source:
    """Several sources as one, in their order; the paths of its items are absolute, or addresses."""
    if len(sources) == 1:
        return sources[0]
    columns = dict.fromkeys(column for source in sources for column in source.columns)
    counts = [source.count for source in sources if source.count is not None]

    def items() -> Iterator[Item]:
        for source in sources:
            top = source.root.absolute()
            for item in source:
                yield item if "://" in item.path else replace(item, path=(top / item.path).as_posix())

    return Source(Path("/"), tuple(columns), sum(counts) if len(counts) == len(sources) else None, items)


def _fill(
    target: Gallery, source: Source, as_json: bool, run: Callable[..., IndexReport], *, prune: bool = False
) -> None:
    """Index into a gallery, and say what was done."""
    report = run(partial(progress, total=source.count, desc="index", unit="images"))
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
        f"{target.path}: {total} images ({report.added} added, {report.changed} changed, "
        f"{report.unchanged} unchanged, {len(report.skipped)} skipped{removed}), {report.rate:.0f} images/s"
    )
    stages = report.stages
    if report.seconds > 1:  # for shorter runs nobody needs the bottleneck
        click.echo(
            f"{report.seconds:.1f} s: model {stages.compute_seconds:.1f}, waiting for pixels {stages.wait_seconds:.1f} "
            f"(decoding: {stages.decode_seconds:.1f} over all threads), writing {report.write_seconds:.1f}; "
            f"bottleneck: {report.bottleneck}",
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
        "images_per_second": round(report.rate, 2),
        "decode_seconds": round(stages.decode_seconds, 3),
        "wait_seconds": round(stages.wait_seconds, 3),
        "compute_seconds": round(stages.compute_seconds, 3),
        "write_seconds": round(report.write_seconds, 3),
        "bottleneck": report.bottleneck,
    }


@click.command(epilog='Example:  clipret-search remove gallery/ red/0.jpg 17 --where "hour < 6"')
@click.argument("gallery", type=GALLERY)
@click.argument("images", nargs=-1)
@where_option
@json_option
def remove(gallery: Path, images: tuple[str, ...], where: str | None, as_json: bool) -> None:
    """Delete images from GALLERY: by path, by id, or all for which --where holds.

    The image files are not touched. Searches no longer return the images from now on; clipret-search compact frees
    their space. Indexing adds them again as long as their files are in its source.
    """
    if not images and where is None:
        raise click.UsageError("name images by path or id, or choose them with --where")
    with Gallery.open(gallery) as opened:
        with opened.writing():
            ids = [_id(opened, name) for name in images]
            if where is not None:
                ids += opened.select(where).tolist()
            removed = opened.remove(ids)
        if as_json:
            print_json({"removed": removed, "total": len(opened)})
        else:
            click.echo(f"{opened.path}: {removed} removed, {len(opened)} images left")


def _id(gallery: Gallery, name: str) -> int:
    """The id of an image; a path such as "17" takes precedence over an id."""
    if name in gallery.database.by_path([name]) or not (name.isascii() and name.isdecimal() and len(name) < 19):
        return gallery.id_of(name)
    if not len(gallery.select(f"id = {name}")):
        raise ClipretError(f"{gallery.path} holds no image {name}: clipret-search query --json shows ids")
    return int(name)


@click.command(epilog="Example:  clipret-search compact gallery/")
@click.argument("gallery", type=GALLERY)
@json_option
def compact(gallery: Path, as_json: bool) -> None:
    """Rewrite GALLERY without its deleted embeddings, in a few large files.

    Worthwhile after many small additions or many deletions: searches become faster and disk space is freed. Results
    stay the same, and a service keeps running meanwhile. It needs disk space for a second copy of the embeddings.
    """
    with Gallery.open(gallery) as opened:
        dropped = compact_gallery(opened, partial(progress, desc="compact", unit="shards"))
        if as_json:
            print_json({"dropped": dropped, "total": len(opened)})
        else:
            click.echo(f"{opened.path}: {len(opened)} images, {dropped} deleted embeddings dropped")


@click.command(epilog="Example:  clipret-search info gallery/ --duplicates")
@click.argument("gallery", type=GALLERY)
@click.option("--duplicates", is_flag=True, help="Also list images whose files are identical.")
@json_option
def info(gallery: Path, duplicates: bool, as_json: bool) -> None:
    """Show what GALLERY contains: images, files, the model, and the columns for --where."""
    with Gallery.open(gallery) as opened:
        stored = opened.read()
        groups = opened.duplicates()
        size = sum(_size(file) for file in opened.path.iterdir())
        facts = {
            "images": len(opened),
            "deleted embeddings": len(stored.ids) - len(opened),
            "shards": len(stored.shards),
            "bytes": size,
            "embedding": f"float16 [{opened.info.embedding_dim}]",
            "duplicates": sum(map(len, groups)) - len(groups),
            "root": opened.info.root,
            "bundle": opened.info.bundle,
            "fingerprint": opened.info.fingerprint,
            "columns": [*OWN_COLUMNS, *opened.columns()],
        }
    if as_json:
        print_json(facts | ({"duplicate_groups": groups} if duplicates else {}))
        return
    lines = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in facts.items()]
    click.echo(headed(show_table(("of the gallery", ""), [(name, printable(value)) for name, value in lines])))
    for group in groups if duplicates else []:
        click.echo("\n" + "\n".join(map(printable, group)))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a writer has just renamed it
        return 0

"""clipret-search export and import: embeddings for other tools, and from them."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, cast

import click

from clipret.bundle import Bundle
from clipret.cli.options import BUNDLE, FILE, GALLERY, SHOWN, column_option, json_option, print_json, where_option
from clipret.console import progress
from clipret.errors import ClipretError, printable
from clipret.gallery.embeddings import BLOCK, open_embeddings
from clipret.gallery.gallery import Gallery
from clipret.gallery.transfer import ImportReport, Kind, export_gallery, import_embeddings


@click.command("export", epilog="Example:  clipret-search export gallery/ embeddings.parquet --where \"camera = 'A3'\"")
@click.argument("gallery", type=GALLERY)
@click.argument("target")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["parquet", "npy", "faiss", "milvus"]),
    help="What TARGET is; default: what it ends in says it.",
)
@where_option
@click.option("--index", metavar="TYPE", help="Of milvus: FLAT (exact, the default), IVF_FLAT, HNSW, GPU_CAGRA, …")
@click.option("--index-param", "parameters", metavar="NAME=N", multiple=True, help="Of its index: nlist=1024, M=16, …")
@click.option("--overwrite", is_flag=True, help="Let milvus TARGET hold GALLERY where it holds another one.")
@json_option
def export_command(
    gallery: Path,
    target: str,
    kind: str | None,
    where: str | None,
    index: str | None,
    parameters: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the embeddings of GALLERY to TARGET, for other tools.

    \b
    TARGET ends in
      .parquet   id, path, size, mtime_ns, hash, metadata, embedding (float32); for pandas, polars, duckdb
      .npy       float16 [N,D]; line n of TARGET.jsonl says what row n is
      .faiss     a flat inner product index under the gallery's ids; TARGET.jsonl says which image an id is

    Every row keeps its bits: clipret-search import makes the same gallery of a .parquet or .npy again. --where is an
    SQL expression over the gallery's columns, such as  camera = 'A3' and hour < 6.  A TARGET that exists is replaced.

    \b
    With --to milvus TARGET is http://HOST:19530#COLLECTION, or a .db file for Milvus Lite on this machine:
        clipret-search export gallery/ images.db --to milvus --index HNSW
        clipret-search query milvus+images.db "a red truck"
    Exported again, only what is new, changed or deleted is sent. docs/milvus.md says more.
    """
    shown = partial(progress, desc="export", unit="blocks")
    if kind != "milvus":
        if index or parameters or overwrite:
            raise click.UsageError("--index, --index-param and --overwrite are for --to milvus")
        file = Path(target)
        with Gallery.open(gallery) as opened:
            rows = export_gallery(opened, file, kind=cast("Kind | None", kind), where=where, progress=shown)
        if as_json:
            print_json({"target": str(file.absolute()), "embeddings": rows})
        else:
            click.echo(f"{file.absolute()}: {rows} embeddings")
        return
    from clipret.milvus.collection import Address
    from clipret.milvus.export import export_to_milvus

    address = Address.parse(target)
    if address.search:
        raise click.UsageError(f"what follows ? in {target} is for searches: leave it out here")
    with Gallery.open(gallery) as opened:
        report = export_to_milvus(
            opened,
            address,
            where=where,
            index=index,
            parameters=dict(map(_parameter, parameters)),
            take_over=overwrite,
            progress=shown,
        )
    if as_json:
        print_json({"target": str(address), **asdict(report)})
    else:
        click.echo(f"{address}: {report.total} images ({report.sent} sent, {report.deleted} deleted)")


def _parameter(given: str) -> tuple[str, int]:
    name, _, value = given.partition("=")
    if not name.isidentifier() or not value.isdecimal():
        raise click.UsageError(f"{given!r} is no NAME=N, such as nlist=1024")
    return name, int(value)


@click.command("import", epilog="Example:  clipret-search import bundle/ embeddings.npy gallery/ --paths images.csv")
@click.argument("bundle", type=BUNDLE)
@click.argument("embeddings", type=FILE)
@click.argument("gallery", type=GALLERY)
@click.option("--paths", type=FILE, help="List of the images that the rows belong to, in their order; see above.")
@column_option("image", "embedding")
@click.option("--image-root", type=FILE, help="What paths are relative to; default: GALLERY's images, else the list.")
@json_option
def import_command(
    bundle: Path,
    embeddings: Path,
    gallery: Path,
    paths: Path | None,
    image_column: str | None,
    embedding_column: str | None,
    image_root: Path | None,
    as_json: bool,
) -> None:
    """Append EMBEDDINGS of images, made elsewhere, to GALLERY, which is made where it does not exist.

    They must come from the image tower of the very model that BUNDLE was exported from: its text tower answers the
    queries, and rows of another model would be ranked at random.

    EMBEDDINGS is an .npy [N,D] with a list of N images (--paths: .csv, .tsv, .jsonl, or .txt with a path a line), an
    .npz that holds both, or a .parquet with a column of paths and one of float lists. Other columns become metadata.
    Rows that are not of unit length are normalised; those that are zero or not finite are skipped and named.
    """
    opened = Bundle.open(bundle)
    source = open_embeddings(embeddings, paths, image_column=image_column, embedding_column=embedding_column)
    if source.dimension != opened.manifest.embedding_dim:
        raise ClipretError(
            f"{embeddings} has rows of {source.dimension} values, {bundle} makes {opened.manifest.embedding_dim}: "
            "import what the same model made"
        )

    def shown(blocks: Iterable[Any]) -> Iterable[Any]:
        return progress(blocks, total=ceil(source.count / BLOCK), desc="import", unit="blocks")

    exists = (gallery / "gallery.json").exists()
    target = Gallery.open(gallery) if exists else Gallery.create(gallery, opened, image_root or source.folder)
    with target:
        target.check(opened)
        report = import_embeddings(target, source, image_root=image_root, progress=shown)
        total = len(target)
    _show(target, report, total, as_json)


def _show(gallery: Gallery, report: ImportReport, total: int, as_json: bool) -> None:
    for path, reason in report.skipped[:SHOWN]:
        click.echo(printable(f"skipped {path}: {reason}"), err=True)
    if len(report.skipped) > SHOWN:
        click.echo(f"… and {len(report.skipped) - SHOWN} more; --json names them all", err=True)
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in report.skipped]
        counts = {"imported": report.imported, "replaced": report.replaced, "normalised": report.normalised}
        print_json({**counts, "skipped": skipped, "total": total})
        return
    click.echo(
        f"{gallery.path}: {total} images ({report.imported} imported, {report.replaced} of them replaced, "
        f"{report.normalised} normalised, {len(report.skipped)} skipped)"
    )

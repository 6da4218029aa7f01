"""clipret-search export and import: embeddings to and from other tools."""

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
    help="Format of TARGET; default: by its extension.",
)
@where_option
@click.option("--index", metavar="TYPE", help="Milvus index: FLAT (exact, the default), IVF_FLAT, HNSW, GPU_CAGRA, …")
@click.option(
    "--index-param",
    "parameters",
    metavar="NAME=N",
    multiple=True,
    help="Parameter of the Milvus index: nlist=1024, M=16, …",
)
@click.option("--overwrite", is_flag=True, help="Replace another gallery in the Milvus collection.")
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
    By the extension of TARGET
      .parquet   id, path, size, mtime_ns, hash, metadata, embedding (float32); for pandas, polars, duckdb
      .npy       float16 [N,D]; line n of TARGET.jsonl describes row n
      .faiss     a flat inner-product index with the gallery's ids; TARGET.jsonl maps ids to images

    Embeddings keep every bit: clipret-search import rebuilds the same gallery from a .parquet or .npy file. --where is
    an SQL expression over the gallery's columns, such as  camera = 'A3' and hour < 6.  An existing TARGET is replaced.

    \b
    With --to milvus, TARGET is http://HOST:19530#COLLECTION, or a .db file for Milvus Lite on this machine:
        clipret-search export gallery/ images.db --to milvus --index HNSW
        clipret-search query milvus+images.db "a red truck"
    Another export sends only what is new, changed or deleted. See docs/milvus.md.
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
        raise click.UsageError(f"{target}: the part after ? is for searches: leave it out here")
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
        raise click.UsageError(f"{given!r} is not NAME=N, such as nlist=1024")
    return name, int(value)


@click.command("import", epilog="Example:  clipret-search import bundle/ embeddings.npy gallery/ --paths images.csv")
@click.argument("bundle", type=BUNDLE)
@click.argument("embeddings", type=FILE)
@click.argument("gallery", type=GALLERY)
@click.option("--paths", type=FILE, help="Annotations file with the image of each embedding, in order; see above.")
@column_option("image", "embedding")
@click.option(
    "--image-root", type=FILE, help="What paths are relative to; default: GALLERY's root, else the folder of the file."
)
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
    """Append EMBEDDINGS of images, computed elsewhere, to GALLERY, which is created if it does not exist.

    They must come from the image tower of the same model as BUNDLE, whose text tower encodes the queries: scores
    between embeddings of different models mean nothing.

    EMBEDDINGS is an .npy file [N,D] with the paths of the N images (--paths: .csv, .tsv, .jsonl, or .txt with a path a
    line), an .npz file with both, or a .parquet file with a column of paths and a column of float lists. Other columns
    become metadata. Embeddings that are not of unit length are normalised; zero or non-finite ones are skipped and
    listed.
    """
    opened = Bundle.open(bundle)
    source = open_embeddings(embeddings, paths, image_column=image_column, embedding_column=embedding_column)
    if source.dimension != opened.manifest.embedding_dim:
        raise ClipretError(
            f"{embeddings} has embeddings of {source.dimension} values, {bundle} of {opened.manifest.embedding_dim}: "
            "import embeddings of the same model"
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
        click.echo(f"… and {len(report.skipped) - SHOWN} more; --json lists all", err=True)
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in report.skipped]
        counts = {"imported": report.imported, "replaced": report.replaced, "normalised": report.normalised}
        print_json({**counts, "skipped": skipped, "total": total})
        return
    click.echo(
        f"{gallery.path}: {total} images ({report.imported} imported, {report.replaced} of them replaced, "
        f"{report.normalised} normalised, {len(report.skipped)} skipped)"
    )

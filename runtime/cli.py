"""clipret-search: index pictures, query them by text, evaluate."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from clipret.bundle import Bundle
from clipret.console import Group, progress, show_table
from clipret.encoder import Encoder
from clipret.errors import printable
from clipret.evaluation import GroundTruth, evaluate_search, read_ground_truth
from clipret.gallery import Gallery
from clipret.indexing import index_pictures, list_pictures
from clipret.metrics import Metrics
from clipret.page import Card, Section, write_page
from clipret.search import Hit, Searcher

FILE = click.Path(path_type=Path)

device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Processor threads; default: all there are.")
bundle_option = click.option("--bundle", type=FILE, help="The bundle, where it is no longer where it was at indexing.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
where_option = click.option(
    "--where", metavar="SQL", help="Only rows of the list for which this holds, e.g. \"split = 'val'\"."
)
image_column_option = click.option(
    "--image-column", metavar="NAME", help="Column of the pictures' paths; default: detected."
)
image_root_option = click.option(
    "--image-root", type=FILE, help="What paths in a list are relative to; default: its folder."
)


@click.group(
    "clipret-search", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Search pictures by text: exact results, no torch.

    \b
    clipret-search index BUNDLE pictures/ GALLERY      encode pictures once
    clipret-search query GALLERY "a red sedan"         find the best ten
    clipret-search eval GALLERY queries.csv            recall@k, mAP@10

    A bundle is a model ready to search with; clipret-export makes one.
    """


@main.command(epilog="Example:  clipret-search index bundle/ list.csv gallery/ --where \"split = 'val'\"")
@click.argument("bundle", type=FILE)
@click.argument("pictures", type=FILE)
@click.argument("gallery", type=FILE)
@image_column_option
@image_root_option
@where_option
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures an engine call.")
@device_option
@threads_option
@json_option
def index(
    bundle: Path,
    pictures: Path,
    gallery: Path,
    image_column: str | None,
    image_root: Path | None,
    where: str | None,
    batch_size: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Encode PICTURES with BUNDLE into GALLERY.

    PICTURES is a folder, walked recursively, or a .csv, .tsv or .jsonl list with a column of paths. Run it again to add
    new and changed pictures: those that GALLERY holds already are not encoded twice. Pictures that cannot
    be read are skipped, counted, and named with the reason in GALLERY/skipped.tsv.
    """
    encoder = Encoder(Bundle.open(bundle), device=device, threads=threads, batch_size=batch_size)
    files, root = list_pictures(pictures, image_column=image_column, image_root=image_root, where=where)
    encoder.image_tower  # noqa: B018 (a bundle that cannot encode must fail before a gallery is made)
    exists = (gallery / "gallery.json").exists()
    target = Gallery.open(gallery) if exists else Gallery.create(gallery, encoder.bundle, root)
    with target:
        report = index_pictures(target, encoder, files, lambda jobs: progress(jobs, desc="index", unit="pictures"))
        total = len(target)
    rate = report.encoded / report.seconds if report.seconds else 0.0
    for path, reason in report.skipped[:10]:
        click.echo(printable(f"skipped {path}: {reason}"), err=True)
    if len(report.skipped) > 10:
        click.echo(f"… and {len(report.skipped) - 10} more in {target.path / 'skipped.tsv'}", err=True)
    if as_json:
        counts = {"added": report.added, "changed": report.changed, "unchanged": report.unchanged}
        skipped = [{"path": path, "reason": reason} for path, reason in report.skipped]
        _print_json({**counts, "skipped": skipped, "total": total, "seconds": round(report.seconds, 3)})
        return
    click.echo(
        f"{target.path}: {total} pictures ({report.added} added, {report.changed} changed, "
        f"{report.unchanged} unchanged, {len(report.skipped)} skipped), {rate:.0f} pictures/s"
    )


@main.command(epilog='Example:  clipret-search query gallery/ "a red sedan" "一辆红色的轿车" -k 20 --html found.html')
@click.argument("gallery", type=FILE)
@click.argument("texts", nargs=-1, required=True)
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="How many pictures a text.")
@click.option("--html", type=FILE, help="Also write a page with the pictures.")
@json_option
@bundle_option
@device_option
@threads_option
def query(
    gallery: Path,
    texts: tuple[str, ...],
    k: int,
    html: Path | None,
    as_json: bool,
    bundle: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Find the pictures of GALLERY that fit each of TEXTS best.

    Prints rank, score (the cosine of picture and text) and path. Equal scores are ordered by age in the gallery.
    """
    searcher = _open(gallery, bundle, device, threads)
    with searcher.gallery:
        results = list(zip(texts, searcher.search(texts, k), strict=True))
        if html is not None:
            sections = [Section(text, [_card(hit) for hit in hits]) for text, hits in results]
            write_page(html, title=f"clipret: {gallery.name}", facts=_gallery_facts(searcher), sections=sections)
            click.echo(f"page: {html.absolute()}", err=True)
    if as_json:
        _print_json([{"query": text, "hits": [_as_dict(hit) for hit in hits]} for text, hits in results])
        return
    for number, (text, hits) in enumerate(results):
        if len(texts) > 1:
            click.echo(("\n" if number else "") + text)
        rows = [(str(hit.rank), f"{hit.score:.4f}", printable(hit.path)) for hit in hits]
        click.echo(show_table(("rank", "score", "path"), rows))


@main.command(
    "eval", epilog="Example:  clipret-search eval gallery/ captions.tsv --where \"split = 'val' and lang = 'en'\""
)
@click.argument("gallery", type=FILE)
@click.argument("queries", type=FILE)
@click.option("--title-column", metavar="NAME", help="Column of the query texts; default: detected.")
@image_column_option
@image_root_option
@where_option
@click.option("--html", type=FILE, help="Also write a page: queries, what they found, right or wrong.")
@click.option("--html-queries", type=click.IntRange(1), default=40, show_default=True, help="Queries it shows.")
@json_option
@bundle_option
@device_option
@threads_option
def eval_command(
    gallery: Path,
    queries: Path,
    title_column: str | None,
    image_column: str | None,
    image_root: Path | None,
    where: str | None,
    html: Path | None,
    html_queries: int,
    as_json: bool,
    bundle: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Measure how well GALLERY answers QUERIES.

    QUERIES is a .csv, .tsv or .jsonl list with a title and a picture a row: captions with their pictures, or
    queries with one row for each picture that answers them. Rows with the same title are one query.

    recall@k is the share of queries with a right picture among the first k; median rank is that of the first
    right picture; mAP@10 is the standard mean average precision over the first ten.
    """
    searcher = _open(gallery, bundle, device, threads)
    with searcher.gallery:
        truth = read_ground_truth(
            searcher, queries, title_column=title_column, image_column=image_column, image_root=image_root, where=where
        )
        metrics = evaluate_search(searcher, truth).metrics
        if html is not None:
            _write_eval_page(html, searcher, truth, metrics, html_queries)
            click.echo(f"page: {html.absolute()}", err=True)
    if truth.missing:
        click.echo(
            f"{truth.missing} pictures of {queries} are not in the gallery; {truth.unanswerable} queries left out",
            err=True,
        )
    if as_json:
        _print_json({**metrics.to_dict(), "missing_pictures": truth.missing, "queries_left_out": truth.unanswerable})
        return
    click.echo(show_table(("metric", "value"), _facts(metrics)))


def _open(gallery: Path, bundle: Path | None, device: str, threads: int | None) -> Searcher:
    opened = Gallery.open(gallery)
    return Searcher(opened, Encoder(opened.bundle(bundle), device=device, threads=threads))


def _write_eval_page(out: Path, searcher: Searcher, truth: GroundTruth, metrics: Metrics, count: int) -> None:
    """The page shows an even sample of the queries, so that it is neither the best nor the worst of them."""
    texts = list(truth.relevant)
    count = min(count, len(texts))
    sample = [texts[number * len(texts) // count] for number in range(count)]
    sections = []
    for text, hits in zip(sample, searcher.search(sample, 10), strict=True):
        right = set(truth.relevant[text])
        noun = "picture" if len(right) == 1 else "pictures"
        cards = [_card(hit, hit.path in right) for hit in hits]
        found = sum(hit.path in right for hit in hits)
        sections.append(Section(text, cards, f"{found} of the first {len(hits)} right; {len(right)} {noun} to find"))
    title = f"clipret: evaluation of {searcher.gallery.path.name}"
    write_page(out, title=title, facts=[*_facts(metrics), *_gallery_facts(searcher)], sections=sections)


def _gallery_facts(searcher: Searcher) -> Sequence[tuple[str, str]]:
    manifest = searcher.encoder.bundle.manifest
    return (("pictures", f"{len(searcher.gallery):,}"), ("model", f"{manifest.model} {manifest.precision}"))


def _facts(metrics: Metrics) -> Sequence[tuple[str, str]]:
    return (
        ("queries", f"{metrics.queries}"),
        ("recall@1", f"{100 * metrics.recall_at_1:.2f}%"),
        ("recall@5", f"{100 * metrics.recall_at_5:.2f}%"),
        ("recall@10", f"{100 * metrics.recall_at_10:.2f}%"),
        ("median rank", f"{metrics.median_rank:g}"),
        ("mAP@10", f"{metrics.map_at_10:.4f}"),
    )


def _card(hit: Hit, relevant: bool | None = None) -> Card:
    return Card(hit.file, hit.path, hit.score, relevant)


def _as_dict(hit: Hit) -> dict[str, object]:
    return {"rank": hit.rank, "id": hit.id, "score": hit.score, "path": hit.path, "file": str(hit.file)}


def _print_json(value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # File names that are not UTF-8 come as lone surrogates, for which JSON has an escape and UTF-8 nothing.
    click.echo(text.encode("utf-8", "backslashreplace").decode())


if __name__ == "__main__":
    main()

"""clipret-search query: finding images by text and image."""

from collections.abc import Sequence
from pathlib import Path

import click

from clipret.cli.options import (
    FILE,
    PAGE,
    SEARCHED,
    Number,
    Runtime,
    json_option,
    print_json,
    runtime_options,
    where_option,
)
from clipret.cli.rerank_options import open_reranker, prompts_option, read_texts, rerank_options
from clipret.cli.searching import gallery_facts, open_searcher
from clipret.cli.show import hits_table, seen, show_option, way
from clipret.errors import printable
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank
from clipret.search.searcher import Hit, Part, Query, Searcher

__all__ = ["query"]


@click.command(epilog='Example:  clipret-search query gallery/ "a red sedan" "一辆红色的轿车" -k 20 --html found.html')
@click.argument("gallery", type=SEARCHED)
@click.argument("texts", nargs=-1)
@click.option(
    "--texts",
    "texts_file",
    type=FILE,
    help="More queries: a .txt file with one per line, or an annotations file with captions.",
)
@click.option("--image", "images", type=FILE, multiple=True, help="Find images like this one; see above.")
@click.option("--minus", metavar="TEXT", multiple=True, help="What the images should not show.")
@click.option("--minus-weight", type=Number(-100, 100), default=0.5, show_default=True, help="Weight of --minus.")
@prompts_option
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Images per query.")
@where_option
@click.option("--exclude", metavar="PATH", multiple=True, help="An image of the gallery to leave out.")
@click.option("--min-score", type=Number(), help="Only images with at least this score.")
@rerank_options
@click.option("--html", type=PAGE, help="Also write a page with the images.")
@show_option
@json_option
@runtime_options
def query(
    gallery: Path | str,
    texts: tuple[str, ...],
    texts_file: Path | None,
    images: tuple[Path, ...],
    minus: tuple[str, ...],
    minus_weight: float,
    prompts: Prompts,
    k: int,
    where: str | None,
    exclude: tuple[str, ...],
    min_score: float | None,
    rerank: Rerank,
    reference: Path | None,
    html: Path | None,
    show: str,
    as_json: bool,
    runtime: Runtime,
) -> None:
    """Find the images of GALLERY that match each of TEXTS best.

    Prints rank, score (the cosine similarity of image and query) and path. Ties are ordered by age in the gallery.

    \b
    Each text is a query. With texts, --image is added to each of them ("like this, but at night"); without texts,
    each --image is a query. --minus subtracts something from every query:
        clipret-search query gallery/ "a red truck" --minus "a fire engine"
        clipret-search query gallery/ --image car.jpg --where "camera = 'A3' and hour < 6"

    Terminals that can show images (kitty, Ghostty, WezTerm, iTerm2, foot, mintty and others) show them above the
    table; in most others, paths are links to the files. --show none turns this off.
    """
    if texts_file is not None:
        texts = (*texts, *read_texts(texts_file))
    if not texts and not images:
        raise click.UsageError("name at least one text, or an image with --image")
    if rerank.steps and min_score is not None:
        raise click.UsageError("--min-score is a cosine, which re-ranking changes: leave out one of them")
    names, asked = zip(*_queries(texts, images, minus, minus_weight), strict=True)
    searcher = open_searcher(gallery, runtime, prompts.forms)
    with searcher:
        unwanted = [searcher.id_of(path) for path in exclude]
        if rerank.steps:
            embedded, among = searcher.embed(asked), searcher.among(where, unwanted)
            found = searcher.hits(*open_reranker(searcher, rerank, reference).rank(embedded, k, among=among))
        else:
            found = searcher.search(asked, k, where=where, exclude=unwanted, min_score=min_score)
        results = list(zip(names, found, strict=True))
        if html is not None:
            from clipret.reports.page import Card, Section, write_page  # most queries write no page

            sections = [Section(name, [Card(hit.file, hit.path, hit.score) for hit in hits]) for name, hits in results]
            write_page(
                html,
                title=f"clipret: {Path(searcher.searched.name).name}",
                facts=gallery_facts(searcher),
                sections=sections,
            )
            click.echo(f"page: {html.absolute()}", err=True)
        if as_json:
            print_json([{"query": name, "hits": _as_dicts(searcher, hits)} for name, hits in results])
            return
    how = way(show)
    for number, (name, hits) in enumerate(results):
        if len(results) > 1:
            click.echo(("\n" if number else "") + click.style(printable(name), bold=True))
        if drawn := seen(hits, how):
            click.echo(drawn)
        click.echo(hits_table(hits, how))


def _queries(
    texts: Sequence[str], images: Sequence[Path], minus: Sequence[str], minus_weight: float
) -> list[tuple[str, Query]]:
    """The queries of a command line with the names under which they are shown."""
    against = tuple(Part(text, -minus_weight) for text in minus)
    without = "".join(f" − {text}" for text in minus)
    if not texts:
        return [(f"{image}{without}", Query((Part(image), *against))) for image in images]
    like = tuple(Part(image) for image in images)
    also = "".join(f" + {image}" for image in images)
    return [(f"{text}{also}{without}", Query((Part(text), *like, *against))) for text in texts]


def _as_dicts(searcher: Searcher, hits: Sequence[Hit]) -> list[dict[str, object]]:
    metadata = searcher.searched.metadata([hit.id for hit in hits])
    return [
        {
            "rank": hit.rank,
            "id": hit.id,
            "score": hit.score,
            "path": hit.path,
            "file": str(hit.file),
            "metadata": metadata[hit.id],
        }
        for hit in hits
    ]

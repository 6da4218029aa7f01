"""clipret-search query and eval: finding pictures, and measuring how well they are found."""

from collections.abc import Sequence
from pathlib import Path

import click

from clipret.cli.completion import gallery_columns
from clipret.cli.options import (
    FILE,
    PAGE,
    SEARCHED,
    Number,
    Runtime,
    image_column_option,
    image_root_option,
    json_option,
    print_json,
    runtime_options,
    title_column_option,
    where_list_option,
    where_option,
)
from clipret.cli.rerank_options import open_reranker, prompts_option, read_texts, rerank_options
from clipret.cli.show import hits_table, seen, show_option, way
from clipret.console import headed, show_table
from clipret.errors import ClipretError, printable
from clipret.evaluation.evaluate import (
    GroundTruth,
    evaluate_search,
    measure,
    measure_lists,
    read_attribute_truth,
    read_ground_truth,
)
from clipret.evaluation.metrics import Metric, Metrics
from clipret.gallery.gallery import Gallery
from clipret.inference.encoder import Encoder
from clipret.openers import open_searchable
from clipret.reports.page import Card, Section, write_page
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank
from clipret.search.results import read_results
from clipret.search.searcher import Forms, Hit, Part, Query, Searcher

__all__ = ["eval_command", "open_searcher", "query"]


@click.command(epilog='Example:  clipret-search query gallery/ "a red sedan" "一辆红色的轿车" -k 20 --html found.html')
@click.argument("gallery", type=SEARCHED)
@click.argument("texts", nargs=-1)
@click.option("--texts", "texts_file", type=FILE, help="More queries: one a line in a .txt, or a list with titles.")
@click.option("--picture", "pictures", type=FILE, multiple=True, help="Find pictures like this one; see above.")
@click.option("--minus", metavar="TEXT", multiple=True, help="What the pictures shall not show.")
@click.option(
    "--minus-weight", type=Number(-100, 100), default=0.5, show_default=True, help="How strongly --minus counts."
)
@click.option("--template", "templates", metavar="TEXT", multiple=True, help='E.g. "a photo of a {}."; several: mean.')
@prompts_option
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="How many pictures a query.")
@where_option
@click.option("--exclude", metavar="PATH", multiple=True, help="A picture of the gallery that is not wanted.")
@click.option("--min-score", type=Number(), help="Only pictures with at least this score.")
@rerank_options
@click.option("--html", type=PAGE, help="Also write a page with the pictures.")
@show_option
@json_option
@runtime_options
def query(
    gallery: Path | str,
    texts: tuple[str, ...],
    texts_file: Path | None,
    pictures: tuple[Path, ...],
    minus: tuple[str, ...],
    minus_weight: float,
    templates: tuple[str, ...],
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
    """Find the pictures of GALLERY that fit each of TEXTS best.

    Prints rank, score (the cosine of picture and query) and path. Equal scores are ordered by age in the gallery.

    \b
    Each of TEXTS is a query of its own. With TEXTS, --picture is added to each of them ("like this, but at
    night"); without, each --picture is a query. --minus takes something away from every query:
        clipret-search query gallery/ "a red truck" --minus "a fire engine"
        clipret-search query gallery/ --picture car.jpg --where "camera = 'A3' and hour < 6"

    In a terminal that shows pictures (kitty, Ghostty, WezTerm, iTerm2, foot, mintty and others) they stand above the
    table, and in most others a path is a link to its file; --show none leaves that out.
    """
    if texts_file is not None:
        texts = (*texts, *read_texts(texts_file))
    if not texts and not pictures:
        raise click.UsageError("name at least one text, or a picture with --picture")
    if rerank.steps and min_score is not None:
        raise click.UsageError("--min-score is a cosine, which re-ranking changes: leave one of them out")
    names, asked = zip(*_queries(texts, pictures, minus, minus_weight), strict=True)
    if templates and prompts.rules:
        raise click.UsageError("--template and --prompts say the same in two ways: keep one of them")
    searcher = open_searcher(gallery, runtime, templates or prompts.forms)
    with searcher:
        unwanted = [searcher.id_of(path) for path in exclude]
        if rerank.steps:
            embedded, among = searcher.embed(asked), searcher.among(where, unwanted)
            found = searcher.hits(*open_reranker(searcher, rerank, reference).rank(embedded, k, among=among))
        else:
            found = searcher.search(asked, k, where=where, exclude=unwanted, min_score=min_score)
        results = list(zip(names, found, strict=True))
        if html is not None:
            sections = [Section(name, [_card(hit) for hit in hits]) for name, hits in results]
            write_page(
                html,
                title=f"clipret: {Path(searcher.searched.name).name}",
                facts=_gallery_facts(searcher),
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
    texts: Sequence[str], pictures: Sequence[Path], minus: Sequence[str], minus_weight: float
) -> list[tuple[str, Query]]:
    """The queries of a command line with the names under which they are shown."""
    against = tuple(Part(text, -minus_weight) for text in minus)
    without = "".join(f" − {text}" for text in minus)
    if not texts:
        return [(f"{picture}{without}", Query((Part(picture), *against))) for picture in pictures]
    like = tuple(Part(picture) for picture in pictures)
    also = "".join(f" + {picture}" for picture in pictures)
    return [(f"{text}{also}{without}", Query((Part(text), *like, *against))) for text in texts]


@click.command(
    "eval", epilog="Example:  clipret-search eval gallery/ captions.tsv --where \"split = 'val' and lang = 'en'\""
)
@click.argument("gallery", type=SEARCHED)
@click.argument("queries", type=FILE)
@title_column_option
@image_column_option
@image_root_option
@where_list_option
@click.option(
    "--equal",
    metavar="COLUMN",
    multiple=True,
    shell_complete=gallery_columns,
    help="Right is a picture with the query's value in this column.",
)
@click.option(
    "--includes",
    metavar="COLUMN",
    multiple=True,
    shell_complete=gallery_columns,
    help="Right is one that holds all names that the query's holds.",
)
@click.option(
    "--metric",
    "metrics",
    metavar="M",
    multiple=True,
    help="mAP, mAP@K, recall@K, challenge: these in place of the usual.",
)
@click.option("--results", type=FILE, help="Measure this result file, of merge or query --json, not a ranking of now.")
@click.option(
    "--against",
    metavar="exact|GALLERY",
    help="Of milvus+URI: what its index finds of the exact ranking; exact: of the gallery that was exported.",
)
@prompts_option
@rerank_options
@click.option("--html", type=PAGE, help="Also write a page: charts, the worst queries, a sample of the others.")
@click.option("--html-queries", type=click.IntRange(1), default=40, show_default=True, help="Queries it shows.")
@json_option
@runtime_options
def eval_command(
    gallery: Path | str,
    queries: Path,
    title_column: str | None,
    image_column: str | None,
    image_root: Path | None,
    where: str | None,
    equal: tuple[str, ...],
    includes: tuple[str, ...],
    metrics: tuple[str, ...],
    results: Path | None,
    against: str | None,
    prompts: Prompts,
    rerank: Rerank,
    reference: Path | None,
    html: Path | None,
    html_queries: int,
    as_json: bool,
    runtime: Runtime,
) -> None:
    """Measure how well GALLERY answers QUERIES.

    QUERIES is a .csv, .tsv or .jsonl list with a title and a picture a row: captions with their pictures, or
    queries with one row for each picture that answers them. Rows with the same title are one query.

    recall@k is the share of queries with a right picture among the first k; median rank is that of the first
    right picture; mAP@10 is the standard mean average precision over the first ten, mAP that over all. The metric
    "challenge" is the scorer published for the CVPR 2023 traffic challenge. It divides by the right pictures found,
    not by those to be found: three right ones before seven wrong ones score 1.0 where a hundred are right.

    With --equal and --includes the list has no pictures: a query's own columns say what it asks for (color, type),
    and the pictures' columns, from the list they were indexed from, say which answer it.

    The page that --html writes has the recall at every k, the scores of right and wrong pictures, what was found for
    what was wanted by each attribute (those of --equal and --includes, else columns of the gallery with few values),
    and --html-queries queries with what they found and should have found: half of them the worst.

    Re-ranking is measured with --metric, which says how deep the ranking goes; default: mAP@10 and recall@1/5/10.
    """
    chosen = [Metric.parse(name) for name in metrics]
    if (rerank.steps or results is not None) and html is not None:
        raise ClipretError("--html shows the plain ranking: leave it out with re-ranking and --results")
    if results is not None and (rerank.steps or prompts.rules):
        raise ClipretError("--results are ranked already: re-rank and prompt where they are made")
    if (rerank.steps or results is not None) and not chosen:
        chosen = [Metric.parse(name) for name in ("recall@1", "recall@5", "recall@10", "mAP@10")]
    searcher = open_searcher(gallery, runtime, prompts.forms)
    with searcher:
        if against is not None:
            _show_agreement(searcher, against, queries, title_column, as_json)
            return
        if isinstance(gallery, str):
            if equal or includes or html is not None or rerank.steps:
                raise ClipretError("--equal, --includes, --html and re-ranking look at every picture: use the gallery")
            chosen = chosen or [Metric.parse(name) for name in ("recall@1", "recall@5", "recall@10", "mAP@10")]
        if equal or includes:
            truth = read_attribute_truth(
                searcher, queries, equal=equal, includes=includes, title_column=title_column, where=where
            )
        else:
            truth = read_ground_truth(
                searcher,
                queries,
                title_column=title_column,
                image_column=image_column,
                image_root=image_root,
                where=where,
            )
        evaluated = evaluate_search(searcher, truth) if html is not None or not chosen else None
        if chosen:
            find = open_reranker(searcher, rerank, reference).rank if rerank.steps else None
            if isinstance(gallery, str) and results is None:
                values = measure_lists(truth, _listed(searcher, truth, chosen), chosen, gallery)
            elif results is None:
                values = measure(searcher, truth, chosen, find)
            else:
                listed = {text: found.paths for text, found in read_results(results).items()}
                values = measure_lists(truth, listed, chosen, str(results))
            facts = [("queries", f"{len(truth.relevant)}"), *((name, f"{value:.4f}") for name, value in values.items())]
            report: dict[str, float] = {"queries": len(truth.relevant), **values}
        else:
            assert evaluated is not None
            facts, report = _facts(evaluated.metrics), evaluated.metrics.to_dict()
        if html is not None and evaluated is not None:
            from clipret.evaluation.report import write_report  # no other command needs it, and it needs numpy.random

            title = f"clipret: evaluation of {Path(searcher.searched.name).name}"
            every = [*facts, *_gallery_facts(searcher)]
            write_report(html, searcher, evaluated, facts=every, title=title, queries=html_queries)
            click.echo(f"page: {html.absolute()}", err=True)
    if truth.missing or truth.unanswerable:
        click.echo(
            f"{truth.missing} pictures of {queries} are not in the gallery; {truth.unanswerable} queries left out",
            err=True,
        )
    if as_json:
        print_json({**report, "missing_pictures": truth.missing, "queries_left_out": truth.unanswerable})
        return
    click.echo(headed(show_table(("metric", "value"), facts)))


def open_searcher(place: Path | str, runtime: Runtime, templates: Forms = ("{}",)) -> Searcher:
    """A searcher of a gallery, or of the collection that milvus+URI names."""
    opened = open_searchable(place)
    if not isinstance(opened, Gallery) and opened.changing:
        click.echo(f"{opened.name} is being changed, or an export was broken off: run that again", err=True)
    return Searcher(opened, Encoder(opened.bundle(runtime.bundle), runtime.config), templates=templates)


def _show_agreement(searcher: Searcher, against: str, queries: Path, title_column: str | None, as_json: bool) -> None:
    """eval milvus+URI QUERIES --against: what the index finds of the exact ranking."""
    from clipret.milvus.search import MilvusCollection, agreement

    there = searcher.searched
    if not isinstance(there, MilvusCollection):
        raise ClipretError("--against compares a Milvus collection with a gallery: name it as milvus+URI")
    place = there.source if against == "exact" else Path(against)
    texts = list(dict.fromkeys(read_texts(queries, title_column)))
    with Searcher(Gallery.open(place), searcher.encoder, templates=searcher.templates) as exact:
        found = agreement(there, exact, texts)
    rate, exact_rate = found.queries / found.seconds, found.queries / found.exact_seconds
    if as_json:
        report = {f"recall@{k} of exact": value for k, value in found.recall.items()}
        rates = {"queries_per_second": round(rate, 1), "exact_queries_per_second": round(exact_rate, 1)}
        print_json({"queries": found.queries, "index": there.client.index(), **report, **rates})
        return
    facts = [("queries", f"{found.queries}"), ("index", there.client.index())]
    facts += [(f"recall@{k} of exact", f"{100 * value:.2f}%") for k, value in found.recall.items()]
    facts += [("queries a second", f"{rate:.1f}"), ("exact, queries a second", f"{exact_rate:.1f}")]
    click.echo(headed(show_table(("against exact", "value"), facts)))


def _listed(searcher: Searcher, truth: GroundTruth, metrics: Sequence[Metric]) -> dict[str, list[str]]:
    """What each text of a truth finds, as far as the metrics look."""
    if any(metric.k is None for metric in metrics):
        raise ClipretError("a metric without @K ranks every picture, which Milvus does not: write it with @K")
    texts = list(truth.relevant)
    found = searcher.search(texts, max(metric.k or 1 for metric in metrics))
    return {text: [hit.path for hit in hits] for text, hits in zip(texts, found, strict=True)}


def _gallery_facts(searcher: Searcher) -> Sequence[tuple[str, str]]:
    manifest = searcher.encoder.bundle.manifest
    return (("pictures", f"{searcher.searched.count():,}"), ("model", f"{manifest.model} {manifest.precision}"))


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    return [
        ("queries", f"{metrics.queries}"),
        ("recall@1", f"{100 * metrics.recall_at_1:.2f}%"),
        ("recall@5", f"{100 * metrics.recall_at_5:.2f}%"),
        ("recall@10", f"{100 * metrics.recall_at_10:.2f}%"),
        ("median rank", f"{metrics.median_rank:g}"),
        ("mAP@10", f"{metrics.map_at_10:.4f}"),
    ]


def _card(hit: Hit) -> Card:
    return Card(hit.file, hit.path, hit.score)


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

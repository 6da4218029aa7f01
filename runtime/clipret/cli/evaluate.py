"""clipret-search eval: retrieval metrics of a gallery."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from clipret.cli.completion import gallery_columns
from clipret.cli.options import (
    FILE,
    SEARCHED,
    Runtime,
    column_option,
    image_root_option,
    json_option,
    print_json,
    runtime_options,
    where_list_option,
)
from clipret.cli.rerank_options import open_reranker, prompts_option, read_texts, rerank_options
from clipret.cli.searching import gallery_facts, open_searcher
from clipret.cli.settings import Settings
from clipret.console import headed, show_table
from clipret.errors import ClipretError
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
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank
from clipret.search.results import read_results
from clipret.search.searcher import Searcher

__all__ = ["eval_command"]


@dataclass(frozen=True)
class ReportPage:
    """The settings of --html."""

    file: Path
    queries: int = 40

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise click.UsageError(f"--html queries is {self.queries}: use 1 or more.")


@click.command(
    "eval", epilog="Example:  clipret-search eval gallery/ captions.tsv --where \"split = 'val' and lang = 'en'\""
)
@click.argument("gallery", type=SEARCHED)
@click.argument("queries", type=FILE)
@column_option("caption", "image")
@image_root_option
@where_list_option
@click.option(
    "--equal",
    metavar="COLUMN",
    multiple=True,
    shell_complete=gallery_columns,
    help="An image is right if it has the query's value in this column.",
)
@click.option(
    "--includes",
    metavar="COLUMN",
    multiple=True,
    shell_complete=gallery_columns,
    help="An image is right if this column contains all names of the query's.",
)
@click.option(
    "--metric",
    "metrics",
    metavar="M",
    multiple=True,
    help="mAP, mAP@K, recall@K or challenge, instead of the default metrics.",
)
@click.option(
    "--results", type=FILE, help="Measure this result file, from merge or query --json, instead of searching."
)
@click.option(
    "--against",
    metavar="exact|GALLERY",
    help="For milvus+URI: how much of the exact ranking its index finds; exact: that of the exported gallery.",
)
@prompts_option
@rerank_options
@click.option(
    "--html",
    type=Settings(ReportPage, first="file"),
    help="Also write a page: charts, the worst queries, a sample of the others; queries=40: how many.",
)
@json_option
@runtime_options
def eval_command(
    gallery: Path | str,
    queries: Path,
    caption_column: str | None,
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
    html: dict[str, Any] | None,
    as_json: bool,
    runtime: Runtime,
) -> None:
    """Measure retrieval metrics of GALLERY on QUERIES.

    QUERIES is a .csv, .tsv or .jsonl file with a caption and an image per row: captions with their images, or queries
    with one row for each right image. Rows with the same caption are one query.

    recall@k is the share of queries with a right image among the first k; median rank is the median rank of the first
    right image; mAP@10 is the standard mean average precision over the first ten results, mAP over all. The metric
    "challenge" is the published scorer of the CVPR 2023 traffic challenge. It divides by the number of right images
    found, not by the number of right images: three right results before seven wrong ones score 1.0 even if a hundred
    are right.

    With --equal and --includes the file has no images: a query's columns say what it asks for (color, type), and the
    images' metadata, from the file they were indexed from, says which images match.

    The page of --html has the recall at every k, the scores of right and wrong images, a confusion table for each
    attribute (those of --equal and --includes, else columns of the gallery with few values),
    and 40 queries (--html page.html,queries=100: more) with what they found and should have found, half of them the
    worst.

    With re-ranking, --metric decides how deep the ranking goes; default: mAP@10 and recall@1/5/10.
    """
    chosen = [Metric.parse(name) for name in metrics]
    page = None if html is None else ReportPage(**html)
    if (rerank.steps or results is not None) and page is not None:
        raise ClipretError("--html shows the plain ranking: leave it out with --rerank and --results")
    if results is not None and (rerank.steps or prompts.rules):
        raise ClipretError("--results is a finished ranking: use --rerank and --prompts when it is made")
    if (rerank.steps or results is not None) and not chosen:
        chosen = [Metric.parse(name) for name in ("recall@1", "recall@5", "recall@10", "mAP@10")]
    searcher = open_searcher(gallery, runtime, prompts.forms)
    with searcher:
        if against is not None:
            _show_agreement(searcher, against, queries, caption_column, as_json)
            return
        if isinstance(gallery, str):
            if equal or includes or page is not None or rerank.steps:
                raise ClipretError(
                    "--equal, --includes, --html and --rerank need every image: search the gallery, not Milvus"
                )
            chosen = chosen or [Metric.parse(name) for name in ("recall@1", "recall@5", "recall@10", "mAP@10")]
        if equal or includes:
            truth = read_attribute_truth(
                searcher, queries, equal=equal, includes=includes, caption_column=caption_column, where=where
            )
        else:
            truth = read_ground_truth(
                searcher,
                queries,
                caption_column=caption_column,
                image_column=image_column,
                image_root=image_root,
                where=where,
            )
        evaluated = evaluate_search(searcher, truth) if page is not None or not chosen else None
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
        if page is not None and evaluated is not None:
            from clipret.evaluation.report import write_report  # no other command needs it, and it needs numpy.random

            page_title = f"clipret: evaluation of {Path(searcher.searched.name).name}"
            every = [*facts, *gallery_facts(searcher)]
            write_report(page.file, searcher, evaluated, facts=every, title=page_title, queries=page.queries)
            click.echo(f"page: {page.file.absolute()}", err=True)
    if truth.missing or truth.unanswerable:
        click.echo(
            f"{truth.missing} images of {queries} are not in the gallery; {truth.unanswerable} queries left out",
            err=True,
        )
    if as_json:
        print_json({**report, "missing_images": truth.missing, "queries_left_out": truth.unanswerable})
        return
    click.echo(headed(show_table(("metric", "value"), facts)))


def _show_agreement(searcher: Searcher, against: str, queries: Path, caption_column: str | None, as_json: bool) -> None:
    """eval milvus+URI QUERIES --against: how much of the exact ranking the index finds."""
    from clipret.milvus.search import MilvusCollection, agreement

    there = searcher.searched
    if not isinstance(there, MilvusCollection):
        raise ClipretError("--against compares a Milvus collection with a gallery: name the collection as milvus+URI")
    place = there.source if against == "exact" else Path(against)
    texts = list(dict.fromkeys(read_texts(queries, caption_column)))
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
    """The results of each query, as many as the metrics need."""
    if any(metric.k is None for metric in metrics):
        raise ClipretError(
            "a metric without @K needs a ranking of all images, which Milvus does not return: use mAP@10 or the like"
        )
    texts = list(truth.relevant)
    found = searcher.search(texts, max(metric.k or 1 for metric in metrics))
    return {text: [hit.path for hit in hits] for text, hits in zip(texts, found, strict=True)}


def _facts(metrics: Metrics) -> list[tuple[str, str]]:
    return [
        ("queries", f"{metrics.queries}"),
        ("recall@1", f"{100 * metrics.recall_at_1:.2f}%"),
        ("recall@5", f"{100 * metrics.recall_at_5:.2f}%"),
        ("recall@10", f"{100 * metrics.recall_at_10:.2f}%"),
        ("median rank", f"{metrics.median_rank:g}"),
        ("mAP@10", f"{metrics.map_at_10:.4f}"),
    ]

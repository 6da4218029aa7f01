"""clipret-search merge and submit: one ranking from several, and answers to competitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from clipret.cli.options import (
    FILE,
    Number,
    Runtime,
    column_option,
    encoder_options,
    image_root_option,
    json_option,
    print_json,
    runtime_options,
    where_option,
)
from clipret.cli.rerank_options import open_reranker, prompts_option, read_texts, rerank_options
from clipret.cli.searching import open_searcher
from clipret.cli.settings import Settings, merged
from clipret.competitions.assignment import assign
from clipret.competitions.submission import Form, Sample, image_names, product_answer, traffic_answer
from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.inference.config import EncoderConfig
from clipret.search.fusion import FusionSource, How, merge
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank
from clipret.search.results import RankedPaths, as_results, read_results
from clipret.search.searcher import Searcher
from clipret.tables import pick_column, read_table

__all__ = ["merge_command", "submit"]


@dataclass(frozen=True)
class Fusion:
    """The settings of merge --how."""

    how: How = "z"
    depth: int = 1000

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise click.UsageError(f"--how depth is {self.depth}: use 1 or more.")


@dataclass(frozen=True)
class AnswerFormat:
    """The settings of submit --format: what the scorer expects of an answer."""

    sample: Path | None = None
    names: Form | None = None
    images: Path | None = None
    one_to_one: bool = False


@click.command(
    "merge",
    epilog="Example:  clipret-search merge cars/ people/ --texts test.txt --prompts prompts.toml "
    "--only vehicle --only person > merged.json",
)
@click.argument("sources", type=FILE, nargs=-1, required=True)
@click.option(
    "--texts",
    type=FILE,
    required=True,
    help="The queries: a .txt file with one per line, or an annotations file with captions.",
)
@column_option("caption")
@click.option("--how", type=Settings(Fusion, first="how"), default="z", show_default=True, help="See above.")
@click.option("--weight", "weights", type=Number(), multiple=True, help="Weight of each source, in order; default: 1.")
@click.option(
    "--only",
    metavar="RULE",
    multiple=True,
    help='Queries of each source, in order: those of this rule of --prompts, "other" for those of no rule, "all".',
)
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Images per query.")
@prompts_option
@encoder_options
def merge_command(
    sources: tuple[Path, ...],
    texts: Path,
    caption_column: str | None,
    how: dict[str, Any],
    weights: tuple[float, ...],
    only: tuple[str, ...],
    k: int,
    prompts: Prompts,
    config: EncoderConfig,
) -> None:
    """Rank images by several SOURCES together: galleries of different models and result files. Prints a result file.

    Images are matched by path; with several galleries, only images that all of them have count. --how sum adds
    similarities, z adds similarities standardised for each query, rrf adds 1 / (60 + rank), which needs no
    scores and looks at the first 1,000 images of each source (rrf,depth=N). The first two are exact.

    Result files come from  clipret-search query --texts FILE --json,  with or without re-ranking, and from merge. An
    image that a result file does not list gets the score of the last one that it lists.
    """
    fusion = Fusion(**how)
    queries = read_texts(texts, caption_column)
    for name, given in (("--weight", weights), ("--only", only)):
        if given and len(given) != len(sources):
            raise ClipretError(f"{len(given)} {name} for {len(sources)} sources: give one for each, in order")
    rules = [rule.name for rule in prompts.rules]
    for rule in only:
        if rule not in (*rules, "all", "other"):
            raise ClipretError(
                f"--prompts has no rule {rule!r}: use all, other{''.join(f', {name}' for name in rules)}"
            )
    fitting = {text: fits.name if (fits := prompts.rule(text)) is not None else "other" for text in queries}
    opened = []
    for number, path in enumerate(sources):
        searcher, results = _open(path, prompts, Runtime(config))
        chosen = only[number] if only else "all"
        answers = None if chosen == "all" else frozenset(text for text, name in fitting.items() if name == chosen)
        opened.append(FusionSource(str(path), searcher, results, weights[number] if weights else 1.0, answers))
    print_json(as_results(queries, merge(opened, queries, k, how=fusion.how, depth=fusion.depth)))


@click.command(
    epilog="Example:  clipret-search submit gallery/ test.txt answer.json;  "
    "clipret-search submit gallery/ queries.csv submit.csv --format sample=sample.csv,one_to_one --leave-out train.csv"
)
@click.argument("source", type=FILE)
@click.argument("texts", type=FILE)
@click.argument("answer", type=FILE)
@column_option("caption")
@click.option(
    "--format",
    "answer_format",
    type=Settings(AnswerFormat),
    multiple=True,
    help="sample=FILE: the sample submission that a .csv answer follows; one_to_one: no image twice, by the assignment "
    "with the best sum; names=name|stem|path: how images are named (default: file names, or as in the sample); "
    "images=FOLDER: the test images, any other is refused.",
)
@click.option(
    "--leave-out",
    type=FILE,
    help="An annotations file with images that cannot be answers, such as the training images.",
)
@image_root_option
@where_option
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Images per query in a .json answer.")
@prompts_option
@rerank_options
@runtime_options
@json_option
def submit(
    source: Path,
    texts: Path,
    answer: Path,
    caption_column: str | None,
    answer_format: tuple[dict[str, Any], ...],
    leave_out: Path | None,
    image_root: Path | None,
    where: str | None,
    k: int,
    prompts: Prompts,
    rerank: Rerank,
    reference: Path | None,
    runtime: Runtime,
    as_json: bool,
) -> None:
    """Write results for TEXTS from SOURCE, a gallery or a result file, in a competition's format.

    An ANSWER that ends in .json is for the traffic retrieval challenge: the ten best images of each line of TEXTS, in
    order. One that ends in .csv is for the product retrieval contest: the best image of each query, in the form of
    --format sample=FILE. An answer that the scorer would reject (a query without images, a wrong number of images, a
    duplicate or unknown image) is refused with the reason, and nothing is written.
    """
    shape = AnswerFormat(**merged(answer_format, "--format"))
    product = answer.suffix.lower() == ".csv"
    if not product and answer.suffix.lower() != ".json":
        raise ClipretError(f"{answer} must end in .json (traffic retrieval) or .csv (product retrieval)")
    if product != (shape.sample is not None):
        raise ClipretError(
            "a .csv answer follows a sample submission, a .json one does not: pass --format sample=FILE, or write .json"
        )
    if shape.one_to_one and not product:
        raise ClipretError("--format one_to_one is for .csv answers: a .json answer has several images for each text")
    queries = read_texts(texts, caption_column)
    searcher, results = _open(source, prompts, runtime)
    taken = 1 if product else k
    if searcher is not None:
        found, paths = _search(
            searcher, queries, taken, leave_out, image_root, where, rerank, reference, shape.one_to_one
        )
    else:
        if rerank.steps or leave_out is not None or where is not None or prompts.rules:
            raise ClipretError(
                f"{source} is a result file: give --rerank, --leave-out, --where and --prompts to query instead"
            )
        found = _listed(results or {}, queries, taken, source, shape.one_to_one)
        paths = sorted({path for line in found for path in line})
    known = None if shape.images is None else _files(shape.images)
    sample = None if shape.sample is None else Sample.read(shape.sample)
    form = shape.names or ("name" if sample is None else sample.form(known if known is not None else paths))
    called = image_names(paths, form)
    # The images of a gallery are known to exist.
    allowed = set(image_names(known, form).values()) if known is not None else None
    lines = [[called[path] for path in line] for line in found]
    if sample is not None:
        content = product_answer(sample, queries, [line[0] for line in lines], allowed, once=shape.one_to_one)
    else:
        content = traffic_answer(queries, lines, allowed, k)
    write_file(answer, content)
    count = len({path for line in found for path in line})
    if as_json:
        print_json({"answer": str(answer), "texts": len(queries), "images": count})
    else:
        click.echo(f"{answer}: {len(queries)} texts, {count} different images")


def _open(path: Path, prompts: Prompts, runtime: Runtime) -> tuple[Searcher | None, dict[str, RankedPaths] | None]:
    """A gallery's searcher, or the results of a file."""
    if path.is_dir():
        return open_searcher(path, runtime, prompts.forms), None
    return None, read_results(path)


def _search(
    searcher: Searcher,
    queries: Sequence[str],
    k: int,
    leave_out: Path | None,
    image_root: Path | None,
    where: str | None,
    rerank: Rerank,
    reference: Path | None,
    one_to_one: bool,
) -> tuple[list[list[str]], list[str]]:
    """The paths that each query found, and those of all images of the gallery."""
    held = searcher.gallery.ids_by_path()
    unwanted = [] if leave_out is None else _unwanted(searcher, leave_out, image_root)
    among = searcher.among(where, unwanted)
    embeddings = searcher.embed(queries)
    reranker = open_reranker(searcher, rerank, reference)
    if one_to_one:
        if rerank.hubness != "none" or rerank.k_reciprocal or rerank.adapt:
            scores, positions = assign(
                lambda which, n: _part(reranker.rank(embeddings, n, among=among), which), len(queries)
            )
        else:
            scores, positions = assign(
                lambda which, n: searcher.ranker.rank(embeddings[which], n, among=among), len(queries)
            )
        hits = searcher.hits(scores[:, None], positions[:, None])
    else:
        hits = searcher.hits(*reranker.rank(embeddings, k, among=among))
    return [[hit.path for hit in line] for line in hits], list(held)


def _part(
    ranked: tuple[np.ndarray, np.ndarray],
    which: np.ndarray,  # of all queries, since they may decide about each other
) -> tuple[np.ndarray, np.ndarray]:
    return ranked[0][which], ranked[1][which]


def _unwanted(searcher: Searcher, path: Path, image_root: Path | None) -> list[int]:
    """The ids of the images of a list. Raises ClipretError when the gallery holds none of them."""
    table = read_table(path)
    image, root = pick_column(table, None, "image"), image_root or path.parent
    names = {row[image].strip() for row in table.rows}
    found = [number for _, number in searcher.find({name: root / name for name in names}).values()]
    if not found:
        raise ClipretError(
            f"none of the {len(names)} images of {path} is in the gallery (such as {sorted(names)[0]}): "
            "set --image-root, or leave out --leave-out"
        )
    click.echo(f"{len(set(found))} images of {path} are left out", err=True)
    return found


def _listed(
    results: dict[str, RankedPaths], queries: Sequence[str], k: int, source: Path, one_to_one: bool
) -> list[list[str]]:
    for number, text in enumerate(queries, 1):
        if text not in results:
            raise ClipretError(f"{source} has no results for text {number} ({text!r}): make it with the same texts")
    lists = [results[text] for text in queries]
    if not one_to_one:
        return [list(found.paths[:k]) for found in lists]
    if any(found.scores is None for found in lists):
        raise ClipretError(f"{source} has no scores, which one_to_one needs: make it with query --json or merge")
    names = list(dict.fromkeys(path for found in lists for path in found.paths))
    number_of = {path: at for at, path in enumerate(names)}
    longest = max(len(found.paths) for found in lists)
    scores, positions = np.full((len(lists), longest), -np.inf), np.full((len(lists), longest), -1, dtype=np.int64)
    for line, found in enumerate(lists):
        scores[line, : len(found.paths)] = found.scores
        positions[line, : len(found.paths)] = [number_of[path] for path in found.paths]
    _, chosen = assign(lambda which, n: (scores[which, :n], positions[which, :n]), len(lists))
    return [[names[at]] for at in chosen.tolist()]


def _files(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it."""
    if not folder.is_dir():
        raise ClipretError(f"{folder} is not a folder: name the folder of the test images")
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())

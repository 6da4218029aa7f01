"""The options --rerank and --prompts."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from clipret.cli.settings import Settings, merged
from clipret.errors import ClipretError
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank, Reranker
from clipret.search.searcher import Searcher
from clipret.tables import pick_column, read_table

__all__ = ["open_reranker", "prompts_option", "read_texts", "rerank_options"]

F = TypeVar("F", bound=Callable[..., Any])


def _read_prompts(context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> Prompts:
    if not given or context.resilient_parsing:
        return Prompts()
    templates = [value for value in given if "{}" in value]
    if len(templates) == len(given):
        return Prompts.of_templates(templates)
    first, *others = given
    if others:
        raise click.UsageError("--prompts takes either templates or one file of rules: leave out the other.")
    if not Path(first).is_file():
        raise ClipretError(
            f"--prompts {first!r} is neither a template with {{}} nor a file: check the text or the path"
        )
    return Prompts.read(first)


prompts_option = click.option(
    "--prompts",
    metavar="TEMPLATE|FILE",
    multiple=True,
    callback=_read_prompts,
    help='A template such as "a photo of a {}."; several are averaged. Or a TOML file with rules, see docs/query.md.',
)


def rerank_options(function: F) -> F:
    """Adds --rerank; the command gets `rerank`, a Rerank, and `reference`, a path or None."""

    @functools.wraps(function)
    def call(*arguments: Any, rerank: tuple[dict[str, Any], ...], **more: Any) -> Any:
        settings = merged(rerank, "--rerank")
        reference = settings.pop("reference", None)
        how = Rerank(**settings)
        if reference is not None and how.hubness == "none":
            raise ClipretError("--rerank reference= needs hubness: add hubness=nnn or hubness=dual-softmax")
        return function(*arguments, rerank=how, reference=reference, **more)

    option = click.option(
        "--rerank",
        type=Settings(Rerank, files=("reference",)),
        multiple=True,
        help="Re-ranking: adapt=50 (query adaptation), k_reciprocal=100 (k-reciprocal), hubness=nnn or dual-softmax, "
        "alone or together. hubness looks at the other queries, or at the texts of reference=FILE. See docs/query.md.",
    )
    return option(call)  # type: ignore[return-value]


def open_reranker(searcher: Searcher, rerank: Rerank, reference: Path | None) -> Reranker:
    embeddings = None if reference is None else searcher.embed(list(dict.fromkeys(read_texts(reference))))
    return Reranker(searcher.stored, searcher.ranker, rerank, embeddings)


def read_texts(path: Path, column: str | None = None) -> Sequence[str]:
    """The queries of a file in order, duplicates included: the lines of a .txt file, else the column of captions.

    Raises ClipretError for a blank text, with its number, and for a file without texts.
    """
    if path.suffix.lower() == ".txt":
        try:
            # splitlines would cut texts at U+2028 and at form feeds
            texts = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except OSError as error:
            raise ClipretError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ClipretError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from error
        while texts and not texts[-1].strip():
            texts.pop()
        if not texts:
            raise ClipretError(f"{path} has no texts: add one per line")
    else:
        table = read_table(path)
        caption = pick_column(table, column, "caption")
        texts = [row[caption] for row in table.rows]
    blank = next((number for number, text in enumerate(texts, 1) if not text.strip()), None)
    if blank is not None:
        raise ClipretError(f"text {blank} of {path} is blank: fill it in or remove it")
    return [text.strip() for text in texts]

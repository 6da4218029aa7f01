"""The options of re-ranking and of prompts, which several subcommands of clipret-search have."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from clipret.cli.options import FILE, Number
from clipret.errors import ClipretError
from clipret.search.prompts import Prompts
from clipret.search.rerank import HUBNESS, Rerank, Reranker
from clipret.search.searcher import Searcher
from clipret.tables import pick_column, read_table

__all__ = ["open_reranker", "prompts_option", "read_texts", "rerank_options"]

F = TypeVar("F", bound=Callable[..., Any])


def _read_prompts(context: click.Context, _parameter: click.Parameter, value: Path | None) -> Prompts:
    return Prompts() if value is None or context.resilient_parsing else Prompts.read(value)


prompts_option = click.option(
    "--prompts",
    type=FILE,
    callback=_read_prompts,
    help="Rules, in TOML, for what a text becomes by what it speaks of: words stripped, templates, averaged.",
)

_OPTIONS = (
    click.option(
        "--adapt",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Move each query towards what its N first pictures share; 50 is usual. Looks at the gallery.",
    ),
    click.option("--adapt-weight", type=Number(0, 1), default=0.5, show_default=True, help="How far."),
    click.option(
        "--hubness",
        type=click.Choice(HUBNESS),
        default="none",
        show_default=True,
        help="Take from pictures that are near to every query. Transductive: looks at the other queries, "
        "unless --reference names some.",
    ),
    click.option("--hubness-strength", type=Number(), default=0.75, show_default=True, help="Of nnn."),
    click.option("--hubness-neighbours", type=int, default=16, show_default=True, help="Of nnn: queries a picture."),
    click.option("--temperature", type=Number(), default=100.0, show_default=True, help="Of dual-softmax."),
    click.option("--reference", type=FILE, help="Texts that hubness is measured with, e.g. those of the training."),
    click.option(
        "--reciprocal",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Order the N first pictures anew by the neighbours they share; 100 is usual. Looks at the gallery.",
    ),
)


def rerank_options(function: F) -> F:
    """Adds the options; the command gets them as `rerank`, a Rerank, and `reference`, a path or None."""

    @functools.wraps(function)
    def call(
        *arguments: Any,
        adapt: int,
        adapt_weight: float,
        hubness: Any,
        hubness_strength: float,
        hubness_neighbours: int,
        temperature: float,
        reciprocal: int,
        **more: Any,
    ) -> Any:
        rerank = Rerank(
            adapt=adapt,
            adapt_weight=adapt_weight,
            hubness=hubness,
            neighbours=hubness_neighbours,
            strength=hubness_strength,
            temperature=temperature,
            reciprocal=reciprocal,
        )
        if more["reference"] is not None and hubness == "none":
            raise ClipretError("--reference is for --hubness: choose nnn or dual-softmax with it")
        return function(*arguments, rerank=rerank, **more)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call  # type: ignore[return-value]


def open_reranker(searcher: Searcher, rerank: Rerank, reference: Path | None) -> Reranker:
    rows = None if reference is None else searcher.embed(list(dict.fromkeys(read_texts(reference))))
    return Reranker(searcher.stored, searcher.ranker, rerank, rows)


def read_texts(path: Path, column: str | None = None) -> Sequence[str]:
    """The texts of a file, in their order, repeated ones too: one a line in a .txt, else the titles of a list.

    Raises ClipretError for a blank text between others, with its number, and for a file without any.
    """
    if path.suffix.lower() == ".txt":
        try:
            # splitlines would cut texts at U+2028 and at form feeds
            texts = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except OSError as error:
            raise ClipretError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ClipretError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from None
        while texts and not texts[-1].strip():
            texts.pop()
        if not texts:
            raise ClipretError(f"{path} holds no texts: nothing to do")
    else:
        table = read_table(path)
        title = pick_column(table, column, "title")
        texts = [row[title] for row in table.rows]
    blank = next((number for number, text in enumerate(texts, 1) if not text.strip()), None)
    if blank is not None:
        raise ClipretError(f"text {blank} of {path} is blank: fill it in or remove it")
    return [text.strip() for text in texts]

"""clipret-search complete: fills the attributes that the captions of a list leave out."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from clipret.cli.options import (
    FILE,
    GALLERY,
    PAGE,
    Runtime,
    column_option,
    image_root_option,
    json_option,
    print_json,
    runtime_options,
)
from clipret.cli.searching import open_searcher
from clipret.cli.settings import Settings, merged
from clipret.competitions.completion import Guess, SlotReport, Vocabulary, complete_slot, fill_in
from clipret.console import show_table
from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.reports.page import Card, Section, write_page
from clipret.search.searcher import Searcher
from clipret.tables import Table, pick_column, read_table

__all__ = ["complete"]

_FOOTER = "The figure is the confidence: the word's share among the vocabulary. An image links to its file."
_SHOWN = 24  # images of a word or a reason on the review page: the least certain ones
FILLED = "filled"  # the column that says which words were filled in


@dataclass(frozen=True)
class Confidence:
    """The settings of --confidence."""

    precision: float = 0.95
    unfamiliar: float = 0.1
    calibrate: str | None = None

    def __post_init__(self) -> None:
        for name in ("precision", "unfamiliar"):
            if not 0 <= getattr(self, name) <= 1:
                raise click.UsageError(f"--confidence {name} is {getattr(self, name)}: use 0 to 1.")


@click.command(
    epilog="Example:  clipret-search complete gallery/ captions.csv completed.csv --vocabulary vocabulary.json "
    "--where \"kind = 'vehicle'\" --html review.html"
)
@click.argument("gallery", type=GALLERY)
@click.argument("captions", type=FILE)
@click.argument("out", type=FILE)
@click.option("--vocabulary", type=FILE, required=True, help="JSON file: the words of each slot, and others to reject.")
@click.option("--slot", "slots", metavar="NAME", multiple=True, help="Slot to fill; default: all but brand.")
@click.option(
    "--template",
    "templates",
    metavar="TEXT",
    multiple=True,
    help="Query for a word, with slots in braces; several are averaged. Default: --caption.",
)
@click.option("--caption", metavar="TEXT", help='The caption to write; default: all slots, "{color} {brand} {type}".')
@click.option(
    "--confidence",
    type=Settings(Confidence),
    multiple=True,
    help="precision=0.95: what filled-in words must reach; unfamiliar=0.1: the share of the known images that would "
    "be refused as unlike the others of their word; calibrate=SQL: rows to calibrate on, best those that no training "
    "has seen.",
)
@click.option("--where", metavar="SQL", help="SQL condition: fill only images of these rows.")
@column_option("image")
@image_root_option
@click.option("--html", type=PAGE, help="Also write a page to review the images with what was filled in, or not.")
@json_option
@runtime_options
def complete(
    gallery: Path,
    captions: Path,
    out: Path,
    vocabulary: Path,
    slots: tuple[str, ...],
    templates: tuple[str, ...],
    caption: str | None,
    confidence: tuple[dict[str, Any], ...],
    where: str | None,
    image_column: str | None,
    image_root: Path | None,
    html: Path | None,
    as_json: bool,
    runtime: Runtime,
) -> None:
    """Fill in attributes that CAPTIONS lacks for the images in GALLERY, and write OUT to train with.

    CAPTIONS is an annotations file with an image, a caption and a column for each slot (color, brand, type), empty if
    the word is unknown. The model of the gallery chooses a missing word from the vocabulary. It also predicts the known
    words: they give the confidence threshold that reaches the precision of --confidence, and how different from the
    known images an image may be (a silver car when no caption says silver). The table reports the precision reached and
    on how many images, which are rows that the model was trained on unless calibrate=SQL names others. Templates with a
    single slot ask about every image in the same words, whatever else is known:
    --template "a {color} vehicle" --template "a {type}".

    OUT has all rows of CAPTIONS and one more, with the full caption, for each image with a filled slot; its column
    "filled" names the slots. This takes seconds per hundred thousand images.
    """
    wanted = Confidence(**merged(confidence, "--confidence"))
    words = Vocabulary.read(vocabulary)
    table = read_table(captions)
    image, caption_column = pick_column(table, image_column, "image"), pick_column(table, None, "caption")
    slots = slots or tuple(slot for slot in words.slots if slot != "brand")
    _check(table, words, slots, templates, caption, out)
    caption = caption or " ".join(f"{{{slot}}}" for slot in words.slots)
    searcher = open_searcher(gallery, runtime)
    with searcher:
        rows, names, positions = _images(searcher, table, image, image_root)
        values = _known(table, names, rows, [slot for slot in words.slots if slot in table.columns])
        chosen = [None if sql is None else _chosen(captions, sql, image, names) for sql in (where, wanted.calibrate)]
        stored = EmbeddingShards(searcher.ranker.shards)
        found: dict[str, tuple[SlotReport, dict[int, Guess]]] = {}
        for slot in slots:
            found[slot] = complete_slot(
                stored,
                positions,
                values,
                slot,
                words,
                searcher.encoder,
                templates or (caption,),
                precision=wanted.precision,
                unfamiliar=wanted.unfamiliar,
                among=chosen[0],
                calibrate=chosen[1],
            )
        reports = [report for report, _ in found.values()]
        filled = [
            {slot: one.word for slot, (_, guesses) in found.items() if (one := guesses.get(at)) and not one.refused}
            for at in range(len(names))
        ]
        write_file(out, _completed(table, caption_column, [rows[name][0] for name in names], values, filled, caption))
        if html is not None:
            files = [searcher.gallery.file(path) for path in _stored(searcher, positions)]
            _review(html, gallery, names, files, {slot: guesses for slot, (_, guesses) in found.items()}, reports)
            click.echo(f"page: {html.absolute()}", err=True)
    lost = len({row[image].strip() for row in table.rows}) - len(names)
    if lost:
        click.echo(f"{lost} images of {captions} are not in the gallery and stay as they are", err=True)
    for report in reports:
        if report.rare:
            rare = ", ".join(report.rare)
            click.echo(f"{report.slot}: too few images are known to fill in {rare}", err=True)
        if not np.isfinite(report.threshold):
            click.echo(
                f"{report.slot}: no threshold reaches a precision of {wanted.precision:g}: nothing is filled", err=True
            )
    if as_json:
        print_json([_finite(dataclasses.asdict(report)) for report in reports])
        return
    click.echo(show_table(_HEADER, [_line(report) for report in reports]))
    click.echo(f"{out}: {sum(map(bool, filled))} images got a fuller caption")


_HEADER = (
    "slot", "known", "accuracy", "threshold", "precision", "of", "coverage",
    "missing", "filled", "unsure", "unfamiliar", "other",
)  # fmt: skip


def _line(report: SlotReport) -> list[str]:
    shares = [f"{100 * value:.1f}%" for value in (report.accuracy, report.precision, report.coverage)]
    counts = [report.missing, report.filled, report.unsure, report.unfamiliar, report.other]
    figures = [f"{report.known}", shares[0], f"{report.threshold:.4f}", shares[1], f"{report.sure}", shares[2]]
    return [report.slot, *figures, *map(str, counts)]


def _finite(report: dict[str, object]) -> dict[str, object]:
    return report | {"threshold": report["threshold"] if report["threshold"] != float("inf") else None}


def _check(
    table: Table, words: Vocabulary, slots: Sequence[str], templates: Sequence[str], caption: str | None, out: Path
) -> None:
    if out.suffix.lower() != ".csv":
        raise ClipretError(f"{out} must end in .csv")
    if FILLED in table.columns:
        raise ClipretError(f"{table.path} is already completed: use the file that it was made from")
    for slot in slots:
        if slot not in words.slots:
            raise ClipretError(f"the vocabulary has no slot {slot!r}: it has {', '.join(words.slots)}")
        if slot not in table.columns:
            raise ClipretError(f"{table.path} has no column {slot!r}: its columns are {', '.join(table.columns)}")
    for template in (*templates, *([caption] if caption else [])):
        strange = [
            name for name in template.replace("{", "\0{").split("\0")[1:] if name[1:].split("}")[0] not in words.slots
        ]
        if strange:
            raise ClipretError(
                f"template {template!r}: {strange[0]!r} is not one of the slots {', '.join(words.slots)} in braces"
            )


def _images(
    searcher: Searcher, table: Table, image: str, image_root: Path | None
) -> tuple[dict[str, list[dict[str, str]]], list[str], np.ndarray]:
    """The rows of each image of the list; the names of those that the gallery holds, and where it holds them."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in table.rows:
        rows.setdefault(row[image].strip(), []).append(row)
    root = image_root or table.path.parent
    found = searcher.find({name: root / name for name in rows})
    names, ids = list(found), [number for _, number in found.values()]
    if not names:
        raise ClipretError(
            f"gallery {searcher.gallery.path} has none of the {len(rows)} images of {table.path} "
            f"(the first: {next(iter(rows))}): set --image-root, or index those images"
        )
    return rows, names, np.searchsorted(searcher.stored.ids, np.array(ids))


def _known(
    table: Table, names: Sequence[str], rows: Mapping[str, list[dict[str, str]]], slots: Sequence[str]
) -> list[dict[str, str]]:
    """What the rows of each image say together. Raises ClipretError where two contradict each other."""
    known = []
    for name in names:
        values: dict[str, str] = {}
        for row in rows[name]:
            for slot in slots:
                word = row[slot].strip()
                if word and values.setdefault(slot, word) != word:
                    raise ClipretError(
                        f"{table.path} says {slot} {values[slot]} and {word} of {name}: correct one of the rows"
                    )
        known.append(values)
    return known


def _chosen(captions: Path, where: str, image: str, names: Sequence[str]) -> np.ndarray:
    """Which images have a row for which an expression holds, bool [P]."""
    chosen = {row[image].strip() for row in read_table(captions, where).rows}
    return np.array([name in chosen for name in names])


def _completed(
    table: Table,
    caption_column: str,
    first: Sequence[Mapping[str, str]],
    values: Sequence[Mapping[str, str]],
    filled: Sequence[Mapping[str, str]],
    caption: str,
) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, (*table.columns, FILLED), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, FILLED: ""} for row in table.rows)
    for row, known, new in zip(first, values, filled, strict=True):
        if new:
            every = {**known, **new}
            given = {slot: word for slot, word in every.items() if slot in table.columns}
            writer.writerow({**row, **given, caption_column: fill_in(caption, every), FILLED: ";".join(new)})
    return out.getvalue()


def _stored(searcher: Searcher, positions: np.ndarray) -> list[str]:
    return searcher.gallery.paths(searcher.stored.ids[positions])


def _review(
    out: Path,
    gallery: Path,
    names: Sequence[str],
    files: Sequence[Path],
    guesses: Mapping[str, Mapping[int, Guess]],
    reports: Sequence[SlotReport],
) -> None:
    """The least certain of what was filled, word by word, and the most certain of what was not, by reason."""
    sections = []
    for report in reports:
        own = guesses[report.slot]
        for word in report.words:
            some = [at for at, one in own.items() if one.word == word and not one.refused]
            some.sort(key=lambda at: own[at].confidence)
            note = f"{len(some)} filled in; the least certain first"
            sections.append(Section(f"{report.slot}: {word}", _cards(some, names, files, own), note))
        for reason in ("unsure", "unfamiliar", "other"):
            some = [at for at, one in own.items() if one.refused == reason]
            some.sort(key=lambda at: -own[at].confidence)
            note = f"{len(some)} not filled in; the most certain first"
            if some:
                sections.append(Section(f"{report.slot}: {reason}", _cards(some, names, files, own), note))
    facts = []
    for report in reports:
        facts.append((f"{report.slot}: filled of missing", f"{report.filled} / {report.missing}"))
        facts.append((f"{report.slot}: precision where known", f"{100 * report.precision:.1f}%"))
    write_page(out, title=f"clipret: completion with {gallery.name}", facts=facts, sections=sections, footer=_FOOTER)


def _cards(places: Sequence[int], names: Sequence[str], files: Sequence[Path], own: Mapping[int, Guess]) -> list[Card]:
    return [Card(files[at], f"{own[at].word}: {names[at]}", own[at].confidence) for at in places[:_SHOWN]]

"""clipret-train data traffic and challenge: the traffic retrieval challenge's files, read and drawn."""

import csv
import io
import json
from pathlib import Path

import click

from clipret.competitions.completion import Vocabulary
from clipret.console import show_table
from clipret.errors import ClipretError
from clipret.files import new_folder, write_file
from clipret_training.competitions import COLORS, COLUMNS, TYPES, parse_labels, rows_of, statistics, vocabulary_of

__all__ = ["challenge", "traffic"]

FILE = click.Path(path_type=Path)
_NAMED = 20  # lines with a fault that are named on the terminal


@click.command(epilog="Example:  clipret-train data traffic train_label.txt traffic --image-root train_images")
@click.argument("labels", type=FILE)
@click.argument("out", type=FILE)
@click.option("--image-root", type=FILE, help="Folder of the images; each one must exist.")
@click.option("--vocabulary", type=FILE, help="A vocabulary.json with further colours or types.")
@click.option(
    "--val-share", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share of the images to hold out."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of that choice.")
@click.option("--skip", is_flag=True, help="Skip invalid lines instead of refusing the file.")
@click.option("--json", "as_json", is_flag=True, help="Print all counts as JSON.")
def traffic(
    labels: Path,
    out: Path,
    image_root: Path | None,
    vocabulary: Path | None,
    val_share: float,
    seed: int,
    skip: bool,
    as_json: bool,
) -> None:
    """Check LABELS, the challenge's lines image$attribute$text, and write the folder OUT.

    \b
    captions.csv      path, caption, kind (vehicle, person), color, brand, type, attributes, split (train, val)
    vocabulary.json   the colours, types and brands there are, and the 21 attributes of persons
    statistics.json   how often each of them occurs, and what looks like a slip

    Every line is checked: three fields, an existing image, colour and brand or a type or 21 values of 0 and 1, no
    contradiction to an earlier line. Nothing is guessed: invalid lines are listed by number, and the file is refused.
    Next:

    \b
    clipret-train fit OUT/captions.csv --model M --out run --set image_root=IMAGES --set where="split = 'train'" \\
        --set val_where="split = 'val'" --set resize=longest --set fill=116
    """
    given = None if vocabulary is None else Vocabulary.read(vocabulary)
    slots = {} if given is None else given.slots
    parsed, problems = parse_labels(
        labels, colors=slots.get("color", COLORS), types=slots.get("type", TYPES), images=image_root
    )
    for problem in problems[:_NAMED]:
        click.echo(f"{labels} {problem}", err=True)
    if len(problems) > _NAMED:
        click.echo(f"{labels}: {len(problems) - _NAMED} more lines have a fault", err=True)
    if problems and not skip:
        raise ClipretError(
            f"{labels}: {len(problems)} of {len(problems) + len(parsed)} lines have a fault and nothing was written: "
            "correct them, or leave them out with --skip"
        )
    if not parsed:
        raise ClipretError(f"{labels} has no line without a fault: is it a file of lines image$attribute$text?")
    counts = statistics(parsed)
    with new_folder(out) as folder:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of(parsed, val_share, seed))
        write_file(folder / "captions.csv", text.getvalue())
        for name, value in (("vocabulary", vocabulary_of(parsed, given)), ("statistics", counts)):
            write_file(folder / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        click.echo(json.dumps(counts | {"skipped": len(problems)}, indent=2, ensure_ascii=False))
        return
    rows = [[name, f"{value}"] for name, value in counts.items() if isinstance(value, int)]
    for name in ("color", "type", "brand"):
        words = counts[name]
        assert isinstance(words, dict)
        rows.append([f"different words of {name}", f"{len(words)}"])
    click.echo(show_table(["count", "value"], [*rows, ["lines left out", f"{len(problems)}"]]))
    for name in ("unclear persons", "brands spelt in several ways"):
        slips = counts[name]
        if isinstance(slips, dict):
            slips = {group: n for group, n in slips.items() if n}
        if slips:
            click.echo(f"{name}: {slips}", err=True)


@click.command(epilog="Example:  clipret-train data challenge drawn --train 2640 --test 1320 --seed 1")
@click.argument("out", type=FILE)
@click.option("--train", type=click.IntRange(1), default=2640, show_default=True, help="Images to train with.")
@click.option("--test", type=click.IntRange(1), default=1320, show_default=True, help="Images to search.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed draws the same images."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that draw.")
def challenge(out: Path, train: int, test: int, seed: int, workers: int) -> None:
    """Draw the files of the traffic retrieval challenge into the folder OUT, with the truth.

    \b
    train_label.txt, train_images/    clean images; a line names colour and brand, or the type
    test_text.txt, test_images/       a camera's images; a line names colour, brand and type, or a person
    test_images.csv                 what each test image shows, to index them with
    test_queries.csv                  what each line of test_text.txt asks for, to evaluate with

    \b
    clipret-search index bundle OUT/test_images.csv gallery --image-root OUT/test_images
    clipret-search eval gallery OUT/test_queries.csv --equal color --equal type --includes attributes
    """
    from clipret_training.synthetic.challenge import write_challenge

    write_challenge(out, train=train, test=test, seed=seed, workers=workers)
    click.echo(f"{train} images to train with and {test} to search in {out}")

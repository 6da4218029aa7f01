"""clipret-train soup: one model out of several trainings of it."""

from pathlib import Path
from typing import Any, get_args

import click

from clipret.cli.options import column_option, image_root_option
from clipret.console import show_table
from clipret.errors import ClipretError, require
from clipret_training.choices import SoupMethod

__all__ = ["soup"]

FILE = click.Path(path_type=Path)

EPILOG = """
\b
Examples
  The mean of three runs from the same start:
    clipret-train soup run1 run2 run3 --out soup --how uniform
  From the best one down, those that help on images that none was trained on:
    clipret-train soup run1 run2 run3 --out soup --how greedy --val val.csv
  Half way between a run and what it started from:
    clipret-train soup run --out robust --how wise --alpha 0.5

\b
Next:  clipret-export soup bundle
"""


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=FILE, required=True, help="The run folder to create; it must not exist or be empty.")
@click.option(
    "--how",
    type=click.Choice(get_args(SoupMethod)),
    required=True,
    help="The mean of all; the mean of those that help; between a run and its original.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="wise: 0 is the original, 1 the run.",
)
@click.option("--original", metavar="M", help="wise: what RUN started from; default: what its params.toml says.")
@click.option(
    "--val",
    type=FILE,
    help="The annotations file that decides (greedy), or to measure the result on (uniform, wise).",
)
@click.option("--val-where", metavar="SQL", help="Only rows of --val for which this holds.")
@image_root_option
@column_option("image", "caption")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N, to measure on.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads; default: all there are.")
def soup(
    runs: tuple[str, ...],
    out: Path,
    how: SoupMethod,
    alpha: float,
    original: str | None,
    val: Path | None,
    **given: Any,
) -> None:
    """Average the weights of RUN... into a run folder, which loads, trains and exports like any other.

    A RUN is a run folder (its best checkpoint), one of its checkpoint files, or any other model for fit --model. All
    must have the same architecture and should come from the same initial weights. No training is needed, and the
    result is as fast as a single model (Wortsman et al., 2022).
    """
    for package in ("torch", "open_clip", "safetensors", "tomli_w"):
        require(package, "train")
    from clipret_training.soups import Measure, make_soup

    if how == "wise" and len(runs) != 1:
        raise ClipretError(f"--how wise mixes one run with its original, not {len(runs)}: name one")
    if how != "wise" and len(runs) < 2:
        raise ClipretError(f"--how {how} averages several runs: name more than one, or use --how wise")
    if how == "greedy" and val is None:
        raise ClipretError(
            "--how greedy decides on an annotations file: pass --val with images that no run was trained on"
        )
    if original is not None and how != "wise":
        raise ClipretError(f"--original belongs to --how wise, not to --how {how}: leave it out")

    root = given.pop("image_root")
    measure = Measure(str(val), image_root=str(root) if root else None, **given) if val is not None else None
    result = make_soup(runs, out, how, alpha, original, measure, lambda line: click.echo(line, err=True))
    rows = [[name, *cells] for name, cells in result.table()]
    if rows:
        click.echo(show_table(["weights", "recall@10", "mean recall", "in the soup"], rows))
    click.echo(f"{', '.join(result.soup.ingredients)} in {out}. Next:  clipret-export {out} BUNDLE")

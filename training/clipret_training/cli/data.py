"""clipret-train data: data to train on, from a challenge's files or drawn."""

from pathlib import Path
from typing import get_args

import click

from clipret.console import Group
from clipret_training.choices import Style
from clipret_training.cli.traffic import challenge, traffic

__all__ = ["data"]


@click.group(cls=Group)
def data() -> None:
    """Prepare a challenge's files for training, or draw images with captions."""


data.add_command(traffic)
data.add_command(challenge)


@data.command(epilog="Example:  clipret-train data scenes scenes --count 2000 --style surveillance --seed 1")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Images to draw.")
@click.option(
    "--style",
    type=click.Choice(get_args(Style)),
    default="web",
    show_default=True,
    help="Clean images as in a shop, or those of a camera on a pole.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed draws the same images."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that draw.")
def scenes(out: Path, count: int, style: Style, seed: int, workers: int) -> None:
    """Draw traffic scenes with captions into the folder OUT."""
    from clipret_training.synthetic import write_set

    write_set(out, count=count, style=style, seed=seed, workers=workers)
    click.echo(f"{count} images in {out}")

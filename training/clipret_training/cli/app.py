"""clipret-train: fine-tune or train a CLIP model, and draw data to try it on."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clipret.cli.options import LOCATION
from clipret.console import Group, show_table
from clipret.errors import ClipretError, require
from clipret_training.choices import Augment, Precision, Style
from clipret_training.cli.run import run
from clipret_training.cli.soup import soup
from clipret_training.cli.traffic import challenge, traffic
from clipret_training.filenames import PARAMS, SKIPPED

if TYPE_CHECKING:
    from clipret_training.config import FitConfig

FILE = click.Path(path_type=Path)

FIT_EPILOG = """
\b
Examples
  A new model from a list with the columns path and caption, images beside it:
    clipret-train fit captions.csv --model clipret-small --out run
  Rows of one language, one split held out:
    clipret-train fit captions.tsv --image-root images --model clipret-small --out run \\
        --where "lang = 'en'" --val-where "lang = 'en' and split = 'val'"
  Fine-tune a checkpoint of open_clip; everything that has no flag of its own goes through --set:
    clipret-train fit captions.csv --model ViT-B-32-quickgelu:weights.safetensors --out run --set patch_dropout=0.5
  A recipe, some of it overridden, on eight GPUs:
    torchrun --nproc-per-node 8 --no-python clipret-train fit shards/{000..127}.tar --out run \\
        --recipe vit-bigg-14-traffic --epochs 3
  Go on from an earlier run's model, or repeat a run:
    clipret-train fit more.csv --model run --out run2 --lr 2e-4
    clipret-train fit --recipe run/params.toml --out run2

\b
The run folder holds params.toml, metrics.jsonl, log.txt, skipped.tsv, tensorboard and checkpoints.
Next:  clipret-export run bundle
"""


@click.group(
    "clipret-train", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Train CLIP models on your images and captions.

    \b
    clipret-train fit captions.csv --model clipret-small --out run     from scratch, on a CPU
    clipret-train fit captions.csv --model ViT-B-32:laion2b_s34b_b79k --out run
    clipret-train resume run                                           after an interruption
    clipret-train recipes                                              what there is to start from
    clipret-train soup run1 run2 --how uniform --out run               the mean of several trainings
    clipret-train data scenes OUT --count 2000                         drawn traffic scenes with captions
    clipret-train data traffic train_label.txt OUT                     a competition's labels, checked
    clipret-train run traffic --out work                               from raw files to the answer
    """


@main.command(epilog=FIT_EPILOG)
@click.argument("data", type=LOCATION, required=False)
@click.option(
    "--model",
    metavar="M",
    help="clipret-small, MODEL[:TAG or FILE] of open_clip, chinese-clip-SIZE[:FILE], hf-hub:ORG/REPO, "
    "local-dir:FOLDER, or a run folder.",
)
@click.option("--out", type=FILE, required=True, help="The run folder to make; it must not exist or be empty.")
@click.option("--recipe", metavar="NAME|FILE", help="See  clipret-train recipes;  or a .toml file.")
@click.option("--set", "more", multiple=True, metavar="NAME=VALUE", help="Any option of  clipret-train options.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out if it has been begun.")
@click.option("--image-root", type=FILE, help="What paths in the list are relative to; default: its folder.")
@click.option("--image-column", metavar="NAME", help="Column of the images' paths; default: detected.")
@click.option("--caption-column", metavar="NAME", help="Column of the captions; default: detected.")
@click.option("--group-column", metavar="NAME", help="Rows with the same value are right answers to each other.")
@click.option("--where", metavar="SQL", help="Only rows of the list for which this holds.")
@click.option("--val", type=LOCATION, help="A list of its own to validate on.")
@click.option("--val-where", metavar="SQL", help="Rows to validate on, of --val or of the list itself.")
@click.option("--val-split", type=float, help="Share of the images to validate on where neither is given.")
@click.option("--validate-every", type=int, metavar="EPOCHS", help="How often recall is measured.")
@click.option("--epochs", type=int, help="Times that every image is seen.")
@click.option("--batch-size", type=int, help="Images a step, of all processes together.")
@click.option("--accumulate", type=int, metavar="PARTS", help="Compute a batch in so many parts: less memory.")
@click.option("--captions", type=int, help="Captions of each image that take part in a step.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--weight-decay", type=float, help="On matrices only.")
@click.option("--warmup", type=float, help="Share of the steps until the learning rate is reached.")
@click.option("--augment", type=click.Choice(get_args(Augment)), help="How images are varied.")
@click.option("--crop-area", type=float, help="Least share of an image that a random crop keeps.")
@click.option("--precision", type=click.Choice(get_args(Precision)), help="Default: bf16 where the processor has it.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]")
@click.option("--threads", type=int, help="Processor threads; default: all there are.")
@click.option(
    "--cache-limit",
    type=float,
    metavar="GIB",
    help="Memory for decoded images; beyond it they are decoded anew each epoch.  [default: 4]",
)
@click.option("--save-every", type=int, metavar="STEPS", help="How often to save; default: after each epoch.")
@click.option("--seed", type=int, help="Decides the weights, the order, the crops.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def fit(out: Path, recipe: str | None, more: tuple[str, ...], resume: bool, as_json: bool, **given: Any) -> None:
    """Train MODEL on DATA: a list (CSV, TSV or JSON lines: one image and one caption a row) or webdataset's .tar files.

    An image may have many captions and a caption many images: all of them count as right answers. What is left open
    is filled in from the recipe and from the defaults for the model; params.toml in the run folder records every value.
    """
    _require_packages()
    from clipret_training.config import FitConfig, parse_value

    values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    for assignment in more:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ClipretError(f"--set {assignment!r} is no NAME=VALUE: write for example --set patch_dropout=0.5")
        values[name] = parse_value(name, text)
    _train(FitConfig.for_model(recipe=recipe, **values), out, resume=resume, as_json=as_json)


@main.command(epilog="Example:  clipret-train resume run")
@click.argument("run", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def resume(run: Path, as_json: bool) -> None:
    """Go on with the training in the folder RUN after its last checkpoint, to the weights that it would have had."""
    _require_packages()
    from clipret_training.config import FitConfig

    _train(FitConfig.read(run / PARAMS), run, resume=True, as_json=as_json)


@main.command(epilog="Examples:  clipret-train recipes;  clipret-train recipes small > mine.toml")
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes there are, or print the one called NAME."""
    from clipret_training.recipe import recipe_names, recipe_text

    if name is not None:
        click.echo(recipe_text(name), nl=False)
        return
    click.echo(show_table(["recipe", "for"], [[name, purpose] for name, purpose in recipe_names().items()]))


@main.command()
def options() -> None:
    """List all options of a training, for --set and recipes, with their defaults."""
    _require_packages()
    from clipret_training.config import option_table

    click.echo(show_table(["option", "value", "default"], option_table()))


main.add_command(soup)
main.add_command(run)


def _require_packages() -> None:
    for package in ("torch", "open_clip", "safetensors", "tomli_w"):
        require(package, "train")


def _train(config: "FitConfig", out: Path, *, resume: bool, as_json: bool) -> None:
    from clipret_training.fit import fit as train

    result = train(config, out, _report, resume=resume)
    if not result.writes:
        return
    if result.skipped:
        click.echo(f"unreadable images: {result.skipped}, listed in {out / SKIPPED}", err=True)
    if as_json:
        kept = {name: value for name, value in dataclasses.asdict(result).items() if name != "writes"}
        click.echo(json.dumps(kept | {"run": str(result.run)}, indent=2))
        return
    rows = []
    for caption, metrics in (("best", result.best), ("last", result.last)):
        for way, name in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            found = metrics[way]
            shares = [f"{100 * found[f'recall_at_{k}']:.1f}%" for k in (1, 5, 10)]
            rank, precision = f"{found['median_rank']:g}", f"{found['map_at_10']:.4f}"
            rows.append(
                [f"{caption} (epoch {metrics['epoch']})", name, *shares, rank, precision, f"{found['queries']}"]
            )
    header = ["checkpoint", "direction", "recall@1", "recall@5", "recall@10", "median rank", "mAP@10", "queries"]
    click.echo(show_table(header, rows))
    click.echo(f"{result.last['cpu_seconds']:.0f} CPU seconds. Next:  clipret-export {out} BUNDLE")


def _report(metrics: dict[str, Any]) -> None:
    line = f"epoch {metrics['epoch']:3}  loss {metrics['loss']:.3f}  {metrics['images_per_second']:.0f} images/s"
    if "text_to_image" in metrics:
        line += f"  recall@10 {100 * metrics['text_to_image']['recall_at_10']:.1f}%"
    click.echo(line, err=True)


@main.group()
def data() -> None:
    """Make data to train on: from a challenge's files, or drawn."""


data.add_command(traffic)
data.add_command(challenge)


@data.command(epilog="Example:  clipret-train data scenes scenes --count 2000 --style surveillance --seed 1")
@click.argument("out", type=FILE)
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Images to draw.")
@click.option(
    "--style",
    type=click.Choice(get_args(Style)),
    default="web",
    show_default=True,
    help="Clean images as in a shop, or what a camera on a pole sees.",
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

"""clipret-train: fine-tune or train a CLIP model, and draw data to try it on."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import click

from clipret.console import Group, show_table
from clipret.errors import require

FILE = click.Path(path_type=Path)
AUGMENTS = ("none", "photo", "surveillance")  # as in clipret.training.augment, which needs torch

FIT_EPILOG = """
\b
Examples
  A new model from a list with the columns path and title, pictures beside it:
    clipret-train fit captions.csv --model clipret-small --out run
  Rows of one language, one split held out:
    clipret-train fit captions.tsv --image-root images --model clipret-small --out run \\
        --where "lang = 'en'" --val-where "lang = 'en' and split = 'val'"
  Fine-tune a checkpoint of open_clip:
    clipret-train fit captions.csv --model ViT-B-32-quickgelu:weights.safetensors --out run
  Go on from an earlier run:
    clipret-train fit more.csv --model run --out run2 --lr 2e-4

\b
The run folder holds params.toml, metrics.jsonl, log.txt, skipped.tsv and checkpoints.
Next:  clipret-export run bundle
"""


@click.group(
    "clipret-train", cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Train CLIP models on your pictures and titles.

    \b
    clipret-train fit captions.csv --model clipret-small --out run     from scratch, on a CPU
    clipret-train fit captions.csv --model ViT-B-32:laion2b_s34b_b79k --out run
    clipret-train data scenes OUT --count 2000                         drawn traffic scenes with titles
    """


@main.command(epilog=FIT_EPILOG)
@click.argument("data", type=FILE)
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="clipret-small, MODEL[:TAG or FILE] of open_clip, hf-hub:ORG/REPO, local-dir:FOLDER, or a run folder.",
)
@click.option("--out", type=FILE, required=True, help="The run folder to make; it must not exist or be empty.")
@click.option("--image-root", type=FILE, help="What paths in the list are relative to; default: its folder.")
@click.option("--image-column", metavar="NAME", help="Column of the pictures' paths; default: detected.")
@click.option("--title-column", metavar="NAME", help="Column of the titles; default: detected.")
@click.option("--where", metavar="SQL", help="Only rows of the list for which this holds.")
@click.option("--val", type=FILE, help="A list of its own to validate on.")
@click.option("--val-where", metavar="SQL", help="Rows to validate on, of --val or of the list itself.")
@click.option(
    "--val-split",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the pictures to validate on where neither is given.  [default: 0.1]",
)
@click.option("--validate-every", type=click.IntRange(1), metavar="EPOCHS", help="How often recall is measured.")
@click.option("--epochs", type=click.IntRange(1), help="Times that every picture is seen.")
@click.option("--batch-size", type=click.IntRange(2), help="Pictures a step.")
@click.option("--captions", type=click.IntRange(1), help="Titles of each picture that take part in a step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Highest learning rate.")
@click.option("--weight-decay", type=click.FloatRange(0), help="Of AdamW, on matrices only.")
@click.option("--warmup", type=click.FloatRange(0, 1), help="Share of the steps until the learning rate is reached.")
@click.option("--augment", type=click.Choice(AUGMENTS), help="How pictures are varied.  [default: photo]")
@click.option(
    "--crop-area", type=click.FloatRange(0, 1, min_open=True), help="Least share of a picture that a random crop keeps."
)
@click.option("--precision", type=click.Choice(("fp32", "bf16")), help="Default: bf16 where the processor has it.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]")
@click.option("--threads", type=click.IntRange(1), help="Processor threads; default: all there are.")
@click.option(
    "--cache-limit",
    type=click.FloatRange(0),
    metavar="GIB",
    help="Memory for decoded pictures; beyond it they are decoded anew each epoch.  [default: 4]",
)
@click.option("--seed", type=int, help="Decides the weights, the order, the crops.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def fit(data: Path, model: str, out: Path, as_json: bool, **given: Any) -> None:
    """Train MODEL on the list DATA (CSV, TSV or JSON lines: one picture and one title a row).

    A picture may have many titles and a title many pictures: all of them count as right answers. What is left open
    is filled in from a recipe for the model; params.toml in the run folder records every value.
    """
    for package in ("torch", "open_clip", "safetensors", "tomli_w"):
        require(package, "train")
    from clipret.training.config import FitConfig
    from clipret.training.fit import fit as train

    texts = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    config = FitConfig.for_model(str(data), model, **texts)
    result = train(config, out, _report)
    if result.skipped:
        click.echo(f"unreadable pictures: {result.skipped}, listed in {out / 'skipped.tsv'}", err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"run": str(result.run)}, indent=2))
        return
    rows = []
    for title, metrics in (("best", result.best), ("last", result.last)):
        for way, name in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            shares = [f"{100 * metrics[way][f'recall_at_{k}']:.1f}%" for k in (1, 5, 10)]
            rows.append([f"{title} (epoch {metrics['epoch']})", name, *shares, f"{metrics[way]['queries']}"])
    click.echo(show_table(["checkpoint", "direction", "recall@1", "recall@5", "recall@10", "queries"], rows))
    click.echo(f"{result.last['cpu_seconds']:.0f} CPU seconds. Next:  clipret-export {out} BUNDLE")


def _report(metrics: dict[str, Any]) -> None:
    line = f"epoch {metrics['epoch']:3}  loss {metrics['loss']:.3f}  {metrics['pictures_per_second']:.0f} pictures/s"
    if "text_to_image" in metrics:
        line += f"  recall@10 {100 * metrics['text_to_image']['recall_at_10']:.1f}%"
    click.echo(line, err=True)


@main.group()
def data() -> None:
    """Make data to try a training on."""


@data.command(epilog="Example:  clipret-train data scenes scenes --count 2000 --style surveillance --seed 1")
@click.argument("out", type=FILE)
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Pictures to draw.")
@click.option(
    "--style",
    type=click.Choice(("web", "surveillance")),
    default="web",
    show_default=True,
    help="Clean pictures as in a shop, or what a camera on a pole sees.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws the same pictures.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that draw.")
def scenes(out: Path, count: int, style: Literal["web", "surveillance"], seed: int, workers: int) -> None:
    """Draw traffic scenes with titles into the folder OUT."""
    from clipret.training.scenes import write_set

    write_set(out, count=count, style=style, seed=seed, workers=workers)
    click.echo(f"{count} pictures in {out}")

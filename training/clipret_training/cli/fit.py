"""clipret-train fit: the training itself, and what its help lists."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipret.cli.options import LOCATION, json_option
from clipret.console import show_table
from clipret.errors import ClipretError, require
from clipret_training.filenames import PARAMS, SKIPPED
from clipret_training.settings import HELP, Settings

if TYPE_CHECKING:
    from clipret_training.config import FitConfig

__all__ = ["fit", "require_packages"]

FILE = click.Path(path_type=Path)

EPILOG = """
\b
Examples
  A new model, from an annotations file with the columns path and caption, on a CPU:
    clipret-train fit captions.csv --model clipret-small --out run
  Rows of one language; one split held out:
    clipret-train fit captions.tsv --model clipret-small --out run --set image_root=images \\
        --set where="lang = 'en'" --set val_where="lang = 'en' and split = 'val'"
  Fine-tune a checkpoint of OpenCLIP:
    clipret-train fit captions.csv --model ViT-B-32-quickgelu:weights.safetensors --out run --set patch_dropout=0.5
  A recipe with other settings, on eight GPUs:
    torchrun --nproc-per-node 8 --no-python clipret-train fit shards/{000..127}.tar --out run \\
        --recipe vit-bigg-14-traffic --epochs 3
  Continue an interrupted run; train further from a run's model; repeat a run:
    clipret-train fit --resume --out run
    clipret-train fit more.csv --model run --out run2 --lr 2e-4
    clipret-train fit --recipe run/params.toml --out run2

\b
The run folder contains params.toml, metrics.jsonl, log.txt, skipped.tsv, tensorboard and checkpoints.
Next:  clipret-export run bundle
"""


class _FitCommand(click.Command):
    """A command whose help ends with all settings of a training."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        defaults = _defaults()
        with formatter.section("Settings for --set and recipes"):
            formatter.write_text("The value after the name is the default; recipes change some of them by model.")
            for section, settings in HELP.items():
                formatter.write_paragraph()
                formatter.write_heading(section)
                formatter.indent()
                formatter.write_dl([(f"{name}{defaults.get(name, '')}", text) for name, text in settings.items()])
                formatter.dedent()
        super().format_epilog(ctx, formatter)


def _defaults() -> dict[str, str]:
    """ "=VALUE" for each setting that has a default."""
    values = {field.name: field.default for field in dataclasses.fields(Settings)}
    return {name: f"={_shown(value)}" for name, value in values.items() if value not in (None, dataclasses.MISSING)}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


@click.command(cls=_FitCommand, epilog=EPILOG)
@click.argument("data", type=LOCATION, required=False)
@click.option(
    "--model",
    metavar="M",
    help="clipret-small, MODEL[:TAG or FILE] of OpenCLIP, chinese-clip-SIZE[:FILE], hf-hub:ORG/REPO, "
    "local-dir:FOLDER, or a run folder; clipret-train models lists names.",
)
@click.option("--out", type=FILE, required=True, help="The run folder to create; it must not exist or be empty.")
@click.option("--recipe", metavar="NAME|FILE", help="Settings from a recipe of clipret-train models, or a .toml file.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Any setting; see below.")
@click.option("--val", type=LOCATION, help="An annotations file to validate on; default: a tenth of the images.")
@click.option("--epochs", type=int, help="Passes over the images.")
@click.option("--batch-size", type=int, help="Images of a step, over all processes.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]")
@click.option("--resume", is_flag=True, help="Continue the run in --out after its last checkpoint.")
@json_option
def fit(out: Path, recipe: str | None, assignments: tuple[str, ...], resume: bool, as_json: bool, **flags: Any) -> None:
    """Train MODEL on DATA: an annotations file with an image and a caption per row, or webdataset .tar files.

    An image may have many captions and a caption many images; all of them count as right answers. Settings that are
    not given come from the recipe, then from the defaults for the model. params.toml in the run folder records every
    value. --resume without DATA reads them from there, and ends with the weights that the run would have had
    without the interruption.
    """
    require_packages()
    from clipret_training.config import FitConfig, parse_value

    values = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ClipretError(f"--set {assignment!r} is not NAME=VALUE: write for example --set patch_dropout=0.5")
        values[name] = parse_value(name, text)
    if resume and recipe is None and values["data"] is None:
        changed: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        config = dataclasses.replace(FitConfig.read(out / PARAMS), **changed)
    else:
        config = FitConfig.for_model(recipe=recipe, **values)
    _train(config, out, resume=resume, as_json=as_json)


def require_packages() -> None:
    """Raises ClipretError where a package of the training is missing."""
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
        values = {name: value for name, value in dataclasses.asdict(result).items() if name != "writes"}
        click.echo(json.dumps(values | {"run": str(result.run)}, indent=2))
        return
    rows = []
    for checkpoint, metrics in (("best", result.best), ("last", result.last)):
        for direction, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
            measured = metrics[direction]
            recalls = [f"{100 * measured[f'recall_at_{k}']:.1f}%" for k in (1, 5, 10)]
            rank, precision = f"{measured['median_rank']:g}", f"{measured['map_at_10']:.4f}"
            name = f"{checkpoint} (epoch {metrics['epoch']})"
            rows.append([name, label, *recalls, rank, precision, f"{measured['queries']}"])
    header = ["checkpoint", "direction", "recall@1", "recall@5", "recall@10", "median rank", "mAP@10", "queries"]
    click.echo(show_table(header, rows))
    click.echo(f"{result.last['cpu_seconds']:.0f} CPU seconds. Next:  clipret-export {out} BUNDLE")


def _report(metrics: dict[str, Any]) -> None:
    line = f"epoch {metrics['epoch']:3}  loss {metrics['loss']:.3f}  {metrics['images_per_second']:.0f} images/s"
    if "text_to_image" in metrics:
        line += f"  recall@10 {100 * metrics['text_to_image']['recall_at_10']:.1f}%"
    click.echo(line, err=True)

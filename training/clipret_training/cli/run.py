"""clipret-train run: a pipeline from raw files to a competition's answer."""

import json
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from clipret.console import show_table
from clipret.errors import ClipretError
from clipret_training.pipelines import Pipeline, StepRecord, run_pipeline
from clipret_training.recipe import recipe_names, recipe_text

__all__ = ["run"]

_COUNTS = ("queries", "missing_images", "queries_left_out")  # of eval: the same in every step


@click.command(
    epilog="Example:  clipret-train run traffic --out work --set labels=train_label.txt --set images=train_images"
)
@click.argument("recipe", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results of all steps.")
@click.option(
    "--set", "given", metavar="NAME=VALUE", multiple=True, help='A value of the recipe; a list as ["--epochs", "10"].'
)
@click.option("--show", is_flag=True, help="Print the recipe and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def run(recipe: str | None, out: Path | None, given: tuple[str, ...], show: bool, as_json: bool) -> None:
    """Run the steps of RECIPE, a built-in pipeline or a .toml file; without RECIPE, list the built-in pipelines.

    Finished steps are kept: run the command again after an interruption, or with other values or a changed recipe, and
    only the steps that this affects run again. Prints the time of each step and, for steps that measure, the change
    since the measurement before.
    """
    if recipe is None:
        rows = [[name, purpose] for name, purpose in recipe_names("pipeline").items()]
        click.echo(show_table(["pipeline", "for"], rows))
        return
    if show:
        click.echo(recipe_text(recipe, "pipeline"), nl=False)
        return
    if out is None:
        raise click.UsageError("name the folder for the results with --out")
    values = {}
    for assignment in given:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ClipretError(f"--set {assignment!r} is not NAME=VALUE: write for example --set model=clipret-small")
        values[name] = value
    records = run_pipeline(Pipeline.read(recipe, values), out, _report)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(records), indent=2))
        return
    click.echo(_table(records))


def _report(step: str, state: str) -> None:
    click.echo(f"step {step}: {state}", err=True)


def _table(records: Mapping[str, StepRecord]) -> str:
    names = dict.fromkeys(name for record in records.values() for name in record.metrics or {})
    names = {name: None for name in names if name not in _COUNTS}
    rows, before = [], dict[str, float]()
    for step, record in records.items():
        metrics = record.metrics or {}
        compared = records[record.against].metrics or {} if record.against in records else before
        cells = []
        for name in names:
            change = f" ({metrics[name] - compared[name]:+.4f})" if name in metrics and name in compared else ""
            cells.append(f"{metrics[name]:.4f}{change}" if name in metrics else "")
        before = metrics or before
        rows.append([step, f"{record.seconds:.1f}", f"{record.cpu_seconds:.1f}", *cells])
    return show_table(["step", "seconds", "CPU seconds", *names], rows)

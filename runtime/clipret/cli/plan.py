"""clipret-search plan: what a gallery of a given size takes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from clipret.cli.options import FILE, Number, json_option, print_json
from clipret.console import headed, show_table

__all__ = ["plan_command"]


def _count(_context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """A whole number that may be written as 1e9."""
    if value is None:
        return None
    try:
        number = float(value.replace("_", "").replace(",", ""))
        if number >= 1 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise click.BadParameter(f"{value!r} is no whole number from 1 on, such as 1e9.", param=option)


_POSITIVE = Number(0, min_open=True)


@click.command(
    "plan", epilog="Example:  clipret-search plan --images 1e9 --model ViT-H-14 --qps 5000 --tflops 300 --hours 24"
)
@click.option("--images", required=True, callback=_count, metavar="N", help="How many, such as 1e9.")
@click.option("--model", required=True, help="ViT-B-32, ViT-L-14, ViT-H-14, ViT-bigG-14, …")
@click.option("--precision", default="bf16", show_default=True, help="fp32, bf16, int8: of encoding on processors.")
@click.option("--qps", type=_POSITIVE, help="Queries a second that shall be answered.")
@click.option("--cores", type=click.IntRange(1), help="Processor cores that encode: how long do they take?")
@click.option("--gpus", type=click.IntRange(1), help="GPUs that encode: how long do they take?")
@click.option("--hours", type=_POSITIVE, help="In how many hours shall it be done?")
@click.option("--rate", type=_POSITIVE, help="Images a second of one of your GPUs, measured.")
@click.option("--tflops", type=_POSITIVE, help="TFLOP/s that one of your GPUs sustains, instead.")
@click.option("--image", default="0.3 MP", show_default=True, help="Size of the images: 0.3 MP, 2 MP, 12 MP.")
@click.option("--kilobytes", type=_POSITIVE, help="Of an image's file.")
@click.option("--milvus-qps", type=_POSITIVE, help="Queries a second of one node, measured.")
@click.option("--rates", type=FILE, help="Measurements of your machines, as rates.json in the package has ours.")
@json_option
def plan_command(rates: Path | None, as_json: bool, **given: Any) -> None:
    """Say what encoding, keeping and searching so many images takes.

    Each line has its formula and says whether it was measured (by the scripts in benchmarks/, on the machine that is
    named), computed from such a measurement, or given by you. No GPU is among the measured machines: pass --rate,
    which  clipret-search index  prints on yours, or --tflops. What is missing is named and not guessed.

    Costs are GPU or core hours for encoding, GB for keeping, and cores and GB of memory for searching, times what
    yours cost.
    """
    from clipret.diagnostics.planning import Workload, plan, read_rates  # no other command needs it

    lines = plan(Workload(**{name: value for name, value in given.items() if value is not None}), read_rates(rates))
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    rows = [
        (line.part, line.name, "?" if line.value is None else _shown(line.value), line.unit, line.origin, line.formula)
        for line in lines
    ]
    click.echo(headed(show_table(("", "", "value", "", "from", "formula"), rows)))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

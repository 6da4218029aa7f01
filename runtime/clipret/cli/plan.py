"""clipret-search plan: the hardware that a gallery of a given size needs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from clipret.cli.options import FILE, json_option, print_json
from clipret.console import headed, show_table

__all__ = ["plan_command"]


@click.command("plan", epilog="Example:  clipret-search plan images=1e9 model=ViT-H-14 qps=5000 tflops=300 hours=24")
@click.argument("facts", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.option("--rates", type=FILE, help="Measurements of your machines, in the form of the package's rates.json.")
@json_option
def plan_command(facts: Sequence[str], rates: Path | None, as_json: bool) -> None:
    """Estimate what encoding, storing and searching a number of images takes.

    \b
    Required
      images=1e9         how many
      model=ViT-H-14     ViT-B-32, ViT-L-14, ViT-H-14, ViT-bigG-14, …
    The images
      image="0.3 MP"     size: 0.3 MP (default), 2 MP, 12 MP
      kilobytes=80       size of a file
    Encoding
      hours=24           how long it may take: how much hardware?
      cores=64, gpus=8   the hardware that there is: how long does it take?
      precision=bf16     fp32, bf16 or int8, on processors
      rate=900           images per second of one of your GPUs, as index printed it
      tflops=300         TFLOP/s that one of your GPUs sustains, where there is no rate
    Searching
      qps=5000           queries per second
      milvus_qps=800     queries per second of one Milvus node, as eval --against measured it

    Each line of the result has its formula and says whether it was measured (by the scripts in benchmarks/, on the
    machine that is named), computed from a measurement, or given by you. No GPU is among the measured machines: give
    rate or tflops. What is missing is named and not guessed.
    """
    from clipret.diagnostics.planning import Workload, plan, read_rates  # no other command needs it

    lines = plan(Workload(**_workload(facts, Workload)), read_rates(rates))
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    rows = [
        (line.part, line.name, "?" if line.value is None else _shown(line.value), line.unit, line.origin, line.formula)
        for line in lines
    ]
    click.echo(headed(show_table(("", "", "value", "", "from", "formula"), rows)))


def _workload(facts: Sequence[str], workload: type) -> dict[str, Any]:
    """The values of a Workload, each of the type of its field. Raises click.UsageError that names what is wrong."""
    kinds: Mapping[str, Any] = get_type_hints(workload)
    values = dict[str, Any]()
    for fact in facts:
        key, equals, text = fact.partition("=")
        if not equals or key not in kinds:
            raise click.UsageError(f"{fact!r} is not one of {', '.join(f'{name}=…' for name in kinds)}.")
        if key in values:
            raise click.UsageError(f"{key} is given twice: keep one of the values.")
        values[key] = text if kinds[key] is str else _number(key, text, whole=kinds[key] is int)
    if missing := [
        field.name for field in fields(workload) if field.name in ("images", "model") and field.name not in values
    ]:
        raise click.UsageError(f"{' and '.join(f'{name}=…' for name in missing)} is missing: see --help.")
    return values


def _number(key: str, text: str, *, whole: bool) -> float:
    """A number above 0; a whole one may be written as 1e9."""
    try:
        number = float(text.replace("_", "").replace(",", ""))
        if 0 < number < float("inf") and (not whole or number == int(number)):
            return int(number) if whole else number
    except ValueError:
        pass
    raise click.UsageError(
        f"{key}={text} is not {'a whole number above 0, such as 1e9' if whole else 'a number above 0'}."
    )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

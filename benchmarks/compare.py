"""Two result files of the suite, figure by figure: what got slower, as a ratio.

    python benchmarks/compare.py OLD.json NEW.json [--threshold 1.15] [--all]

A figure is worse when the new one is more than --threshold times the old one, for what should be small, or the old one
more than so many times the new one, for what should be large. Figures of peers are shown and never judged: they tell
whether the machine itself was slower. Exit status 1 where something of ours got worse, 2 where nothing can be compared.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure, figures, is_peer


@dataclass(frozen=True)
class Change:
    """`worse`: how many times worse the new figure is; below 1 it is better."""

    figure: Figure
    old: float
    new: float
    worse: float
    peer: bool


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises SystemExit for anything else."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content["questions"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise SystemExit(f"{path} is no result file of benchmarks/suite.py: {error}") from None
    return content


def by_name(content: dict[str, Any]) -> dict[str, Figure]:
    found = (
        figure
        for name, question in content["questions"].items()
        for result in question.get("results", {}).values()
        for figure in figures(name, result)
    )
    return {figure.name: figure for figure in found}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every figure that both have and that has a better and a worse, the worst first."""
    before, after = by_name(old), by_name(new)
    found = []
    for name, figure in after.items():
        if name not in before or figure.better is None:
            continue
        a, b = before[name].value, figure.value
        if a == b:
            worse = 1.0
        elif min(a, b) <= 0:  # a count of faults, which was none or is none
            worse = math.inf if (b > a) == (figure.better == "lower") else 0.0
        else:
            worse = b / a if figure.better == "lower" else a / b
        found.append(Change(figure, a, b, worse, is_peer(figure.path)))
    return sorted(found, key=lambda change: -change.worse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=1.15, help="times worse that are still noise")
    parser.add_argument("--all", action="store_true", help="list every figure, not only the worse ones")
    arguments = parser.parse_args()
    if arguments.threshold < 1:
        parser.error("--threshold is a ratio of at least 1")
    old, new = read(arguments.old), read(arguments.new)
    if old.get("machine") != new.get("machine"):
        print(f"the machines differ: {old.get('machine')} and {new.get('machine')}", file=sys.stderr)
    found = changes(old, new)
    if not found:
        print("the two files have no figure in common", file=sys.stderr)
        raise SystemExit(2)
    ours = [change for change in found if not change.peer]
    worse = [change for change in ours if change.worse > arguments.threshold]
    for change in found if arguments.all else worse:
        mark = "peer " if change.peer else "WORSE" if change.worse > arguments.threshold else "     "
        print(f"{mark} {change.worse:6.2f}x  {change.old:g} -> {change.new:g}  {change.figure.name}")
    typical = {
        name: statistics.median(min(change.worse, 1e9) for change in some)
        for name, some in (("ours", ours), ("peers", [change for change in found if change.peer]))
        if some
    }
    told = ", ".join(f"{name} {value:.2f}x" for name, value in typical.items())
    print(f"{len(worse)} of {len(ours)} figures worse by more than {arguments.threshold:g}x; median: {told}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()

"""The report of a result file: one HTML page that needs nothing else, and the same tables in Markdown.

    python benchmarks/report.py RESULTS.json          # writes RESULTS.html and RESULTS.md next to it

Every question with its command, its tables and plots; what failed; and what was not measured, with the reason.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import direction, is_peer, label_of
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plots import bars, lines

_ABOUT = ("benchmark", "machine", "cores", "python", "date")
_BARS = 3  # plots of one table at most: its first columns with a direction


@dataclass(frozen=True)
class Table:
    """`path`: the keys that lead to it. `cells`: numbers and words by line and column."""

    path: tuple[str, ...]
    columns: list[tuple[str, ...]]
    cells: dict[str, dict[tuple[str, ...], Any]]

    def plots(self) -> Iterator[Markup]:
        """A bar chart for each of the first columns that measure something."""
        drawn = 0
        for column in self.columns:
            values = {
                line: cells[column]
                for line, cells in self.cells.items()
                if isinstance(cells.get(column), int | float) and not isinstance(cells[column], bool)
            }
            full = (*self.path, *column)
            if len(values) < 2 or drawn == _BARS or direction(full) is None:
                continue
            drawn += 1
            peers = {line for line in values if is_peer((line, *column))}
            better = "more" if direction(full) == "higher" else "less"
            yield bars(f"{' · '.join(full)} ({better} is better)", values, peers)


def flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The numbers and words below a dict by their paths; lists are left out."""
    if not isinstance(value, dict):
        return {} if isinstance(value, list) else {path: value}
    return {key: leaf for name, below in value.items() for key, leaf in flat(below, (*path, str(name))).items()}


def tables(value: Any, path: tuple[str, ...] = ()) -> Iterator[Table]:
    """A result as tables: dicts whose parts are alike become the lines of one, single values one of their own."""
    if isinstance(value, list):
        if value and all(isinstance(one, dict) for one in value):
            yield from tables({label_of(one, number): one for number, one in enumerate(value)}, path)
        return
    single = {name: one for name, one in value.items() if not isinstance(one, dict | list)}
    below = {name: one for name, one in value.items() if isinstance(one, dict) and one}
    if single:
        yield Table(path, [("",)], {name: {("",): one} for name, one in single.items()})
    rest = dict(below)
    while rest:
        first = next(iter(rest.values()))
        own = set(flat(first))
        alike = {name: one for name, one in rest.items() if len(own & set(flat(one))) > 0.5 * len(own) and own}
        small = len(own) <= 12 and not any(isinstance(leaf, list) for leaf in first.values())
        if len(alike) > 1 and small:
            columns = list(dict.fromkeys(key for one in alike.values() for key in flat(one)))
            yield Table(path, columns, {name: flat(one) for name, one in alike.items()})
            rest = {name: one for name, one in rest.items() if name not in alike}
        else:
            name = next(iter(rest))
            yield from tables(rest.pop(name), (*path, name))
    for name, one in value.items():
        if isinstance(one, list) and name != "plots":
            yield from tables(one, (*path, name))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.8g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def html(content: dict[str, Any]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    questions = []
    for name, question in content["questions"].items():
        shown_results = []
        for result in question.get("results", {}).values():
            facts = {key: one for key, one in result.items() if key not in (*_ABOUT, "plots")}
            drawn = [lines(plot["title"], plot["x"], plot["y"], plot["series"]) for plot in result.get("plots", [])]
            shown_results.append({"lines": drawn, "tables": list(tables(facts))})
        questions.append({**question, "name": name, "results": shown_results})
    template = environment.get_template("report.html.j2")
    return template.render(content=content, facts=_facts(content), questions=questions, shown=shown)


def markdown(content: dict[str, Any]) -> str:
    """The same without the plots."""
    parts = [f"# clipret, measured on {content['machine']}", "", _facts(content), ""]
    for question in content["questions"].values():
        parts += [f"## {question['title']}", "", question["about"], "", f"    {question['command']}", ""]
        if "failed" in question:
            parts += [f"Failed: {question['failed']}", ""]
        for result in question.get("results", {}).values():
            facts = {key: one for key, one in result.items() if key not in (*_ABOUT, "plots")}
            for table in tables(facts):
                if table.path:
                    parts += [f"**{' · '.join(table.path)}**", ""]
                heads = [" ".join(column) for column in table.columns]
                parts += [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
                for line, cells in table.cells.items():
                    told = [shown(cells.get(column, "")).replace("|", "/") for column in table.columns]
                    parts.append(f"| {line} | {' | '.join(told)} |")
                parts.append("")
    parts += ["## Not measured", "", *(f"- {name}: {reason}" for name, reason in content["missing"].items())]
    return "\n".join(parts) + "\n"


def _facts(content: dict[str, Any]) -> str:
    words = [f"{content['cores']} cores", f"Python {content['python']}", content["date"], f"commit {content['commit']}"]
    return ", ".join(words + ([content["note"]] if content.get("note") else [])) + "."


def write(results: Path) -> Path:
    """The page and the Markdown next to a result file; returns the page's path."""
    content = json.loads(results.read_text(encoding="utf-8"))
    page = results.with_suffix(".html")
    page.write_text(html(content), encoding="utf-8")
    results.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(write(parser.parse_args().results))


if __name__ == "__main__":
    main()

"""The report of a result file: one HTML page that needs nothing else, and the same tables in Markdown.

    python benchmarks/report.py RESULTS.json          # writes RESULTS.html and RESULTS.md beside it

Every question with its command, its tables and plots; what failed; and what was not measured, with the reason.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from figures import direction, is_peer, label_of
from plots import bars, lines

_ABOUT = ("benchmark", "machine", "cores", "python", "date")
_BARS = 3  # plots of one table at most: its first columns with a direction
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { background: #8882; padding: 0.6rem; overflow-x: auto; white-space: pre-wrap; }
.wide { overflow-x: auto; } .missing { color: #b45309; } h2 { margin-top: 2.5rem; } svg { max-width: 100%; }
"""


@dataclass(frozen=True)
class Table:
    """`path`: the keys that lead to it. `cells`: numbers and words by line and column."""

    path: tuple[str, ...]
    columns: list[tuple[str, ...]]
    cells: dict[str, dict[tuple[str, ...], Any]]

    def plots(self) -> Iterator[str]:
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


def _questions(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from content["questions"].items()


def html(content: dict[str, Any]) -> str:
    """The page."""
    parts = [f"<h1>clipret, measured on {escape(content['machine'])}</h1>", f"<p>{escape(_facts(content))}</p>"]
    parts.append("<p>Bars of peers are grey. Every figure is in the JSON file beside this page.</p>")
    for name, question in _questions(content):
        parts.append(f'<h2 id="{escape(name)}">{escape(question["title"])}</h2>')
        parts.append(f"<p>{escape(question['about'])}</p><pre>{escape(question['command'])}</pre>")
        if "failed" in question:
            parts.append(f'<p class="missing">Failed: {escape(question["failed"])}</p>')
        for result in question.get("results", {}).values():
            facts = {key: one for key, one in result.items() if key not in _ABOUT}
            drawn = facts.pop("plots", [])
            parts += [lines(plot["title"], plot["x"], plot["y"], plot["series"]) for plot in drawn]
            for table in tables(facts):
                parts += _html_table(table)
                parts += table.plots()
    parts.append("<h2>Not measured</h2><ul>")
    parts += [f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in content["missing"].items()]
    body = "\n".join([*parts, "</ul>"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>clipret benchmarks</title>'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _html_table(table: Table) -> list[str]:
    head = "".join(f"<th>{escape(' '.join(column))}</th>" for column in table.columns)
    rows = [
        f"<tr><td>{escape(line)}</td>"
        + "".join(f"<td>{escape(shown(cells.get(column, '')))}</td>" for column in table.columns)
        + "</tr>"
        for line, cells in table.cells.items()
    ]
    title = f"<h3>{escape(' · '.join(table.path))}</h3>" if table.path else ""
    return [title, f'<div class="wide"><table><tr><th></th>{head}</tr>', *rows, "</table></div>"]


def markdown(content: dict[str, Any]) -> str:
    """The same without the plots."""
    parts = [f"# clipret, measured on {content['machine']}", "", _facts(content), ""]
    for _, question in _questions(content):
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
    """The page and the Markdown beside a result file; returns the page's path."""
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

"""clipret-search doctor: what works on this machine, and what to install for the rest."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipret.cli.options import json_option, print_json
from clipret.console import headed, show_table
from clipret.errors import ClipretError

if TYPE_CHECKING:
    from clipret.diagnostics.doctor import Extra, Finding

__all__ = ["doctor"]

_SIGNS = {"works": ("✓", "green"), "idle": ("·", "yellow"), "absent": ("·", "yellow"), "fails": ("✗", "red")}
_MOST = 100  # characters of a reason in the table; --json has all of it


@click.command(epilog="Example:  clipret-search doctor --json > this-machine.json")
@json_option
def doctor(as_json: bool) -> None:
    """Check what works on this machine, and show what to install for the rest.

    Each installed backend runs a small tower on each of its devices, in the code that searches, and each ranking method
    is compared with a brute-force search in float64, with ties and duplicates. This takes about ten seconds.

    Exit status 0 if everything that is installed works, else 1 with one line that says what does not.
    """
    from clipret.diagnostics.doctor import (  # not for the other commands
        check_backends,
        check_exactness,
        extras,
        machine,
    )

    facts, installed = machine(Path.cwd()), extras()
    backends, ranking = list(check_backends()), list(check_exactness())
    wrong = _wrong(installed, backends, ranking)
    if as_json:
        listed = [asdict(one) | {"complete": one.complete, "install": _install(one)} for one in installed]
        print_json(
            {
                "ok": not wrong,
                "machine": facts,
                "backends": [asdict(one) for one in backends],
                "ranking": [asdict(one) for one in ranking],
                "extras": listed,
            }
        )
    else:
        _show(facts, installed, backends, ranking)
    if wrong:
        raise ClipretError(wrong)


def _wrong(installed: "list[Extra]", backends: "list[Finding]", ranking: "list[Finding]") -> str:
    """One line about what is installed and does not work; empty if everything works."""
    reasons = [f"{one.name} {one.detail}" for one in backends if one.state == "fails"]
    reasons += [f"the ranking is not exact ({one.name}: {one.detail})" for one in ranking if one.state == "fails"]
    old = dict.fromkeys(package for one in installed for package in one.old)
    reasons += [f"{package} is older than clipret needs: run  pip install --upgrade {package}" for package in old]
    if not any(one.state in ("works", "idle") for one in backends) and not reasons:
        reasons = ["no backend is installed: run  pip install 'clipret[cpu]'"]
    return "; ".join(reasons)


def _install(extra: "Extra") -> str | None:
    return None if extra.complete else f"pip install 'clipret[{extra.name}]'" if extra.name else "pip install clipret"


def _show(facts: dict[str, Any], installed: "list[Extra]", backends: "list[Finding]", ranking: "list[Finding]") -> None:
    click.echo(headed(show_table(("machine", ""), _machine(facts))))
    for heading, findings in (("backend", backends), ("ranking", ranking)):
        rows = [(_SIGNS[one.state][0], one.name, _cut(one.detail)) for one in findings]
        head, *lines = show_table(("", heading, ""), rows).splitlines()
        click.echo("\n" + click.style(head, bold=True))
        for line, one in zip(lines, findings, strict=True):
            click.echo(click.style(line[0], fg=_SIGNS[one.state][1]) + line[1:])
    rows = []
    for extra in installed:
        held = [f"{name} {version}" for name, version in extra.packages.items() if version is not None]
        missing = [name for name, version in extra.packages.items() if version is None]
        sign = "✓" if extra.complete else "·"
        what = ", ".join(held) if extra.complete else f"{_install(extra)}   (for {', '.join([*missing, *extra.old])})"
        rows.append((sign, extra.name or "(always)", what))
    click.echo("\n" + headed(show_table(("", "extra", ""), rows)))


def _machine(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cores = f"{facts['usable_cores']} of {facts['cores']} cores"
    exact = "VNNI" if facts["vnni"] else "no VNNI: 8-bit products take a slower, exact way"
    memory = (
        "unknown" if facts["memory"] is None else f"{_size(facts['memory_available'])} of {_size(facts['memory'])} free"
    )
    if facts["memory_limit"] is not None:
        memory += f", limited to {_size(facts['memory_limit'])}"
    return [
        ("system", f"{facts['system']}, Python {facts['python']}"),
        ("processor", f"{facts['processor']}, {cores}, {exact}"),
        ("instructions", ", ".join(facts["instructions"]) or "none of those that matter here"),
        ("memory", memory),
        ("disk here", f"{_size(facts['disk_free'])} free"),
        ("GPUs", ", ".join(facts["gpus"]) or "none"),
    ]


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / (1 << 30):.1f} GiB"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else text[: _MOST - 1] + "…"

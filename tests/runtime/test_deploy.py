"""What deploy/ holds, as far as it can be tried without systemd and docker running."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from clipret.cli import main

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGES = sorted(DEPLOY.glob("Dockerfile.*"))


def accepted(words: list[str]) -> None:
    """The options are those of the command."""
    command = main.get_command(click.Context(main), words[0])
    assert command is not None
    command.make_parser(click.Context(command, **main.context_settings)).parse_args(words[1:])


def started() -> str:
    """What the unit runs."""
    found = re.search(r"^ExecStart=(.+)$", (DEPLOY / "clipret.service").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_unit_s_command_can_be_given() -> None:
    program, *words = shlex.split(started())
    assert program == "/opt/clipret/bin/clipret-search"
    accepted(words)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "clipret.service").read_text().replace("/opt/clipret/bin/clipret-search", sys.executable)
    (tmp_path / "clipret.service").write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "clipret.service")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_an_image_copies_what_there_is_and_starts_what_there_is(file: Path) -> None:
    text = file.read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["dev-mode-dirs"]
    assert {*packages, "pyproject.toml", "constraints.txt", project["project"]["readme"]} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    [extras] = re.findall(r"/src\[(.+?)\]", text)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    [started] = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    accepted(json.loads(started))


def test_there_are_images_for_both() -> None:
    assert [file.suffix for file in IMAGES] == [".cpu", ".gpu"]

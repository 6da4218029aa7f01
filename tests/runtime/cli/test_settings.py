"""Options that hold several settings: what they become, and what is said of what is wrong in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from clipret.cli.settings import Settings, merged


@dataclass(frozen=True)
class Oven:
    degrees: float = 180.0
    minutes: int | None = None
    fan: bool = False
    shelf: Literal["low", "high"] = "low"
    door: str = "shut"


SETTINGS = Settings(Oven, leave_out=("door",), files=("recipe",))


def test_values_have_the_types_of_the_fields() -> None:
    found = SETTINGS.convert("degrees=200,minutes=5,fan,shelf=high,recipe=a.txt", None, None)
    assert found == {"degrees": 200.0, "minutes": 5, "fan": True, "shelf": "high", "recipe": Path("a.txt")}
    assert SETTINGS.convert("fan=no", None, None) == {"fan": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("degree=200", "'degree=200' is not a setting: did you mean degrees?"),
        ("door=open", "is not a setting: the settings are degrees=180.0, minutes=None, fan=False, shelf=low, recipe."),
        ("degrees=hot", "'degrees=hot' is not valid: degrees must be a number."),
        ("degrees=nan", "degrees must be a finite number"),
        ("minutes=1.5", "minutes must be a whole number"),
        ("minutes", "minutes must be given a value, as KEY=VALUE"),
        ("fan=maybe", "fan must be true or false"),
        ("shelf=middle", "shelf must be one of low, high"),
        ("fan,fan", "fan is set twice"),
        ("", "'' is not a setting"),
    ],
)
def test_what_is_wrong_is_said(value: str, message: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        SETTINGS.convert(value, None, None)
    assert message in caught.value.message


@dataclass(frozen=True)
class Recipe:
    file: Path | None = None
    where: str | None = None
    rank: Literal["good", "bad"] | None = None
    limit: int = 10


RECIPE = Settings(Recipe, first="file")


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        ("a.csv", {"file": Path("a.csv")}),
        ("a.csv,limit=3", {"file": Path("a.csv"), "limit": 3}),
        ("a,b.csv,rank=bad", {"file": Path("a,b.csv"), "rank": "bad"}),
        ("where=lang in ('en', 'zh'),limit=3", {"where": "lang in ('en', 'zh')", "limit": 3}),
        ("limit=3,where=a = 'x=y', b", {"limit": 3, "where": "a = 'x=y', b"}),
    ],
)
def test_a_leading_value_and_commas_in_texts(value: str, settings: dict[str, Any]) -> None:
    assert RECIPE.convert(value, None, None) == settings


def test_an_option_may_be_given_several_times() -> None:
    @click.command()
    @click.option("--oven", type=SETTINGS, multiple=True)
    def bake(oven: tuple[dict[str, Any], ...]) -> None:
        click.echo(Oven(**merged(oven, "--oven")).degrees)

    assert CliRunner().invoke(bake, ["--oven", "fan", "--oven", "degrees=150"]).output == "150.0\n"
    twice = CliRunner().invoke(bake, ["--oven", "degrees=1", "--oven", "degrees=2"])
    assert (twice.exit_code, "--oven sets degrees twice" in twice.stderr) == (2, True)


def test_keys_are_completed() -> None:
    context = click.Context(click.Command("x"))
    option = click.Option(["--oven"])
    offered = [item.value for item in SETTINGS.shell_complete(context, option, "fan,de")]
    assert offered == ["fan,degrees="]

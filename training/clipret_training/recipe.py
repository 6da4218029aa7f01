"""Recipes: TOML files that fill in what the user leaves open."""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError

__all__ = ["read_recipe", "recipe_names", "recipe_text"]

_FOLDER = files("clipret_training") / "recipes"


def recipe_names() -> dict[str, str]:
    """The recipes that clipret has, each with its first line, which says what it is for."""
    names = sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))
    return {name: recipe_text(name).splitlines()[0].lstrip("# ") for name in names}


def recipe_text(recipe: str) -> str:
    """The text of a recipe of clipret's, or of a TOML file. Raises ClipretError when there is neither."""
    if recipe.endswith(".toml"):
        try:
            return Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClipretError(f"recipe {recipe} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    file = _FOLDER / f"{recipe}.toml"
    if "/" in recipe or not file.is_file():
        names = list(recipe_names())
        near = difflib.get_close_matches(recipe, names, n=3, cutoff=0.3) or names
        raise ClipretError(
            f"there is no recipe {recipe!r}: did you mean {', '.join(near)}? A file's name ends in .toml"
        )
    return file.read_text(encoding="utf-8")


def read_recipe(recipe: str) -> dict[str, Any]:
    """Names and values of a recipe. Raises ClipretError when there is none or it is not TOML."""
    try:
        return tomllib.loads(recipe_text(recipe))
    except tomllib.TOMLDecodeError as error:
        raise ClipretError(f"recipe {recipe} is not TOML: {error}") from None

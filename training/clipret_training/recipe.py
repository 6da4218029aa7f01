"""Recipes: TOML files that clipret has or that a user writes. They fill in what is left open, or list steps."""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError

__all__ = ["read_recipe", "recipe_names", "recipe_text"]

_FOLDERS = {"recipe": "recipes", "pipeline": "pipelines"}


def recipe_names(kind: str = "recipe") -> dict[str, str]:
    """The recipes that clipret has, or its pipelines, each with its first line, which says what it is for."""
    folder = files("clipret_training") / _FOLDERS[kind]
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return {name: recipe_text(name, kind).splitlines()[0].lstrip("# ") for name in names}


def recipe_text(recipe: str, kind: str = "recipe") -> str:
    """The text of a recipe of clipret's, or of a TOML file. Raises ClipretError when there is neither."""
    if recipe.endswith(".toml"):
        try:
            return Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClipretError(f"{kind} {recipe} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    file = files("clipret_training") / _FOLDERS[kind] / f"{recipe}.toml"
    if "/" in recipe or not file.is_file():
        names = list(recipe_names(kind))
        near = difflib.get_close_matches(recipe, names, n=3, cutoff=0.3) or names
        guess = f"did you mean {', '.join(near)}? A file's name ends in .toml"
        raise ClipretError(f"there is no {kind} {recipe!r}: {guess}")
    return file.read_text(encoding="utf-8")


def read_recipe(recipe: str, kind: str = "recipe") -> dict[str, Any]:
    """Names and values of a recipe. Raises ClipretError when there is none or it is not TOML."""
    try:
        return tomllib.loads(recipe_text(recipe, kind))
    except tomllib.TOMLDecodeError as error:
        raise ClipretError(f"{kind} {recipe} is not TOML: {error}") from None

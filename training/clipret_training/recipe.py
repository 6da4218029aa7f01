"""Recipes: TOML files, built-in or a user's, with the settings of a training or the steps of a pipeline."""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError

__all__ = ["read_recipe", "recipe_names", "recipe_text"]

_FOLDERS = {"recipe": "recipes", "pipeline": "pipelines"}


def recipe_names(kind: str = "recipe") -> dict[str, str]:
    """List the built-in recipes.

    Args:
        kind: `recipe` (settings of a training) or `pipeline`.

    Returns:
        By name the first line of each file, which describes it.
    """
    folder = files("clipret_training") / _FOLDERS[kind]
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return {name: recipe_text(name, kind).splitlines()[0].lstrip("# ") for name in names}


def recipe_text(recipe: str, kind: str = "recipe") -> str:
    """Return the text of a recipe.

    Args:
        recipe: The name of a built-in recipe, or the path of a TOML file.
        kind: `recipe` or `pipeline`.

    Raises:
        ClipretError: There is no such recipe, or the file cannot be read.
    """
    if recipe.endswith(".toml"):
        try:
            return Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClipretError(
                f"{kind} {recipe} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
    file = files("clipret_training") / _FOLDERS[kind] / f"{recipe}.toml"
    if "/" in recipe or not file.is_file():
        names = list(recipe_names(kind))
        near = difflib.get_close_matches(recipe, names, n=3, cutoff=0.3) or names
        guess = f"did you mean {', '.join(near)}? The name of a file must end in .toml"
        raise ClipretError(f"there is no {kind} {recipe!r}: {guess}")
    return file.read_text(encoding="utf-8")


def read_recipe(recipe: str, kind: str = "recipe") -> dict[str, Any]:
    """Return the names and values of a recipe.

    Args:
        recipe: The name of a built-in recipe, or the path of a TOML file.
        kind: `recipe` or `pipeline`.

    Raises:
        ClipretError: There is no such recipe, or it is not TOML.
    """
    try:
        return tomllib.loads(recipe_text(recipe, kind))
    except tomllib.TOMLDecodeError as error:
        raise ClipretError(f"{kind} {recipe} is not TOML: {error}") from error

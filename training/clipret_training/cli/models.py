"""clipret-train models: the models and recipes that a training can start from."""

import click

from clipret.cli.options import json_option, print_json
from clipret.console import headed, show_table
from clipret.errors import require
from clipret_training.recipe import recipe_names, recipe_text

__all__ = ["models"]


@click.command(epilog="Examples:  clipret-train models ViT-B-32;  clipret-train models --recipe small > mine.toml")
@click.argument("name", required=False)
@click.option("--recipe", metavar="NAME", help="Print this recipe.")
@json_option
def models(name: str | None, recipe: str | None, as_json: bool) -> None:
    """List the models for fit --model whose names contain NAME, and the recipes.

    A model with a tag has pretrained weights, which are downloaded when they are first used.
    """
    if recipe is not None:
        click.echo(recipe_text(recipe), nl=False)
        return
    for package in ("torch", "open_clip"):
        require(package, "train")
    from clipret_training.models import model_names

    names = [model for model in model_names() if name is None or name.lower() in model.lower()]
    recipes = recipe_names()
    if as_json:
        print_json({"models": names, "recipes": recipes})
        return
    if name is None:
        click.echo(headed(show_table(["recipe", "for"], [[recipe, purpose] for recipe, purpose in recipes.items()])))
        click.echo()
    click.echo(headed("\n".join(["model", *names])))

"""Render the templates in `templates/`. jinja2 is imported with the first one, so that other commands start faster."""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("clipret.reports")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: Any) -> str:
    """Render a template. All values are escaped.

    Args:
        template: Name of a file in `clipret/reports/templates`.
        values: The variables of the template.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(values)

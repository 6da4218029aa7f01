"""Pages from the templates in `templates/`. jinja2 is loaded with the first of them: a query without one is sooner
done."""

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
    """What a template makes of these values, every text of them escaped.

    Args:
        template: Name of a file in `clipret/reports/templates`.
        values: What the template names.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(values)

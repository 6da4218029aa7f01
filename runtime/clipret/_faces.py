"""Lazy public names of a package: a module is imported when one of its names is first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_face"]


def lazy_face(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package, so that a cold query imports only the modules that it runs.

    Args:
        package: Name of the package.
        modules: For each module of the package, the public names that it defines.

    Returns:
        A function that imports a name's module when the name is first looked up.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 (it becomes the package's own)
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(importlib.import_module(package), name, value)
        return value

    return __getattr__

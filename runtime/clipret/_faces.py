"""The public face of a package that loads its modules only when a name of theirs is asked for (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_face"]


def lazy_face(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: a cold query loads what it runs and nothing else.

    Args:
        package: Name of the package.
        modules: The public names by the module of the package that defines them.

    Returns:
        A function that imports a name's module when the name is first looked up.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 (it becomes the package's own)
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(importlib.import_module(package), name, value)
        return value

    return __getattr__

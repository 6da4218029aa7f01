"""The examples in docstrings are correct."""

import doctest
import importlib
import pkgutil

import pytest

import clipret
from clipret.errors import ClipretError

MODULES = [
    module.name
    for module in pkgutil.walk_packages(clipret.__path__, "clipret.")
    if not module.name.endswith(".__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (ClipretError, ModuleNotFoundError) as error:
        pytest.skip(f"needs an extra: {error}")
    assert doctest.testmod(module).failed == 0

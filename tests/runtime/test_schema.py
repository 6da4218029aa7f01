"""The error message for a value that does not match a schema."""

from typing import Annotated, Literal

import msgspec
import pytest

from clipret.schema import Amount, Count, Filled, checked


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Count
    kind: Literal["a", "b"] | None = None


class Outer(msgspec.Struct, frozen=True):
    inner: dict[str, Inner]
    names: Annotated[list[Filled], msgspec.Meta(max_length=2)] = []
    tags: dict[str, tuple[Filled, ...]] = {}
    rate: Amount | None = None


def test_a_valid_value_becomes_the_schemas_type() -> None:
    value = {"inner": {"x": {"size": 1, "kind": "a"}}, "rate": 2, "more": 1}
    assert checked(value, Outer) == Outer({"x": Inner(1, "a")}, rate=2.0)
    assert checked([value], list[Outer])[0].names == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "it is 3: expected object, got int"),
        ({}, "it: missing required field inner"),
        ({"inner": {"x": {}}}, "inner.x: missing required field size"),
        ({"inner": {"x": {"size": 1}, "y.z": {"size": 0}}}, "inner.y.z.size is 0: expected int >= 1"),
        ({"inner": {"x": {"size": 1, "kind": "c"}}}, "inner.x.kind is 'c': expected one of a, b"),
        ({"inner": {"x": {"size": 1, "sort": "c"}}}, "inner.x: contains unknown field sort"),
        ({"inner": {}, "names": ["a", " "]}, r"names[1] is ' ': expected str matching regex '\\S'"),
        ({"inner": {}, "tags": {"x": ["a"], "y": ["b", ""]}}, r"tags.y[1] is '': expected str matching regex '\\S'"),
        ({"inner": {}, "names": "a"}, "names is 'a': expected array, got str"),
        ({"inner": {}, "rate": 0.0}, "rate is 0.0: expected float > 0.0"),
        ({"inner": {}, "rate": True}, "rate is True: expected float | null, got bool"),
    ],
)
def test_the_line_names_field_value_and_what_is_allowed(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as raised:
        checked(value, Outer)
    assert str(raised.value) == message

"""The label files of a contest, checked line by line."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret_training.competitions.traffic import (
        COLORS,
        COLUMNS,
        PERSON_ATTRIBUTES,
        TYPES,
        Label,
        Problem,
        parse_labels,
        rows_of,
        statistics,
        vocabulary_of,
    )

__all__ = [
    "COLORS",
    "COLUMNS",
    "PERSON_ATTRIBUTES",
    "TYPES",
    "Label",
    "Problem",
    "parse_labels",
    "rows_of",
    "statistics",
    "vocabulary_of",
]

__getattr__ = lazy_face(
    __name__,
    {
        "traffic": [
            "COLORS",
            "COLUMNS",
            "Label",
            "PERSON_ATTRIBUTES",
            "Problem",
            "TYPES",
            "parse_labels",
            "rows_of",
            "statistics",
            "vocabulary_of",
        ],
    },
)

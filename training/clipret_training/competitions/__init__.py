"""The label files of the traffic retrieval challenge."""

from clipret_training.competitions.traffic import (
    COLORS,
    COLUMNS,
    PERSON_ATTRIBUTES,
    TYPES,
    parse_labels,
    rows_of,
    statistics,
    vocabulary_of,
)

__all__ = ["COLORS", "COLUMNS", "PERSON_ATTRIBUTES", "TYPES", "parse_labels", "rows_of", "statistics", "vocabulary_of"]

"""Tools for two competitions: completed labels, one-to-one assignment, submission files."""

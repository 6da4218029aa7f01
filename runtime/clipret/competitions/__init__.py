"""What two competitions ask for: completed labels, one-to-one assignment, submission files."""

"""From rows of an annotations file to batches."""

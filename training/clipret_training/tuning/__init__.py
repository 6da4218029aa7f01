"""What of a model is trained, and in which precision."""

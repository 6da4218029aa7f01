"""Label files of the traffic retrieval challenge."""

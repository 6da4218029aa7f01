"""What works on this machine, and what a gallery of a given size takes."""

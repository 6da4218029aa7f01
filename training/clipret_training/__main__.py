"""`python -m clipret_training`: the command clipret-train, for torchrun."""

from clipret_training.cli import main

main()

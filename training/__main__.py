"""python -m clipret.training: the command clipret-train, for torchrun."""

from clipret.training.cli import main

main()

"""`python -m clipret.cli` is `clipret-search`."""

from clipret.cli.app import main

if __name__ == "__main__":
    main(prog_name="clipret-search")

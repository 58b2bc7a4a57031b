"""`python -m moebius`: the command line."""

from moebius.cli.__main__ import main

if __name__ == "__main__":
    main()

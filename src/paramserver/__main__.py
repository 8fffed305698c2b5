"""``python -m paramserver``: the command line, where the ``paramserver`` program is not on the path."""

from paramserver.cli import main

if __name__ == "__main__":
    main()

"""``python -m paramserver``: the command line, for environments without the ``paramserver`` program on the path."""

from paramserver.cli import main

if __name__ == "__main__":
    main()

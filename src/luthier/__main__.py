"""`python -m luthier`, the same as the command `luthier`."""

from luthier.cli import main

if __name__ == "__main__":
    main()

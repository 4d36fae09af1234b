"""`python -m luthier`, and so `accelerate launch -m luthier run ...`."""

from luthier.cli import main

if __name__ == "__main__":
    main()

"""`python -m prefix_distill …`."""

from prefix_distill.cli import main

if __name__ == "__main__":
    main()

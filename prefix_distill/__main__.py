"""`python -m prefix_distill …`."""

from .cli.main import main

if __name__ == "__main__":
    main()

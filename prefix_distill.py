"""Launcher for a checkout: `python prefix_distill.py run …`, `torchrun prefix_distill.py run …`."""

from prefix_distill.cli.main import main

if __name__ == "__main__":
    main()

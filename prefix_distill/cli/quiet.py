"""Quiet the libraries: spinning threads, deprecation warnings, progress bars."""

import sys
import warnings
from collections.abc import MutableMapping


def quiet_libraries() -> None:
    """Import the heavy libraries, and switch off their messages and progress bars."""
    import logging

    import transformers

    hide_deprecations()  # again: the import may add filters before ours
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def hide_deprecations() -> None:
    """Hide FutureWarning and DeprecationWarning, which a user cannot act on.

    They report that this package or a library uses old names. Python's own ``-W``, ``-X dev`` and
    ``PYTHONWARNINGS`` still show them or turn them into errors.
    """
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def calm_threads(environment: MutableMapping[str, str]) -> None:
    """Set how OpenMP's threads wait, unless the environment already does. Call it before the import
    of torch.

    Threads that spin for long at barriers slow torch down when another process is busy. Threads
    that sleep at once must be woken for every small matmul.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "20000")  # some tens of microseconds

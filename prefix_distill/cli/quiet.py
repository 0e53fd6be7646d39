"""Quiet the libraries: spinning threads, deprecation warnings, progress bars."""

import sys
import warnings
from collections.abc import MutableMapping


def quiet_libraries() -> None:
    """Imports the heavy libraries with their own chatter off."""
    import logging

    import transformers

    hide_deprecations()  # again: the import may add filters before ours
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def hide_deprecations() -> None:
    """Hide FutureWarning and DeprecationWarning, which a user cannot act on.

    They report uses of old names by this package or by a library. Python's own ``-W``, ``-X dev``
    and ``PYTHONWARNINGS`` still show them or turn them into errors.
    """
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def calm_threads(environment: MutableMapping[str, str]) -> None:
    """How OpenMP's threads wait, where nothing else is set; before torch is imported. Long spinning
    at barriers slows torch down when another process is busy; sleeping at once makes every small
    matmul wait for a wake-up."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "20000")  # some tens of microseconds

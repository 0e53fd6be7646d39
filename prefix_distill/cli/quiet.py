"""Keep libraries quiet: waiting threads, deprecation warnings, progress bars."""

import sys
import warnings
from collections.abc import MutableMapping


def quiet_libraries() -> None:
    """Imports the heavy libraries with their own chatter off."""
    import logging

    import transformers

    hide_deprecations()  # once more: the import may have put filters before ours
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def hide_deprecations() -> None:
    """Hide FutureWarning and DeprecationWarning, about which a user can do nothing.

    They name a library's old names, which another library or this package uses. Python's own
    ``-W``, ``-X dev`` and ``PYTHONWARNINGS`` still show them or make them errors.
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

"""Settings of the process that must precede the import of torch."""

from collections.abc import MutableMapping

from ..api.quiet import hide_deprecations, quiet_libraries

__all__ = ["calm_threads", "hide_deprecations", "quiet_libraries"]


def calm_threads(environment: MutableMapping[str, str]) -> None:
    """Set how OpenMP's threads wait, unless the environment says so already.

    Long spinning at barriers slows torch down when another process is busy. Sleeping at once makes
    every small matrix product wait for a wake-up.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "20000")  # some tens of microseconds

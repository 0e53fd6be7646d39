"""Explain why a model name cannot be found on the hub."""

import os

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import UserError


def check_reachable(name: str, error: BaseException) -> None:
    """Raise UserError if loading failed because ``name`` is no folder and the hub has no answer."""
    if os.path.exists(os.path.expanduser(name)):
        return
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise UserError(
                f"model {name}: no such folder, and not loadable from the hub (no connection); "
                "check the path or the network"
            ) from None
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            raise UserError(
                f"model {name}: no such folder, and no such public model on the hub; check the "
                "path or the id, or run `hf auth login`"
            ) from None
        cause = cause.__cause__ or cause.__context__

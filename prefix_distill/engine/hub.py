"""Pin models to a revision of the hub, and explain why a name cannot be found there."""

import contextlib
import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..display import phase
from ..errors import UserError, one_line
from ..prompts.sources import split_revision

WEIGHTS = ("*.safetensors",)
# other formats of weights, which are never read
UNREAD = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ckpt", "*.tflite")


def contacting(name: str) -> contextlib.AbstractContextManager[object]:
    """Show during the ``with`` block that the hub is asked for ``name``, unless it is a path."""
    if os.path.exists(os.path.expanduser(name)):
        return contextlib.nullcontext()
    return phase(f"contacting the hub for {name}")


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


def find_pinned(name: str, ignored: tuple[str, ...] = UNREAD) -> Path | None:
    """Return the folder of ``repo@revision`` in the hub's cache; None for another name.

    Missing files are downloaded, except those that match a pattern in ``ignored``. UserError: the
    hub or the cache has no such revision.
    """
    repo, revision = split_revision(name)
    if revision is None:
        return None
    try:
        with contacting(name):
            return Path(snapshot_download(repo, revision=revision, ignore_patterns=[*ignored]))
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"model {name}: revision {revision} of {repo} cannot be loaded from the hub "
            f"({type(error).__name__}: {one_line(error)}); check the revision and the network"
        ) from None


def find_commit(name: str, kind: str = "model") -> str | None:
    """Return the commit that a hub id (``repo`` or ``repo@revision``) means in the hub's cache.

    ``kind``: model or dataset. None: the name is not in the cache.
    """
    repo, revision = split_revision(name)
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    if Path(repo).exists() or len(folder.name) > 200:
        return None
    file = folder / "refs" / (revision or "main")
    if not file.is_file():
        return None
    return file.read_text(encoding="utf-8").strip()

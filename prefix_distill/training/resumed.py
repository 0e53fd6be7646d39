"""Prepare a resumed run, and check in a dry run that it can continue."""

from ..config import Config
from .commits import pin_commits
from .fingerprints import compare_fingerprints, take_fingerprints
from .folder import RunFolder
from .prepare import prepare
from .run import Run
from .state import check_shapes


def prepare_resumed(config: Config, folder: RunFolder) -> Run:
    """Load everything that a resumed run needs, at the hub's commits that it recorded.

    UserError: as `prepare`.
    """
    config, notes = pin_commits(config, folder)
    run = prepare(config)
    run.notes.lines[:0] = notes
    return run


def check_resume(run: Run, folder: RunFolder) -> list[str]:
    """Return notes on how a resume would continue the run; write nothing. All ranks call it.

    UserError: a resume would refuse the run, because prompts, models or checkpoints do not fit.
    """
    notes, _ = compare_fingerprints(run, folder, take_fingerprints(run))
    if not folder.has_checkpoint:
        return [*notes, "a resume starts from the beginning, because there is no checkpoint yet"]
    step, tensors, _ = folder.read_latest_checkpoint(notes.append)
    student = run.pair.student
    if student.adapter is None:
        student.train_weights()
    check_shapes(folder, student, tensors)
    return [*notes, f"a resume continues after step {step}"]

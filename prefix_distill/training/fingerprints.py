"""Fingerprints of a run's prompts and models, in its run.json.

A resumed run compares them with its own, and refuses other ones unless --allow-changed is given.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from .. import config as configuration
from ..config import Config
from ..engine.fingerprint import fingerprint_model
from ..engine.models import Model
from ..engine.ranks import Place
from ..errors import UserError
from ..prompts.prompt import Rendered
from . import commits
from .folder import RunFolder
from .run import Run, settled

KEY = "fingerprints"  # in run.json; under "earlier" those before each accepted change
TRAINING, HELD_OUT = "training prompts", "held-out prompts"
ROLES = ("student", "teacher")
PARTS = ("config", "tokenizer", "weights")
MARKS = 64  # number of prefixes of the prompts that have a digest

Prompts = Mapping[str, Sequence[Rendered]]  # TRAINING or HELD_OUT → prompts


def take_fingerprints(run: Run) -> dict:
    """Return the fingerprints of the run's prompts and models. All ranks call it.

    The models must be as loaded, without a step or a checkpoint. UserError: the ranks loaded
    different prompts or models.
    """
    found: dict = {}
    for name, prompts in _prompts_of(run).items():
        found[name] = digest_prompts(prompts)
    found[TRAINING]["loaded"] = run.problems.loaded
    found |= fingerprint_models(run.config, run.pair.student, run.pair.teacher)
    _compare_ranks(run.place, found)
    return found


def _prompts_of(run: Run) -> Prompts:
    """Return the prompts whose fingerprints are kept."""
    problems = run.problems
    held_out = []
    for prompt, ids in problems.held_out:
        held_out.append(Rendered(prompt=prompt, student_ids=ids, teacher_ids=()))
    return {TRAINING: problems.train, HELD_OUT: [*held_out, *problems.kl]}


def fingerprint_models(config: Config, student: Model, teacher: Model | None = None) -> dict:
    """Return role → fingerprint of the student and, if given, of the teacher."""
    name = settled(config.models.student, "--student")
    found = {"student": fingerprint_model(student, name)}
    if teacher is None:
        return found
    if teacher.net is student.net:
        return found | {"teacher": found["student"]}
    if config.models.teacher != configuration.SELF:
        name = settled(config.models.teacher, "--teacher")
    return found | {"teacher": fingerprint_model(teacher, name)}


def digest_prompts(prompts: Sequence[Rendered]) -> dict:
    """Return {count, digests} of prompts; digests: number of prompts → digest of the first ones.

    Another --steps makes the list longer or shorter and keeps its beginning. Digests of about
    ``MARKS`` beginnings, and of those with 1, 2, 4, 8, … prompts, make lists of different lengths
    comparable.
    """
    digests = {}
    running = hashlib.sha256()
    every = max(1, len(prompts) // MARKS)
    for count, rendered in enumerate(prompts, 1):
        running.update(_serialize(rendered))
        is_power_of_two = count.bit_count() == 1
        if is_power_of_two or count % every == 0 or count == len(prompts):
            digests[str(count)] = running.hexdigest()[:16]
    return {"count": len(prompts), "digests": digests}


def _serialize(rendered: Rendered) -> bytes:
    prompt = rendered.prompt
    row = [prompt.index, prompt.answer, rendered.student_ids, rendered.teacher_ids]
    return json.dumps(row).encode()


def _compare_ranks(place: Place, found: dict) -> None:
    """Raise UserError on all ranks if one has other prompts or models than rank 0."""
    first, *others = place.gather(found)
    for rank, other in enumerate(others, 1):
        for name in first:
            if other[name] != first[name]:
                raise UserError(
                    f"rank {rank} loaded other data than rank 0 ({name}); give every machine the "
                    "same files"
                )


def check_fingerprints(run: Run, folder: RunFolder, current: dict) -> list[str]:
    """Compare the run's fingerprints with those in its folder, and record them there.

    Return notes. All ranks call it. UserError: they differ, and --allow-changed was not given.
    """
    document = folder.read_json("run.json")
    notes, earlier = compare_fingerprints(run, folder, current)
    run.place.barrier()  # every rank has read before the first one writes
    if run.place.is_first:
        document[KEY] = current | {"earlier": earlier}
        if run.config.checkpoint.allow_changed:  # the next resume loads these
            document[commits.KEY] = commits.find_commits(run.config)
        folder.write_json("run.json", document)
    return notes


def compare_fingerprints(run: Run, folder: RunFolder, current: dict) -> tuple[list[str], list]:
    """Compare the run's fingerprints with those in its folder; write nothing.

    Return notes, and the fingerprints before each accepted change. UserError: they differ, and
    --allow-changed was not given.
    """
    stored = folder.read_json("run.json").get(KEY)
    if not isinstance(stored, dict) or not _is_complete(stored):
        note = (
            "the run folder has no fingerprints, because an older version wrote it: whether "
            "prompts and models are those that the run began with is not checked; from now on it is"
        )
        return [note], []
    earlier: list = stored.get("earlier", [])
    differing = describe_differences(stored, current, _prompts_of(run))
    if not differing:
        return [], earlier
    if not run.config.checkpoint.allow_changed:
        raise _refusal(f"--resume {folder.path}", differing)
    note = (
        f"--allow-changed: {join_names(differing)} differ from those that this run began with; "
        "the result will differ from a run that used one of them throughout"
    )
    return [note], [*earlier, {k: v for k, v in stored.items() if k != "earlier"}]


def check_student(folder: RunFolder, config: Config, student: Model) -> None:
    """Raise UserError unless ``student``, as loaded, can take a checkpoint of the run.

    A checkpoint of a whole student replaces all weights; one of an adapter needs the same base. A
    folder of an older version has no fingerprints and is not checked.
    """
    stored = folder.read_json("run.json").get(KEY)
    if not isinstance(stored, dict) or not _is_complete(stored):
        return
    differing = describe_differences(stored, fingerprint_models(config, student), {})
    if config.adapter.rank is None and "the student's weights" in differing:
        differing.remove("the student's weights")
    if differing:
        raise UserError(
            f"run folder {folder.path}: {join_names(differing)} differ from those that the run "
            f"began with; restore the model {config.models.student}"
        )


def _refusal(where: str, differing: list[str]) -> UserError:
    return UserError(
        f"{where}: {join_names(differing)} differ from those that this run began with; restore "
        "the files, or continue with the changed ones with --allow-changed"
    )


def _is_complete(stored: dict) -> bool:
    """Return whether the fingerprints are a document of this version."""
    for name in (TRAINING, HELD_OUT):
        prompts = stored.get(name)
        if not isinstance(prompts, dict) or not isinstance(prompts.get("digests"), dict):
            return False
    for role in ROLES:
        model = stored.get(role)
        if not isinstance(model, dict) or not isinstance(model.get("weights"), dict):
            return False
    return True


def describe_differences(stored: dict, current: dict, prompts: Prompts) -> list[str]:
    """Return the names of what differs: prompts, and each model's config, tokenizer or weights."""
    differing = []
    for name, now in prompts.items():
        loaded = current.get(name, {}).get("loaded")
        same_rows = stored[name].get("loaded") == loaded
        if not same_rows or not _same_prompts(stored[name]["digests"], now):
            differing.append(f"the {name}")
    for role in ROLES:
        if role not in current:
            continue
        for part in PARTS:
            if not _is_same(stored[role].get(part), current[role][part]):
                differing.append(f"the {role}'s {part}")
    return differing


def _same_prompts(stored: dict[str, str], prompts: Sequence[Rendered]) -> bool:
    """Compare as many prompts as both have, to one of the stored lengths."""
    lengths = [int(count) for count in stored if int(count) <= len(prompts)]
    if not lengths:
        return not stored or not prompts
    count = max(lengths)
    return digest_prompts(prompts[:count])["digests"][str(count)] == stored[str(count)]


def _is_same(stored: object, current: object) -> bool:
    """Compare digests; those of weights in a dtype that both have."""
    if not isinstance(stored, dict) or not isinstance(current, dict):
        return stored == current
    common = [dtype for dtype in stored if dtype in current]
    if not common:
        return True  # quantized weights in another dtype cannot be compared
    exact = "float32" if "float32" in common else common[0]
    return stored[exact] == current[exact]


def join_names(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    *others, last = names
    if not others:
        return last
    return f"{', '.join(others)} and {last}"

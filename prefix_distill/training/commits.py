"""Commits of the hub: a run records those it began with, and a resume loads the same ones."""

from huggingface_hub import constants

from .. import config as configuration
from ..config import Config
from ..engine.hub import find_commit
from ..lab.task import LAB
from ..prompts.sources import Source, parse_source, split_revision, split_sources
from .folder import RunFolder

KEY = "commits"  # in run.json
MODELS = ("models.student", "models.teacher")
DATASETS = ("data.dataset", "evaluate.dataset")

Commits = dict[str, str]  # such as "model org/name@tag" or "dataset org/name" → commit


def find_commits(config: Config) -> Commits:
    """Return the commit of each model and dataset of the run that comes from the hub."""
    names: list[tuple[str, str]] = []
    for path in MODELS:
        names.append(("model", configuration.get(config, path) or LAB))
    for path in DATASETS:
        for name, _ in split_sources(configuration.get(config, path) or LAB):
            names.append(("dataset", _locate_dataset(parse_source(name))))
    commits = {}
    for kind, name in names:
        commit = find_commit(name, kind)
        if commit is not None:
            commits[f"{kind} {name}"] = commit
    return commits


def pin_commits(config: Config, folder: RunFolder) -> tuple[Config, list[str]]:
    """Return the config with every hub id at the commit that the run recorded, and notes.

    A branch or a tag is pinned as well, because both can move. With --allow-changed, all names
    stay.
    """
    commits = folder.read_json("run.json").get(KEY)
    if config.checkpoint.allow_changed or not isinstance(commits, dict):
        return config, []
    notes = []
    for path in (*MODELS, *DATASETS):
        name = configuration.get(config, path)
        if name is None:
            continue
        pin = _pin_model if path in MODELS else _pin_datasets
        pinned = pin(name, commits)
        if pinned != name:
            notes.append(
                f"{configuration.flag(path)} {pinned}: the commit that this run began with"
            )
        section, key = path.split(".")
        config = configuration.replace(config, **{section: {key: pinned}})
    return config, notes


def _pin_model(name: str, commits: Commits) -> str:
    commit = _find_pin(name, "model", commits)
    if commit is None:
        return name
    repo, _ = split_revision(name)
    return f"{repo}@{commit}"


def _pin_datasets(text: str, commits: Commits) -> str:
    """Pin every dataset of a mixture; counts and weights stay."""
    named = split_sources(text)
    parts = text.split(",")
    if len(named) == 1:
        parts = [text]
    pinned = []
    for part, (name, _) in zip(parts, named, strict=True):
        source = parse_source(name)
        commit = _find_pin(_locate_dataset(source), "dataset", commits)
        if commit is not None:
            unpinned, _ = split_revision(source.name)
            part = part.replace(source.name, f"{unpinned}@{commit}", 1)
        pinned.append(part)
    return ",".join(pinned)


def _locate_dataset(source: Source) -> str:
    """Return the hub id of a dataset, with the revision that the user names."""
    if source.revision is None:
        return source.location
    return f"{source.location}@{source.revision}"


def _find_pin(name: str, kind: str, commits: Commits) -> str | None:
    """Return the recorded commit of a name; None if the name needs no pin.

    If the hub is switched off, the cache says which commit the name means. Then a name that means
    the recorded one stays, because the cache of `datasets` has no revisions.
    """
    commit = commits.get(f"{kind} {name}")
    if constants.HF_HUB_OFFLINE and find_commit(name, kind) == commit:
        return None
    return commit


def names_as_given(config: Config, folder: RunFolder) -> dict:
    """Return the config as plain values, with the hub ids that config.yaml has, without pins."""
    tree = configuration.as_dict(config)
    saved = configuration.read_yaml(str(folder.path / "config.yaml"))
    for path in (*MODELS, *DATASETS):
        section, key = path.split(".")
        tree[section][key] = saved.get(path, tree[section][key])
    return tree

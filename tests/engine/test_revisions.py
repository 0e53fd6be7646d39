"""Test `repo@revision` with models and datasets in a folder of the hub's cache format, offline."""

import json
import shutil

import datasets
import pytest
import torch
from helpers import flags, invoke, save_tiny
from huggingface_hub import constants

from prefix_distill.engine import adapter_files, loading
from prefix_distill.engine.hub import find_commit
from prefix_distill.errors import UserError
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.sources import parse_source, split_revision

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache with two commits of a model and of a dataset; main is the second one."""
    root = tmp_path / "hub"
    for kind, name in (("model", "tiny"), ("dataset", "sums")):
        repo = root / f"{kind}s--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(SECOND)
        (repo / "refs/v1").write_text(FIRST)
        for seed, commit in enumerate((FIRST, SECOND)):
            folder = repo / "snapshots" / commit
            if kind == "model":
                save_tiny(folder, seed=seed)
            else:
                folder.mkdir(parents=True)
                rows = [
                    {"question": f"{seed}: {i}+{i}?", "answer": f"#### {2 * i}"} for i in range(30)
                ]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / "train.jsonl").write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def weights(name):
    model = loading.load_model(name, device=torch.device("cpu"), dtype=torch.float32)
    return model.net.lm_head.weight


def test_names_with_and_without_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert split_revision("org/m@v1") == ("org/m", "v1")
    assert split_revision("org/m@refs/pr/3") == ("org/m", "refs/pr/3")
    for name in ("org/m", "a@b", "./x@y", "/x@y", "lab:choice@1", "x@y.jsonl", "@v1", "org/m@"):
        assert split_revision(name) == (name, None)
    source = parse_source("org/sums@v1#10")
    assert (source.location, source.revision, source.count) == ("org/sums", "v1", 10)
    source = parse_source("gsm8k@v1")
    assert source.preset is not None and source.location == source.preset.hub
    assert parse_source("gsm8k=org/copy@v1").location == "org/copy"


def test_a_revision_pins_a_model(cache):
    first = cache / f"models--org--tiny/snapshots/{FIRST}"
    second = cache / f"models--org--tiny/snapshots/{SECOND}"
    for revision in ("v1", FIRST):
        assert torch.equal(weights(f"org/tiny@{revision}"), weights(str(first)))
    assert torch.equal(weights("org/tiny@main"), weights(str(second)))
    assert not torch.equal(weights("org/tiny@v1"), weights("org/tiny@main"))
    assert find_commit("org/tiny@v1") == find_commit(f"org/tiny@{FIRST}") == FIRST
    assert find_commit("org/tiny") == SECOND and find_commit("org/other") is None
    assert find_commit("org/sums@v1", "dataset") == FIRST
    with pytest.raises(UserError, match="revision v9 of org/tiny"):
        weights("org/tiny@v9")


def test_a_revision_pins_a_dataset(cache, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for revision, start in (("v1", "0:"), ("main", "1:"), (FIRST, "0:")):
        prompts = load_prompts(f"org/sums@{revision}#5").prompts
        assert len(prompts) == 5 and all(p.problem.startswith(start) for p in prompts)
    with pytest.raises(UserError, match="org/sums"):
        load_prompts("org/sums@v9")


def test_a_run_records_the_commits(cache, tmp_path):
    student = "org/tiny@v1"
    names = flags((student, "org/tiny@main"), "org/sums@v1", tmp_path / "run")
    code, _, err = invoke(*names, "--steps", "1", "--eval-every", "0", "--lora", "2")
    assert code == 0, err
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert document["commits"] == {
        "model org/tiny@v1": FIRST,
        "model org/tiny@main": SECOND,
        "dataset org/sums@v1": FIRST,
    }
    saved = json.loads((tmp_path / "run/model/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/tiny", "v1")
    assert adapter_files.read_base(tmp_path / "run/model") == student
    assert "base_model: org/tiny\n" in (tmp_path / "run/model/README.md").read_text()
    # the tag moves to other weights
    (cache / "models--org--tiny/refs/v1").write_text(SECOND)
    code, _, err = invoke("run", "--resume", "--out", tmp_path / "run", "--steps", "2")
    assert code == 0 and f"org/tiny@{FIRST}: the commit that this run began with" in err, err
    more = ("--steps", "3", "--allow-changed")
    code, _, err = invoke("run", "--resume", "--out", tmp_path / "run", *more)
    assert code == 0 and "the student's weights" in err, err
    shutil.rmtree(tmp_path / "run")


@pytest.fixture
def hub(cache, monkeypatch):
    """Let a dataset without a revision come from the commit that main names, as from the hub."""
    plain = datasets.load_dataset

    def load_dataset(name, *rest, **named):
        folder = cache / f"datasets--{name.replace('/', '--')}"
        if folder.is_dir() and named.get("revision") is None:
            name = str(folder / "snapshots" / (folder / "refs/main").read_text())
        return plain(name, *rest, **named)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return cache


def move_main(hub):
    """Let main and the tag of the data name the other commit, as after a push."""
    for name in ("models--org--tiny", "datasets--org--sums"):
        (hub / name / "refs/main").write_text(FIRST)
    (hub / "datasets--org--sums/refs/v1").write_text(SECOND)


UNPINNED = {"model org/tiny": SECOND, "dataset org/sums": SECOND}


@pytest.fixture
def run(hub, tmp_path):
    """Return the folder of a run of one step with names without a revision; then main moves."""
    out = tmp_path / "run"
    names = flags(("org/tiny", "org/tiny"), "org/sums#20:2,org/sums@v1#5", out)
    code, _, err = invoke(*names, "--steps", "1", "--eval-every", "0")
    assert code == 0, err
    commits = json.loads((out / "run.json").read_text())["commits"]
    assert commits == UNPINNED | {"dataset org/sums@v1": FIRST}
    move_main(hub)
    return out


def resume(out, steps, *more):
    code, _, err = invoke("run", "--resume", "--out", out, "--steps", steps, *more)
    return code, err


def test_a_resume_loads_the_commits_that_the_run_recorded(run):
    """The config keeps the names as given, so that they can be given again."""
    config = (run / "config.yaml").read_text()
    code, err = resume(run, 2)
    assert code == 0, err
    assert f"org/tiny@{SECOND}" in err and f"org/sums@{SECOND}" in err
    assert (run / "config.yaml").read_text() == config.replace("steps: 1", "steps: 2")
    code, err = resume(run, 3, "--student", "org/tiny")
    assert code == 0, err
    assert UNPINNED.items() <= json.loads((run / "run.json").read_text())["commits"].items()
    code, _, err = invoke("export", run, "--which", "3", "--out", run / "exported")
    assert code == 0, err


def test_allow_changed_takes_what_main_names_now(run):
    code, err = resume(run, 2, "--allow-changed")
    assert code == 0 and "the student's weights" in err and "prompts" in err, err
    commits = json.loads((run / "run.json").read_text())["commits"]
    moved = {"model org/tiny": FIRST, "dataset org/sums": FIRST, "dataset org/sums@v1": SECOND}
    assert commits == moved
    code, err = resume(run, 3)
    assert code == 0, err

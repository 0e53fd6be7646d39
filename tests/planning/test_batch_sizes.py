"""Test that a run chooses batch sizes that fit the free memory, and records them."""

from dataclasses import replace

import pytest
import torch
import yaml
from helpers import invoke, prepared, save_tiny

from prefix_distill import config as configuration
from prefix_distill.errors import UserError
from prefix_distill.planning import memory
from prefix_distill.planning.forecast import Forecaster
from prefix_distill.training import resume

AUTO = {"train__micro_batch_size": None, "rollout__rows": None}
SIZES = {"rows": 64, "micro_batch": 8}


@pytest.fixture(scope="module")
def config(pair, questions, tmp_path_factory):
    """Return the config of a student whose batches need much more than its weights."""
    student = save_tiny(tmp_path_factory.mktemp("wide") / "student", seed=1, width=64, layers=3)
    changes = {"rollout__max_new_tokens": 150, "schedule__prefix": "100"}
    run = prepared((student, pair[1]), questions, **changes, **AUTO)
    return run.config


def loaded_bytes(forecast):
    return forecast["weights"]["student"] + forecast["weights"]["teacher"]


@pytest.mark.parametrize("free", [6 << 20, 12 << 20, 40 << 20])
def test_the_largest_sizes_that_fit_are_chosen(config, monkeypatch, free):
    monkeypatch.setattr(memory, "read_free_memory", lambda device: free)
    run = memory.prepare_fitting(config)
    chosen = memory.describe_case(run)
    assert (run.limits.rows, run.limits.micro_batch_size) == (chosen.rows, chosen.micro_batch)
    forecaster = Forecaster(run.pair.student.net.config, run.pair.teacher.net.config)

    def needed(case):
        forecast = forecaster.forecast(case)
        return forecast["total"] - loaded_bytes(forecast)

    assert needed(chosen) <= memory.FILLED * free
    alone = {"rows": 1, "micro_batch": 1}
    for field, most in SIZES.items():
        size = getattr(chosen, field)
        larger = replace(chosen, **alone | {field: 2 * size})
        assert size == most or needed(larger) > memory.FILLED * free
    assert chosen.rows < 64 or chosen.micro_batch < 8 or free == 40 << 20


def test_a_micro_batch_on_a_gpu_may_be_a_whole_step(config):
    case = memory.describe_case(memory.prepare_fitting(config))
    rollouts = config.train.batch_size * config.rollout.samples
    assert memory.largest_micro_batch(torch.device("cpu"), case) == 8 < rollouts
    assert memory.largest_micro_batch(torch.device("cuda"), case) == rollouts


def test_a_given_size_is_kept(config, monkeypatch):
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 4 << 20)
    given = configuration.replace(config, train={"micro_batch_size": 7})
    run = memory.prepare_fitting(given)
    assert run.config.train.micro_batch_size == 7 and run.config.rollout.rows < 64
    both = configuration.replace(given, rollout={"rows": 5})
    assert memory.prepare_fitting(both).config.rollout.rows == 5


def test_a_given_micro_batch_that_does_not_fit_leaves_the_rows_as_they_are(config, monkeypatch):
    """It is halved when memory runs out, and sampling does not run beside training."""
    monkeypatch.setattr(memory, "read_free_memory", lambda device: 6 << 20)
    free = memory.prepare_fitting(config).config
    given = configuration.replace(config, train={"micro_batch_size": 4 * 8})
    assert free.train.micro_batch_size < 32
    assert memory.prepare_fitting(given).config.rollout.rows == free.rollout.rows > 1


@pytest.mark.parametrize("free, words", [(None, "is not known"), (4 << 20, "4 MiB free on cpu")])
def test_a_note_states_the_sizes_and_why(config, monkeypatch, free, words):
    monkeypatch.setattr(memory, "read_free_memory", lambda device: free)
    run = memory.prepare_fitting(config)
    (note,) = [text for text in run.notes.lines if text.startswith("chosen: ")]
    sizes = f"--generation-rows {run.limits.rows} --micro-batch-size {run.limits.micro_batch_size}"
    assert sizes in note and words in note
    assert (note in run.notes.details) == (free is None)


def test_a_run_records_its_sizes_and_a_resumed_run_keeps_them(pair, questions, tmp_path):
    flags = ("--student", pair[0], "--teacher", pair[1], "--dataset", questions)
    small = ("--steps", 1, "--batch-size", 2, "--problems", 2, "--check-samples", 0)
    auto = ("--micro-batch-size", "auto", "--generation-rows", "auto")
    code, _, err = invoke(
        "run", *flags, *small, *auto, "--max-new-tokens", 8, "--out", tmp_path / "run"
    )
    assert code == 0, err
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["train"]["micro_batch_size"] == 8 and recorded["rollout"]["rows"] == 64
    values = {"checkpoint.out": str(tmp_path / "run"), "train.micro_batch_size": "auto"}
    settings, notes = resume.resume_settings(values)
    assert settings["train.micro_batch_size"] == 8 and not notes


def test_auto_is_accepted_wherever_an_option_is_set(tmp_path):
    path = "train.micro_batch_size"
    assert configuration.build({path: "auto"}).train.micro_batch_size is None
    assert configuration.build({path: None}).train.micro_batch_size is None
    assert configuration.build({path: 3}).train.micro_batch_size == 3
    (tmp_path / "c.yaml").write_text("train: {micro_batch_size: 4}\n")
    config = "--config", tmp_path / "c.yaml"
    for flags in (("--micro-batch-size", "auto"), ("--set", f"{path}=auto")):
        code, out, err = invoke("plan", *config, *flags, "--prompt-tokens", 8, "--steps", 1)
        assert code == 0 and '"micro_batch_size": 8' in out, err
    with pytest.raises(UserError, match="expected a whole number or auto, got 'many'"):
        configuration.build({path: "many"})
    with pytest.raises(UserError, match=r"train\.steps: expected a whole number, got 'auto'"):
        configuration.build({"train.steps": "auto"})
    code, _, err = invoke("plan", "--micro-batch-size", "many")
    assert (
        code == 2 and "--micro-batch-size many: expected a whole number, such as 8, or auto" in err
    )

"""`prefix-distill help` prints files that work as printed: a notebook and a published setting."""

import ast
import io
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, invoke, last_json, save_tiny

from prefix_distill import Config
from prefix_distill import config as configuration
from prefix_distill.cli import pages
from prefix_distill.maths.schedule import parse_prefix

RECIPES = [topic for topic in pages.find_files() if topic.startswith("recipe:")]
SKIPPED = "skip-execution"


def read_notebook() -> dict:
    code, out, err = invoke("help", "notebook")
    assert code == 0 and err == ""
    return json.loads(out)


def test_a_file_is_printed_as_it_is_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for topic, file in pages.find_files().items():
        monkeypatch.setattr(sys, "stdout", Terminal())
        pages.print_page(topic)
        assert sys.stdout.getvalue() == file.read_text(encoding="utf-8")


def test_the_notebook_runs_without_network(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.reads(json.dumps(read_notebook()), as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        skip_cells_with_tag=SKIPPED,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    outputs = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and SKIPPED not in cell.metadata.get("tags", []):
            outputs[cell.source.splitlines()[0]] = cell.outputs
    shown = json.dumps(list(outputs.values()))
    assert "accuracy" in shown and "image/png" in shown and "  after: " in shown
    assert (tmp_path / "runs/toy/model/config.json").is_file()
    assert (tmp_path / "runs/answers.jsonl").is_file()


def test_the_cells_that_need_the_hub_have_valid_options():
    cells = [c for c in read_notebook()["cells"] if "hub" in c["metadata"].get("tags", [])]
    assert cells
    calls = []
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        calls += [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [call.func.id for call in calls]
    assert sorted(names) == ["resume", "run"]
    options = calls[names.index("run")].keywords
    config = Config.from_options(**{o.arg: ast.literal_eval(o.value) for o in options})
    assert config.models.student and config.models.teacher and config.data.dataset
    folders = {ast.literal_eval(calls[names.index("resume")].args[0]), config.checkpoint.out}
    assert len(folders) == 1


@pytest.mark.parametrize("topic", RECIPES)
def test_a_recipe_has_valid_settings_and_runs_with_small_models(topic, questions, tmp_path):
    code, out, err = invoke("help", topic)
    assert code == 0 and err == ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(out, encoding="utf-8")
    values = configuration.read_yaml(str(recipe))
    assert values.keys() <= configuration.options().keys()
    student = save_tiny(tmp_path / "student", seed=1)
    teacher = save_tiny(tmp_path / "teacher", seed=2)
    for folder in (student, teacher):
        file = Path(folder, "config.json")
        config = json.loads(file.read_text()) | {"max_position_embeddings": 1024}
        file.write_text(json.dumps(config))
    small = ("--batch-size", 2, "--steps", 2, "--max-new-tokens", 300)
    small += ("--set", "data.streaming=false")
    small += ("--problems", 2, "--eval-every", 0, "--kl-prompts", 2, "--check-samples", 0)
    models = ("--student", student, "--teacher", teacher)
    data = ("--dataset", questions, "--eval-dataset", questions)
    folder = ("--config", recipe, "--out", tmp_path / "run")
    code, out, err = invoke("run", *folder, *models, *data, *small)
    assert code == 0, err
    assert last_json(out)["steps"] == 2
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["divergence"]["estimator"] == values["divergence.estimator"]


def test_the_recipe_of_prefix_distillation_has_the_published_schedule():
    config = configuration.build(
        configuration.read_yaml(str(pages.find_files()["recipe:2602.15260"]))
    )
    schedule = parse_prefix(config.schedule.prefix, config.rollout.max_new_tokens)
    lengths = [schedule.length(step) for step in range(config.train.steps)]
    assert lengths == [1 + 256 * k for k in range(60)]
    assert (config.divergence.name, config.divergence.estimator) == ("reverse-kl", "sampled")
    assert (config.schedule.lr, config.schedule.lr_schedule) == (1e-6, "constant")
    assert config.rollout.begin == "<think>\n"

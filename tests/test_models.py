"""A sample of the classes that models.py examines, and the page that lists all of them."""

import json

import model_page
import model_steps
import pytest
from helpers import BENCHMARKS
from model_configs import list_classes

SAMPLE = {
    "DeepseekV3ForCausalLM": "works",
    "Gemma3ForConditionalGeneration": "works",
    "Qwen3NextForCausalLM": "works",
    "RobertaForCausalLM": "refused",
    "UdopForConditionalGeneration": "refused",
}
LONG = ("Qwen3NextForCausalLM", "DeepseekV3ForCausalLM")  # other tests cover much of these


@pytest.fixture(scope="module")
def classes():
    return {model_class.name: model_class for model_class in list_classes()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in SAMPLE]
)
def test_a_class_works_or_is_refused_with_its_obstacle(name, classes, tmp_path):
    if name not in classes:
        pytest.skip(f"this transformers has no {name}")
    *_, last = model_steps.run_steps(classes[name], tmp_path)
    assert last["outcome"] == SAMPLE[name], last
    assert not last.get("faults")
    if SAMPLE[name] == "works":
        assert {"load", "padded rows", "decoding", "gradient", "LoRA merged"} < last[
            "figures"
        ].keys()


@pytest.mark.parametrize(
    "text, is_obstacle",
    [
        ("decoding differs by 0.2 of its norm", True),
        ("the architecture is not supported", False),
        ("cannot be loaded (KeyError: 'x')", False),
        ("two\nlines", False),
    ],
)
def test_a_refusal_without_an_obstacle_counts_as_neither(text, is_obstacle):
    outcome = model_steps.outcome_of_refusal("load", text)["outcome"]
    assert outcome == ("refused" if is_obstacle else "neither")


def test_the_help_page_lists_the_recorded_classes():
    document = json.loads((BENCHMARKS / "results" / "models.json").read_text(encoding="utf-8"))
    assert model_page.PAGE.read_text(encoding="utf-8") == model_page.render(document)
    assert document["works"] >= 110 and document["neither"] == 0
    assert len(document["classes"]) == document["works"] + document["refused"]

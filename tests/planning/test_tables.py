"""Test the tables of a plan: what they leave out, and that they fit a terminal of 80 columns."""

import io
import re
import subprocess
import sys

import pytest
from helpers import invoke, last_json

from prefix_distill.api.documents import PlanResult
from prefix_distill.display import memory_text, render_tables
from prefix_distill.planning import plan as planning
from prefix_distill.planning.gpus import SIZES
from prefix_distill.planning.tables import tabulate

GIB = 1 << 30
MEMORY = {
    "total": 19.5 * GIB,
    "set_by": "student_update",
    "weights": {"student": 2.2 * GIB, "AdamW's moments": 353_000},
    "phases": {"teacher_score": 3 * GIB, "student_update": 4.4 * GIB, "teacher_text": 1 * GIB},
    "teacher_device": None,
}


def make_plan(seconds=None, seconds_on_card=None):
    row = {"tokens": [16, 512], "flops_per_update": 1.18e12, "flops_total": 1.2e15}
    row |= {"seconds": seconds, "memory": MEMORY}
    flags = ["--lora", "64", "--gradient-checkpointing", "--generation-rows", "64"]
    card = {"card": "4090", "fits": True, "flags": flags, "total": 19.5 * GIB}
    nothing = {"card": "t4", "fits": False, "flags": None, "total": None, "seconds": None}
    return {
        "method": "all weights",
        "updates": 100,
        "micro_batch_size": 8,
        "prefixes": [{"prefix": name, **row} for name in ("linear:16:512", "50%", "full")],
        "cards": [{**card, "seconds": seconds_on_card}, nothing],
        "rule": planning.RULE,
        "assumptions": list(planning.ASSUMPTIONS),
    }


def show(document):
    return render_tables(*tabulate(document), stream=io.StringIO(), width=80)


@pytest.mark.parametrize("seconds", [None, 5400])
@pytest.mark.parametrize("on_card", [None, 4800])
def test_at_80_columns_nothing_is_cut_and_a_column_without_a_value_is_left_out(seconds, on_card):
    text = show(make_plan(seconds, on_card))
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("90 min") == (3 if seconds else 0)
    assert text.count("80 min") == (1 if on_card else 0)
    assert bool(re.search(r"time\s*[│┃]", text)) == bool(seconds)
    assert ("time, assumed" in text) == bool(on_card)
    words = " ".join(text.split())
    assert ("--from-run" in words and "--measure" in words) == (not seconds)
    assert ("such as --card 4090" in words) == (not on_card)
    assert ("not measured" in words) == bool(on_card)


def test_phases_are_words_and_sizes_have_the_unit_that_suits_them():
    text = " ".join(show(make_plan()).split())
    assert "_" not in text
    for words in ("teacher scoring", "student update", "the teacher's text", "19.5 GiB", "345 KiB"):
        assert words in text
    assert memory_text(6 << 20) == "6 MiB" and memory_text(0) == "0 KiB"
    assert memory_text(1023.9 * 2**20) == "1 GiB"


def test_plain_tables_keep_what_stands_below_them(monkeypatch):
    monkeypatch.setenv("PREFIX_DISTILL_PLAIN", "1")
    lines = show(make_plan(seconds_on_card=4800)).splitlines()
    assert planning.RULE in lines and set(planning.ASSUMPTIONS) <= set(lines)


def test_common_sizes_are_no_cards_of_which_the_time_is_known():
    document = make_plan()
    document["cards"] = [
        {"card": size.name, "fits": False, "flags": None, "total": None, "seconds": None}
        for size in SIZES
    ]
    assert "time, assumed" not in show(document)


# A library that cannot be imported shows that none was.
BLOCKED = """
import sys
for name in ("torch", "transformers", "datasets"):
    sys.modules[name] = None
from prefix_distill.cli.main import main
sys.argv = ["prefix-distill", "plan", *{words}]
main()
"""


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--card", "4900"], "error: --card 4900: expected a card"),
        (["--device-tflops", "-1"], "error: --device-tflops -1: expected a number above 0"),
        (["--measure", "--from-run", "run"], "error: --device-tflops, --measure, --from-run: "),
    ],
)
def test_a_wrong_card_or_speed_is_refused_before_libraries_load(words, answer):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(words=words)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(answer), done.stderr


def test_a_plan_has_the_warnings_of_its_data(monkeypatch):
    def assume(config, length, models, notes):
        notes.warn("something may go wrong")
        return planned(config, length, models, notes=notes)

    planned = planning.assume_prompts
    monkeypatch.setattr(planning, "assume_prompts", assume)
    code, out, err = invoke("plan", "--prompt-tokens", 50, "--prefixes", "full", "--card", 24)
    assert code == 0, err
    document = last_json(out)
    assert document["warnings"] == ["something may go wrong"]
    assert PlanResult.read(document).warnings == ("something may go wrong",)
    assert "warnings  1" in err and err.count("something may go wrong") == 2

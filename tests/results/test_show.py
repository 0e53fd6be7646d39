"""Tests of `show`, of the texts that a run stores for it, and of `try`."""

import io
import json
import re
import shutil
import threading
import time

import pytest
from helpers import byte_tokenizer, invoke, last_json, make_model, prepared, tiny_net
from rich.console import Console

from prefix_distill.api import looking
from prefix_distill.engine.token_texts import TokenTexts, split_text
from prefix_distill.errors import UserError
from prefix_distill.files import write_atomically
from prefix_distill.results import show, texts
from prefix_distill.results.texts import choose_steps, read_texts
from prefix_distill.training import samples
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.text_lines import one_line, visible

RUN = ("--prefix", 24, "--steps", 4, "--batch-size", 4, "--samples", 1, "--lr", 4e-4)
RUN += (
    "--keep-checkpoints",
    2,
    "--save-every",
    2,
    "--eval-every",
    2,
    "--problems",
    20,
    "--kl-prompts",
    4,
    "--check-samples",
    0,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run that printed rollouts, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = invoke("run", *RUN, "--print-rollouts", 2, "--out", folder)
    assert code == 0, err
    return folder, err


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# What a run stores


def test_an_evaluation_stores_the_first_answers_as_the_examples_have_them(run):
    folder, _ = run
    stored = rows_of(folder / "samples.jsonl")
    assert [row["step"] for row in stored] == [0, 2, 4]
    for row, name in ((stored[0], "examples-before"), (stored[-1], "examples-after")):
        examples = rows_of(folder / f"{name}.jsonl")
        assert len(examples) == 20 and len(row["answers"]) == samples.PROBLEMS
        for answer, example in zip(row["answers"], examples, strict=False):
            assert answer.items() >= example["responses"][0].items()
            assert answer["prompt"] == example["prompt"]
    assert all(len(row["kl"]) == 4 for row in stored)


def test_the_mark_is_where_the_first_24_tokens_end(run):
    """The toy task has two digits, a colon, two digits and a space: four steps are 24 tokens."""
    long = [a for row in rows_of(run[0] / "samples.jsonl") for a in row["answers"]]
    long = [answer for answer in long if answer["tokens"] > 30]
    assert long
    for answer in long:
        head = answer["text"][: answer["prefix_characters"]]
        assert len(head.split()) == 4 and head.endswith(" ")


def test_the_stored_kl_is_that_of_the_measurement(run):
    before = json.loads((run[0] / "before.json").read_text())
    stored = rows_of(run[0] / "samples.jsonl")[0]
    for context, exact, rounded in zip(
        stored["contexts"], before["kl_by_token"], stored["kl"], strict=True
    ):
        assert rounded == pytest.approx(exact, rel=6e-3, abs=1e-9)
        assert len(context["tokens"]) == len(exact)


def test_rollouts_are_printed_with_the_end_of_the_prefix(run):
    folder, err = run
    stored = rows_of(folder / "rollouts.jsonl")
    assert [(row["step"], len(row["answers"])) for row in stored] == [(i, 2) for i in (1, 2, 3, 4)]
    lines = [line for line in err.splitlines() if line.startswith("rollout of step ")]
    assert len(lines) == 8
    for line in lines:
        assert "the prefix of 24 tokens ends here" in line or "(ends after" in line


@pytest.mark.parametrize("steps, printed", [(4, 4), (200, 200), (399, 399), (100_000, 200)])
def test_long_runs_print_the_rollouts_of_about_200_steps(steps, printed):
    assert sum(samples.is_printed(step, steps) for step in range(1, steps + 1)) == printed


def test_long_texts_are_stored_in_part():
    record = {
        "problem": 1,
        "prompt": "p" * 20_000,
        "reference": None,
        "responses": [{"text": "t" * 20_000, "tokens": 9}],
    }
    stored = samples.describe_record(record)
    assert len(json.dumps(stored)) < 2.1 * samples.CHARACTERS


def test_a_resumed_run_has_the_texts_of_an_uninterrupted_one(run, tmp_path):
    whole = run[0]
    shutil.copytree(whole, tmp_path / "cut")
    cut = tmp_path / "cut"
    document = json.loads((cut / "run.json").read_text())
    del document["result"]
    (cut / "run.json").write_text(json.dumps(document))
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    for name in ("samples.jsonl", "rollouts.jsonl"):
        with open(cut / name, "a") as file:
            file.write('{"step": 4, "torn')
    code, _, err = invoke("run", "--resume", "--out", cut)
    assert code == 0, err
    for name in ("samples.jsonl", "rollouts.jsonl"):
        strip = [row | {"evaluation": None} for row in rows_of(cut / name)]
        assert strip == [row | {"evaluation": None} for row in rows_of(whole / name)], name


@pytest.mark.parametrize("text", ["plain words", "naïve 東京 🎉!", " leading", "a\n\n b"])
def test_the_texts_of_tokens_joined_are_the_text(text):
    model = make_model(tiny_net("llama"))
    ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
    pieces = split_text(model, ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    cut = split_text(model, ids[:-1])  # the last character may be incomplete
    assert len(cut) == len(ids) - 1


def test_special_tokens_have_a_text_only_if_asked():
    model = make_model(tiny_net("llama"))
    assert TokenTexts(model, special=False).add(257) == ""
    assert TokenTexts(model, special=True).add(257) == "<e>"


# show


def test_show_prints_answers_side_by_side_and_stacked(run):
    found = read_texts(run[0])
    problems = texts.choose_problems(found, wrong=False, limit=2)
    for width, beside in ((160, True), (60, False)):
        console = Console(width=width, record=True, file=io.StringIO())
        for shown in show.render_answers(found, problems, [0, 2, 4], width=width):
            console.print(shown)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert any("before" in line and "after" in line for line in lines) == beside
        assert any(show.MARK in line for line in lines)


@pytest.mark.parametrize("width, names", [(200, 3), (120, 3), (80, 2), (60, 3)])
def test_as_many_evaluations_stand_side_by_side_as_fit(run, width, names):
    """A terminal of 60 columns has them one below the other, all of them."""
    view = looking.look(run[0], looking.Choice(limit=1))
    console = Console(width=width, record=True, file=io.StringIO())
    for shown in view.renderables(width):
        console.print(shown)
    text = console.export_text()
    assert sum(name in text for name in ("before ·", "step 2 ·", "after (step 4) ·")) == names


def test_show_names_right_and_wrong_and_the_end_of_the_prefix(run):
    code, out, err = invoke("show", run[0], "--limit", 0, "--json")
    assert code == 0, err
    document = last_json(out)
    assert document["state"] == "finished" and document["steps"] == [0, 2, 4]
    assert len(document["problems"]) == 20
    assert "before, wrong" in err and "after (step 4)" in err and show.PLAIN_MARK in err
    first = document["problems"][0]
    assert [answer["step"] for answer in first["answers"]] == [0, 2, 4]


WORKED = "Alex weighs 125*4-2 = <<125*4-2=498>>498. Their sum is 125+498. " * 3 + "\n#### 623"


@pytest.fixture(scope="module")
def worked(run, tmp_path_factory):
    """Return the folder of a run whose references are worked solutions."""
    folder = tmp_path_factory.mktemp("worked") / "run"
    shutil.copytree(run[0], folder)
    for name in ("examples-before", "examples-after"):
        rows = [row | {"reference": WORKED} for row in rows_of(folder / f"{name}.jsonl")]
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").unlink()
    return folder


@pytest.mark.parametrize("width", [40, 80])
def test_the_reference_is_the_value_that_answers_are_compared_with(worked, width):
    view = looking.look(worked, looking.Choice(limit=1))
    lines = list(view.lines())
    assert "  reference: 623" in lines
    console = Console(width=width, record=True, file=io.StringIO())
    for shown in view.renderables(width):
        console.print(shown)
    assert "reference 623" in console.export_text().splitlines()[0]
    assert view.to_dict()["problems"][0]["reference"] == WORKED


def test_the_reference_of_a_users_grader_is_shown_whole(worked, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(worked, folder)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("grader: null", "grader: my.py:score"))
    assert read_texts(folder).problems[0].gold == WORKED


def test_show_writes_text_to_a_pipe_and_the_document_on_request(run, monkeypatch):
    command = ("show", run[0], "--limit", 1)
    code, text, err = invoke(*command)
    assert code == 0 and not err and text.startswith("problem ")
    assert "before, " in text and text.splitlines()[-1].endswith("the run is finished")
    assert not re.search(r"[\x1b{─│]", text)
    code, out, err = invoke(*command, "--json")
    assert code == 0 and json.loads(out)["state"] == "finished" and err == text
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in invoke(*command)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert invoke(*command)[1] == text


def test_show_live_writes_lines_to_a_pipe(run):
    code, out, err = invoke("show", run[0], "--live", "--limit", 1)
    assert code == 0 and not err and out.splitlines()[-1] == "the run is finished"
    assert "after step 4: accuracy" in out


def test_show_wrong_shows_only_problems_that_are_wrong_at_the_end(run):
    _, out, _ = invoke("show", run[0], "--wrong", "--limit", 0, "--json")
    examples = rows_of(run[0] / "examples-after.jsonl")
    wrong = [row["problem"] for row in examples if not row["responses"][0]["correct"]]
    assert [problem["problem"] for problem in last_json(out)["problems"]] == wrong


def test_show_step_names_the_evaluations_there_are(run):
    code, _, err = invoke("show", run[0], "--step", 3)
    assert code == 2 and "--step 3: expected a step with an evaluation (0, 2, 4)" in err
    assert choose_steps([0, 10, 20, 30, 40], 20, 4) == [0, 20, 40]
    assert choose_steps(list(range(0, 100, 10)), None, 4) == [0, 30, 60, 90]
    assert choose_steps([0], None, 4) == [0]


def test_show_kl_names_loud_tokens(run):
    code, out, err = invoke("show", run[0], "--kl", "--limit", 1, "--json")
    assert code == 0, err
    [context] = last_json(out)["contexts"]
    loudest = max(value for value in context["kl"]["0"] if value is not None)
    assert f"{{{loudest:.2g}}}" in err
    found = read_texts(run[0])
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    for shown in show.render_tokens(found, [0, 4], 1):
        console.print(shown)
    assert "".join(found.contexts[0].tokens[:4]) in console.export_text().replace("\n", "")


def test_a_run_without_held_out_problems_shows_the_kl_of_its_rollouts(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for name in ("before", "after"):
        (folder / f"examples-{name}.jsonl").write_text("")
    stored = [row | {"answers": []} for row in rows_of(folder / "samples.jsonl")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stored))
    code, out, err = invoke("show", folder, "--kl", "--json")
    assert code == 0 and last_json(out)["steps"] == [0, 2, 4] and "KL in nats, before" in err
    assert "0 of 0 problems" in invoke("show", folder)[1]


def test_show_live_follows_a_run_until_it_ends(run, tmp_path, monkeypatch):
    """A lock is what tells a running folder from an interrupted one."""
    monkeypatch.setattr(looking, "LOOK", 0.05)
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    document = json.loads((folder / "run.json").read_text())
    unfinished = {key: value for key, value in document.items() if key != "result"}
    (folder / "run.json").write_text(json.dumps(unfinished))
    stored = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text(stored[0] + stored[1][:50])
    lines: list[str] = []

    def watch():
        lines.extend(looking.follow(folder, looking.Choice(limit=1)))

    with RunFolder(folder).lock():
        assert texts.state_of(folder) == "running"
        watcher = threading.Thread(target=watch)
        watcher.start()
        time.sleep(0.3)
        write_atomically(folder / "samples.jsonl", "".join(stored))
        write_atomically(folder / "run.json", json.dumps(document))
        watcher.join(20)
    evaluations = [line for line in lines if line.startswith("after step ")]
    assert [line.split(":")[0] for line in evaluations] == [f"after step {i}" for i in (0, 2, 4)]
    assert lines[-1] == "the run is finished"
    (folder / "run.json").write_text(json.dumps(unfinished))
    assert texts.state_of(folder) == "interrupted"


def test_a_folder_without_texts_is_refused(tmp_path):
    code, out, err = invoke("show", tmp_path)
    assert code == 2 and "expected a run folder" in err and not out
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="stores no answers yet"):
        read_texts(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(UserError, match="row 1: step: expected a whole number"):
        read_texts(tmp_path)


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    text = "a\x1b[31mred\x07\r\nb\x9b1m\tc"
    shown = visible(text)
    assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown and "\r" not in shown
    assert one_line("a\n b\n") == "a ↵ b"


# try


def test_try_asks_three_models_the_same_question(run):
    code, out, err = invoke("try", run[0], "32:23 31:61", "29:40 28:90", "--json")
    assert code == 0, err
    models = last_json(out)["models"]
    roles = [model["role"] for model in models]
    assert roles == ["untrained student", "trained student", "teacher"]
    for model in models:
        assert f"{model['role']} ({model['model']}):" in err
        assert len(model["answers"]) == 2
        for answer in model["answers"]:
            assert answer["text"] in err and answer["tokens"] >= 2
    assert "####49" in models[-1]["answers"][0]["text"]  # the teacher knows
    assert invoke("try", run[0], "32:23 31:61", "29:40 28:90") == (0, err, "")


def test_try_names_a_teacher_that_is_gone_after_the_students_answers(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    config = (folder / "config.yaml").read_text()
    assert "lab:choice/teacher" in config
    gone = tmp_path / "gone"
    (folder / "config.yaml").write_text(config.replace("lab:choice/teacher", str(gone)))
    code, out, err = invoke("try", folder, "32:23 31:61")
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: teacher: model ") and str(gone) in last
    assert "trained student (" in out and "no answer" in out


def test_try_renders_the_question_as_the_run_does(pair, questions, tmp_path):
    from prefix_distill.results import trying

    options = {
        "data.system": "Be brief.",
        "data.instruction": "Box it.",
        "data.prompt_template": "Q: {prompt}",
    }
    run = prepared(pair, questions, **{k.replace(".", "__"): v for k, v in options.items()})
    prompt = trying.build_prompt(run.config, "1+1?")
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 1+1?\n\nBox it."},
    )


def test_try_needs_a_question_and_a_trained_student(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = invoke("try", run[0])
    assert code == 2 and "try: expected a question" in err
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("model", "best"))
    code, _, err = invoke("try", folder, "32:23 31:61")
    assert code == 2 and "expected a trained student in model/ or best/" in err

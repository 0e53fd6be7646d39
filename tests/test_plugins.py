"""Test divergences and prefix schedules that a user's module registers: `--plugin`.

The tests use the examples in tests/plugins unchanged.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import signal

import pytest
import torch
from helpers import (
    PLUGINS,
    ROOT,
    byte_tokenizer,
    command,
    flags,
    invoke,
    last_json,
    rows,
    save_tiny,
)
from safetensors.torch import load_file

from prefix_distill import config as configuration
from prefix_distill.errors import UserError
from prefix_distill.maths.divergence import Head, Terms, per_token
from prefix_distill.maths.formulas import DIVERGENCES
from prefix_distill.maths.fused import statistics, weighted
from prefix_distill.maths.registered import register_divergence, register_schedule
from prefix_distill.maths.registry import registering
from prefix_distill.maths.schedule import SCHEDULES, parse_prefix
from prefix_distill.plugins import GROUP, load_plugins

SKEW, COSINE = PLUGINS / "skew_kl.py", PLUGINS / "cosine_prefix.py"
PATIENT, BOTH_WAYS = PLUGINS / "patient_prefix.py", PLUGINS / "with_gradient.py"


@pytest.fixture(autouse=True)
def forget():
    """Unload all plugins after each test."""
    yield
    load_plugins(None)


def tables(n=23, d=8, e=11, v=41):
    """Return hidden rows and heads of a student and a teacher, and a weight per row."""
    torch.manual_seed(3)
    student = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    return *student, torch.randn(n, e), Head(weight_VD=torch.randn(v, e)), torch.rand(n)


def loss_and_gradients(terms, softcap=None):
    """Return the loss, the values, and the gradients of the student's hidden rows and head."""
    hidden, weight, teacher, teacher_head, token_weight = tables()
    head = Head(weight_VD=weight, bias_V=None, scale=1.0, softcap=softcap)
    loss, values, _ = weighted(terms, hidden, head, teacher, teacher_head, token_weight)
    return loss, values, *torch.autograd.grad(loss, (hidden, weight))


# The examples


@pytest.mark.parametrize("file", sorted(PLUGINS.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_has_at_most_20_lines(file):
    assert len(file.read_text().splitlines()) <= 20


@pytest.mark.parametrize("file", [SKEW, COSINE], ids=lambda file: file.stem)
def test_help_plugins_shows_the_example(file):
    page = (ROOT / "prefix_distill/help/plugins.md").read_text(encoding="utf-8")
    assert f"```python\n{file.read_text(encoding='utf-8')}```" in page


def test_a_run_uses_a_registered_divergence_and_schedule(pair, questions, tmp_path):
    out = tmp_path / "run"
    more = ["--divergence", "skew-kl:0.2", "--prefix", "cosine:4:12:5"]
    code, said, err = invoke(
        *flags(pair, questions, out), *more, "--plugin", SKEW, "--plugin", COSINE
    )
    assert code == 0, err
    assert "plugin" in err and "--divergence skew-kl" in err and "--prefix cosine" in err
    table = rows(out)
    assert [row["rollout/prefix_tokens"] for row in table] == [4, 5, 7, 9, 11, 12]
    # KL(S‖(1−α)T + αS) is at most −log α
    assert all(0 < row["loss/skew_kl_nats"] <= -math.log(0.2) for row in table)
    document = json.loads((out / "run.json").read_text())
    assert [record["file"] for record in document["plugins"]] == [SKEW.name, COSINE.name]
    for record, file in zip(document["plugins"], (SKEW, COSINE), strict=True):
        assert (out / record["copy"]).read_bytes() == file.read_bytes()
    saved = configuration.read_yaml(str(out / "config.yaml"))
    assert saved["runtime.plugin"] == f"{SKEW},{COSINE}"
    assert last_json(said)["steps"] == 6
    # exporting a checkpoint does not need the plugin
    code, _, err = invoke("export", out, "--which", "3", "--out", tmp_path / "exported")
    assert code == 0 and (tmp_path / "exported/model.safetensors").is_file(), err


def test_the_other_commands_accept_a_plugin(pair, questions, tmp_path):
    models = ["--student", pair[0], "--teacher", pair[1]]
    plugin = ["--plugin", f"{SKEW},{COSINE}", "--divergence", "skew-kl"]
    prefix = ["--prefix", "cosine:4:12:5", "--max-new-tokens", "32"]
    code, said, err = invoke("plan", *models, "--prompt-tokens", "9", *plugin, *prefix)
    assert code == 0, err
    assert last_json(said)["prefixes"][0]["tokens"] == [4, 12]
    data = ["--dataset", questions, "--check-samples", "0", "--problems", "4"]
    code, said, err = invoke("check", *models, *data, *plugin, *prefix)
    assert code == 0, err
    arms = tmp_path / "arms.yaml"
    arms.write_text(
        json.dumps(
            {
                "base": {
                    "models": {"student": pair[0], "teacher": pair[1]},
                    "data": {"dataset": questions},
                    "train": {"steps": 2, "batch_size": 2},
                    "rollout": {"samples": 1, "max_new_tokens": 16},
                    "evaluate": {"problems": 2, "kl_prompts": 2, "tail_every": 0},
                },
                "arms": {
                    "plain": {"schedule": {"prefix": "4"}},
                    "skewed": {
                        "schedule": {"prefix": "cosine:4:6:2"},
                        "divergence": {"name": "skew-kl:0.5"},
                        "runtime": {"plugin": f"{SKEW},{COSINE}"},
                    },
                },
            }
        )
    )
    code, _, err = invoke("compare", arms, "--out", tmp_path / "arms")
    assert code == 0, err
    table = rows(tmp_path / "arms/skewed/seed-0")
    assert [row["rollout/prefix_tokens"] for row in table] == [4, 5]
    assert table[0]["loss/skew_kl_nats"] <= -math.log(0.5)


def test_names_are_known_only_where_the_plugin_is_loaded():
    settings = {"divergence.name": "skew-kl"}
    assert configuration.build(settings | {"runtime.plugin": str(SKEW)})
    with pytest.raises(UserError, match="--divergence skew-kl: expected reverse-kl"):
        configuration.build(settings)


def test_an_installed_package_is_named_by_its_entry_point(tmp_path, monkeypatch):
    shutil.copy(SKEW, tmp_path / "my_package_skew.py")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nskewed = my_package_skew\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = {"runtime.plugin": "skewed", "divergence.name": "skew-kl:0.3"}
    assert configuration.build(values)
    (plugin,) = load_plugins("skewed")
    assert plugin.file == tmp_path / "my_package_skew.py"
    with pytest.raises(UserError, match=r"expected a \.py file.*\(installed: skewed\)"):
        load_plugins("skew")


# The mathematics


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_autograd_in_chunks_equals_autograd_on_the_whole_table(temperature, softcap):
    terms = Terms(
        name="skew-kl", parameters=(0.2,), temperature=temperature, memory_bytes=4 * 41 * 9 * 5
    )
    assert 1 <= terms.rows_per_chunk(41, softcap is not None) <= 5  # several chunks of 23 rows
    loss, values, *gradients = loss_and_gradients(terms, softcap)
    hidden, weight, teacher, teacher_head, token_weight = tables()
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    student_logp = torch.log_softmax(logits / temperature, -1)
    teacher_logp = torch.log_softmax(teacher @ teacher_head.weight_VD.T / temperature, -1)
    want_values = per_token(terms, student_logp, teacher_logp)
    want = (token_weight * want_values).sum()
    torch.testing.assert_close(values, want_values.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for got, expected in zip(gradients, torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("top_k", [None, 5])
def test_value_only_value_with_gradient_and_built_in_are_equal(top_k):
    built_in = loss_and_gradients(Terms(name="reverse-kl", top_k=top_k))
    for name in ("my-kl", "my-kl-auto"):
        for got, expected in zip(
            loss_and_gradients(Terms(name=name, top_k=top_k)), built_in, strict=True
        ):
            largest = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * largest)
    hidden, weight, teacher, teacher_head, _ = tables()
    token = torch.arange(len(hidden))
    facts = [
        statistics(
            Terms(name=name, top_k=top_k),
            hidden,
            Head(weight_VD=weight),
            teacher,
            teacher_head,
            token,
        )
        for name in ("my-kl", "reverse-kl")
    ]
    torch.testing.assert_close(facts[0]["divergence"], facts[1]["divergence"])


@pytest.mark.parametrize("by_hand", [False, True], ids=["value", "value and gradient"])
def test_registered_functions_receive_one_chunk_at_a_time(by_hand):
    seen = []

    def value(student_logp, teacher_logp):
        seen.append(len(student_logp))
        assert student_logp.dtype == torch.float32
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)

    def gradient(student_logp, teacher_logp):
        seen.append(len(student_logp))
        return student_logp.exp()

    with registering("this test"):
        register_divergence("counted", gradient=gradient if by_hand else None, tables=8)(value)
    try:
        terms = Terms(name="counted", memory_bytes=4 * 41 * 8 * 6)
        chunk = terms.rows_per_chunk(41)
        with torch.autocast("cpu", torch.bfloat16):
            loss_and_gradients(terms)
    finally:
        DIVERGENCES.drop("this test")
    assert max(seen) == chunk == 6 and sum(seen) == 23 * (1 + by_hand)


@pytest.mark.usefixtures("registered")
def test_lengths_of_a_schedule_are_clipped_to_the_possible_range():
    schedule = parse_prefix("cosine:90:300:10", 100)
    lengths = [schedule.length(step) for step in range(20)]
    assert lengths[0] == 90 and lengths[-1] == 100 == schedule.longest(20)
    assert schedule.observe(0, {}, 1.0, 1.0) is None and schedule.window({}) == 0


@pytest.mark.usefixtures("registered")
def test_a_schedule_with_a_state_observes_every_step():
    schedule, state = parse_prefix("patient:5", 32), {}
    for step, reached in enumerate([1.0, 0.5, 1.0, 1.0, 1.0]):
        assert schedule.length(step, state) == 5
        reason = schedule.observe(step, state, 0.3, reached)
    assert reason == "after update 5 the prefix is 10 tokens"
    assert (schedule.length(5, state), schedule.window(state)) == (10, 5)
    assert schedule.longest(2) == 32


def test_a_run_with_the_plugin_equals_one_with_the_built_in(pair, questions, tmp_path):
    """Test one tokenizer, and two tokenizers, for which the loss is computed on units."""
    for name, more in (("one", []), ("two", ["--cross-tokenizer", "simct"])):
        teacher = pair[1]
        if name == "two":
            teacher = save_tiny(tmp_path / "teacher", seed=3, eos="<p>")
            byte_tokenizer("<p>").save_pretrained(teacher)
        curves = []
        for divergence in ("reverse-kl", "my-kl"):
            out = tmp_path / f"{name}-{divergence}"
            arguments = flags((pair[0], teacher), questions, out)
            arguments += [*more, "--plugin", BOTH_WAYS, "--divergence", divergence, "--steps", "2"]
            code, _, err = invoke(*arguments)
            assert code == 0, err
            key = f"loss/{divergence.replace('-', '_')}_nats"
            curves.append([row[key] for row in rows(out)])
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)


# Resume and ranks


@pytest.fixture(scope="module")
def stateful(pair, questions, tmp_path_factory):
    """Run a schedule that has a state, and return (command line, run folder, plugin)."""
    folder = tmp_path_factory.mktemp("stateful")
    plugin = folder / "plugin.py"
    plugin.write_text(SKEW.read_text() + PATIENT.read_text())

    def arguments(out):
        return [
            *flags(pair, questions, out),
            *("--plugin", plugin, "--divergence", "skew-kl:0.2", "--prefix", "patient:2"),
        ]

    code, _, err = invoke(*arguments(folder / "whole"))
    assert code == 0, err
    assert len({row["rollout/prefix_tokens"] for row in rows(folder / "whole")}) > 1
    return arguments, folder / "whole", plugin


def test_an_interrupted_run_with_a_plugin_equals_an_uninterrupted_one(
    stateful, tmp_path, monkeypatch
):
    from prefix_distill.display import Display

    arguments, whole, _ = stateful
    show = Display.row

    def row(self, row, *rest):
        show(self, row, *rest)
        if row["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "row", row)
    out = tmp_path / "run"
    code, _, err = invoke(*arguments(out))
    assert code == 130, err
    monkeypatch.undo()
    code, said, err = invoke("run", "--resume", "--out", out)
    assert code == 0 and last_json(said)["resumed_from"] == 4, err
    assert "changed" not in err
    assert rows(out) == rows(whole)
    for name in ("model/model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        ours, theirs = load_file(out / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_on_resume_a_changed_plugin_is_reported_and_a_missing_one_is_refused(stateful, tmp_path):
    _, whole, plugin = stateful
    out, moved = tmp_path / "run", tmp_path / "plugin.py"
    shutil.copytree(whole, out)
    moved.write_text(plugin.read_text() + "\n# one more line\n")
    resume = ["run", "--resume", "--out", out]
    code, _, err = invoke(*resume, "--plugin", moved, "--steps", "7")
    assert code == 0, err
    warning = "its content changed since the last checkpoint (2 lines added, 0 removed; the earlier"
    assert warning in err and err.count("content changed") == 1
    (record,) = json.loads((out / "run.json").read_text())["plugins"]
    assert len(record["earlier"]) == 1
    assert len(list((out / "plugins").iterdir())) == 2
    code, _, err = invoke(*resume, "--steps", "8")
    assert code == 0 and "content changed" not in err, err
    moved.unlink()
    code, _, err = invoke(*resume, "--steps", "9")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"plugin {moved}: cannot be read (No such file or directory); check --plugin" in err


@pytest.mark.long
def test_two_ranks_with_a_plugin_equal_one_process(pair, questions, tmp_path):
    more = ["--plugin", f"{SKEW},{COSINE}", "--divergence", "skew-kl:0.2", "--device", "cpu"]
    more += [
        "--prefix",
        "cosine:4:12:2",
        "--steps",
        "3",
        "--save-every",
        "0",
        "--rank-timeout",
        "60",
    ]
    done = command(*flags(pair, questions, tmp_path / "2"), *more, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    code, _, err = invoke(*flags(pair, questions, tmp_path / "1"), *more)
    assert code == 0, err
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for key in ("loss/skew_kl_nats", "rollout/prefix_tokens"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


# Mistakes


HEAD = "from prefix_distill import register_divergence, register_schedule\n"
VALUE = "def value(student_logp, teacher_logp):\n    return "
BAD = {
    "a missing file": (None, [], "cannot be read (No such file or directory)"),
    "no Python": ("def (", [], "plugin.py, line 1: SyntaxError"),
    "a failing import": ("x = 1\nimport no_such_module\n", [], "plugin.py, line 2: ModuleNotFound"),
    "an exit": ("import sys\nsys.exit(3)\n", [], "plugin.py, line 2: SystemExit: 3"),
    "nothing registered": ("x = 1\n", [], "it registers no divergence and no prefix schedule"),
    "a built-in name": (
        HEAD + "@register_divergence('jsd')\n" + VALUE + "1\n",
        [],
        "line 2: divergence 'jsd': prefix-distill registers this name already",
    ),
    "a reserved name": (
        HEAD + "register_schedule('full')(print)\n",
        [],
        "line 2: prefix schedule 'full': prefix-distill registers this name already",
    ),
    "an invalid name": (
        HEAD + "@register_divergence('My KL')\n" + VALUE + "1\n",
        [],
        "line 2: divergence 'My KL': expected a name of at most 40 lower-case letters",
    ),
    "another shape": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "(student_logp - teacher_logp).sum()\n",
        ["--divergence", "mine"],
        "line 2: value returned a tensor of shape [] for log-probabilities of shape [5, 300]; "
        "expected [5]",
    ),
    "no tensor": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "1.0\n",
        ["--divergence", "mine"],
        "line 2: value returned float; expected a tensor of floats",
    ),
    "no finite numbers": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "student_logp.sum(-1) / 0\n",
        ["--divergence", "mine"],
        "value returned a tensor that is not finite on a random table",
    ),
    "no gradient": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "student_logp.detach().sum(-1)\n",
        ["--divergence", "mine"],
        "value returned values that autograd cannot follow",
    ),
    "changed inputs": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "teacher_logp.exp_().sum(-1) + "
        "student_logp.sum(-1)\n",
        ["--divergence", "mine"],
        "changed its inputs; work on copies",
    ),
    "an error in the formula": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "student_logp @ teacher_logp\n",
        ["--divergence", "mine"],
        "line 4: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ),
    "a gradient of another shape": (
        HEAD + "def gradient(s, t):\n    return s[:, :2]\n"
        "@register_divergence('mine', gradient=gradient)\n" + VALUE + "student_logp.sum(-1)\n",
        ["--divergence", "mine"],
        "line 2: gradient returned a tensor of shape [5, 2]",
    ),
    "too many parameters": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "student_logp.sum(-1)\n",
        ["--divergence", "mine:0.3"],
        "--divergence mine:0.3: expected reverse-kl, forward-kl, jsd:β with 0 < β < 1, or mine",
    ),
    "a parameter out of range": (
        SKEW.read_text(),
        ["--divergence", "skew-kl:1.5"],
        "--divergence skew-kl:1.5: ",
    ),
    "no schedule": (
        HEAD + "register_schedule('mine')(lambda arguments, limit: 7)\n",
        ["--prefix", "mine"],
        "expected a function of the step, or an object with length(step), got 7",
    ),
    "half a token": (
        HEAD + "register_schedule('mine')(lambda arguments, limit: lambda step: 2.5)\n",
        ["--prefix", "mine"],
        "the length of step 0 is 2.5; return a whole number of tokens",
    ),
    "arguments that the schedule does not take": (
        COSINE.read_text(),
        ["--prefix", "cosine:4"],
        "line 10: ValueError: not enough values to unpack (expected 3, got 1); make got "
        "arguments=['4'] and limit=",
    ),
    "a decorator without parentheses": (
        HEAD + "@register_divergence\n" + VALUE + "1\n",
        [],
        "line 2: @register_divergence: expected a name, got value; write "
        '@register_divergence("name") above it',
    ),
    "a schedule without parentheses": (
        HEAD + "@register_schedule\ndef make(arguments, limit):\n    return 5\n",
        [],
        "line 2: @register_schedule: expected a name, got make",
    ),
    "a divergence that cannot be called": (
        HEAD + "register_divergence('mine')(5)\n",
        [],
        "line 2: divergence 'mine': expected a function, got 5",
    ),
    "a gradient that cannot be called": (
        HEAD + "register_divergence('mine', gradient='g')\n",
        [],
        "line 2: divergence 'mine': gradient: expected a function, got 'g'",
    ),
    "a schedule that cannot be called": (
        HEAD + "register_schedule('mine')(None)\n",
        [],
        "line 2: prefix schedule 'mine': expected a function, got None",
    ),
    "tables in words": (
        HEAD + "register_divergence('mine', tables='many')\n",
        [],
        "line 2: divergence 'mine': tables: expected a whole number of at least 1, got 'many'",
    ),
    "no tables": (
        HEAD + "register_divergence('mine', tables=0)\n",
        [],
        "tables: expected a whole number of at least 1, got 0",
    ),
    "a partial function": (
        HEAD + "import functools\nregister_divergence('mine')(functools.partial(lambda s, t: s))\n",
        ["--divergence", "mine"],
        "line 3: <lambda> returned a tensor of shape [5, 300]",
    ),
    "an object": (
        HEAD + "class F:\n    def __call__(self, s, t):\n        return s\n"
        "register_divergence('mine')(F())\n",
        ["--divergence", "mine"],
        "line 3: F returned a tensor of shape [5, 300]",
    ),
    "another observe": (
        HEAD + "class R:\n    def length(self, step, state):\n        return 5\n"
        "    def observe(self, step):\n        pass\n"
        "register_schedule('mine')(lambda arguments, limit: R())\n",
        ["--prefix", "mine"],
        "expected observe(step, state, signal, reached), got a function of other arguments",
    ),
    "an exit in a divergence": (
        HEAD + "@register_divergence('mine')\n" + VALUE + "exit(0)\n",
        ["--divergence", "mine"],
        "line 4: SystemExit: 0",
    ),
    "an exit in a schedule": (
        HEAD + "register_schedule('mine')(lambda arguments, limit: exit(0))\n",
        ["--prefix", "mine"],
        "line 2: SystemExit: 0",
    ),
    "an unknown schedule": (COSINE.read_text(), ["--prefix", "sine:4"], "or one of cosine"),
    "the sampled estimator": (
        SKEW.read_text(),
        ["--divergence", "skew-kl", "--estimator", "sampled"],
        "--estimator sampled with --divergence skew-kl: ",
    ),
    "a clip": (SKEW.read_text(), ["--divergence", "skew-kl", "--clip", "1"], "--clip 1 with"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_gives_a_one_line_error_before_models_load(name, tmp_path):
    text, more, message = BAD[name]
    file = tmp_path / "plugin.py"
    if text is not None:
        file.write_text(text)
    more = [*more, "--max-new-tokens", "32", "--out", tmp_path / "run"]
    code, out, err = invoke("run", "--plugin", file, *more)
    assert code == 2 and out == "" and len(err.splitlines()) == 1, err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_two_plugins_cannot_register_one_name(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(SKEW.read_text())
    with pytest.raises(UserError, match=f"'skew-kl': {SKEW} registers this name already"):
        load_plugins(f"{SKEW},{other}")
    # Each plugin works alone, and a plugin that is given twice counts once.
    for text in (str(other), f"{SKEW},{SKEW}"):
        assert len(load_plugins(text)) == 1


LATE_SCHEDULE = """@register_schedule('mine')
class Rule:
    def __init__(self, arguments, limit): pass
    def length(self, step, state): return {}
    def observe(self, step, state, signal, reached): pass
"""
LATE_DIVERGENCE = """@register_divergence('mine')
def value(student_logp, teacher_logp):
    result = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
    return result if student_logp.shape[1] == 300 else {}
"""
# name → (plugin that passes the checks at registration and fails later, its fault, message)
LATE = {
    "an error": (LATE_SCHEDULE, "10 // (3 - step)", "line 5: ZeroDivisionError"),
    "an exit": (LATE_SCHEDULE, "5 if step < 3 else exit(0)", "line 5: SystemExit: 0"),
    "a length": (LATE_SCHEDULE, "5 if step < 3 else 5.0", "the length of step 3 is 5.0; return a"),
    "one row": (LATE_DIVERGENCE, "result[:1]", "line 2: value returned a tensor of shape [1] for"),
    "a mean": (LATE_DIVERGENCE, "result.mean()", "line 2: value returned a tensor of shape [] for"),
    "a column": (LATE_DIVERGENCE, "result[:, None]", "line 2: value returned a tensor of shape ["),
    "no graph": (LATE_DIVERGENCE, "result.detach()", "line 2: value returned values that autograd"),
    "a number": (LATE_DIVERGENCE, "1.0", "line 2: value returned float; expected a tensor"),
    "an exit of a divergence": (LATE_DIVERGENCE, "exit(3)", "line 5: SystemExit: 3"),
}


@pytest.mark.parametrize("name", LATE)
def test_an_error_during_training_names_the_file_the_line_and_the_checkpoint(
    pair, questions, tmp_path, name
):
    template, late, message = LATE[name]
    plugin = tmp_path / "plugin.py"
    plugin.write_text(HEAD + template.format(late))
    more = ["--divergence", "mine"]
    if template is LATE_SCHEDULE:
        more = ["--prefix", "mine"]
    more += ["--plugin", plugin, "--tail-every", "0"]
    code, _, err = invoke(*flags(pair, questions, tmp_path / "run"), *more)
    assert code == 2 and "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert str(plugin) in last and message in last
    if template is LATE_SCHEDULE:
        saved = "; the newest checkpoint is step-00000003: correct the plugin, then continue with "
        assert saved + "--resume" in last


def test_a_divergence_may_use_the_most_likely_tokens(tmp_path):
    plugin = tmp_path / "plugin.py"
    text = VALUE + "(student_logp - teacher_logp).topk(10).values.square().sum(-1)\n"
    plugin.write_text(HEAD + "@register_divergence('mine')\n" + text)
    assert configuration.build({"runtime.plugin": str(plugin), "divergence.name": "mine"})


def test_a_state_that_no_checkpoint_can_hold_is_refused(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        PATIENT.read_text().replace('state["full"] = ', 'state["pair"] = (1, 2); state["full"] = ')
    )
    load_plugins(str(plugin))
    with pytest.raises(UserError, match="use JSON values with text as keys, lists for tuples"):
        parse_prefix("patient:4", 32).observe(0, {}, None, 1.0)


def test_a_function_registered_without_a_file_is_recorded_and_a_change_reported(tmp_path):
    """A notebook cell can register such a function. A function without source text is reported."""
    from prefix_distill import register_divergence, resume, run
    from prefix_distill.maths.formulas import DIVERGENCES

    def first(student_logp, teacher_logp):
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)

    def second(student_logp, teacher_logp):
        return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)

    small = {"batch_size": 2, "samples": 1, "problems": 1, "kl_prompts": 1}
    try:
        register_divergence("in-a-cell")(first)
        run(divergence="in-a-cell", steps=1, out=tmp_path / "run", **small)
        document = json.loads((tmp_path / "run/run.json").read_text())
        [record] = document["plugins"]
        assert "def first" in (tmp_path / "run" / record["copy"]).read_text()
        assert record["file"] == "divergence-in-a-cell.py"
        register_divergence("in-a-cell")(second)
        with observed_warnings() as warnings:
            resume(tmp_path / "run", steps=2)
        assert any("divergence-in-a-cell: its content changed" in text for text in warnings)
        exec("def unknown(s, t): return (s.exp() * (s - t)).sum(-1)", globals())
        register_divergence("in-a-cell")(globals()["unknown"])
        with observed_warnings() as warnings:
            run(divergence="in-a-cell", steps=1, out=tmp_path / "unknown", **small)
        assert any("its text is not known" in text for text in warnings)
    finally:
        DIVERGENCES.drop("this program")


def test_a_schedule_of_a_program_that_lacks_its_arguments_is_located(tmp_path):
    file = tmp_path / "program.py"
    file.write_text("def saw(arguments, limit):\n    low, high = arguments\n    return int(low)\n")
    names: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    try:
        register_schedule("saw")(names["saw"])
        with pytest.raises(UserError) as error:
            parse_prefix("saw", 64)
    finally:
        SCHEDULES.drop("this program")
    assert str(error.value).startswith(
        f"--prefix saw: {file}, line 2: ValueError: not enough values to unpack (expected 2, got "
        "0); saw got arguments=[] and limit=64; "
    )


@contextlib.contextmanager
def observed_warnings():
    """Collect the warnings of the logger "prefix_distill"."""
    texts = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    log = logging.getLogger("prefix_distill")
    log.addHandler(handler)
    try:
        yield texts
    finally:
        log.removeHandler(handler)

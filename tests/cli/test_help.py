"""Tests of `help`, `env`, plain mode and completion: their text agrees with the commands."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers import ROOT, command, invoke, last_json, shortage
from tables import SIGNS

import prefix_distill
from prefix_distill import config as configuration
from prefix_distill.cli import main

FOLDER = ROOT / "prefix_distill/help"
PAGES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.md"))}
GROUP = typer.main.get_command(main.app)
BLOCKS = [
    (name, re.sub(r" \\\n +", " ", block))
    for name, page in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", page, re.S)
]
LINES = [(name, line) for name, block in BLOCKS for line in block.splitlines()]
TOPICS = [
    *("adapters", "data", "devices", "exit-codes", "methods", "migration", "model-classes"),
    *("models", "plugins", "python", "recipes", "reliability", "results", "speed", "tokenizers"),
]


FILES = ["notebook", "recipe:2602.15260"]


def test_help_lists_the_pages_prints_one_and_names_the_nearest():
    assert sorted(PAGES) == TOPICS
    code, out, err = invoke("help")
    listed = [line.split()[2] for line in out.splitlines()]
    assert code == 0 and err == "" and listed == sorted(PAGES) + FILES
    for name, page in PAGES.items():
        assert invoke("help", name) == (0, page, "")
    for wrong, said in (
        ("exit-code", "did you mean exit-codes?"),
        ("machines", "no such page; "),
        ("zzz", "choose from adapters, data, devices"),
        ("recipe", "did you mean recipe"),
    ):
        code, out, err = invoke("help", wrong)
        assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_and_command_that_a_page_names_exists(name):
    flags = {flag for sub in GROUP.commands.values() for p in sub.params for flag in p.opts} | {
        flag for p in GROUP.params for flag in p.opts
    }
    flags |= {
        "--nnodes",
        "--node-rank",
        "--nproc-per-node",
        "--master-addr",
        "--master-port",
        "--help",
    }  # options of torchrun and click
    text = re.sub(r" \\\n +", " ", PAGES[name])
    text = text.replace("--learning_rate", "")  # the page names it as an option of another tool
    if name == "migration":
        text = re.sub(r"prefix-distill run --model_name_or_path.*", "", text)
    wrong = [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text) if flag not in flags]
    assert wrong == [] and set(
        re.findall(r"prefix-distill ([a-z]+)", PAGES[name])
    ) <= GROUP.commands.keys() | {"help"}


@pytest.mark.parametrize("name, line", LINES)
def test_every_command_of_a_page_parses_and_is_a_valid_run(name, line):
    program, sub, *words = shlex.split(line)
    assert program == "prefix-distill"
    given = (
        GROUP.commands[sub]
        .make_context(sub, main.translate_arguments(GROUP, [sub, *words])[0][1:])
        .params
    )
    configuration.build(
        {k.replace("__", "."): v for k, v in given.items() if "__" in k and v not in (None, ())}
        | ({"train.batch_size": 8} if sub == "probe" else {})
    )


def test_methods_states_what_the_committed_results_found():
    """Every sign is the verdict of a recorded claim.

    Every method has a claim or states that there is none. The page repeats no measured difference.
    """
    page, quoted = " ".join(PAGES["methods"].split()), 0
    line = r"- \[([+0−])\] ([^`]+): `([^`]+)` against `([^`]+)` \(`([\w-]+)\.json`\)"
    for sign, words, better, worse, file in re.findall(line, page):
        claims = json.loads((ROOT / f"tests/benchmarks/results/{file}.json").read_text())["claims"]
        verdicts = [
            claim["verdict"]
            for claim in claims
            if (claim["claim"], claim["better"], claim["worse"]) == (words, better, worse)
        ]
        assert [SIGNS[verdict] for verdict in verdicts] == [sign], (words, file)
        quoted += 1
    assert quoted > 25 and quoted == page.count("against `")
    assert not re.search(r"[+-]\d+\.\d", page)
    for section in PAGES["methods"].split("\n## ")[1:]:
        section = " ".join(section.split())
        assert "Found:" in section or "No experiment of ours" in section, section[:60]
    flags = {
        field.metadata["flag"]
        for path, field in configuration.options(
            "schedule.prefix", "rollout", "divergence", "weights", "extrapolation", "adapter"
        ).items()
    }
    flags -= {"--max-new-tokens", "--off-policy", "--generation-rows", "--extrapolate-problems"}
    assert [flag for flag in sorted(flags) if flag not in page] == []


def test_the_page_on_exit_codes_lists_the_codes_of_commands(pair, questions, tmp_path, monkeypatch):
    """Provoke each exit code by its own cause."""

    from prefix_distill.display import Display

    flags = [
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        "4",
        "--max-new-tokens",
        "8",
        "--steps",
        "2",
        "--batch-size",
        "1",
        "--samples",
        "1",
        "--problems",
        "0",
        "--kl-prompts",
        "1",
        "--check-samples",
        "0",
        "--save-every",
        "0",
    ]
    seen = {
        0: invoke("help")[0],
        2: invoke("run", "--prefix", "0")[0],
        1: invoke(*flags, "--lr", "1e38", "--out", tmp_path / "1")[0],
        3: invoke(*flags, "--max-new-tokens", "500", "--out", tmp_path / "3")[0],
    }
    with monkeypatch.context() as patch:
        patch.setattr(Display, "row", lambda *_: signal.raise_signal(signal.SIGINT))
        seen[130] = invoke(*flags, "--out", tmp_path / "130")[0]
    with monkeypatch.context() as patch:
        shortage(patch, "generation", 0)
        seen[4] = invoke(
            "eval",
            "--model",
            pair[0],
            "--dataset",
            questions,
            "--problems",
            "2",
            "--max-new-tokens",
            "8",
            "--out",
            tmp_path / "4",
        )[0]
    assert seen == {code: code for code in seen}
    assert {
        int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["exit-codes"], re.M)
    } == seen.keys()
    assert all(f"{code} " in " ".join(invoke("--help")[1].split()) for code in seen)


def test_env_is_one_document_without_secrets_or_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HF_TOKEN": "hf_SECRET",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "/home/somebody",
    }.items():
        monkeypatch.setenv(name, value)
    code, out, err = invoke("env", "--json")
    document = last_json(out)
    assert code == 0 and len(out.splitlines()) == 1
    code, text, err_of_text = invoke("env")
    assert code == 0 and not err_of_text and not text.startswith("{")
    assert {row["device"] for row in document["devices"]} >= {"cpu"} and document["devices"][0][
        "memory_bytes"
    ] > 1 << 28
    assert (
        document["threads"]["OMP_NUM_THREADS"] == "1"
        and document["packages"]["torch"] != "not installed"
    )
    import getpass
    import platform

    text += out + err
    for private in (
        "SECRET",
        "somebody",
        str(Path.home()),
        str(tmp_path),
        platform.node(),
        sys.prefix,
        str(ROOT),
        f'"{getpass.getuser()}"',
    ):
        assert private not in text, private
    for name in document:
        assert f"{name}: " in err


def test_env_lists_every_package_of_the_extras():
    import tomllib

    from prefix_distill.engine.device import PACKAGES

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        line
        for name, lines in project["optional-dependencies"].items()
        if name not in ("test", "lint")
        for line in lines
    ]
    assert {re.match(r"[\w-]+", line)[0] for line in project["dependencies"] + extras} <= set(
        PACKAGES
    )


BOXES = re.compile("[\u2500-\u259f\x1b]")  # box-drawing lines, blocks, escape sequences


def _in_a_terminal(environment: dict, code: str) -> str:
    """Return what ``code`` writes to stderr if stderr is a terminal of 100 columns."""
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        clean = {
            k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PREFIX_DISTILL_PLAIN")
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=theirs,
            stdout=subprocess.DEVNULL,
            env={**clean, "TERM": "xterm", "COLUMNS": "100", **environment},
        )
        os.close(theirs)
        seen = b""
        try:
            while part := screen.read(4096):
                seen += part
        except OSError:  # Linux raises at the end of a pseudo-terminal
            pass
        assert process.wait() == 0
    return seen.decode()


SHOWN = """
import sys
from rich.table import Table
from prefix_distill.display import Display, Outline, render_tables
table = Table(title="arms")
for name in ("arm", "accuracy", "cost"):
    table.add_column(name)
table.add_row("full", "90.5% [86.0%, 94.5%]", "1 G")
row = {
    "step": 1,
    "loss/reverse_kl_nats": 0.5,
    "rollout/prefix_tokens": 8,
    "rollout/finished_share": 0.0,
}
with Display(Outline(steps=2, label="run:")) as display:
    display.row(row, 1e9, 2e9)
    display.note("a note")
print(render_tables(table, stream=sys.stderr), file=sys.stderr)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    "environment",
    [{"PREFIX_DISTILL_PLAIN": "1"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {}],
    ids=["plain", "NO_COLOR", "dumb", "bars"],
)
def test_plain_mode_has_no_bars_boxes_or_colors(environment):
    seen = _in_a_terminal(environment, SHOWN).replace("\r\n", "\n")
    if not environment:
        assert BOXES.search(seen)
        return
    assert not BOXES.search(seen), seen
    assert "run: step 1/2: train reverse KL 0.5000, prefix" in seen and "\na note\n" in seen
    assert seen.endswith("arms\narm: full\n  accuracy: 90.5% [86.0%, 94.5%]\n  cost: 1 G\n")


PAGE_SHOWN = """
import sys
sys.stdout = sys.stderr  # the terminal of this test
sys.argv = ["prefix-distill", "help", "exit-codes"]
from prefix_distill.cli.main import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_page_is_rendered_on_a_terminal_and_markdown_in_plain_mode():
    rendered = _in_a_terminal({}, PAGE_SHOWN)
    assert BOXES.search(rendered) and "|--:|" not in rendered and "130" in rendered
    plain = _in_a_terminal({"NO_COLOR": "1"}, PAGE_SHOWN).replace("\r\n", "\n")
    assert plain == PAGES["exit-codes"]


def test_plain_is_a_flag_before_and_after_the_command(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in invoke("help", "devices")[1]
    for words in ("--plain help devices", "help --plain devices", "help devices --plain"):
        assert invoke(*words.split())[:2] == (0, PAGES["devices"])
    assert invoke("help", "devices", "--", "--plain")[0] == 2  # after -- it is an ordinary argument


def test_shell_completion_offers_the_values_of_an_option(monkeypatch):
    """Completion follows bash's protocol, as typer's --show-completion sets it up.

    It runs in a separate process, because typer prepares completion while it builds the command.
    """
    monkeypatch.setenv("_PREFIX_DISTILL_COMPLETE", "complete_bash")
    for words, values in (
        ("run --eos ", {"student", "teacher", "union"}),
        ("check --eos te", {"teacher"}),
        ("run --lr-sch", {"--lr-schedule"}),
        ("run --divergence ", {"reverse-kl", "forward-kl", "jsd:0.5"}),
        ("probe --dataset gs", {"gsm8k"}),
        ("plan --prefix st", {"staircase:"}),
        ("help re", {"recipes", "reliability", "report"}),
        ("export --gguf q", {"q8_0"}),
        ("eval --dtype bf", {"bfloat16"}),
    ):
        monkeypatch.setenv("COMP_WORDS", f"prefix-distill {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
        done = command()
        assert set(done.stdout.split()) >= values, (words, done.stderr)


def test_version_is_printed_alone():
    assert invoke("--version") == (0, f"prefix-distill {prefix_distill.__version__}\n", "")


def test_help_of_a_command_is_printed_and_the_nearest_of_both_is_named():
    assert invoke("help", "export")[1] == invoke("export", "--help")[1]
    assert "did you mean compare?" in invoke("help", "comparee")[2]


def test_help_offers_completion():
    done = command("--help")
    assert "--install-completion" in done.stdout and "--show-completion" in done.stdout


def test_eval_and_export_take_their_flags_from_the_options_of_run():
    flags = {
        name: {
            parameter.opts[0]: parameter.name.replace("__", ".")
            for parameter in GROUP.commands[name].params
            if "__" in parameter.name
        }
        for name in ("eval", "export")
    }
    renamed = {
        "--model": "models.student",
        "--thinking": "data.student_thinking",
        "--problems": "evaluate.problems",
        "--samples": "evaluate.rollouts",
        "--temperature": "evaluate.temperature",
        "--top-p": "evaluate.top_p",
        "--top-k": "evaluate.top_k",
        "--sampling": "evaluate.sampling",
    }
    same = (
        "--dataset --split --prompt-column --answer-column --streaming --system --instruction "
        "--prompt-template --few-shot --template --template-arg --template-date --begin "
        "--max-new-tokens --answer-format --grader --grader-timeout --generation-rows --dtype "
        "--device --gpus --seed --trust-remote-code"
    )
    paths = {configuration.flag(path): path for path in configuration.options()}
    assert flags["eval"] == renamed | {flag: paths[flag] for flag in same.split()}
    assert flags["export"] == {
        flag: paths[flag] for flag in ("--trust-remote-code", "--push-to-hub", "--hub-public")
    }


def test_characters_that_stdout_cannot_encode_are_replaced(monkeypatch):
    """A Windows code page has no Σ, κ and →, which the help contains."""
    written = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True)
    )
    monkeypatch.setattr(sys, "argv", ["prefix-distill", "run", "--help-all"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    shown = written.getvalue().decode("cp1252")
    assert stop.value.code in (0, None) and "?" in shown and "--clip" in shown

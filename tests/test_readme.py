"""Test README.md, the help pages and the results page.

All commands run, all numbers are from recorded results, and CI installs as README.md says.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tables
import typer
import yaml
from helpers import BENCHMARKS, PROGRAMS, ROOT, command, invoke, last_json, save_tiny
from safetensors.torch import load_file

import prefix_distill
from prefix_distill.api import spellings
from prefix_distill.cli import main
from prefix_distill.cli.app import COMMANDS
from prefix_distill.cli.pages import find_pages

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = BENCHMARKS / "results"
PAGE = (RESULTS / "README.md").read_text(encoding="utf-8")
HELP = {topic: page.read_text(encoding="utf-8") for topic, page in find_pages().items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUP = typer.main.get_command(main.app)


def shell_lines(text: str) -> list[str]:
    """Return the commands of the sh blocks, with continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in re.sub(r" \\\n +", " ", block).splitlines()]


def section(text: str, title: str) -> str:
    """Return the text below a heading of level 2."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Return the rows of the Markdown tables in a text as cells, without the header rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    heads = {*rules, *(i - 1 for i in rules)}
    return [row for i, row in enumerate(cells) if i not in heads]


INSTALL = [
    line for line in shell_lines(README) if line.startswith(("git ", "python3 ", "pip ", "pytest "))
]
OURS = [line for line in shell_lines(README) if line.startswith("prefix-distill ")]
# commands of the help pages that need no hub access and no other files
TOPICS = ("recipes", "data", "adapters", "devices", "tokenizers", "methods")
EMBEDDED = [
    line
    for topic in TOPICS
    for line in shell_lines(HELP[topic])
    if line.startswith("prefix-distill ")
    and not re.search(r"--(student|model|dataset) (?!lab:|runs/)", line)
]
LONG = [line for line in shell_lines(PAGE) if line.startswith("python ")]
UNLISTED = [
    f"python tests/benchmarks/{name}.py"
    for name in PROGRAMS
    if not any(f"/{name}.py" in line for line in LONG)
]


# Form


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and len(README.split()) <= 2500
    assert [line for line in lines if len(line) > 120] == []


def test_the_first_twelve_lines_say_what_the_project_is_and_how_to_run_it():
    first = README.splitlines()[:12]
    text = "\n".join(first)
    for words in ("small language model", "git clone ", "pip install ", "prefix-distill demo"):
        assert words in text, words
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer" in text
    assert "Not yet measured on a GPU" in "\n".join(README.splitlines()[:40])


def test_the_top_level_has_only_the_expected_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    expected = {"prefix_distill.py", "prefix_distill", "tests", "pyproject.toml", "README.md"}
    assert {name for name in top if not name.startswith(".")} == {
        *expected,
        "LICENSE",
        "CITATION.cff",
    }


def test_the_citation_names_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert citation["title"] == PROJECT["name"] and citation["license"] == PROJECT["license"]
    assert citation["version"] == PROJECT["version"] == prefix_distill.__version__


def test_the_links_have_targets():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", README, re.M))
    for target in [*targets, *named.values()]:
        if target.startswith("https://arxiv.org/abs/"):
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        if anchor:
            titles = re.findall(r"^##+ (.*)$", PAGE, re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, target
    for name in [
        *re.findall(r"\]\[([^\]]+)\]", README),
        *re.findall(r"\[(\d{4}\.\d{5})\]", README),
    ]:
        assert name in named, name


# Commands


def test_every_command_is_executed():
    assert sorted(INSTALL + OURS) == sorted(shell_lines(README)) and len(OURS) == 6
    assert len(EMBEDDED) >= 16 and len(LONG) == 27
    executed = {line.split()[1] for line in [*OURS, *EMBEDDED]}
    assert executed == set(COMMANDS) - {"env", "help"}


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci/run").read_text()
    block = next(b for b in re.findall(r"```sh\n(.*?)```", README, re.S) if "pytest" in b)
    for line in block.splitlines():
        words = shlex.split(line)
        mine = next(
            shlex.split(x)
            for x in script.splitlines()
            if x.split()[:1] == words[:1] and words[-1] in x
        )
        assert [w for w in mine if w not in ("--quiet", "-q", "--durations", "15", "&")] == words


def test_a_clone_contains_the_files_that_the_installation_needs(tmp_path):
    """Run the first command with this checkout instead of the repository URL."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    (tmp_path / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    [line] = [line for line in INSTALL if line.startswith("git clone ")]
    line = line.replace("REPOSITORY_URL", shlex.quote(str(ROOT))) + " && ls"
    done = subprocess.run(
        line,
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"pyproject.toml", "prefix_distill.py"} <= set(done.stdout.split())


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, str]:
    """Return hub id or preset → local replacement.

    Responses of the models end after a few tokens, because half of the vocabulary are EOS tokens.
    """
    folder = tmp_path_factory.mktemp("hub")
    local = {}
    for seed, name in enumerate(("Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct")):
        path = Path(save_tiny(folder / name, "qwen3", seed))
        for file, key, value in (
            ("config.json", "max_position_embeddings", 4096),
            ("generation_config.json", "eos_token_id", [257, *range(128)]),
        ):
            document = json.loads((path / file).read_text())
            (path / file).write_text(json.dumps(document | {key: value}))
        local[f"Qwen/{name}"] = str(path)
    problems = [
        {
            "question": f"What is {i} + {i * i}?",
            "answer": f"{i} + {i * i} = {i + i * i}\n#### {i + i * i}",
        }
        for i in range(300)
    ]
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return {**local, "gsm8k": f"gsm8k={file}"}


def test_the_commands_on_your_own_models_run_in_order(hub, tmp_path, monkeypatch):
    """Run the commands of README.md with local models and data instead of those on the hub."""
    monkeypatch.chdir(tmp_path)
    for line in OURS:
        words = [hub.get(word, word) for word in shlex.split(line)[1:]]
        if words == ["demo"]:
            continue
        code, out, err = invoke(*words)
        assert code == 0, (line, err)
        document = last_json(out)
        if words[0] == "plan":
            assert [row["prefix"] for row in document["prefixes"]][-1] == "full"
        if words[0] == "run":
            assert document["steps"] == 100 and Path("runs/first/model/config.json").is_file()
    assert "prefix-distill run --resume --out runs/first" in README
    code, out, err = invoke("run", "--resume", "--out", "runs/first", "--steps", "102")
    assert code == 0 and last_json(out)["steps"] == 102, err


@pytest.mark.skipif(not hasattr(prefix_distill, "run"), reason="needs the Python API")
def test_the_python_example_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    for name, local in hub.items():
        code = code.replace(f'"{name}"', repr(local))
    names: dict = {}
    exec(code.replace("prefix=256", "prefix=8, steps=2, max_new_tokens=32"), names)
    result = names["result"]
    assert result.accuracy_after is not None and result.flops.useful > 0
    assert len(list(result.metrics())) == 2 and Path("runs/api/model").is_dir()


def test_the_arms_file_in_help_recipes_is_valid_with_its_optional_keys(tmp_path):
    from prefix_distill.results.compare import KEYS, read_arms

    text = re.search(r"```yaml\n(.*?)```", HELP["recipes"], re.S)[1]
    file = tmp_path / "arms.yaml"
    file.write_text(re.sub(r"(?m)^# ", "", text))
    assert set(re.findall(r"(?m)^(\w+):", file.read_text())) == set(KEYS)
    arms = read_arms(str(file))
    assert arms.also["longer"]["data.split"] == "test" and arms.values == (2e-4, 4e-4)


def test_the_example_in_help_python_runs(tmp_path, monkeypatch, capsys):
    """Run the example unchanged, and check that the names on the page are public."""
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", HELP["python"], re.S)
    names: dict = {}
    exec(code, names)
    result = names["result"]
    assert (result.resumed_from, result.steps, len(result.metrics())) == (2, 3, 3)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:2] == ["1", "2"]
    text = HELP["python"].replace(code, "")
    for name in re.findall(r"`([A-Z][A-Za-z]+)[`.]", text):
        assert name in {*prefix_distill.__all__, "KeyboardInterrupt"}, name
    fields = {
        field
        for name in prefix_distill.__all__
        for field in getattr(getattr(prefix_distill, name), "__dataclass_fields__", ())
    }
    for cell, _ in rows(section(HELP["python"], "Results")):
        for field in re.findall(r"`([a-z_.]+)`", cell):
            assert set(field.split(".")) <= fields, field
    for cell, *_ in rows(text.split("## Options")[0]):
        for function in re.findall(r"`(\w+)`", cell):
            assert function in prefix_distill.__all__, function


@pytest.mark.parametrize(
    "left_out",
    [(" probe", " compare", " report", "--gpus"), pytest.param((), marks=pytest.mark.long)],
    ids=["most", "all"],
)
def test_commands_run_in_order(tmp_path, monkeypatch, left_out):
    """Run the commands of the help pages on embedded models unchanged.

    The commands for probe, compare, report and ranks run only with -m long, because other tests
    cover them.
    """
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text(re.search(r"```yaml\n(.*?)```", HELP["recipes"], re.S)[1])
    for line in EMBEDDED:
        if any(word in line for word in left_out):
            continue
        if "--gpus" in line:  # `invoke` cannot capture the stdout of ranks
            done = command(*shlex.split(line)[1:])
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = invoke(*shlex.split(line)[1:])
        assert code == 0, err
        if line.startswith(("prefix-distill show ", "prefix-distill try ")):
            assert out and not err
            continue
        document = last_json(out)
        if " demo" in line:
            prefix, full = document["arms"]
            assert (prefix["name"], full["name"]) == ("prefix", "full") and prefix[
                "updates"
            ] == full["updates"]
            assert prefix["accuracy"]["low"] > document["student"]["high"] + 0.1
            assert full["accuracy"]["low"] > document["student"]["high"] + 0.1
            assert prefix["flops_useful"] < full["flops_useful"] / 2
            assert Path(document["picture"]).stat().st_size > 10_000
        if "--select" in line:
            assert {"selection", "extrapolation"} < document["flops"]["by_phase"].keys() and len(
                document["extrapolations"]
            ) == 2
        if "--cross-tokenizer" in line:
            assert (
                document["evaluations"][0]["alignment"]["span_share"] > 0.05
                and "units of text are compared" in err
            )
        if "--gpus 2" in line:
            assert (
                document["steps"] == 2
                and json.loads(Path("runs/ranks/run.json").read_text())["ranks"] == 2
            )
        if "--teacher self" in line:
            assert document["kl_after"]["value"] < document["kl_before"]["value"]
        if " check" in line:
            assert (
                document["ok"]
                and {c["status"] for c in document["checks"]} == {"ok"}
                and all(check["name"] in err for check in document["checks"])
            )
        if " plan" in line:
            assert [row["prefix"] for row in document["prefixes"]] == [
                "25%",
                "50%",
                "full",
            ] and all(row["seconds"] > 0 for row in document["prefixes"])
        if line.startswith("prefix-distill run ") and "runs/first" in line:
            assert document["steps"] == (35 if "--resume" in line else 30)
        if ":3,lab:" in line:
            assert "sampled with --seed" in err and document["steps"] == 2
        if "--lora" in line:
            assert (
                Path("runs/lora/adapter/adapter_model.safetensors").is_file()
                and Path("runs/lora/model/model.safetensors").is_file()
            )
        if " export" in line:
            assert document["dtype"] == "bfloat16" and Path(
                "runs/first-bf16/README.md"
            ).read_text().startswith("---")
        if " probe" in line:
            assert 4 <= document["recommended_prefix"] <= 40 and document["expected_saving"] > 3
        if " compare" in line:
            assert [row["arm"] for row in document["arms"]] == ["full", "short", "text", "warmed"]
        if " report" in line:
            assert {row["arm"] for row in document["arms"]} == {
                "first",
                "full",
                "short",
                "text",
                "warmed",
            }
            assert Path("runs/report/report.html").stat().st_size > 10_000


@pytest.mark.parametrize("line", LONG + UNLISTED)
def test_long_experiments_start_and_benchmarks_have_quick(line, monkeypatch, capsys):
    """Check only --help, because full runs take up to an hour.

    test_benchmarks.py runs each --quick with -m long, and test_laboratory.py runs the steps of the
    rebuild. The scripts start in this process, because importing torch again takes most of the
    time.
    """
    script, *flags = shlex.split(line)[1:]
    run = runpy.run_path
    if script == "-m":
        (script, *flags), run = flags, runpy.run_module
        monkeypatch.delitem(
            sys.modules, script, raising=False
        )  # runpy warns about imported modules
    monkeypatch.setattr(sys, "argv", [script, *flags, "--help"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in printed for flag in flags if flag.startswith("--"))
    assert "--quick" in printed or Path(script).parent != Path("tests/benchmarks")


# Numbers


def test_the_results_page_equals_the_output_of_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--quick"])
    tables.main()
    *page, last = capsys.readouterr().out.splitlines(keepends=True)
    assert "".join(page) == PAGE, "update it with python tests/benchmarks/tables.py --write"
    assert json.loads(last) == {
        "page": str(RESULTS / "README.md"),
        "lines": len(page),
        "written": False,
    }


def test_the_results_page_links_its_files_and_states_hardware_and_seeds():
    for file in re.findall(r"\]\(([\w-]+\.(?:json|csv|png|md))\)", PAGE):
        assert (RESULTS / file).is_file(), file
    for file in RESULTS.glob("*.json"):
        assert f"({file.name})" in PAGE, file.name
    for name in ("prefix", "plugins", "cross", "lora", "update_vs_trl", "ranks", "plan"):
        assert tables.machine(name) in PAGE, name


def test_the_tables_of_the_readme_equal_the_committed_results():
    assert tables.demo_table() in README
    assert tables.methods_table() in README
    assert tables.cards_table() in README


def test_public_models_have_the_parameters_that_their_cards_state():
    models = yaml.safe_load((BENCHMARKS / "public_models.yaml").read_text(encoding="utf-8"))
    for pair in tables.read("cards")["pairs"]:
        for role, count in zip(("student", "teacher"), pair["parameters"], strict=True):
            stated = models[pair[role]]["parameters"]
            assert count / 1e9 == pytest.approx(stated, abs=0.006), pair[role]


def test_the_readme_has_no_unchecked_number():
    """A number is checked by another test, is in ``known``, or is part of code or a link."""
    from prefix_distill.config import Config
    from prefix_distill.lab.task import Problem
    from prefix_distill.results import demo

    document = tables.read("demo")
    assert {arm["updates"] for arm in document["arms"]} == {demo.UPDATES}
    weights = ROOT / "prefix_distill/lab/models/choice/student/model.safetensors"
    parameters = sum(tensor.numel() for tensor in load_file(weights).values())
    problem = Problem(task="choice", first=41, second=73, steps=26)
    planned = tables.read("cards")["settings"]
    lengths = planned["schedule.prefix"], f"{planned['rollout.max_new_tokens']:,}"
    example = f"`{problem.prompt}`", f"`{problem.solution[:11]} …`"
    known = {
        f"Python {PROJECT['requires-python'].removeprefix('>=')} or newer",
        f"{demo.UPDATES} steps of {demo.PROMPTS} sampled answers",
        f"{parameters / 1e6:.1f} M parameters",
        *example,
        "two shared CPU cores, seed 0",
        "16 bytes per parameter",
        f"{Config().train.steps} steps (prefix {lengths[0]}, answers up to {lengths[1]} tokens",
        "exits with code 2",
        "SmolLM2-135M and GSM8K questions",
        "**0** no difference",
        "License: [Apache-2.0]",
        "[CITATION.cff](CITATION.cff)",
    }
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    for table in (tables.demo_table(), tables.methods_table(), tables.cards_table()):
        text = text.replace(table, "")
    for words in known:
        assert words in README, words
        text = text.replace(words, "")
    for name in ("Flags that matter", "One token's journey"):  # other tests check these sections
        text = text.replace(section(README, name), "")
    text = re.sub(r"^\[.*$", "", text, flags=re.M)  # link definitions
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\[\d{4}\.\d{5}\]", "", text)
    assert re.findall(r"\S*\d\S*", text) == []


def result(name: str) -> dict:
    return tables.read(name)


def test_sentences_on_plugins_match_the_recorded_results():
    arms = tables.by_arm("plugins")
    cost = arms["full soft-or 0.5"]["flops_useful"] / arms["full"]["flops_useful"]
    assert 1.2 < cost < 1.3 and "costs a quarter more FLOPs on full rollouts" in " ".join(
        PAGE.split()
    )


def test_sentences_on_the_plan_match_the_recorded_results():
    text, runs = " ".join(PAGE.split()), result("plan")["runs"].values()
    assert max(abs(r["error_exact_malloc"]) for r in runs) < 0.04 and all(
        r["flops_error"] == 0 for r in runs
    )
    assert "forecast to within 4%, FLOPs exactly" in text
    assert sum(r["error"] < -0.1 for r in runs) == 3 and len(runs) == 5
    assert "missed in three of five runs" in text


def test_sentences_on_a_collapse_match_the_recorded_results():
    document = result("collapse")
    half = document["settings"]["steps"] / 2
    for run in document["runs"]:
        stop = run["stopped_after"]
        assert run["is_harmed"] == (stop is not None) and (stop is None or stop < half)
        if stop is not None and run["rate"] == 4e-4:
            assert run["task"] == "shared" and run["accuracy_after"] < run["accuracy_at_stop"]


def test_sentences_on_kills_and_tokenizers_match_the_recorded_results():
    soak = result("soak")
    assert soak["differing"] == [] and soak["kills"] >= 50 and soak["gpus"] == 1
    modes = result("cross_tokenizer")["modes"].values()
    assert all(mode["alignment_share"] < 0.03 for mode in modes)


# Names


def test_modules_calls_and_flags_in_the_texts_exist():
    for text in (README, *HELP.values()):
        for name in re.findall(r"`([\w/]+\.py)`", text):
            folders = ("prefix_distill", "", "tests/benchmarks")
            assert any((ROOT / folder / name).exists() for folder in folders), name
    for _, file, call, _ in rows(section(README, "One token's journey")):
        code = (ROOT / "prefix_distill" / file.strip("`")).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {call.strip('`')}\b", code), (file, call)
    known = {
        flag
        for command in [GROUP, *GROUP.commands.values()]
        for parameter in command.params
        for flag in parameter.opts
    }
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text):
        assert flag in known or spellings.known(flag[2:]), flag


def test_the_table_of_commands_is_complete():
    names = [row[0].strip("`") for row in rows(section(README, "Commands"))]
    assert sorted(names) == sorted(COMMANDS) and len(names) == 13
    for topic in re.findall(r"prefix-distill help ([a-z-]+)", README):
        assert topic in HELP, topic


def test_defaults_in_the_table_of_flags_equal_the_config():
    from prefix_distill.config import describe_default, flag, options

    fields = {flag(path): field for path, field in options().items()}
    for names, defaults, _ in rows(section(README, "Flags that matter")):
        flags = [name.strip("`").split()[0] for name in names.split(", ")]
        for name, stated in zip(flags, defaults.split(", "), strict=True):
            if name in ("--config", "--max-new-tokens"):  # no option, and no fixed default
                continue
            if stated == "off":
                assert not fields[name].default, name
            elif name != "--gpus":  # its default is None: a launcher may start several processes
                assert describe_default(fields[name]).split(";")[0] == stated, name


def test_defaults_on_the_help_pages_equal_the_config():
    """Compare each `--flag value` (default) on the help pages with the config.

    test_panels.py does this for --help.
    """
    from prefix_distill.config import flag, options
    from prefix_distill.config.files import _convert
    from prefix_distill.training import defaults as defaults_of_training

    defaults = {flag(path): (path, field) for path, field in options().items()}
    stated = []
    for page in HELP.values():
        stated += re.findall(r"`(--[a-z-]+) ([^`]+)` \((?:the )?default\)", page)
    differs = HELP["migration"].split("## What differs")[1].split("The same run")[0]
    stated += [
        pair
        for row in differs.splitlines()
        if row.startswith("|")
        for pair in re.findall(r"`(--[a-z-]+) ([^`]+)`", row.split("|")[3])
        if "off-policy" not in pair[0]
    ]
    assert len(stated) >= 12
    for name, value in stated:
        path, field = defaults[name]
        default = field.default
        if name == "--lr":
            default = defaults_of_training.RATE
        number: float | int | str = value
        if isinstance(default, float):
            number = float(value)
        elif type(default) is int:
            number = int(value)
        assert _convert(path, number, field) == default, (name, value)


def test_help_methods_lists_every_choice_of_its_options():
    """Check the options that have fixed choices and that the page mentions."""
    from prefix_distill.config import choices, options

    named = 0
    for path, field in options().items():
        values = choices(field.type)
        if not values or f"`{field.metadata['flag']}" not in HELP["methods"]:
            continue
        named += 1
        sections = [
            part for part in HELP["methods"].split("\n## ") if f"`{field.metadata['flag']}" in part
        ]
        text = " ".join(sections)
        assert [v for v in values if v not in text and v not in ("none", "auto", "all")] == [], path
    assert named >= 4

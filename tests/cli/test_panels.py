"""``--help`` groups options in panels, lists the main ones first, and fits the terminal."""

import os
import re
import subprocess
import sys

import pytest
import typer
from helpers import invoke

from prefix_distill import config as configuration
from prefix_distill.cli import main

GROUP = typer.main.get_command(main.app)
MAIN = (
    *("--student", "--teacher", "--dataset", "--prefix", "--lr", "--samples"),
    *("--max-new-tokens", "--divergence", "--steps", "--batch-size", "--gpus", "--out"),
)
COMMANDS = ("run", "check", "plan", "probe", "eval", "export")  # the commands with config options
WIDTHS = (80, 100, 120)


def config_options(name: str) -> dict[str, str]:
    """Return the flag and path of every config option that a command has."""
    return {
        parameter.opts[0]: parameter.name.replace("__", ".")
        for parameter in GROUP.commands[name].params
        if "__" in parameter.name
    }


def panels(text: str) -> dict[str, list[str]]:
    """Return the names in the first column of every panel, by the title of the panel."""
    titles = re.findall(r"^╭─ (.+?) ─+╮$", text, re.MULTILINE)
    assert len(set(titles)) == len(titles)
    bodies = re.split(r"^╭.*╮$", text, flags=re.MULTILINE)[1:]
    # below the line of a switch stands its negative form, and below a long flag its TEXT
    names = [re.findall(r"^│ (?!--no-|TEXT |INT\b)([\w-]+)", body, re.MULTILINE) for body in bodies]
    return dict(zip(titles, names, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_once_in_the_panel_of_its_topic(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    code, text, _ = invoke(name, "--help-all")
    shown = panels(text)
    assert code == 0
    assert max(map(len, text.splitlines())) <= width

    expected: dict[str, list[str]] = {}
    for flag, path in config_options(name).items():
        expected.setdefault(configuration.topic(path), []).append(flag)
    for topic, flags in expected.items():
        assert shown[topic] == flags
    others = {parameter.opts[0] for parameter in GROUP.commands[name].params}
    others = {*others, "--help"} - config_options(name).keys()
    if configuration.MAIN in shown:
        others.add("--help-all")
    arguments = [argument.lower() for argument in shown.get("Arguments", [])]
    assert len(shown["General options"] + arguments) == len(others)


@pytest.mark.parametrize("name", ["run", "check", "plan"])
def test_the_first_panel_has_the_twelve_main_options_and_others_have_the_rest(name):
    shown = panels(invoke(name, "--help-all")[1])
    title, flags = next(iter(shown.items()))
    assert title == configuration.MAIN and tuple(flags) == MAIN
    every = [flag for flags in shown.values() for flag in flags if flag in config_options("run")]
    assert len(every) == len(configuration.options()) > 80
    assert set(every) == {configuration.flag(path) for path in configuration.options()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_main_options_and_counts_the_others(name):
    code, text, _ = invoke(name, "--help")
    shown, every = panels(text), panels(invoke(name, "--help-all")[1])
    assert code == 0 and invoke("help", name) == (0, text, "")
    short = {"Arguments", configuration.MAIN, "General options"}
    hidden = sum(len(rows) for topic, rows in every.items() if topic not in short)
    if configuration.MAIN not in every:
        assert shown == every
        return
    assert shown == {topic: rows for topic, rows in every.items() if topic in short}
    assert text.splitlines()[-1] == f"{hidden} more options: prefix-distill {name} --help-all"


def test_probe_has_no_option_that_needs_an_adapter():
    text = invoke("probe", "--help-all")[1]
    assert (
        "--teacher-quantize" in text and "--lora" not in text and "--student-quantize" not in text
    )


def test_probe_and_eval_start_with_main_options():
    assert tuple(panels(invoke("probe", "--help-all")[1])[configuration.MAIN]) == (
        *("--student", "--teacher", "--dataset", "--samples", "--max-new-tokens", "--gpus"),
    )
    first = next(iter(panels(invoke("eval", "--help-all")[1]).items()))
    assert first == (
        configuration.MAIN,
        ["--model", "--dataset", "--max-new-tokens", "--gpus"],
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_help_of_the_program_and_of_other_commands_fits_too(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for name in GROUP.commands.keys() - set(COMMANDS):
        text = invoke(name, "--help")[1]
        assert max(map(len, text.splitlines())) <= width
    text = invoke("--help")[1]
    assert max(map(len, text.splitlines())) <= width
    assert panels(text)["Commands"] == list(GROUP.list_commands(None))


def test_every_option_of_run_has_its_help_limits_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrower help breaks the longest flags
    text = "".join(invoke("run", "--help-all")[1].replace("│", "").split())
    parameters = {parameter.opts[0]: parameter for parameter in GROUP.commands["run"].params}
    for path, field in configuration.options().items():
        limits = configuration.describe_limits(field.metadata)
        default = f"default: {configuration.describe_default(field)}"
        facts = "; ".join(filter(None, [limits, default]))
        assert "".join(f"{field.metadata['help']}[{facts}]".split()) in text, path
        assert f"default: {parameters[configuration.flag(path)].show_default}" == default


def test_limits_and_defaults_follow_the_help_text():
    text = " ".join(invoke("run", "--help-all")[1].replace("│", " ").split())
    assert "Rollouts per prompt. [at least 1; default: 4]" in text
    assert "[above 0 and at most 1; default: 0.5]" in text
    assert "[default: runs/run-<time>]" in text
    assert "[required]" in invoke("compare", "--help")[1]


def test_plain_help_has_the_panels_without_boxes(monkeypatch):
    monkeypatch.setenv("PREFIX_DISTILL_PLAIN", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke("run", "--help-all")[1]
    assert not re.search("[─-▟\x1b]", text)
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE)[0] == configuration.MAIN
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert flags[:12] == list(MAIN)
    assert sorted(flags) == sorted([*config_options("run"), *GENERAL])


GENERAL = ("--config", "--set", "--resume", "--dry-run", "--help", "--help-all")
PROGRAM = [sys.executable, "-m", "prefix_distill"]


def test_help_in_a_pipe_is_100_columns_wide():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [*PROGRAM, "plan", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert max(map(len, done.stdout.splitlines())) == 100
    assert "\x1b" not in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_help_uses_the_width_of_the_terminal():
    import pty
    import termios

    left_out = ("COLUMNS", "NO_COLOR", "PREFIX_DISTILL_PLAIN")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 93))
    with os.fdopen(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [*PROGRAM, "check", "--help"], stdout=theirs, env=environment | {"TERM": "xterm"}
        )
        os.close(theirs)
        written = b""
        try:
            while part := screen.read(4096):
                written += part
        except OSError:  # Linux raises at the end of a pseudo-terminal
            pass
        assert process.wait() == 0
    text = written.decode()
    assert "\x1b[1;36m--student" in text
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) == 93


@pytest.mark.parametrize("words", [["--plain", "--help"], ["--help", "--plain"]])
def test_plain_and_help_work_in_either_order(words, monkeypatch):
    monkeypatch.setenv("PREFIX_DISTILL_PLAIN", "")
    code, text, _ = invoke(*words)
    assert code == 0 and "General options:\n  --plain\n" in text

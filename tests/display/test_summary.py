"""Test the closing summary: it fits, it counts warnings, and its commands can be copied."""

import pytest

from prefix_distill.display.summary import print_summary

COMMAND = "prefix-distill eval --model runs/first/model --dataset gsm8k --limit 200 --out a.jsonl"
FACTS = {
    "accuracy": "45.0 % → 89.5 % [84.5 %, 93.0 %] of 200 problems, the teacher reaches 97.0 %",
    "KL": "0.51 → 0.12",
}


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_facts_and_warnings_fit_and_commands_stay_whole(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_summary(
        "run finished in 4 min", FACTS, warnings=["the tail is hurt " * 6], commands=[COMMAND]
    )
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "run finished in 4 min" and lines[-1] == f"next: {COMMAND}"
    assert all(len(line) <= min(80, columns) for line in lines[:-1])
    assert "1 warning:" in lines and "\x1b" not in err
    text = " ".join(" ".join(lines).split())
    for fact in FACTS.values():
        assert fact in text


def test_a_plain_summary_has_no_colours(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    print_summary("done", {}, warnings=["a", "b"])
    assert capsys.readouterr().err == "done\n2 warnings:\n  a\n  b\n"

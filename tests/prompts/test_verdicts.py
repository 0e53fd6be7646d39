"""Test that final answers are graded as the table beside this file says.

The table follows the conventions of GSM8K, MATH, AIME, ASDiv and multiple-choice tests.
"""

from pathlib import Path

from prefix_distill.prompts import expressions
from prefix_distill.prompts.answers import is_correct

TABLE = Path(__file__).with_name("verdicts.tsv")


def test_verdicts_are_those_of_the_table(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS_AFTERWARDS", expressions.SECONDS)  # a busy machine
    verdicts, wrong = [], []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            continue
        form, verdict, reference, response = line.replace("⏎", "\n").split("\t")
        verdicts.append(verdict)
        if is_correct(response, reference, form) is not (verdict == "right"):
            wrong.append(line)
    assert wrong == []
    assert len(verdicts) > 400 and verdicts.count("wrong") > 100

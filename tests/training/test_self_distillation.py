"""Test self-distillation: the privileged prompt, the teacher's weights, and the loss."""

import json

import pytest
import torch
from helpers import SELF, byte_tokenizer, invoke, prepared, save_tiny, trained, update_gradient

from prefix_distill import config as configuration
from prefix_distill.engine import loading
from prefix_distill.errors import UserError
from prefix_distill.prompts import templates
from prefix_distill.prompts.load import load_prompts
from prefix_distill.prompts.row_format import RowFormat
from prefix_distill.prompts.templates import PRIVILEGED
from prefix_distill.training import state


def test_the_privileged_prompt_and_the_students(pair, tmp_path):
    """Check that the instruction ends both prompts and that braces in the texts are kept."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"q": "a {solution}?", "doc": {"why": "since {problem} = 1"}, "answer": "1"},
        {"q": "b?", "doc": {"why": "so"}, "answer": "2"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row_format = RowFormat(prompt_column="q", instruction="Think.", privileged_column="doc.why")
    prompts = load_prompts(str(file), row_format).prompts
    config = configuration.build(
        {
            "data.privileged_column": "doc.why",
            "data.instruction": "Think.",
            "models.teacher": "self",
            "data.privileged_template": "P {problem} S {solution} E",
        }
    )
    model = loading.load_model(pair[0], device=torch.device("cpu"), dtype=torch.float32)
    kept, _ = templates.render_all(prompts, model, model, config)
    assert [model.tokenizer.decode(r.student_ids) for r in kept] == [
        "<u>a {solution}?\n\nThink.<a>",
        "<u>b?\n\nThink.<a>",
    ]
    assert [model.tokenizer.decode(r.teacher_ids) for r in kept] == [
        "<u>P a {solution}? S since {problem} = 1 E\n\nThink.<a>",
        "<u>P b? S so E\n\nThink.<a>",
    ]
    (shown,) = templates.teacher_messages(prompts[1], PRIVILEGED)
    assert (
        shown["content"].startswith("b?\n\n")
        and "\nso\n" in shown["content"]
        and shown["content"].endswith("\n\nThink.")
    )


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": None}, "row 1 has no text in 'answer'"),
        ({"answer": " "}, "row 1 has no text"),
        ({}, "row 1 has no text"),
    ],
)
def test_rows_without_privileged_text_are_reported(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in ({"question": "a", "answer": "1"}, {"question": "b"} | row)
        )
    )
    with pytest.raises(UserError, match=message):
        load_prompts(str(file), RowFormat(privileged_column="answer"))
    with pytest.raises(UserError, match="no column 'why'; it has question, answer"):
        load_prompts(str(file), RowFormat(privileged_column="why"))
    with pytest.raises(UserError, match="expected the column solution, got"):
        load_prompts("lab:choice", RowFormat(privileged_column="answer"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--teacher", "self"], "so the loss is zero; name a column that only the teacher sees"),
        (["--teacher-ema", "0.9"], "applies only with --teacher self"),
        (["--teacher", "self", "--privileged-column", "answer", "--teacher-ema", "1"], "below 1"),
        (
            ["--privileged-template", "{problem} {solution}"],
            "applies only with --privileged-column; add it, or omit --privileged-template",
        ),
        (
            ["--privileged-column", "answer", "--privileged-template", "{problem}"],
            "it has no {solution}",
        ),
        (["--clip", "0.05"], "--divergence forward-kl"),
        (["--clip", "0", "--divergence", "forward-kl"], "above 0"),
        (["--keep", "0.5"], "add --select"),
        (["--select", "soft-or", "--keep", "0"], "above 0"),
        (["--select", "best"], "--select best: expected all or one of"),
        (
            ["--extrapolate-score", "heldout-kl"],
            "applies only with --extrapolate; add --extrapolate effopd",
        ),
        (
            ["--extrapolate", "twice"],
            "expected one of none, effopd, always-1, random; change it",
        ),
        (["--position-weight", "sigmoid:1"], "--position-weight sigmoid:1: expected uniform"),
    ],
)
def test_contradictory_settings_are_refused(flags, message, tmp_path):
    code, _, err = invoke("run", *flags, "--out", tmp_path / "run")
    assert (
        code == 2
        and message in err
        and len(err.strip().splitlines()) == 1
        and not (tmp_path / "run").exists()
    )


def test_values_compare_the_two_prompts_under_the_initial_weights(pair, questions):
    """Compare the forward KL of every token with that of full logits of one row at a time.

    The prompts of a batch have different lengths, and so have the prompts of a rollout's two sides.
    """
    run = prepared((pair[0], "self"), questions, divergence__name="forward-kl", **SELF)
    assert run.pair.teacher.net is not run.pair.student.net
    _, rollouts, values = update_gradient(run, micro=10)
    assert len({len(r.student_prompt) for r in rollouts}) > 1 and all(
        len(r.teacher_prompt) > len(r.student_prompt) + 10 for r in rollouts
    )
    for r in rollouts:
        s, t = (
            run.pair.student.net(torch.tensor([prompt + r.ids]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            for prompt in (r.student_prompt, r.teacher_prompt)
        )
        torch.testing.assert_close(
            (t.exp() * (t - s)).sum(-1).detach(),
            torch.tensor(values[r.key]),
            rtol=1e-4,
            atol=1e-6,
        )
        assert values[r.key][0] > 1e-3


def test_the_teacher_keeps_the_students_initial_weights(pair, questions, tmp_path):
    run = prepared(
        (pair[0], "self"),
        questions,
        schedule__lr=1e-2,
        divergence__name="forward-kl",
        divergence__clip=0.05,
        **SELF,
    )
    first = {n: p.clone() for n, p in run.pair.student.net.named_parameters()}
    result = trained(run, tmp_path / "run")
    for name, p in run.pair.teacher.net.named_parameters():
        assert torch.equal(p, first[name])
    assert any(not torch.equal(p, first[n]) for n, p in run.pair.student.net.named_parameters())
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["loss/clipped_share"] < 1 and result["steps"] == 4


def test_an_averaged_teacher_follows_the_recursion(pair, questions, tmp_path, monkeypatch):
    """Check that t ← 0.75·t + 0.25·s after every update."""
    seen, plain = [], state.average_teacher

    def watched(teacher, student, share):
        seen.append([p.detach().clone() for p in student.net.parameters()])
        plain(teacher, student, share)

    monkeypatch.setattr(state, "average_teacher", watched)
    run = prepared(
        (pair[0], "self"), questions, models__teacher_ema=0.75, schedule__lr=1e-2, **SELF
    )
    expected = [p.detach().clone() for p in run.pair.student.net.parameters()]
    trained(run, tmp_path / "run")
    assert len(seen) == 4
    for step in seen:
        expected = [0.75 * t + 0.25 * s for t, s in zip(expected, step, strict=True)]
    for got, want in zip(run.pair.teacher.net.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert not got.requires_grad


def test_thinking_is_set_on_each_side(pair, tmp_path):
    folder = tmp_path / "model"
    save_tiny(folder, seed=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m.content }}{% endfor %}<a>"
        "{% if enable_thinking is defined and not enable_thinking %}[]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(10, 30))
    )
    run = prepared(
        (str(folder), "self"),
        str(file),
        models__teacher="self",
        data__student_thinking="off",
        data__teacher_thinking="on",
    )
    texts = {
        (
            run.pair.student.tokenizer.decode(r.student_ids)[-3:],
            run.pair.student.tokenizer.decode(r.teacher_ids)[-4:],
        )
        for r in run.problems.train
    }
    assert {(s[-2:], t[-3:]) for s, t in texts} == {("[]", "<a>")}
    with pytest.raises(UserError, match="no thinking switch"):
        prepared(pair, str(file), data__teacher_thinking="off")


def test_a_teacher_that_ignores_the_privileged_text_is_reported(pair, questions):
    """Compare a laboratory model that was trained on privileged prompts with one that was not."""
    told = prepared(
        ("lab:choice/student-told", "self"),
        "lab:choice",
        models__teacher="self",
        data__privileged_column="solution",
        rollout__max_new_tokens=192,
    )
    assert not any("does not help" in text for text in told.notes.warnings)
    assert any(text.startswith("privileged text:") for text in told.notes.lines)
    blind = prepared(
        ("lab:choice/student", "self"),
        "lab:choice",
        models__teacher="self",
        data__privileged_column="solution",
        rollout__max_new_tokens=192,
    )
    assert any("does not help" in text for text in blind.notes.warnings)

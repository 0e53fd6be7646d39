"""Test training on text that the teacher samples: once, cut at the prefix, with loss and cost."""

import json

import pytest
import torch
from helpers import Silent, one_update, prepared, state_of

from prefix_distill import config as configuration
from prefix_distill.engine import sampling
from prefix_distill.errors import UserError
from prefix_distill.prompts import stream
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.session import Session
from prefix_distill.training.teacher_text import FILE, load_or_sample


def gradient(run, folder, prefix=12):
    texts, spent = texts_of(run, folder)
    done = one_update(run, prefix=prefix, texts=texts)
    return done.rollouts, done.values, done.gradient, texts, spent, done.ledger


def texts_of(run, folder):
    """Sample or load the teacher's texts; return them and the run's ledger."""
    RunFolder(folder).path.mkdir(exist_ok=True)
    state = state_of(run, folder)
    longest = run.method.prefix.longest(run.config.train.steps)
    return load_or_sample(state, run.pair.teacher, longest), state.progress.ledger


def reference(run, rollouts, loss_of):
    student = run.pair.student.net
    student.zero_grad()
    losses, count = [], 0
    for r in rollouts:
        logits = student(torch.tensor([r.student_prompt + r.ids])).logits[
            0, len(r.student_prompt) - 1 : -1
        ]
        with torch.no_grad():
            theirs = run.pair.teacher.net(torch.tensor([r.teacher_prompt + r.ids])).logits[
                0, len(r.teacher_prompt) - 1 : -1
            ]
        losses.append(loss_of(r, logits.log_softmax(-1), theirs.log_softmax(-1)).sum())
        count += len(r.ids)
    (sum(losses) / count).backward()
    return {n: p.grad.clone() for n, p in student.named_parameters()}


def nll(r, s, t):
    return -s.gather(1, torch.tensor(r.ids)[:, None])[:, 0]


def forward_kl(r, s, t):
    return (t.exp() * (t - s)).sum(-1)


def reverse_kl(r, s, t):
    return (s.exp() * (s - t)).sum(-1)


@pytest.mark.parametrize(
    "off, divergence, own, theirs",
    [
        ("sft", "reverse-kl", None, nll),
        ("divergence", "forward-kl", None, forward_kl),
        ("divergence", "reverse-kl", None, reverse_kl),
        ("sft:0.4", "reverse-kl", reverse_kl, nll),
        ("divergence:0.4", "forward-kl", forward_kl, forward_kl),
    ],
)
def test_gradient_of_every_arm_against_autograd(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, off, divergence, own, theirs
):
    run = prepared(pair, questions, rollout__off_policy=off, divergence__name=divergence)
    rollouts, _, found, *_ = gradient(run, tmp_path / "run")
    foreign = [r for r in rollouts if r.off_policy]
    assert len(foreign) == (4 if "0.4" in off else 10)
    expected = reference(run, rollouts, lambda r, s, t: (theirs if r.off_policy else own)(r, s, t))
    for name in found:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=1e-4,
            atol=1e-5 * max(1e-6, expected[name].abs().max().item()),
        )


def test_the_teachers_text_is_sampled_once_and_cut_at_the_prefix(
    pair, questions, tmp_path, monkeypatch
):
    run = prepared(pair, questions, rollout__off_policy="sft")
    rollouts, _, _, texts, spent, update = gradient(run, tmp_path / "run", prefix=5)
    assert all(
        r.off_policy
        and len(r.ids) <= 5
        and r.ids == tuple(texts[p.prompt.index, r.sample]["ids"][:5])
        for p, r in zip(
            (stream.prompts_of_step(run.problems.train, 0, 5, 0)[r.slot] for r in rollouts),
            rollouts,
            strict=True,
        )
    )
    # the teacher samples the same text if this is the only prompt
    from prefix_distill.engine.sampling import Request, generate

    first = stream.prompts_of_step(run.problems.train, 0, 5, 0)[0]
    alone = generate(
        run.pair.teacher,
        [Request(ids=first.teacher_ids, key=("teacher-text", first.prompt.index, 1))],
        12,
        run.method.text_sampler,
    )
    assert texts[first.prompt.index, 1]["ids"] == list(alone[0].ids)
    assert set(spent.useful) == {"teacher_prefill", "teacher_decode"} and all(spent.useful.values())
    assert "teacher_score" not in update.useful  # cross-entropy needs no teacher scores
    monkeypatch.setattr(sampling, "_Batch", None)  # the second call must not sample
    assert texts_of(run, tmp_path / "run") == (texts, spent)


def test_a_longer_run_samples_only_the_missing_texts(pair, questions, tmp_path):
    short, longer = (
        prepared(pair, questions, rollout__off_policy="divergence", train__steps=steps)
        for steps in (1, 3)
    )
    first, _ = texts_of(short, tmp_path / "run")
    both, paid = texts_of(longer, tmp_path / "run")
    assert first.items() <= both.items() and len(both) > len(first)
    kept = json.loads((tmp_path / "run" / FILE).read_text())
    assert kept["ledger"]["useful"] == paid.useful and len(kept["texts"]) == len(both)


def test_an_sft_run_reduces_the_loss_on_the_text(pair, questions, tmp_path):
    run = prepared(
        pair,
        questions,
        rollout__off_policy="sft",
        schedule__prefix="full",
        train__steps=12,
        schedule__lr=3e-3,
        train__batch_size=2,
    )
    files = RunFolder(tmp_path / "run")
    files.create({})
    files.write_json("run.json", {})
    result = Session(run, files, Silent()).train()
    rows = [json.loads(line) for line in (files.path / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[-1]["loss/teacher_text_nats"] < rows[0]["loss/teacher_text_nats"]
        and rows[0]["loss/reverse_kl_nats"] is None
    )
    assert result["flops"]["by_phase"].keys() == {
        "evaluation",
        "teacher_prefill",
        "teacher_decode",
        "student_update",
    }


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"divergence.estimator": "sampled", "divergence.name": "forward-kl"},
            "--divergence forward-kl",
        ),
        ({"divergence.estimator": "sampled", "divergence.name": "jsd:0.5"}, "--divergence jsd:0.5"),
        ({"divergence.estimator": "sampled", "divergence.temperature": 2.0}, "--kl-temperature 2"),
        ({"divergence.estimator": "sampled", "rollout.temperature": 0.0}, "--temperature 0"),
        (
            {"divergence.estimator": "sampled", "rollout.off_policy": "divergence:0.5"},
            "--off-policy divergence:0.5",
        ),
        ({"rollout.off_policy": "sft", "divergence.name": "forward-kl"}, "--divergence forward-kl"),
        ({"rollout.off_policy": "sft", "divergence.estimator": "top-k:5"}, "--estimator top-k:5"),
        ({"rollout.off_policy": "sft", "divergence.temperature": 2.0}, "--kl-temperature 2.0"),
    ],
)
def test_contradictory_settings_of_the_loss_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        configuration.build(changes)
    for path in changes:  # each setting alone is valid
        configuration.build({path: changes[path]})

"""Windows: which K tokens of a rollout are taught, and that teaching K tokens is teaching those K and no others."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies

from prefix_distill import data, scoring, train
from prefix_distill.divergence import Terms
from prefix_distill.errors import UserError
from prefix_distill.flops import Ledger
from prefix_distill.runtime import Clock
from prefix_distill.weights import WINDOWS, Window, parse_window, token_weights
from test_train import prepared


def test_windows_by_hand():
    values = [0.1, 0.9, 0.9, 0.0, 0.5, 0.9]
    at = lambda kind, size=2: Window(kind, size).positions(6, (0, 0), values)
    assert at("first") == (0, 1) and at("middle") == (2, 3) and at("last") == (4, 5)
    assert at("highest-kl") == (1, 2) and at("highest-kl", 3) == (1, 2, 5)  # ties go to the earlier token
    assert at("highest-entropy", 4) == (1, 2, 4, 5)
    assert Window("middle", 3).positions(6, (0,)) == (1, 2, 3)


@given(strategies.sampled_from(WINDOWS), strategies.integers(1, 30), strategies.integers(1, 25), strategies.integers(0, 9))
def test_every_window_is_k_distinct_ascending_positions(kind, size, tokens, key):
    values = [((t * 37 + key) % 11) / 11 for t in range(tokens)]
    kept = Window(kind, size).positions(tokens, (0, key), values)
    assert len(kept) == min(size, tokens) and list(kept) == sorted(set(kept)) and 0 <= kept[0] and kept[-1] < tokens
    assert kept == Window(kind, size).positions(tokens, (0, key), values)
    if kind in ("first", "middle", "last", "random"):
        assert kept[-1] - kept[0] == len(kept) - 1


def test_random_windows_cover_the_rollout_evenly():
    counts = [0] * 10
    for key in range(4000):
        counts[Window("random", 3).positions(10, (0, key))[0]] += 1
    assert all(abs(n - 500) < 90 for n in counts[:8]) and counts[8:] == [0, 0]  # 4 standard deviations of a binomial are 84


@pytest.mark.parametrize("text", ["", "first", "first:0", "first:x", "top:3", "all:3", "first:²", "highest-kl:-1"])
def test_other_windows_are_refused(text):
    with pytest.raises(UserError, match="--window"):
        parse_window(text)


@pytest.mark.parametrize("window", ["middle:4", "last:5", "scattered:3", "highest-kl:4", "highest-entropy:2", "first:3"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_gradient_is_that_of_the_kept_tokens(pair, questions, window, reduction):
    run = prepared(pair, questions, weights__window=window, schedule__prefix="full", divergence__reduction=reduction)
    student, teacher = run.student.net.requires_grad_(True), run.teacher.net
    student.zero_grad()
    prompts = data.batch(run.train_prompts, 0, 5, 0)
    clock, ledger = Clock(run.place.device), Ledger()
    rollouts = train.select(run, train.sample(run, run.student, prompts, 0, 32, ledger, clock), 0, ledger, clock)
    assert {len(r.taught) for r in rollouts} == {run.window.size}
    weights, share = token_weights(rollouts, reduction)
    values = train._accumulate(run, train.StudentLoss(run), rollouts, weights, share, ledger, clock)
    fused = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()  # independent reference: every rollout alone, full logits, autograd
    losses, count = [], 0
    for r in rollouts:
        s = student(torch.tensor([r.student_prompt + r.ids])).logits[0, len(r.student_prompt) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            t = teacher(torch.tensor([r.teacher_prompt + r.ids])).logits[0, len(r.teacher_prompt) - 1 : -1].log_softmax(-1)
        kl = F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
        if run.window.kind == "highest-kl":
            assert set(r.taught) == set(kl.topk(4).indices.tolist())
        if run.window.kind == "highest-entropy":
            assert set(r.taught) == set((-(s.exp() * s).sum(-1)).topk(2).indices.tolist())
        kept = kl[list(r.taught)]
        torch.testing.assert_close(torch.tensor(values[r.prompt, r.sample]), kept.detach(), rtol=1e-4, atol=1e-6)
        losses.append(kept.sum() if reduction == "token" else kept.mean())
        count += len(kept)
    (sum(losses) / (count if reduction == "token" else len(rollouts))).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(fused[name], p.grad, rtol=1e-4, atol=1e-5 * max(p.grad.abs().max().item(), 1e-6), msg=name)


def test_nothing_behind_the_last_kept_token_is_read_and_the_ledger_knows(pair, questions):
    run = prepared(pair, questions, weights__window="first:3", schedule__prefix="full")
    prompts = data.batch(run.train_prompts, 0, 5, 0)
    clock = Clock(run.place.device)
    whole = train.sample(run, run.student, prompts, 0, 32, Ledger(), clock)
    kept = train.select(run, whole, 0, Ledger(), clock)
    truncated = [r.__class__(**{**r.__dict__, "ids": r.ids[:3], "teacher_ids": r.ids[:3]}) for r in whole]
    assert scoring.sequences(kept) == scoring.sequences(truncated)
    assert scoring.reads(kept, False) == scoring.reads(truncated, False)
    torch.testing.assert_close(scoring.hidden_rows(run.student, kept), scoring.hidden_rows(run.student, truncated))


def test_ranking_windows_cost_a_reading_of_both_models(pair, questions):
    run = prepared(pair, questions, weights__window="highest-kl:4", schedule__prefix="full")
    prompts = data.batch(run.train_prompts, 0, 5, 0)
    clock, ledger, plain = Clock(run.place.device), Ledger(), Ledger()
    rollouts = train.sample(run, run.student, prompts, 0, 32, Ledger(), clock)
    train.select(run, rollouts, 0, ledger, clock)
    groups = scoring.micro_batches(rollouts, run.config.train.micro_batch_size, run.student.reads_once)
    for group in groups:
        plain.forward("selection", run.student_shape, scoring.reads(group, run.student.reads_once))
        plain.forward("selection", run.teacher_shape, scoring.reads(group, run.teacher.reads_once, teacher=True))
    assert ledger.useful == plain.useful and set(ledger.useful) == {"selection"}


def test_statistics_of_one_rollout_do_not_depend_on_the_batch(pair, questions):
    run = prepared(pair, questions)
    rollouts = train.sample(run, run.student, data.batch(run.train_prompts, 0, 5, 0), 0, 20, Ledger(), Clock(run.place.device))
    both = [scoring.token_statistics(Terms("reverse-kl"), run.student, run.teacher, run.support, rollouts, run.place, rows)
            for rows in (1, 10)]
    for key in both[0]:
        for name in both[0][key]:
            assert both[0][key][name] == pytest.approx(both[1][key][name], abs=1e-5), name

"""Test windows, selection and position weights.

They decide which tokens of a rollout are in the loss and with which weight. The gradient must be
that of these tokens only.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, one_update, prepared, state_of, update_gradient
from hypothesis import given, strategies

from prefix_distill.engine import scoring
from prefix_distill.engine.batching import micro_batches, reads
from prefix_distill.engine.rollout import rollout_of, student_sides, teacher_sides
from prefix_distill.engine.scoring import Scorer
from prefix_distill.errors import UserError
from prefix_distill.maths.flops import Ledger
from prefix_distill.maths.intervals import quantile
from prefix_distill.maths.weights import (
    SELECTIONS,
    WINDOWS,
    Selection,
    Window,
    batch_scale,
    keep_selection,
    keep_window,
    parse_position_weight,
    parse_selection,
    parse_window,
    quadrants,
    token_weights,
)
from prefix_distill.training.update import Update


def test_windows_by_hand():
    values = [0.1, 0.9, 0.9, 0.0, 0.5, 0.9]

    def at(kind, size=2):
        return Window(kind=kind, size=size).positions(6, (0, 0), values)

    assert at("first") == (0, 1) and at("middle") == (2, 3) and at("last") == (4, 5)
    assert at("highest-kl") == (1, 2) and at("highest-kl", 3) == (
        1,
        2,
        5,
    )  # ties go to the earlier token
    assert at("highest-entropy", 4) == (1, 2, 4, 5)
    assert Window(kind="middle", size=3).positions(6, (0,)) == (1, 2, 3)


@given(
    strategies.sampled_from(WINDOWS),
    strategies.integers(1, 30),
    strategies.integers(1, 25),
    strategies.integers(0, 9),
)
def test_every_window_is_k_distinct_ascending_positions(kind, size, tokens, key):
    values = [((t * 37 + key) % 11) / 11 for t in range(tokens)]
    kept = Window(kind=kind, size=size).positions(tokens, (0, key), values)
    assert (
        len(kept) == min(size, tokens)
        and list(kept) == sorted(set(kept))
        and kept[0] >= 0
        and kept[-1] < tokens
    )
    assert kept == Window(kind=kind, size=size).positions(tokens, (0, key), values)
    if kind in ("first", "middle", "last", "random"):
        assert kept[-1] - kept[0] == len(kept) - 1


def test_random_windows_cover_the_rollout_evenly():
    counts = [0] * 10
    for key in range(4000):
        counts[Window(kind="random", size=3).positions(10, (0, key))[0]] += 1
    assert all(abs(n - 500) < 90 for n in counts[:8]) and counts[8:] == [
        0,
        0,
    ]  # 4 standard deviations of a binomial are 84


@pytest.mark.parametrize(
    "text", ["", "first", "first:0", "first:x", "top:3", "all:3", "first:²", "highest-kl:-1"]
)
def test_invalid_windows_are_refused(text):
    with pytest.raises(UserError, match="--window"):
        parse_window(text)


@pytest.mark.parametrize(
    "window", ["middle:4", "last:5", "scattered:3", "highest-kl:4", "highest-entropy:2", "first:3"]
)
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_gradient_is_that_of_the_kept_tokens(pair, questions, window, reduction):
    run = prepared(
        pair,
        questions,
        weights__window=window,
        schedule__prefix="full",
        divergence__reduction=reduction,
    )
    student, teacher = run.pair.student.net, run.pair.teacher.net
    done = one_update(run)
    rollouts, values, fused = done.rollouts, done.values, done.gradient
    assert {len(r.taught) for r in rollouts} == {run.method.window.size}

    student.zero_grad()  # independent reference: every rollout alone, full logits, autograd
    losses, count = [], 0
    for r in rollouts:
        s = (
            student(torch.tensor([r.student_prompt + r.ids]))
            .logits[0, len(r.student_prompt) - 1 : -1]
            .log_softmax(-1)
        )
        with torch.no_grad():
            t = (
                teacher(torch.tensor([r.teacher_prompt + r.ids]))
                .logits[0, len(r.teacher_prompt) - 1 : -1]
                .log_softmax(-1)
            )
        kl = F.kl_div(t, s, reduction="none", log_target=True).sum(-1)
        if run.method.window.kind == "highest-kl":
            assert set(r.taught) == set(kl.topk(4).indices.tolist())
        if run.method.window.kind == "highest-entropy":
            assert set(r.taught) == set((-(s.exp() * s).sum(-1)).topk(2).indices.tolist())
        kept = kl[list(r.taught)]
        torch.testing.assert_close(torch.tensor(values[r.key]), kept.detach(), rtol=1e-4, atol=1e-6)
        losses.append(kept.sum() if reduction == "token" else kept.mean())
        count += len(kept)
    (sum(losses) / (count if reduction == "token" else len(rollouts))).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(
            fused[name],
            p.grad,
            rtol=1e-4,
            atol=1e-5 * max(p.grad.abs().max().item(), 1e-6),
            msg=name,
        )


def test_tokens_after_the_last_kept_one_are_neither_run_nor_counted(pair, questions):
    run = prepared(pair, questions, weights__window="first:3", schedule__prefix="full")
    update = Update(state_of(run), 0)
    whole = update.sample()
    kept = update.select(whole)
    truncated = [dataclasses.replace(r, ids=r.ids[:3], teacher_ids=r.ids[:3]) for r in whole]
    for sides in (student_sides, teacher_sides):
        left, right = sides(kept), sides(truncated)
        assert [(s.prompt, s.read) for s in left] == [(s.prompt, s.read) for s in right]
        assert reads(left, False) == reads(right, False)
    torch.testing.assert_close(
        scoring.hidden_rows(run.pair.student, student_sides(kept)),
        scoring.hidden_rows(run.pair.student, student_sides(truncated)),
    )


def test_ranking_windows_cost_a_forward_pass_of_both_models(pair, questions):
    run = prepared(pair, questions, weights__window="highest-kl:4", schedule__prefix="full")
    update = Update(state_of(run), 0)
    rollouts = update.sample()
    update = Update(state_of(run), 0)
    update.select(rollouts)
    ledger, plain = update.meter.ledger, Ledger()
    student, teacher = run.pair.student, run.pair.teacher
    for group in micro_batches(rollouts, run.limits.micro_batch_size, student.encodes_prompt_once):
        students = reads(student_sides(group), student.encodes_prompt_once)
        teachers = reads(teacher_sides(group), teacher.encodes_prompt_once)
        plain.forward("selection", run.pair.student_shape, students)
        plain.forward("selection", run.pair.teacher_shape, teachers)
    assert ledger.useful == plain.useful and set(ledger.useful) == {"selection"}


def test_statistics_of_one_rollout_do_not_depend_on_the_batch(pair, questions):
    run = prepared(pair, questions)
    rollouts = Update(state_of(run), 0, prefix=20).sample()
    scorer = Scorer.reverse_kl(run.pair, run.place)
    both = [scorer.measure(rollouts, size) for size in (1, 10)]
    for key in both[0]:
        for name in both[0][key]:
            assert both[0][key][name] == pytest.approx(both[1][key][name], abs=1e-5), name


# Six tokens of one rollout by hand: entropy, reverse KL and forward KL. The other tokens of the
# batch set the ends of the scale.
ENTROPY, DIVERGENCE, FORWARD = (
    [0.0, 1.0, 2.0, 4.0, 1.0, 0.0],
    [0.0, 0.3, 0.1, 0.0, 0.3, 0.6],
    [0.1, 0.4, 0.1, 9.0, 0.5, 0.2],
)


def six(kind: str, share: float) -> tuple[int, ...]:
    """Return the tokens that a selection keeps of the six.

    Entropies are clipped at 2, because 98 of 100 are 2 or less; divergences are at most 0.6. So
    ĥ = 0, ½, 1, 1, ½, 0 and δ̂ = 0, ½, ⅙, 0, ½, 1, and soft-or is 0, ¾, 1, 1, ¾, 1.
    """
    entropies, divergences = ENTROPY + [2.0] * 94, DIVERGENCE + [0.5] * 94
    at = batch_scale(entropies, divergences)
    assert at.entropy == (0.0, 2.0) and at.divergence == (0.0, 0.6)
    facts = {
        name: dict(enumerate(values))
        for name, values in (
            ("entropy", ENTROPY),
            ("divergence", DIVERGENCE),
            ("forward_kl", FORWARD),
        )
    }
    return Selection(kind=kind, share=share).choose(tuple(range(6)), (0, 0, 0, 0), facts, at)


@pytest.mark.parametrize(
    "kind, share, kept",
    [
        ("soft-or", 0.5, (2, 3, 5)),
        ("soft-or", 0.34, (2, 3)),
        ("soft-or", 0.67, (1, 2, 3, 5)),
        ("soft-or", 0.1, (2,)),
        ("bottom", 0.5, (0, 1, 4)),
        ("bottom", 0.34, (0, 1)),
        ("entropy", 0.5, (1, 2, 3)),
        ("entropy", 0.67, (1, 2, 3, 4)),
        ("divergence", 0.34, (1, 5)),
        ("divergence", 0.5, (1, 4, 5)),
        ("overconfident", 0.5, (1, 4, 5)),  # KL(T‖S)(1 − ĥ) = 0.1, 0.2, 0, 0, 0.25, 0.2
        ("overconfident", 0.2, (4,)),
        ("overconfident", 0.34, (1, 4)),
    ],
)
def test_selection_of_six_tokens_by_hand(kind, share, kept):
    assert six(kind, share) == kept


def test_equal_scores_select_the_earliest_tokens():
    facts = {name: dict.fromkeys(range(4), 0.7) for name in ("entropy", "divergence")}
    at = batch_scale([0.7] * 4, [0.7] * 4)
    assert at.scaled(0.7, 0.7) == (0.0, 0.0)
    for kind in ("soft-or", "bottom", "entropy", "divergence"):
        assert Selection(kind=kind, share=0.5).choose((0, 1, 2, 3), (0,), facts, at) == (0, 1)


@given(strategies.lists(strategies.floats(0, 1), min_size=2, max_size=12))
def test_clipped_entropies_have_equal_scores(divergences):
    """Check that soft-or is exactly 1 if ĥ = 1, for any divergence.

    Otherwise rounding would rank these tokens.
    """
    tokens = tuple(range(len(divergences)))
    facts = {"entropy": dict.fromkeys(tokens, 2.0), "divergence": dict(enumerate(divergences))}
    at = batch_scale([0.0, *[1.5] * 3], [0.0, 1.0])
    assert (
        Selection(kind="soft-or", share=0.5).choose(tokens, (0,), facts, at)
        == tokens[: max(1, len(tokens) // 2)]
    )


@given(strategies.lists(strategies.floats(0, 9), min_size=1, max_size=40), strategies.floats(0, 1))
def test_quantile_matches_torch(values, share):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), share).item()
    assert quantile(values, share) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(
    strategies.sampled_from(SELECTIONS),
    strategies.sampled_from([0.1, 0.2, 0.5, 1.0]),
    strategies.integers(0, 9),
    strategies.lists(strategies.integers(1, 12), min_size=1, max_size=5),
)
def test_selection_keeps_a_share_of_every_rollout_in_any_order(kind, share, key, lengths):
    rollouts = [rollout_of(i, (1,), tuple(range(m))) for i, m in enumerate(lengths)]
    facts = {
        r.key: {
            name: {t: ((r.slot * 7 + t * (3 + n) + key) % 11) / 11 for t in r.taught}
            for n, name in enumerate(("entropy", "divergence", "forward_kl"))
        }
        for r in rollouts
    }

    def chosen(rollouts):
        at = batch_scale(
            *(
                [v for r in rollouts for v in facts[r.key][name].values()]
                for name in ("entropy", "divergence")
            )
        )
        return {
            r.slot: r.taught
            for r in keep_selection(
                Selection(kind=kind, share=share), rollouts, (0, key), facts, at
            )
        }

    kept = chosen(rollouts)
    assert kept == chosen(rollouts[::-1])
    assert [len(kept[r.slot]) for r in rollouts] == [
        max(1, math.floor(share * m + 1e-9)) for m in lengths
    ]
    if share == 1:
        assert kept == {r.slot: r.taught for r in rollouts}


def test_entropy_sample_samples_by_entropy_without_replacement():
    facts = {
        "entropy": {0: 1.0, 1: 3.0, 2: 0.0, 3: 4.0},
        "divergence": dict.fromkeys(range(4), 0.0),
    }
    at, n = batch_scale([0.0, 1.0, 3.0, 4.0] + [4.0] * 96, [0.0]), 4000
    first, pairs = [0] * 4, {}
    for key in range(n):
        [t] = Selection(kind="entropy-sample", share=0.25).choose((0, 1, 2, 3), (0, key), facts, at)
        first[t] += 1
        kept = Selection(kind="entropy-sample", share=0.5).choose((0, 1, 2, 3), (0, key), facts, at)
        pairs[kept] = pairs.get(kept, 0) + 1
        assert Selection(kind="entropy-sample", share=0.75).choose(
            (0, 1, 2, 3), (0, key), facts, at
        ) == (
            0,
            1,
            3,
        )
    p = [1 / 8, 3 / 8, 0, 4 / 8]
    assert first[2] == 0 and all(
        abs(c - n * q) < 5 * math.sqrt(n * q * (1 - q)) + 1e-9
        for c, q in zip(first, p, strict=True)
    )
    for a, b in ((0, 1), (0, 3), (1, 3)):  # a first and then b, or b first and then a
        q = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert abs(pairs[a, b] - n * q) < 5 * math.sqrt(n * q * (1 - q))


@pytest.mark.parametrize(
    "kind, share", [("topmost", 0.5), ("soft-or", 0.0), ("soft-or", 1.5), ("random", math.nan)]
)
def test_invalid_selections_are_refused(kind, share):
    with pytest.raises(UserError, match=r"--select|--keep"):
        parse_selection(kind, share)


def chosen_by_reference(run, rollouts, kind, keep) -> dict:
    """Return the tokens that the formulas select, from full logits of one rollout at a time."""
    rows = []
    for r in rollouts:
        s, t = (
            m.net(torch.tensor([p + r.ids])).logits[0, len(p) - 1 : -1].double().log_softmax(-1)
            for m, p in ((run.pair.student, r.student_prompt), (run.pair.teacher, r.teacher_prompt))
        )
        rows.append(
            (-(s.exp() * s).sum(-1), (s.exp() * (s - t)).sum(-1), (t.exp() * (t - s)).sum(-1))
        )
    h, d = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    top = torch.quantile(h, 0.98)
    kept = {}
    for r, (entropy, divergence, forward) in zip(rollouts, rows, strict=True):
        hat = (entropy.clamp(max=top) - h.min()) / (top - h.min())
        delta = (divergence - d.min()) / (d.max() - d.min())
        score = {
            "soft-or": hat + delta - hat * delta,
            "bottom": -(hat + delta - hat * delta),
            "entropy": hat,
            "divergence": delta,
            "overconfident": forward * (1 - hat),
        }[kind]
        order = sorted(range(len(r.ids)), key=lambda t: (-round(score[t].item(), 9), t))
        kept[r.key] = tuple(sorted(order[: max(1, int(keep * len(r.ids)))]))
    return kept


def selected_gradient(run, micro):
    done = one_update(run, micro)
    reused = done.update.reused_forward_pass
    return done.gradient, done.sampled, done.rollouts, done.values, reused, done.ledger


@pytest.fixture(scope="module")
def even(pair, tmp_path_factory):
    """Write prompts of one length, so that all rollouts fit into one micro-batch."""
    import json

    file = tmp_path_factory.mktemp("even") / "q.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"{i}+{i}?", "answer": "1"}) + "\n" for i in range(10, 50))
    )
    return str(file)


@pytest.mark.parametrize("kind", ["soft-or", "overconfident", "entropy", "divergence", "bottom"])
def test_selection_matches_the_reference_with_one_or_two_forward_passes(pair, even, kind):
    run = prepared(pair, even, weights__select=kind, weights__keep=0.5, rollout__eos="teacher")
    # no rollout ends early
    sampler = dataclasses.replace(run.method.sampler, eos=frozenset({-1}))
    run = dataclasses.replace(run, method=dataclasses.replace(run.method, sampler=sampler))
    once, drawn, kept, values, reading, ledger = selected_gradient(run, 10)
    assert reading
    expected = chosen_by_reference(run, drawn, kind, 0.5)
    assert {key: r.taught for r in kept for key in [r.key]} == expected
    head = (run.pair.student_shape.output(1) + run.pair.teacher_shape.output(1)) * sum(
        len(r.ids) for r in drawn
    )
    assert ledger.useful["selection"] == head == ledger.executed["selection"]
    for micro in (1, 4):
        twice, _, again, _, none, more = selected_gradient(run, micro)
        assert not none and again == kept and more.useful["selection"] > 3 * head
        assert_same(twice, once)
    student, teacher = run.pair.student.net, run.pair.teacher.net
    student.zero_grad()
    losses = []
    for r in kept:
        s = (
            student(torch.tensor([r.student_prompt + r.ids]))
            .logits[0, len(r.student_prompt) - 1 : -1]
            .log_softmax(-1)
        )
        with torch.no_grad():
            t = (
                teacher(torch.tensor([r.teacher_prompt + r.ids]))
                .logits[0, len(r.teacher_prompt) - 1 : -1]
                .log_softmax(-1)
            )
        losses.append(F.kl_div(t, s, reduction="none", log_target=True).sum(-1)[list(r.taught)])
        torch.testing.assert_close(
            torch.tensor(values[r.key]), losses[-1].detach(), rtol=1e-4, atol=1e-6
        )
    torch.cat(losses).mean().backward()
    assert_same(once, {n: p.grad for n, p in student.named_parameters()}, 1e-4)


def test_keeping_all_equals_no_selection_and_selection_stays_inside_a_window(pair, questions):
    plain, rollouts, _ = update_gradient(prepared(pair, questions))
    run = prepared(pair, questions, weights__select="soft-or", weights__keep=1.0)
    whole, drawn, kept, *_ = selected_gradient(run, 4)
    assert drawn == rollouts and [r.taught for r in kept] == [r.taught for r in rollouts]
    assert_same(whole, plain)
    for window, inside in (
        ("last:4", lambda r: range(len(r.ids) - 4, len(r.ids))),
        ("highest-kl:4", None),
    ):
        run = prepared(
            pair, questions, weights__select="divergence", weights__window=window, weights__keep=0.5
        )
        _, drawn, kept, *_ = selected_gradient(run, 4)
        assert {len(r.taught) for r in kept} == {2}
        if inside:
            assert all(set(r.taught) <= set(inside(r)) for r in kept)
        else:  # the two largest of the four largest
            assert {key: r.taught for r in kept for key in [r.key]} == chosen_by_reference(
                run, drawn, "divergence", 2 / 12
            )


def test_quadrants_by_hand():
    found = quadrants([0, 0, 1, 1], [0.0, 3.0, 0.0, 1.0])
    assert found["borders"] == [0.5, 0.5]
    assert found["quadrants"] == {
        "high entropy, high divergence": {"tokens": 0.25, "divergence": 0.25},
        "high entropy, low divergence": {"tokens": 0.25, "divergence": 0},
        "low entropy, high divergence": {"tokens": 0.25, "divergence": 0.75},
        "low entropy, low divergence": {"tokens": 0.25, "divergence": 0},
    }
    moved = quadrants([0, 0, 1, 1], [0.0, 3.0, 0.0, 1.0], (2.0, 2.0))["quadrants"]
    assert (
        moved["low entropy, high divergence"]["tokens"] == 0.25
        and moved["high entropy, high divergence"]["tokens"] == 0
    )


def test_position_weights_by_hand():
    """Check the weights at u = (j − ½)/m.

    moderate: at u = τ = 0.3 the sigmoid is ½, so w = 0.25 + 0.75/2. The mean over a long rollout
    is 0.771.
    """
    moderate, mirrored = parse_position_weight("moderate"), parse_position_weight("decreasing")
    assert moderate.at(1, 5) == pytest.approx(0.25 + 0.75 / 2)
    assert moderate.at(0, 2) == pytest.approx(0.25 + 0.75 / (1 + math.exp(0.5)))
    assert moderate.at(0, 1) == pytest.approx(0.25 + 0.75 / (1 + math.exp(-2)))
    assert sum(moderate.at(t, 1000) for t in range(1000)) / 1000 == pytest.approx(0.771, abs=5e-4)
    for t in range(7):
        assert mirrored.at(t, 7) == pytest.approx(moderate.at(6 - t, 7))
    assert (
        parse_position_weight("sigmoid:0.25,0.3,0.1") == moderate
        and parse_position_weight("uniform") is None
    )
    assert (
        parse_position_weight("sigmoid:1,0.3,0.1").at(0, 9) == 1
        and parse_position_weight("sigmoid:0,1,1e-9").at(0, 9) == 0
    )
    for text in (
        "",
        "steep",
        "sigmoid:1,2",
        "sigmoid:2,0.3,0.1",
        "sigmoid:0,0.3,0",
        "sigmoid:nan,0,1",
        "uniform:1",
    ):
        with pytest.raises(UserError, match="--position-weight"):
            parse_position_weight(text)


@pytest.mark.parametrize("missed", ["no unit", "an empty window", "a window of no unit"])
def test_the_divisor_of_sequence_counts_rollouts_with_a_taught_token(missed):
    """Check weights and divisor by hand for three rollouts, one of which has no taught token."""
    rollouts = [rollout_of(i, (1, 2), (3,) * size) for i, size in enumerate((4, 5, 2))]
    rollouts[0] = rollouts[0].keep((1, 3))
    if missed == "an empty window":
        rollouts[1] = rollouts[1].keep(())
    else:
        rollouts[1] = dataclasses.replace(rollouts[1], units=())
    if missed == "a window of no unit":
        [rollouts[1]] = keep_window(Window(kind="last", size=2), rollouts[1:2], (0,))
    weights, share = token_weights(rollouts, "sequence")
    assert share == 2
    assert list(weights.values()) == [[0.5, 0.5], [], [0.5, 0.5]]
    _, share = token_weights(rollouts, "sum")
    assert share == 3  # the mean of sums, of which one is 0
    _, share = token_weights(rollouts[1:2], "sequence")
    assert share == 0  # of a rank; other ranks have taught tokens, or the run stops


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_position_weights_multiply_and_do_not_renormalise(pair, questions, reduction):
    run = prepared(
        pair,
        questions,
        weights__position="moderate",
        divergence__reduction=reduction,
        weights__window="last:5",
    )
    done = one_update(run)
    rollouts, fused = done.rollouts, done.gradient
    _, share = token_weights(rollouts, reduction, run.method.position)
    _, plain_share = token_weights(rollouts, reduction)
    assert share == plain_share == done.losses.divisor
    run.pair.student.net.zero_grad()
    losses = []
    for r in rollouts:
        s, t = (
            m.net(torch.tensor([p + r.ids])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for m, p in ((run.pair.student, r.student_prompt), (run.pair.teacher, r.teacher_prompt))
        )
        kl, m = F.kl_div(t, s, reduction="none", log_target=True).sum(-1), len(r.ids)
        u = (torch.arange(m) + 0.5) / m
        row = ((0.25 + 0.75 * torch.sigmoid((u - 0.3) / 0.1)) * kl)[-5:]
        losses.append(row)
    loss = {
        "token": torch.cat(losses).mean(),
        "sequence": torch.stack([x.mean() for x in losses]).mean(),
        "sum": torch.stack([x.sum() for x in losses]).mean(),
    }[reduction]
    loss.backward()
    assert_same(fused, {n: p.grad for n, p in run.pair.student.net.named_parameters()}, 1e-4)

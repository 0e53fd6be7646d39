"""The rehearsal of the first step finds failures before an evaluation, and changes nothing."""

import pytest
import torch
from helpers import prepared, rows, shortage, state_of, trained

from prefix_distill.engine import scoring
from prefix_distill.errors import MemoryShortage, Stopped
from prefix_distill.training import rehearsal, session
from prefix_distill.training.monitor import Monitor
from prefix_distill.training.update import Update


def test_a_run_is_bit_equal_with_and_without_it(pair, questions, tmp_path, monkeypatch):
    weights, ledgers = [], []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(session, "rehearse", lambda state: None)
        run = prepared(pair, questions, train__steps=2)
        result = trained(run, tmp_path / name)
        weights.append(run.pair.student.net.state_dict())
        ledgers.append(result["flops"])
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert ledgers[0] == ledgers[1]
    for key, weight in weights[0].items():
        assert torch.equal(weight, weights[1][key])


def test_it_runs_the_longest_prompts_at_the_first_prefix_and_drops_its_moments(
    pair, questions, monkeypatch
):
    run = prepared(pair, questions)
    state = state_of(run)
    random = torch.get_rng_state()
    lengths, moments = [], []
    compute = scoring.hidden_rows
    clear = rehearsal.step_optimizer

    def hidden_rows(model, sides):
        lengths.append((len(sides), max(len(s.prompt) + len(s.ids) for s in sides)))
        return compute(model, sides)

    def step(*arguments, **named):
        norm = clear(*arguments, **named)
        moments.append(len(state.optimizer.state))
        return norm

    monkeypatch.setattr(scoring, "hidden_rows", hidden_rows)
    monkeypatch.setattr(rehearsal, "step_optimizer", step)
    before = {name: p.clone() for name, p in run.pair.student.trainable.items()}
    seconds = dict(state.clock.seconds)
    rehearsal.rehearse(state)
    longest = max(len(r.student_ids) for r in run.problems.train)
    assert lengths[0] == (4, longest + 12)
    assert moments == [len(before)] and not state.optimizer.state
    for name, p in run.pair.student.trainable.items():
        assert p.grad is None and torch.equal(p, before[name])
    assert torch.equal(random, torch.get_rng_state())
    assert state.clock.seconds == seconds and not state.progress.ledger.executed


def test_out_of_memory_halves_the_micro_batch_before_the_first_evaluation(
    pair, questions, tmp_path, monkeypatch
):
    run = prepared(pair, questions, train__steps=1)
    start, seen = Monitor.start, []

    def noting(monitor):
        seen.append(run.limits.micro_batch_size)
        start(monitor)

    monkeypatch.setattr(Monitor, "start", noting)
    shortage(monkeypatch, "training", 2)
    trained(run, tmp_path / "run")
    assert seen == [2] and run.limits.lowered == {"micro_batch_size": 2}


def test_code_of_the_network_that_fails_in_backward_ends_in_one_line(pair, questions, monkeypatch):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            raise AssertionError("use model.train()")

    run = prepared(pair, questions)
    norm = run.pair.student.net.model.norm
    norm.register_forward_hook(lambda module, inputs, output: Failing.apply(output))
    with pytest.raises(Stopped, match=r"code failed \(use model.*nothing was"):
        rehearsal.rehearse(state_of(run))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_module_whose_code_fails_is_named(pair, questions, role):
    run = prepared(pair, questions)

    def fail(module, inputs, output):
        raise ValueError("too long")

    getattr(run.pair, role).net.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(Stopped, match=rf"code failed \({role}\.model\.layers\.1\.mlp: too long\)"):
        rehearsal.rehearse(state_of(run))


ADVICE = (
    r"AdamW's moments, which need .* [KMG]iB at any batch size; use --lora 16, or a smaller "
    "student, or move the teacher with --teacher-device"
)


def test_a_divergence_that_is_not_finite_is_named(pair, questions, monkeypatch):
    backward = Update.backward

    def disturbed(update, rollouts):
        losses = backward(update, rollouts)
        next(iter(losses.values.values()))[0] = float("nan")
        return losses

    monkeypatch.setattr(Update, "backward", disturbed)
    expected = "rehearsal of step 1: the divergence of .* is nan, but the logits of both models are"
    with pytest.raises(Stopped, match=expected):
        rehearsal.rehearse(state_of(prepared(pair, questions)))


def test_no_memory_for_one_rollout_or_for_the_moments_ends_in_one_line(
    pair, questions, monkeypatch
):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    state = state_of(prepared(pair, questions))
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "step_optimizer", no_room)
        with pytest.raises(MemoryShortage, match=ADVICE):
            rehearsal.rehearse(state)
    assert not state.optimizer.state
    shortage(monkeypatch, "training", 0)
    with pytest.raises(MemoryShortage, match="even with one rollout per pass"):
        rehearsal.rehearse(state)


@pytest.mark.parametrize("lora", [False, True])
def test_no_memory_for_the_moments_in_training_advises_what_helps(
    pair, questions, tmp_path, monkeypatch, lora
):
    """They are allocated again after the rehearsal, when evaluations have used memory."""

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    options, advice = {}, ADVICE
    if lora:
        pytest.importorskip("peft")
        options, advice = {"adapter__rank": 2}, "use a lower --lora or fewer --lora-targets, or a"
    run = prepared(pair, questions, train__steps=1, **options)
    monkeypatch.setattr(session, "step_optimizer", no_room)
    with pytest.raises(MemoryShortage, match=advice):
        trained(run, tmp_path / "run")
    assert (tmp_path / "run/checkpoints").is_dir()

"""Test the update, which padding and micro-batches must not change, and what a run writes."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Silent,
    assert_same,
    byte_tokenizer,
    prepared,
    save_tiny,
    state_of,
    update_gradient,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefix_distill import config as configuration
from prefix_distill.engine import scoring
from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.masters import Masters
from prefix_distill.engine.rollout import student_sides
from prefix_distill.engine.saving import save_model
from prefix_distill.errors import Stopped
from prefix_distill.training import metrics, tails
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.monitor import Monitor
from prefix_distill.training.session import Session
from prefix_distill.training.state import Progress
from prefix_distill.training.update import Update


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd:0.5"])
def test_the_gradient_is_the_naive_one_for_any_padding_and_micro_batch(
    pair, questions, reduction, divergence
):
    run = prepared(pair, questions, divergence__reduction=reduction, divergence__name=divergence)
    whole, rollouts, values = update_gradient(run, micro=10)
    for micro in (1, 3, 4):
        split, again, values_split = update_gradient(run, micro=micro)
        assert again == rollouts
        assert_same(split, whole)
        assert values_split.keys() == values.keys()
    # independent reference: each rollout alone, unpadded, both prompts in full, full logits,
    # autograd
    net, teacher = run.pair.student.net, run.pair.teacher.net
    net.zero_grad()
    losses = []
    for r in rollouts:
        s = (
            net(torch.tensor([r.student_prompt + r.ids]))
            .logits[0, len(r.student_prompt) - 1 : -1]
            .log_softmax(-1)
        )
        with torch.no_grad():
            t = (
                teacher(torch.tensor([r.teacher_prompt + r.ids]))
                .logits[0, len(r.teacher_prompt) - 1 : -1]
                .log_softmax(-1)
            )

        def kl(p, q):
            return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

        m = torch.log((s.exp() + t.exp()) / 2)
        per_token = kl(s, t) if divergence == "reverse-kl" else (kl(t, m) + kl(s, m)) / 2
        torch.testing.assert_close(per_token, torch.tensor(values[r.key]), rtol=1e-4, atol=1e-6)
        losses.append(per_token)
    loss = {
        "token": torch.cat(losses).mean(),
        "sequence": torch.stack([x.mean() for x in losses]).mean(),
        "sum": torch.stack([x.sum() for x in losses]).mean(),
    }[reduction]
    loss.backward()
    assert_same(whole, {name: p.grad for name, p in net.named_parameters()})


def test_prompts_of_different_length_on_both_sides(pair, questions, tmp_path):
    """Give the teacher another chat template: the same response follows its own prompt."""
    teacher = tmp_path / "teacher"
    save_tiny(teacher, seed=2, width=48, layers=3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "Q: {% for m in messages %}{{ m.content }}{% endfor %} A: "
    tokenizer.save_pretrained(teacher)
    run = prepared((pair[0], str(teacher)), questions)
    _, rollouts, values = update_gradient(run, micro=3)
    assert all(len(r.teacher_prompt) == len(r.student_prompt) + 5 for r in rollouts)
    r = rollouts[3]
    s, t = (
        m.net(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for m, prompt in (
            (run.pair.student, r.student_prompt),
            (run.pair.teacher, r.teacher_prompt),
        )
    )
    torch.testing.assert_close(
        (s.exp() * (s - t)).sum(-1).detach(),
        torch.tensor(values[r.key]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_forced_start_is_in_both_prompts_and_not_in_the_loss(pair, questions):
    run = prepared(pair, questions, rollout__begin="<think>")
    begin = tuple(run.pair.student.tokenizer("<think>", add_special_tokens=False).input_ids)
    assert len(begin) == 7
    _, rollouts, values = update_gradient(run)
    assert all(
        r.student_prompt[-7:] == begin == r.teacher_prompt[-7:] and len(r.ids) <= 12
        for r in rollouts
    )
    assert all(len(values[r.key]) == len(r.ids) for r in rollouts)


def test_a_student_equal_to_its_teacher_has_a_zero_gradient(pair, questions):
    run = prepared((pair[0], pair[0]), questions)
    gradient, _, values = update_gradient(run)
    assert max(abs(v) for row in values.values() for v in row) < 1e-6
    assert max(g.abs().max().item() for g in gradient.values()) < 1e-6


def test_dropout_is_off(tmp_path, questions, pair):
    folder = tmp_path / "student"
    save_tiny(folder, "gpt2", seed=4)
    config = json.loads((folder / "config.json").read_text()) | {
        "resid_pdrop": 0.5,
        "attn_pdrop": 0.5,
        "embd_pdrop": 0.5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    run = prepared((str(folder), pair[1]), questions)
    assert_same(update_gradient(run, micro=10)[0], update_gradient(run, micro=10)[0], 1e-7)


def test_padded_vocabularies_are_cut_to_the_real_ids(tmp_path, questions, pair):
    """Add 40 rows to the student's head.

    Rollouts and values are the same, and the padding rows get no gradient.
    """
    plain = prepared(pair, questions)
    wide = tmp_path / "wide"
    net = AutoModelForCausalLM.from_pretrained(pair[0])
    net.resize_token_embeddings(300, mean_resizing=False)
    net.save_pretrained(wide)
    byte_tokenizer().save_pretrained(wide)
    padded = prepared((str(wide), pair[1]), questions)
    assert any("padding rows of the output heads are cut" in note for note in padded.notes.lines)
    (want, rollouts, values), (got, same, padded_values) = (
        update_gradient(plain),
        update_gradient(padded),
    )
    assert same == rollouts
    for key in values:
        assert padded_values[key] == pytest.approx(values[key], abs=1e-6)
    head = got["lm_head.weight"]
    torch.testing.assert_close(head[:260], want["lm_head.weight"], rtol=1e-5, atol=1e-7)
    assert head[260:].abs().max() == 0


def test_the_eos_ids_are_those_of_the_chosen_model(pair, questions, tmp_path):
    teacher = tmp_path / "teacher"
    save_tiny(teacher, seed=2, eos="<a>")
    template = teacher / "chat_template.jinja"
    template.write_text(template.read_text().replace("<e>", "<a>"))  # turns end with its EOS token
    generation = GenerationConfig.from_pretrained(teacher)
    generation.eos_token_id = [259]
    generation.save_pretrained(teacher)
    for choice, ids in (("student", {257}), ("teacher", {259}), ("union", {257, 259})):
        run = prepared((pair[0], str(teacher)), questions, rollout__eos=choice)
        assert run.method.sampler.eos == ids
        assert any("(EOS) ids differ" in text for text in run.notes.warnings)


def test_gradient_checkpointing_saves_memory_and_changes_nothing_else(pair, questions, tmp_path):
    """Check that the gradient is the same and fewer bytes are kept for backward.

    Decoding uses the KV cache, and the saved config is the same.
    """
    found = {}
    for on in (False, True):
        run = prepared(pair, questions, train__gradient_checkpointing=on)
        gradient, rollouts, _ = update_gradient(run)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scoring.hidden_rows(run.pair.student, student_sides(rollouts[:1])).sum().backward()
        save_model(run.pair.student, tmp_path / str(on))
        decoding = make_decoder(run.pair.student, torch.float32)
        widths = []

        def measure(module, positional, named, widths=widths):
            widths.append(named["input_ids"].shape[1])

        decoding.net.register_forward_pre_hook(measure, with_kwargs=True)
        state = state_of(run)
        state.decoding = decoding
        drawn = Update(state, 0, prompts=run.problems.train[:2], prefix=8).sample()
        assert (run.pair.student.recomputes, set(widths)) == (on, {1}) and not any(
            m.training for m in run.pair.student.net.modules()
        )
        found[on] = gradient, sum(kept), (tmp_path / str(on) / "config.json").read_text(), drawn
    assert_same(found[True][0], found[False][0])
    assert found[True][1] < found[False][1] / 3
    assert found[True][2:] == found[False][2:]


def test_non_finite_numbers_stop_before_the_first_evaluation(pair, questions, tmp_path):
    run = prepared(pair, questions)
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    with torch.no_grad():
        run.pair.teacher.net.model.embed_tokens.weight[:] = float("nan")
    before = {n: p.detach().clone() for n, p in run.pair.student.net.named_parameters()}
    folder.write_json("run.json", {})
    with pytest.raises(
        Stopped,
        match=r"rehearsal of step 1: .* the teacher's weight model\.embed_tokens\.weight is not",
    ):
        Session(run, folder, Silent()).train()
    assert not folder.has_checkpoint
    for name, p in run.pair.student.net.named_parameters():
        assert torch.equal(p, before[name])


def test_a_run_writes_what_plain_transformers_loads(pair, questions, tmp_path):
    run = prepared(pair, questions, evaluate__every=2)
    folder = RunFolder(tmp_path / "run")
    folder.create(configuration.as_dict(run.config))
    folder.write_json("run.json", {})
    result = Session(run, folder, Silent()).train()
    net = AutoModelForCausalLM.from_pretrained(folder.model)
    for (name, p), q in zip(run.pair.student.net.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q), name
    original, saved = (
        GenerationConfig.from_pretrained(pair[0]),
        GenerationConfig.from_pretrained(folder.model),
    )
    assert saved.to_diff_dict() | {"transformers_version": 0} == original.to_diff_dict() | {
        "transformers_version": 0
    }
    assert (
        AutoTokenizer.from_pretrained(folder.model).chat_template == byte_tokenizer().chat_template
    )
    assert net.config.use_cache == AutoModelForCausalLM.from_pretrained(pair[0]).config.use_cache
    assert not list(folder.path.rglob("*.bin")) and not list(folder.path.rglob("*.pt"))
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all("/" in key for key in rows[0] if key != "step")
    assert result["tokens"] == sum(row["rollout/taught_tokens"] for row in rows)
    assert result["flops"]["useful"] == rows[-1]["flops/useful_total"]
    assert result["best"]["step"] in (0, 2, 4) and folder.best.is_dir()


def test_training_reduces_the_held_out_kl(pair, questions, tmp_path):
    """Check that the intervals of the reverse KL before and after 30 updates do not overlap."""
    run = prepared(
        pair,
        questions,
        train__steps=30,
        schedule__lr=3e-3,
        evaluate__kl_prompts=4,
        schedule__prefix="full",
    )
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    folder.write_json("run.json", {})
    result = Session(run, folder, Silent()).train()
    assert result["kl_after"]["high"] < result["kl_before"]["low"]


def test_bfloat16_samples_from_a_copy_and_keeps_float32_master_weights(pair, questions, tmp_path):
    """Do the same run in both dtypes.

    The decoding copy follows the master weights, and the held-out KL agrees within the resolution
    of bfloat16.
    """
    measured = {}
    for dtype in ("float32", "bfloat16"):
        run = prepared(pair, questions, runtime__dtype=dtype, schedule__lr=1e-3)
        assert (
            run.pair.teacher.net.dtype == getattr(torch, dtype)
            and run.pair.student.net.dtype == torch.float32
        )
        folder = RunFolder(tmp_path / dtype)
        folder.create({})
        folder.write_json("run.json", {})
        result = Session(run, folder, Silent()).train()
        measured[dtype] = [result["kl_before"]["value"], result["kl_after"]["value"]]
        gap = result["sampler_kl"]
        assert gap is None if dtype == "float32" else 0 < gap < 0.01 * result["kl_after"]["value"]
        masters = Masters(run.pair.student, run.place.dtype)
        with torch.no_grad():
            next(run.pair.student.net.parameters()).mul_(1.5)
        masters.refresh()
        for own, master in zip(
            masters.sampler.net.parameters(), run.pair.student.net.parameters(), strict=True
        ):
            assert (own is master) == (dtype == "float32") and torch.equal(
                own, master.to(own.dtype)
            )
    assert measured["bfloat16"] == pytest.approx(measured["float32"], rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_update_equals_cpu(pair, questions):
    """Compare the gradient of the same rollouts on both devices, to float32 matmul accuracy."""
    gradients, rollouts = [], None
    for device in ("cpu", "cuda:0"):
        run = prepared(pair, questions, runtime__device=device)
        state = state_of(run)
        if rollouts is None:
            rollouts = Update(state, 0).sample()
        Update(state, 0, prompts=[]).backward(rollouts)
        gradients.append({n: p.grad.cpu() for n, p in run.pair.student.net.named_parameters()})
    assert_same(gradients[1], gradients[0], 1e-3)


def test_full_rollout_cost_uses_the_measured_length(pair, questions):
    run = prepared(pair, questions)

    def measured(*points):
        return [{"step": step, "mean_tokens": length} for step, length in points]

    assert [metrics._length_at(measured((0, 10), (2, 30), (4, 20)), s) for s in range(5)] == [
        10,
        20,
        30,
        25,
        20,
    ]
    flat, longer = (Progress(step=4, evaluations=measured((0, n), (4, n))) for n in (12, 24))
    assert (
        1.2 < metrics.full_cost(run, longer, range(4)) / metrics.full_cost(run, flat, range(4)) < 2
    )


def test_tail_warning_needs_a_paired_rise():
    def found(rate, values):
        return {"step": 5, "finish_rate": rate, "answers": 200, "kl_by_token": values}

    before = found(0.9, [[1.0, 1.0, 0.1, 0.1 + i / 100] for i in range(8)])
    hurt = [[0.01, 0.01, 0.5, 0.5 + i / 100] for i in range(8)]
    text = tails.tail_warning(before, found(0.6, hurt), 2)
    assert "rose by 0.4" in text and "90% → 60%" in text and "nearly zero" in text
    assert tails.tail_warning(before, before, 2) is None
    # no token after the prefix
    assert tails.tail_warning(before, found(0.9, [[1.0, 1.0]] * 8), 2) is None
    # with different tokenizers, a prefix can have no unit of one token
    spans = found(0.9, [[None, None, 0.1, 0.1 + i / 100] for i in range(8)])
    hurt = [[None, None, 0.5, 0.5 + i / 100] for i in range(8)]
    text = tails.tail_warning(spans, found(0.9, hurt), 2)
    assert "rose by 0.4" in text and "nearly zero" not in text
    # a non-finite divergence is not a rise; the run itself reports it
    broken = found(0.9, [[math.nan] * 4] * 8)
    assert tails.tail_warning(before, broken, 2) is None


def test_a_student_whose_merit_is_nan_is_not_the_best(pair, questions, tmp_path):
    run = prepared(pair, questions, evaluate__every=1, evaluate__problems=0)
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    state = state_of(run, folder.path)
    monitor = Monitor(state)
    monitor.start()
    first = state.progress.best["merit"]
    for step, divergence in enumerate((math.nan, 2 - first), 1):
        monitor._keep_best(step, None, [[divergence]])
        assert state.progress.best["step"] == 0
    monitor._keep_best(3, None, [[-1 - first]])
    assert state.progress.best["step"] == 3


def test_a_stopped_update_saves_the_prefix_of_the_last_completed_one(
    pair, questions, tmp_path, monkeypatch
):
    """Stop the third update of a schedule of 2, 5, 8, … tokens by a NaN: the checkpoint has 5."""
    run = prepared(pair, questions, schedule__prefix="linear:2:3")
    backward = Update.backward

    def disturbed(update, rollouts):
        if update.step == 2:
            with torch.no_grad():
                run.pair.teacher.net.model.embed_tokens.weight[:] = float("nan")
        return backward(update, rollouts)

    monkeypatch.setattr(Update, "backward", disturbed)
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    folder.write_json("run.json", {})
    with pytest.raises(Stopped):
        Session(run, folder, Silent()).train()
    step, _, facts = folder.read_latest_checkpoint(print)
    assert (step, facts["taught_prefix"]) == (2, 5)


def test_learning_rate_schedules():
    from prefix_distill.maths.schedule import learning_rate

    def rates(name, warmup):
        return [
            learning_rate(k, peak=1.0, schedule=name, warmup=warmup, steps=10) for k in range(10)
        ]

    assert rates("constant", 0) == [1.0] * 10
    assert rates("linear", 2)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates("linear", 2)[
        9
    ] == pytest.approx(1 / 8)
    assert rates("cosine", 0)[5] == pytest.approx(0.5) and rates("cosine", 0)[9] == pytest.approx(
        (1 + math.cos(0.9 * math.pi)) / 2
    )

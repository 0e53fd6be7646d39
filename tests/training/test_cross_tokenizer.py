"""Test updates and runs of a laboratory pair with different tokenizers.

The student's tokenizer has merged tokens that the teacher's tokenizer does not have.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import assert_same, by_the_book, counted, invoke, last_json, one_update, state_of
from safetensors.torch import load_file

from prefix_distill import config as configuration
from prefix_distill.engine import scoring
from prefix_distill.engine.alignment import Alignment, SharedVocabulary, TokenBytes
from prefix_distill.engine.units import shared_support, units_of
from prefix_distill.maths import simct
from prefix_distill.maths.divergence import Head, Terms
from prefix_distill.prompts import stream
from prefix_distill.training import prepare as preflight
from prefix_distill.training.update import Update

KILLED = """
import os, signal, sys
import prefix_distill.{module} as module
from prefix_distill.cli.main import main
plain, calls = module.{name}, []
def counted(*arguments, **options):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **options)
module.{name} = counted
main()
"""
MODES = ["strict", "simct", "simct-released"]
SMALL = [
    "--student",
    "lab:choice/student-merged",
    "--teacher",
    "lab:choice/teacher",
    "--dataset",
    "lab:choice",
    "--batch-size",
    "3",
    "--samples",
    "2",
    "--micro-batch-size",
    "4",
    "--prefix",
    "24",
    "--problems",
    "6",
    "--kl-prompts",
    "4",
    "--check-samples",
    "0",
    "--lr",
    "4e-4",
    "--warmup",
    "0",
]


def prepared(student="student-merged", **changes):
    values = {
        "models.student": f"lab:choice/{student}",
        "models.teacher": "lab:choice/teacher",
        "data.dataset": "lab:choice",
        "train.batch_size": 3,
        "rollout.samples": 2,
        "train.micro_batch_size": 4,
        "schedule.prefix": "40",
        "evaluate.problems": 4,
        "evaluate.kl_prompts": 2,
        "runtime.device": "cpu",
    }
    return preflight.prepare(
        configuration.build(values | {k.replace("__", "."): v for k, v in changes.items()})
    )


def gradient(run, micro=4):
    """Return one update's gradient by parameter, its selected rollouts, values and divisor."""
    done = one_update(run, micro, prefix=40)
    return done.gradient, done.rollouts, done.values, done.losses.divisor


def rows(net, prompt, ids, head):
    """Return the logits that predict ``ids`` in plain transformers, cut to ``head`` columns."""
    return net(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :head]


@pytest.mark.parametrize(
    "mode, chosen",
    [
        *((mode, {}) for mode in MODES),
        (
            "simct",
            {"weights__select": "soft-or", "weights__keep": 0.4, "weights__position": "moderate"},
        ),
        ("strict", {"weights__window": "last:7"}),
    ],
)
def test_an_update_matches_the_formula_on_plain_logits(mode, chosen):
    """Compare the gradient with autograd through plain forward passes of one rollout at a time.

    This covers the hidden rows, the causal shift and the divisor, for several micro-batch sizes.
    """
    run = prepared(models__cross_tokenizer=mode, **chosen)
    got, rollouts, values, divisor = gradient(run)
    student, teacher = run.pair.student.net, run.pair.teacher.net
    assert any(not u.exact for r in rollouts for u in r.units)
    assert (mode == "strict") == all(u.exact for r in rollouts for u in r.taught_units)
    if not chosen:
        assert divisor == sum(len(r.ids) for r in rollouts)
    student.zero_grad()
    total = 0.0
    for r in rollouts:
        ours = rows(student, r.student_prompt, r.ids, 26)[list(r.student.rows)]
        with torch.no_grad():
            theirs = rows(teacher, r.teacher_prompt, r.teacher_ids, 18)[list(r.teacher.rows)]
        found = by_the_book(
            Terms(name="reverse-kl"),
            run.pair.alignment.shared_vocabulary,
            [r],
            ours,
            Head(weight_VD=torch.eye(26)),
            theirs,
            Head(weight_VD=torch.eye(18)),
            mode == "simct-released",
        )
        torch.testing.assert_close(
            torch.tensor(values[r.key]), found.detach(), rtol=1e-4, atol=1e-5
        )
        weight = [
            1.0 if run.method.position is None else run.method.position.at(t, len(r.ids))
            for t in r.taught
        ]
        total = total + (torch.tensor(weight) * found).sum() / divisor
    total.backward()
    assert_same(got, {n: p.grad for n, p in student.named_parameters()}, 1e-4)
    for micro in (1, 6):
        assert_same(gradient(run, micro)[0], got)


@pytest.mark.parametrize("window", ["all", "middle:4", "scattered:3"])
@pytest.mark.parametrize("mode", ["strict", "simct"])
def test_the_mean_over_rollouts_leaves_out_those_without_a_unit(mode, window):
    """Take all units away from two rollouts of six.

    ``sequence`` is then the mean over the other four: the gradient is the one of these alone.
    """
    run = prepared(
        models__cross_tokenizer=mode, divergence__reduction="sequence", weights__window=window
    )

    def without_units(rollouts):
        changed = []
        for r in rollouts:
            if r.key in [(0, 1), (2, 0)]:
                r = dataclasses.replace(r, units=())
            changed.append(r)
        return changed

    def only_with_units(rollouts):
        return [r for r in without_units(rollouts) if r.units]

    whole = one_update(run, prefix=40, change=without_units)
    assert [len(r.taught) for r in whole.rollouts].count(0) == 2
    assert whole.losses.divisor == 4
    others = one_update(run, prefix=40, change=only_with_units)
    assert len(others.rollouts) == others.losses.divisor == 4
    assert_same(whole.gradient, others.gradient)


def test_alignment_of_equal_tokenizers_matches_the_plain_path():
    """Compare every parameter's gradient, to 1e-6 of the largest entry.

    The rollouts are canonical and finished, and O holds all ids.
    """
    run = prepared("student", schedule__prefix="full", rollout__temperature=0.0)
    assert run.pair.alignment is None
    side = [TokenBytes(m.tokenizer, m.name) for m in (run.pair.student, run.pair.teacher)]
    state = state_of(run)
    drawn = Update(state, 0, prefix=192).sample()
    assert all(r.finished for r in drawn)
    others = tuple(i for i in range(18) if i != 1)
    alignment = Alignment(
        mode="simct", student=side[0], teacher=side[1], student_eos=(1,), teacher_eos=(1,)
    )
    alignment.__dict__["shared_vocabulary"] = SharedVocabulary(
        student=others, teacher=others, student_eos=(1,), teacher_eos=(1,)
    )
    aligned = dataclasses.replace(
        run.pair,
        alignment=alignment,
        shared_support=shared_support(alignment.shared_vocabulary, "simct", "cpu", "cpu"),
    )
    found = []
    for pair in (run.pair, aligned):
        rollouts = pair.align(drawn)
        if pair.alignment is not None:
            assert all(
                r.teacher_ids == r.ids and r.taught == tuple(range(len(r.ids))) for r in rollouts
            )
        state = state_of(dataclasses.replace(run, pair=pair))
        state.optimizer.zero_grad()
        Update(state, 0, prompts=[]).backward(rollouts)
        found.append({n: p.grad.clone() for n, p in run.pair.student.net.named_parameters()})
    for name, plain in found[0].items():
        assert (found[1][name] - plain).abs().max() <= 1e-6 * max(
            p.abs().max() for p in found[0].values()
        ), name


def test_each_model_gets_its_own_ids_of_the_same_text():
    run = prepared()
    _, rollouts, _, _ = gradient(run)
    for r in rollouts:
        shown = [
            m.tokenizer.decode(ids)
            for m, ids in (
                (run.pair.student, r.student_prompt),
                (run.pair.teacher, r.teacher_prompt),
            )
        ]
        assert shown[0] == shown[1]
        last = r.units[-1]
        texts = [
            m.tokenizer.decode(ids[:end], skip_special_tokens=True)
            for m, ids, end in (
                (run.pair.student, r.ids, last.start + last.size),
                (run.pair.teacher, r.teacher_ids, last.teacher_start + last.teacher_size),
            )
        ]
        assert texts[0] == texts[1] and texts[0]
    assert any(r.student_prompt != r.teacher_prompt for r in rollouts)
    # units beyond the teacher's last position are dropped
    positions = max(len(r.teacher_prompt) for r in rollouts) + 10
    short = Alignment(
        mode="simct",
        student=run.pair.alignment.student,
        teacher=run.pair.alignment.teacher,
        student_eos=(1,),
        teacher_eos=(1,),
        positions=positions,
    )
    for r in map(short.align_rollout, rollouts):
        assert len(r.teacher_prompt) + r.teacher.extent <= positions and r.units


@pytest.mark.parametrize("mode", ["strict", "simct"])
def test_the_ledger_matches_torchs_count(mode):
    """Count the executed FLOPs of both heads on units, forward and backward."""
    run = prepared(models__cross_tokenizer=mode)
    _, rollouts, _, _ = gradient(run)
    group = rollouts[:1]
    student, teacher = (m.head() for m in (run.pair.student, run.pair.teacher))
    hidden = torch.randn(len(group[0].student.rows), 64, requires_grad=True)
    there = torch.randn(len(group[0].teacher.rows), 96)
    of = units_of(group)

    def loss():
        simct.weighted(
            run.method.terms,
            run.pair.shared_support,
            of,
            hidden,
            student,
            there,
            teacher,
            torch.ones(len(of.token[0])),
        )[0].backward()

    ours = scoring.student_head_rows(run.pair, group)
    theirs = scoring.teacher_head_rows(run.pair, group)
    again = run.pair.student_shape.output(sum(u.size for u in group[0].taught_units if not u.exact))
    expected = (
        3 * run.pair.student_shape.output(ours) + again + run.pair.teacher_shape.output(theirs)
    )
    assert counted(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["sft", "divergence"])
def test_the_student_trains_on_the_teachers_text_in_its_own_tokens(loss):
    """Check which parts of the teacher's text are in the loss.

    sft: every token of the re-encoded text. divergence: its units, compared with the tokens that
    the teacher sampled.
    """
    run = prepared(rollout__off_policy=loss, models__cross_tokenizer="simct")
    written = run.pair.teacher.tokenizer("24:10 23:25 ####77", add_special_tokens=False).input_ids
    text = [*written, 1]
    prompts = stream.prompts_of_step(run.problems.train, 0, 3, 0)
    texts = {
        (p.prompt.index, s): {"ids": text, "finished": True} for p in prompts for s in range(2)
    }
    drawn = Update(state_of(run), 0, texts, prefix=40).sample()
    encoded = (
        *run.pair.student.tokenizer("24:10 23:25 ####77", add_special_tokens=False).input_ids,
        1,
    )
    for r in drawn:
        assert r.off_policy and r.ids == encoded and r.finished
        if loss == "sft":
            assert r.taught == tuple(range(len(encoded)))
        else:
            assert (
                r.teacher_ids == tuple(text)
                and sum(u.size for u in r.units) == len(r.ids)
                and any(not u.exact for u in r.taught_units)
            )
    short = Update(state_of(run), 0, texts, prefix=4).sample()
    assert all(r.ids == encoded[:4] and not r.finished for r in short)


def test_a_run_reports_the_alignment_and_resumes_bit_for_bit(tmp_path):
    """Kill a SimCT run with selection and EffOPD before the third of four updates, and resume it.

    Metric rows and evaluations report the alignment.
    """
    flags = [
        *SMALL,
        "--cross-tokenizer",
        "simct",
        "--lr-schedule",
        "constant",
        "--select",
        "soft-or",
        "--keep",
        "0.5",
        "--extrapolate",
        "effopd",
        "--extrapolate-score",
        "heldout-kl",
        "--extrapolate-problems",
        "4",
        "--steps",
        "4",
        "--save-every",
        "2",
    ]
    code, out, err = invoke("run", *flags, "--out", tmp_path / "whole")
    assert code == 0, err
    assert (
        "units of text are compared (--cross-tokenizer simct)" in err
        and "alignment of the student's answers: " in err
    )
    assert "probability is on shared tokens; the loss ignores the rest" in err
    whole = last_json(out)
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED.format(module="training.session", name="step_optimizer", at=3),
            "run",
            *flags,
            "--out",
            str(tmp_path / "parts"),
        ],
        capture_output=True,
    )
    assert killed.returncode == -9
    code, out, err = invoke("run", "--resume", "--out", tmp_path / "parts")
    assert code == 0 and last_json(out)["resumed_from"] == 2, err

    def read(name):
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]

    assert read("parts") == read("whole") and len(read("whole")) == 4
    for row in read("whole"):
        assert sum(
            row[f"alignment/{name}_share"] for name in ("exact", "span", "dropped")
        ) == pytest.approx(1)
        assert row["alignment/span_share"] > 0.02
    one, two = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [x["scores"] for x in last_json(out)["extrapolations"]] == [
        x["scores"] for x in whole["extrapolations"]
    ]
    found = whole["evaluations"][0]["alignment"]
    assert (
        0 < found["student_mass"] < 1 and 0.9 < found["teacher_mass"] <= 1 and found["kl_spans"] > 0
    )
    assert "alignment" in whole["seconds"]["by_phase"]


def test_rollouts_without_a_common_unit_stop_the_run(tmp_path):
    code, out, err = invoke(
        "run", *SMALL, "--prefix", "1", "--steps", "1", "--out", tmp_path / "run"
    )
    assert (
        code == 1
        and out == ""
        and "have no unit of text in common" in err
        and "lengthen --prefix" in err
    )


def test_a_probe_of_different_tokenizers(tmp_path):
    """Probe a pair in which each model continues the text of the other one."""
    code, out, err = invoke(
        "probe",
        "--student",
        "lab:choice/student-merged",
        "--teacher",
        "lab:choice/teacher",
        "--dataset",
        "lab:choice:4-8",
        "--problems",
        "16",
        "--out",
        tmp_path / "probe",
    )
    assert code == 0, err
    document = last_json(out)
    lifted, decayed = document["teacher_prefix_curve"], document["teacher_decay_curve"]
    assert (
        decayed[0]["value"] > 0.7 and max(row["value"] for row in lifted) > lifted[0]["value"] + 0.2
    )
    assert document["teacher_tokens"] < 150  # in the student's tokens

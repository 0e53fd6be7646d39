"""Test parity with TRL: one step on equal weights, prompts and completions gives TRL's loss and
gradient.

TRL 1.16 computes its loss in ``DistillationTrainer.compute_loss``, with left-padded prompts and
right-padded completions. It divides by the number of completion tokens in the step, as our
reduction ``token`` does. Its β has the same meaning as ours. The tests need
``pip install "torch==2.13.0" -e ".[bench]"``.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from helpers import DIVERGENCES, one_update, save_tiny

from prefix_distill import config as configuration
from prefix_distill.engine.alignment import SharedVocabulary
from prefix_distill.engine.rollout import Unit, rollout_of
from prefix_distill.engine.units import shared_support, units_of
from prefix_distill.maths import simct
from prefix_distill.maths.divergence import Head, Terms
from prefix_distill.training import prepare as preflight
from prefix_distill.training.metrics import update_facts

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]

PROMPTS, SAMPLES, CAP = 5, 2, 12


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def pair_of(request, tmp_path_factory):
    """Return the folders of a student and a larger teacher with one architecture."""
    root = tmp_path_factory.mktemp(request.param)
    return (
        save_tiny(root / "student", request.param, seed=1),
        save_tiny(root / "teacher", request.param, seed=2, width=48, layers=3),
    )


def ours(pair, questions, divergence):
    """Return (loss, gradient by parameter, rollouts) of one step of our training loop."""
    run = preflight.prepare(
        configuration.build(
            {
                "models.student": pair[0],
                "models.teacher": pair[1],
                "data.dataset": questions,
                "schedule.prefix": str(CAP),
                "rollout.max_new_tokens": CAP,
                "rollout.samples": SAMPLES,
                "train.batch_size": PROMPTS,
                "train.micro_batch_size": 4,
                "train.steps": 1,
                "evaluate.problems": 0,
                "evaluate.kl_prompts": 1,
                "runtime.dtype": "float32",
                "runtime.device": "cpu",
                "divergence.name": divergence,
                "divergence.reduction": "token",
            }
        )
    )

    def cut(sampled):
        rollouts = []
        for i, r in enumerate(sampled):
            ids = r.ids[: CAP - i]
            rollouts.append(dataclasses.replace(r, ids=ids, teacher_ids=ids))
        return rollouts

    done = one_update(run, change=cut)
    rollouts = done.rollouts
    assert (
        len({len(r.student_prompt) for r in rollouts}) > 1
        and len({len(r.ids) for r in rollouts}) > 5
    )
    loss = update_facts(done.update, done.losses).objective
    return loss, {name: p.grad for name, p in run.pair.student.net.named_parameters()}, rollouts


def theirs(pair, rollouts, beta, folder):
    """Return (loss, gradient by parameter) of the same step in TRL.

    TRL gets two micro-batches, padded as its trainer pads them.
    """
    import measure
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.utils import pad

    trainer = DistillationTrainer(
        model=pair[0],
        teacher_model=pair[1],
        train_dataset=Dataset.from_list([{"prompt": "?"}] * len(rollouts)),
        args=DistillationConfig(
            output_dir=str(folder),
            beta=beta,
            use_cpu=True,
            bf16=False,
            **measure.without_checkpointing(DistillationConfig),
            report_to="none",
        ),
    )
    trainer.model.train()
    tokens, loss = torch.tensor(sum(len(r.ids) for r in rollouts)), 0.0
    for half in (rollouts[::2], rollouts[1::2]):
        sides = {
            "prompt": ([r.student_prompt for r in half], "left"),
            "completion": ([r.ids for r in half], "right"),
        }
        inputs = {"num_items_in_batch": tokens}
        for name, (rows, side) in sides.items():
            rows = [torch.tensor(ids) for ids in rows]
            inputs[f"{name}_ids"] = pad(rows, padding_value=256, padding_side=side)
            inputs[f"{name}_mask"] = pad(
                [torch.ones_like(r) for r in rows], padding_value=0, padding_side=side
            )
        part = trainer.compute_loss(trainer.model, inputs)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient_equal_those_of_trl(pair_of, questions, tmp_path, divergence):
    loss, gradient, rollouts = ours(pair_of, questions, divergence)
    trl_loss, trl_gradient = theirs(pair_of, rollouts, DIVERGENCES[divergence], tmp_path)
    assert loss > 0.01 and loss == pytest.approx(trl_loss, rel=1e-5)
    assert gradient.keys() == trl_gradient.keys()
    for name, want in trl_gradient.items():
        assert (gradient[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_another_beta_gives_another_loss_and_gradient(pair_of, questions, tmp_path):
    """Check that the comparison above can fail: JSD with 1 − β gives another gradient."""
    loss, gradient, rollouts = ours(pair_of, questions, "jsd:0.3")
    trl_loss, trl_gradient = theirs(pair_of, rollouts, 0.7, tmp_path)
    assert abs(loss - trl_loss) > 1e-4 * trl_loss
    assert all(
        (gradient[name] - want).abs().max() > 1e-3 * want.abs().max()
        for name, want in trl_gradient.items()
    )


def uld(strategy: str, hybrid: bool = False):
    """Return GOLD's loss on "42" after one prompt token, as a function of both models' logits.

    Logits have shape [input tokens, vocabulary]. The student's response is "4", "2", EOS; the
    teacher's is "42", EOS.
    """
    import measure
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    vocabularies = {"+": 0, "</s>": 1, "4": 2, "2": 3, "x": 4}, {"+": 0, "</s>": 1, "42": 2}
    tokenizers = [SimpleNamespace(get_vocab=lambda v=v: v) for v in vocabularies]
    config = GOLDConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_uld_loss=True,
        uld_token_merge_strategy=strategy,
        uld_use_hybrid_loss=hybrid,
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        **measure.without_checkpointing(GOLDConfig),
    )
    loss = ULDLoss(config, *tokenizers, device=torch.device("cpu"))
    rows = [torch.tensor([ids]) for ids in ([0, 2, 3, 1], [0, 2, 1])]
    labels = [torch.cat([torch.full((1, 1), -100), row[:, 1:]], 1) for row in rows]
    offsets = (
        torch.tensor([[[0, 0], [0, 1], [1, 2], [2, 2]]]),
        torch.tensor([[[0, 0], [0, 2], [2, 2]]]),
    )
    return lambda student, teacher: loss(
        student[None], teacher[None], *labels, *rows, *offsets
    ).item()


def test_our_loss_and_golds_on_a_token_group_equal_values_by_hand():
    """Compare our loss and GOLD's with values computed by hand, on the case of test_simct.py.

    After the prompt, the student's probability of "4" is 1/2 and then of "2" 1/8. The teacher's
    probability of "42" is 1/2.

    Our scores on {"+", EOS, span} are (1/8, 1/8, sqrt(1/2 · 1/8) = 1/4) for the student and
    (1/4, 1/4, 1/2) for the teacher. Both normalize to (1/4, 1/4, 1/2), so the loss is 0.

    GOLD ("bayesian") merges the student's distributions to 1/2 · (1/8, 1/8, 1/8, 1/8, 1/2), sorts
    both distributions and takes the L1 distance:
    |1/4 − 1/2| + 2·|1/16 − 1/4| + 2·(1/16) = 3/4.
    """

    def log(*p):
        return torch.tensor(p).log()

    other = log(0.2, 0.2, 0.2, 0.2, 0.2)
    student = torch.stack(
        [
            log(1 / 8, 1 / 8, 1 / 2, 1 / 8, 1 / 8),
            log(1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2),
            other,
            other,
        ]
    )
    teacher = torch.stack(
        [log(1 / 4, 1 / 4, 1 / 2), log(1 / 3, 1 / 3, 1 / 3), log(1 / 3, 1 / 3, 1 / 3)]
    )
    assert uld("bayesian")(student, teacher) == pytest.approx(3 / 4, abs=1e-6)
    r = dataclasses.replace(
        rollout_of(0, (0,), (2, 3, 1), True),
        teacher_ids=(2, 1),
        units=(Unit(0, 2, 0, 1),),
        spans=True,
    )
    vocabulary = SharedVocabulary(student=(0,), teacher=(0,), student_eos=(1,), teacher_eos=(1,))
    shared = shared_support(vocabulary, "simct", "cpu", "cpu")
    _, values, _ = simct.weighted(
        Terms(name="reverse-kl"),
        shared,
        units_of([r]),
        student[:2],
        Head(weight_VD=torch.eye(5)),
        teacher[:1],
        Head(weight_VD=torch.eye(3)),
        torch.ones(1),
    )
    assert values.item() == pytest.approx(0, abs=1e-6)

    # GOLD's default strategy uses logits one position late, so the logits that predict the first
    # token have no effect.
    late, changed = uld("observed"), teacher.clone()
    changed[0] = log(0.98, 0.01, 0.01)
    assert late(student, teacher) == late(student, changed) and uld("bayesian")(
        student, teacher
    ) != uld("bayesian")(student, changed)

"""Test the divergence on units against the formula on full logits."""

import dataclasses
import math

import pytest
import torch
from helpers import by_the_book, head_logits

from prefix_distill.engine.alignment import SharedVocabulary
from prefix_distill.engine.rollout import Unit, rollout_of
from prefix_distill.engine.units import shared_support, units_of
from prefix_distill.maths import simct
from prefix_distill.maths.divergence import Head, Terms
from prefix_distill.maths.fused import weighted

D, E, V, W = 6, 5, 17, 23
SHARED = SharedVocabulary(
    student=(0, 2, 3, 5, 7, 11),
    teacher=(1, 4, 0, 9, 20, 8),
    student_eos=(15, 16),
    teacher_eos=(22,),
)


def rollout(units, slot=0, **changes):
    """Return a rollout of random tokens; ``units``: (student tokens, teacher tokens) in order."""
    generator = torch.Generator().manual_seed(slot)
    made, at, there = [], 0, 0
    for size, teacher_size in units:
        made.append(Unit(at, size, there, teacher_size))
        at, there = at + size, there + teacher_size
    ids = tuple(torch.randint(V, (at,), generator=generator).tolist())
    theirs = tuple(torch.randint(W, (there,), generator=generator).tolist())
    plain = dataclasses.replace(rollout_of(slot, (1,), ids), teacher_ids=theirs)
    return dataclasses.replace(plain, **{"units": tuple(made), "spans": True} | changes)


ROLLOUTS = [
    rollout([(1, 1), (3, 2), (1, 1), (1, 2), (1, 1)], 0),
    rollout([(2, 1), (1, 1)], 1),
    rollout([], 2),
    rollout([(1, 1)] * 3, 3),
    rollout([(2, 2), (4, 1), (1, 1)], 4),
]


def single(tensor, device="cpu"):
    """Return a float32 leaf with the same values."""
    return tensor.detach().float().to(device).requires_grad_(tensor.requires_grad)


def case(rollouts, softcap=None, scale=1.0, bias=False, seed=0):
    """Return (student rows, student head, teacher rows, teacher head) in float64."""
    torch.manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    n = sum(len(r.student.rows) for r in rollouts)
    m = sum(len(r.teacher.rows) for r in rollouts)
    heads = [
        Head(
            weight_VD=draw(size, width).requires_grad_(),
            bias_V=draw(size).requires_grad_() if bias else None,
            scale=scale,
            softcap=softcap,
        )
        for size, width in ((V, D), (W, E))
    ]
    return draw(n, D).requires_grad_(), heads[0], draw(m, E).requires_grad_(), heads[1]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("mode", ["strict", "simct", "simct-released"])
@pytest.mark.parametrize(
    "terms, shape",
    [
        (Terms(name="reverse-kl"), {}),
        (Terms(name="reverse-kl", memory_bytes=1), {"softcap": 3.0, "scale": 0.7, "bias": True}),
        (Terms(name="reverse-kl", temperature=1.7, memory_bytes=2500), {"softcap": 3.0}),
        (Terms(name="forward-kl"), {"bias": True}),
        (Terms(name="jsd", parameters=(0.3,), memory_bytes=2500), {}),
        (Terms(name="skew-kl", parameters=(0.3,), memory_bytes=2500), {"bias": True}),
        (Terms(name="my-kl"), {"softcap": 3.0}),
    ],
)
def test_values_and_gradients_are_those_of_the_formula(mode, terms, shape):
    """Compare the values and the gradients of hidden rows, head and bias with the formula.

    Some chunks hold one row, so that a unit is split between chunks.
    """
    rollouts = [dataclasses.replace(r, spans=mode != "strict") for r in ROLLOUTS]
    student_ND, student_head, teacher_ME, teacher_head = case(rollouts, **shape)
    of, raw = units_of(rollouts), mode == "simct-released"
    weight = torch.rand(sum(len(r.taught) for r in rollouts), dtype=torch.float64)
    expected = by_the_book(
        terms, SHARED, rollouts, student_ND, student_head, teacher_ME, teacher_head, raw
    )
    trained = [
        t for t in (student_ND, student_head.weight_VD, student_head.bias_V) if t is not None
    ]
    gradients = torch.autograd.grad((weight * expected).sum(), trained)
    ours = dataclasses.replace(
        student_head,
        weight_VD=single(student_head.weight_VD),
        bias_V=None if student_head.bias_V is None else single(student_head.bias_V),
    )
    theirs = dataclasses.replace(
        teacher_head,
        weight_VD=single(teacher_head.weight_VD),
        bias_V=None if teacher_head.bias_V is None else single(teacher_head.bias_V),
    )
    hidden, there = single(student_ND), single(teacher_ME)
    shared = shared_support(SHARED, mode, "cpu", "cpu")
    loss, values, _ = simct.weighted(terms, shared, of, hidden, ours, there, theirs, weight)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=2e-5, atol=2e-6)
    (3 * loss).backward()
    assert there.grad is None and theirs.weight_VD.grad is None
    for got, want in zip(
        [t for t in (hidden, ours.weight_VD, ours.bias_V) if t is not None], gradients, strict=True
    ):
        torch.testing.assert_close(got.grad.double(), 3 * want, rtol=2e-5, atol=3e-6)
    if terms.temperature == 1:
        facts = simct.statistics(terms, shared, of, hidden, ours, there, theirs, forward=True)
        torch.testing.assert_close(
            facts["divergence"].double(), expected.detach(), rtol=2e-5, atol=2e-6
        )
        forward = by_the_book(
            Terms(name="forward-kl"),
            SHARED,
            rollouts,
            student_ND,
            student_head,
            teacher_ME,
            teacher_head,
            raw,
        )
        torch.testing.assert_close(
            facts["forward_kl"].double(), forward.detach(), rtol=2e-5, atol=2e-6
        )


def test_statistics_are_scores_of_the_units_text_and_mass_on_the_shared_tokens():
    rollouts = ROLLOUTS
    student_ND, student_head, teacher_ME, teacher_head = (
        x.detach().float() if isinstance(x, torch.Tensor) else x.to(torch.float32)
        for x in case(rollouts, bias=False)
    )
    facts = simct.statistics(
        Terms(name="reverse-kl", memory_bytes=1500),
        shared_support(SHARED, "simct", "cpu", "cpu"),
        units_of(rollouts),
        student_ND,
        student_head,
        teacher_ME,
        teacher_head,
    )
    at, n = 0, 0
    for r in rollouts:
        for u in r.taught_units:
            logp = head_logits(student_head, student_ND[at : at + u.size]).log_softmax(-1)
            mean = sum(logp[i, r.ids[u.start + i]] for i in range(u.size)) / u.size
            assert facts["student_logp"][n].item() == pytest.approx(mean.item(), abs=1e-5)
            assert facts["student_mass"][n].item() == pytest.approx(
                logp[0, list(SHARED.student + SHARED.student_eos)].exp().sum().item(), abs=1e-6
            )
            at, n = at + u.size, n + 1


def test_a_span_worked_by_hand():
    """Compare the student's "4", "2" with the teacher's "42": one unit.

    The heads are identities, so hidden rows are logits. O holds "+" and EOS.

    Student: p("+") = p(EOS) = 1/8 and p("4") = 1/2 at the start of the span, then p("2") = 1/8.
    The score of the span is log sqrt(1/2 · 1/8) = log 1/4, so q_S ∝ (1/8, 1/8, 1/4), which is
    (1/4, 1/4, 1/2).

    Teacher: with p_T = (1/4, 1/4) on O and p_T("42") = 1/2, q_T = q_S and KL = 0. With
    p_T("42") = 1/4 and 1/4 elsewhere, q_T = (1/3, 1/3, 1/3) and KL = log 3 − (3/2) log 2.
    """

    def log(*p):
        return torch.tensor([p]).log()

    # columns: "+", EOS, "4", "2", any other token
    student = torch.cat(
        [log(1 / 8, 1 / 8, 1 / 2, 1 / 8, 1 / 8), log(1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2)]
    )
    r = dataclasses.replace(
        rollout_of(0, (1,), (2, 3), False), teacher_ids=(2,), units=(Unit(0, 2, 0, 1),), spans=True
    )
    vocabulary = SharedVocabulary(student=(0,), teacher=(0,), student_eos=(1,), teacher_eos=(1,))
    shared = shared_support(vocabulary, "simct", "cpu", "cpu")
    for teacher, expected in (
        (log(1 / 4, 1 / 4, 1 / 2), 0.0),
        (log(1 / 4, 1 / 4, 1 / 4, 1 / 4), math.log(3) - 1.5 * math.log(2)),
    ):
        head = Head(weight_VD=torch.eye(teacher.shape[1]))
        _, values, _ = simct.weighted(
            Terms(name="reverse-kl"),
            shared,
            units_of([r]),
            student,
            Head(weight_VD=torch.eye(5)),
            teacher,
            head,
            torch.ones(1),
        )
        assert values.item() == pytest.approx(expected, abs=1e-6)


def test_all_ids_shared_equals_the_plain_divergence():
    """Compare with the plain loss if every unit is one token and O holds all ids."""
    torch.manual_seed(0)
    rollouts = [rollout([(1, 1)] * 9)]
    same = SharedVocabulary(
        student=tuple(range(V - 1)),
        teacher=tuple(range(V - 1)),
        student_eos=(V - 1,),
        teacher_eos=(V - 1,),
    )
    head, teacher_head = (
        Head(weight_VD=torch.randn(V, D).requires_grad_()),
        Head(weight_VD=torch.randn(V, E)),
    )
    hidden, teacher_ME, weight = (
        torch.randn(9, D).requires_grad_(),
        torch.randn(9, E),
        torch.rand(9),
    )
    for name, parameters in (("reverse-kl", ()), ("forward-kl", ()), ("jsd", (0.4,))):
        results = []
        for made in (
            weighted(
                Terms(name=name, parameters=parameters),
                hidden,
                head,
                teacher_ME,
                teacher_head,
                weight,
            )[:2],
            simct.weighted(
                Terms(name=name, parameters=parameters),
                shared_support(same, "simct", "cpu", "cpu"),
                units_of(rollouts),
                hidden,
                head,
                teacher_ME,
                teacher_head,
                weight,
            )[:2],
        ):
            results.append((made[1], *torch.autograd.grad(made[0], (hidden, head.weight_VD))))
        for plain, units in zip(*results, strict=True):
            torch.testing.assert_close(units, plain, rtol=1e-5, atol=1e-6)


def test_bfloat16_heads_are_close_to_float32():
    rollouts = ROLLOUTS
    student_ND, student_head, teacher_ME, teacher_head = case(rollouts)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = single(student_ND), single(student_head.weight_VD)
        loss, _, _ = simct.weighted(
            Terms(name="reverse-kl", dtype=dtype),
            shared_support(SHARED, "simct", "cpu", "cpu"),
            units_of(rollouts),
            hidden,
            Head(weight_VD=weight),
            single(teacher_ME),
            Head(weight_VD=single(teacher_head.weight_VD)),
            torch.ones(sum(len(r.taught) for r in rollouts)),
        )
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for full, half in zip(*found, strict=True):
        assert (half - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("units", [False, True])
def test_the_gradient_of_the_head_is_added_in_place(units):
    """A head with a table adds its gradient there; autograd gets the rest and no table."""
    student_ND, student_head, teacher_ME, teacher_head = case(ROLLOUTS)
    count = len(student_ND)
    found = []
    for table in (None, torch.ones_like(single(student_head.weight_VD)).detach()):
        hidden, weight = single(student_ND), single(student_head.weight_VD)
        heads = {
            "student_head": Head(weight_VD=weight, gradient_VD=table),
            "teacher_head": Head(weight_VD=single(teacher_head.weight_VD)),
        }
        terms = Terms(name="reverse-kl", memory_bytes=2500)
        if units:
            loss, _, _ = simct.weighted(
                terms,
                shared_support(SHARED, "simct", "cpu", "cpu"),
                units_of(ROLLOUTS),
                hidden,
                teacher_ME=single(teacher_ME),
                weight_U=torch.ones(sum(len(r.taught) for r in ROLLOUTS)),
                **heads,
            )
        else:
            heads["teacher_head"] = Head(weight_VD=weight.detach())
            loss, _, _ = weighted(
                terms,
                hidden,
                teacher_NE=hidden.detach().roll(1, 0),
                weight_N=torch.ones(count),
                **heads,
            )
        loss.backward()
        gradient = weight.grad
        if table is not None:
            assert gradient is None
            gradient = table - 1
        found.append((hidden.grad, gradient))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["simct", "simct-released"])
def test_a_gpu_gives_what_the_cpu_gives(mode):
    student_ND, student_head, teacher_ME, teacher_head = case(ROLLOUTS)
    found = []
    for device in ("cpu", "cuda"):
        hidden, weight, there, other = (
            single(t, device)
            for t in (student_ND, student_head.weight_VD, teacher_ME, teacher_head.weight_VD)
        )
        shared = shared_support(SHARED, mode, device, device)
        loss, values, _ = simct.weighted(
            Terms(name="reverse-kl", memory_bytes=2500),
            shared,
            units_of(ROLLOUTS),
            hidden,
            Head(weight_VD=weight),
            there,
            Head(weight_VD=other),
            torch.ones(sum(len(r.taught) for r in ROLLOUTS)),
        )
        loss.backward()
        facts = simct.statistics(
            Terms(name="reverse-kl"),
            shared,
            units_of(ROLLOUTS),
            hidden,
            Head(weight_VD=weight),
            there,
            Head(weight_VD=other),
        )
        found.append([t.cpu() for t in (values, hidden.grad, weight.grad, *facts.values())])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


def test_rollouts_without_units_give_a_zero_loss():
    student_ND, student_head, teacher_ME, teacher_head = case([rollout([])])
    loss, values, _ = simct.weighted(
        Terms(name="reverse-kl"),
        shared_support(SHARED, "simct", "cpu", "cpu"),
        units_of([rollout([])]),
        student_ND.float(),
        student_head.to(torch.float32),
        teacher_ME.float(),
        teacher_head.to(torch.float32),
        torch.ones(0),
    )
    assert loss == 0 and len(values) == 0

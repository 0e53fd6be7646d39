"""Test the loss with both heads, in chunks, against a naive reference on full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import NAMES_AND_PARAMETERS

from prefix_distill.maths.divergence import Head, Terms, per_token
from prefix_distill.maths.fused import statistics, weighted


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
def test_identical_models_have_no_divergence_and_no_gradient(name, parameters):
    hidden = torch.randn(5, 8, requires_grad=True)
    head = Head(weight_VD=torch.randn(50, 8, requires_grad=True))
    loss, values, _ = weighted(
        Terms(name=name, parameters=parameters), hidden, head, hidden, head, torch.full((5,), 0.2)
    )
    loss.backward()
    assert values.abs().max() < 1e-6 and loss.abs() < 1e-6
    assert hidden.grad.abs().max() < 1e-6 and head.weight_VD.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
def test_never_negative_on_far_apart_models(name, parameters):
    torch.manual_seed(0)
    heads = [Head(weight_VD=torch.randn(1000, 16) * 4) for _ in range(2)]
    found = statistics(
        Terms(name=name, parameters=parameters),
        torch.randn(64, 16),
        heads[0],
        torch.randn(64, 16),
        heads[1],
        torch.zeros(64, dtype=torch.long),
    )
    assert found["divergence"].min() >= -1e-6


def naive(name, parameters, hidden, weight, bias, head, teacher_logits, token_weights, temperature):  # noqa: PLR0913  the operands of the formula
    """Return the loss and the values from full float32 logits and torch's ``kl_div``."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    s, t = (F.log_softmax(x / temperature, -1) for x in (logits, teacher_logits))

    def kl(p, q):
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if name == "reverse-kl":
        values = kl(s, t)
    elif name == "forward-kl":
        values = kl(t, s)
    else:
        (beta,) = parameters
        m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
        values = beta * kl(t, m) + (1 - beta) * kl(s, m)
    return (values * token_weights).sum(), values


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
@pytest.mark.parametrize(
    "scale, softcap, temperature, bias",
    [
        (1.0, None, 1.0, False),
        (1.0, 5.0, 1.0, False),
        (0.25, None, 2.0, True),
        (2.0, 3.0, 0.7, True),
    ],
)
def test_values_and_gradients_match_autograd(name, parameters, scale, softcap, temperature, bias):  # noqa: PLR0913  fixtures and parameters of one test
    torch.manual_seed(1)
    n, d, e, v = 37, 12, 20, 203
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    bias_v = torch.randn(v, requires_grad=True) if bias else None
    teacher_hidden, teacher_head = torch.randn(n, e), Head(weight_VD=torch.randn(v, e), scale=0.5)
    token_weight = torch.rand(n)
    head = Head(weight_VD=weight, bias_V=bias_v, scale=scale, softcap=softcap)
    tables = 3 + (name == "jsd") + (softcap is not None)
    # 10 rows per chunk: four chunks, the last one smaller
    terms = Terms(
        name=name, parameters=parameters, temperature=temperature, memory_bytes=4 * v * tables * 10
    )
    assert terms.rows_per_chunk(v, softcap is not None) == 10
    inputs = [hidden, weight] + ([bias_v] if bias else [])
    want, want_values = naive(
        name,
        parameters,
        hidden,
        weight,
        bias_v,
        head,
        teacher_hidden @ teacher_head.weight_VD.T * 0.5,
        token_weight,
        temperature,
    )
    want_grads = torch.autograd.grad(want * 3, inputs)
    loss, values, _ = weighted(terms, hidden, head, teacher_hidden, teacher_head, token_weight)
    grads = torch.autograd.grad(loss * 3, inputs)
    torch.testing.assert_close(values, want_values.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=2e-5 * expected.abs().max().item()
        )


def bucketed(logp, top):
    """Return [N, k + 1]: the probability of each token in ``top``, and of all other tokens."""
    mass = logp.exp()
    chosen = mass.gather(1, top)
    return torch.cat([chosen, mass.sum(-1, keepdim=True) - chosen.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
@pytest.mark.parametrize("k", [1, 7])
def test_top_k_is_the_divergence_of_the_buckets_with_its_exact_gradient(name, parameters, k):
    torch.manual_seed(5)
    n, d, v = 19, 6, 60
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    teacher, teacher_head = torch.randn(n, d), Head(weight_VD=torch.randn(v, d))
    token_weight = torch.rand(n)
    s = F.log_softmax((hidden @ weight.T).double(), -1)
    t = F.log_softmax((teacher @ teacher_head.weight_VD.T).double(), -1)
    top = t.topk(k, -1).indices
    student_mass, teacher_mass = bucketed(s, top), bucketed(t, top)
    want = per_token(
        Terms(name=name, parameters=parameters), student_mass.log(), teacher_mass.log()
    )
    want_grads = torch.autograd.grad((want * token_weight).sum(), [hidden, weight])
    terms = Terms(name=name, parameters=parameters, memory_bytes=4 * v * 5 * 4, top_k=k)
    loss, values, _ = weighted(
        terms, hidden, Head(weight_VD=weight), teacher, teacher_head, token_weight
    )
    torch.testing.assert_close(values.double(), want.detach(), rtol=1e-5, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(loss, [hidden, weight]), want_grads, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
    _, full, _ = weighted(
        Terms(name=name, parameters=parameters),
        hidden,
        Head(weight_VD=weight),
        teacher,
        teacher_head,
        token_weight,
    )
    assert (values <= full + 1e-6).all()  # merging tokens cannot raise the divergence
    found = statistics(
        terms,
        hidden,
        Head(weight_VD=weight),
        teacher,
        teacher_head,
        torch.zeros(n, dtype=torch.long),
    )
    torch.testing.assert_close(found["divergence"], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(name, parameters):
    torch.manual_seed(6)
    hidden, head = (
        torch.randn(4, 5, requires_grad=True),
        Head(weight_VD=torch.randn(11, 5, requires_grad=True)),
    )
    teacher, teacher_head = torch.randn(4, 5), Head(weight_VD=torch.randn(11, 5))
    for k in (11, 1000):
        results = []
        for terms in (
            Terms(name=name, parameters=parameters),
            Terms(name=name, parameters=parameters, top_k=k),
        ):
            loss, values, _ = weighted(terms, hidden, head, teacher, teacher_head, torch.ones(4))
            results.append((loss, values, *torch.autograd.grad(loss, [hidden, head.weight_VD])))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_frozen_head_gets_no_gradient_and_a_cut_head_only_inside_its_support():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    teacher = Head(weight_VD=torch.randn(12, 4)[:8])
    loss, *_ = weighted(
        Terms(name="reverse-kl"),
        hidden,
        Head(weight_VD=weight[:8]),
        torch.randn(6, 4),
        teacher,
        torch.ones(6),
    )
    loss.backward()
    assert weight.grad[:8].abs().min() > 0 and weight.grad[8:].abs().max() == 0
    frozen = Head(weight_VD=torch.randn(8, 4))
    loss, *_ = weighted(
        Terms(name="reverse-kl"), hidden, frozen, torch.randn(6, 4), teacher, torch.ones(6)
    )
    loss.backward()
    assert frozen.weight_VD.grad is None


def test_no_tensor_of_rows_times_vocabulary_is_kept_for_backward():
    """Check that the largest tensor kept for backward is the gradient of the head."""
    n, v, d = 512, 4000, 8
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    head = Head(weight_VD=weight)
    loss, *_ = weighted(
        Terms(name="reverse-kl", memory_bytes=8 * 4 * v * 16),
        hidden,
        head,
        torch.randn(n, d),
        head,
        torch.ones(n),
    )
    kept = [g.numel() for g in loss.grad_fn.grads if g is not None]
    assert max(kept) == v * d < n * v


def test_statistics_match_torchs_distributions():
    torch.manual_seed(3)
    student, teacher = torch.randn(9, 5), torch.randn(9, 5)
    heads = Head(weight_VD=torch.randn(30, 5)), Head(weight_VD=torch.randn(30, 5))
    token = torch.arange(9)
    found = statistics(
        Terms(name="reverse-kl", memory_bytes=8 * 4 * 30 * 2),
        student,
        heads[0],
        teacher,
        heads[1],
        token,
    )
    s, t = (
        torch.distributions.Categorical(logits=h @ head.weight_VD.T)
        for h, head in zip((student, teacher), heads, strict=True)
    )
    torch.testing.assert_close(found["entropy"], s.entropy())
    torch.testing.assert_close(found["student_logp"], s.log_prob(token))
    torch.testing.assert_close(found["teacher_logp"], t.log_prob(token))
    torch.testing.assert_close(found["divergence"], torch.distributions.kl_divergence(s, t))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name, parameters", NAMES_AND_PARAMETERS)
def test_gpu_equals_cpu(name, parameters):
    torch.manual_seed(4)
    made = [torch.randn(64, 32), torch.randn(5000, 32), torch.randn(64, 32), torch.randn(5000, 32)]
    grads = []
    for device in ("cpu", "cuda"):
        hidden, weight, teacher, teacher_weight = (x.to(device) for x in made)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        loss, *_ = weighted(
            Terms(name=name, parameters=parameters),
            hidden,
            Head(weight_VD=weight),
            teacher,
            Head(weight_VD=teacher_weight),
            torch.full((64,), 1 / 64, device=device),
        )
        loss.backward()
        grads.append((loss.item(), hidden.grad.cpu(), weight.grad.cpu()))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[0][2], grads[1][2], rtol=1e-4, atol=1e-6)


def exact_case(seed=0):
    """Return the vocabulary size, both heads, and one hidden row of each model."""
    torch.manual_seed(seed)
    vocabulary = 40
    student, teacher = (
        Head(weight_VD=torch.randn(vocabulary, 8), bias_V=torch.randn(vocabulary)),
        Head(weight_VD=torch.randn(vocabulary, 12), softcap=6.0),
    )
    return vocabulary, student, teacher, torch.randn(1, 8), torch.randn(1, 12)


@pytest.mark.parametrize("ratio", [False, True])
def test_the_sampled_gradient_equals_the_exact_one_in_expectation(ratio):
    """Check that Σ_v q(v) ∇loss(v) = ∇KL(S‖T) in a fixed context.

    q is S, or another distribution with the importance ratio.
    """
    vocabulary, student, teacher, hidden, theirs = exact_case()
    logp = F.log_softmax(student.logits(hidden.clone()), -1)[0]
    # with the ratio: sampled at temperature 0.6
    sampler = F.log_softmax(student.logits(hidden.clone()) / 0.6, -1)[0] if ratio else logp
    gradients, means = [], []
    for terms, rows, weight, more in (
        (Terms(name="reverse-kl"), 1, torch.ones(1), ()),
        (
            Terms(name="reverse-kl", sampled=True),
            vocabulary,
            sampler.exp(),
            (torch.arange(vocabulary), sampler if ratio else None),
        ),
    ):
        own = hidden.clone().requires_grad_(True)
        table, bias = (
            student.weight_VD.clone().requires_grad_(True),
            student.bias_V.clone().requires_grad_(True),
        )
        loss, values, _ = weighted(
            terms,
            own.expand(rows, -1),
            Head(weight_VD=table, bias_V=bias),
            theirs.expand(rows, -1),
            teacher,
            weight,
            *more,
        )
        loss.backward()
        gradients.append((own.grad, table.grad, bias.grad))
        means.append((weight * values).sum().item())
    if not ratio:
        assert means[1] == pytest.approx(means[0], abs=1e-5)  # the mean of the estimates is the KL
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_without_the_ratio_another_sampler_biases_the_gradient():
    vocabulary, student, teacher, hidden, theirs = exact_case()
    q = F.softmax(student.logits(hidden.clone()) / 0.6, -1)[0]
    found = []
    for terms, rows, weight in (
        (Terms(name="reverse-kl"), 1, torch.ones(1)),
        (Terms(name="reverse-kl", sampled=True), vocabulary, q),
    ):
        own = hidden.clone().requires_grad_(True)
        weighted(
            terms,
            own.expand(rows, -1),
            student,
            theirs.expand(rows, -1),
            teacher,
            weight,
            torch.arange(vocabulary),
        )[0].backward()
        found.append(own.grad)
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sampled_and_cross_entropy_against_autograd(softcap):
    """Compare with naive versions of the losses −ρ·A·log S(y) and −log S(y).

    Chunks hold all rows or one row.
    """
    torch.manual_seed(1)
    hidden, theirs = torch.randn(9, 8), torch.randn(9, 12)
    weight, teacher = torch.rand(9), Head(weight_VD=torch.randn(30, 12))
    table, token, drawn = torch.randn(30, 8), torch.randint(30, (9,)), -torch.rand(9) * 3
    for terms in (
        Terms(name="reverse-kl", sampled=True),
        Terms(name="cross-entropy"),
        Terms(name="reverse-kl", sampled=True, memory_bytes=1),
        Terms(name="cross-entropy", memory_bytes=1),
    ):
        sides = []
        for fused in (True, False):
            own, head = hidden.clone().requires_grad_(True), table.clone().requires_grad_(True)
            if fused:
                text = terms.name == "cross-entropy"
                loss, values, _ = weighted(
                    terms,
                    own,
                    Head(weight_VD=head, softcap=softcap),
                    None if text else theirs,
                    teacher,
                    weight,
                    token,
                    None if text else drawn,
                )
            else:
                logits = own @ head.T
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
                if terms.name == "cross-entropy":
                    values, loss = -logp, -(weight * logp).sum()
                else:
                    advantage = (
                        teacher.logits(theirs).log_softmax(-1).gather(1, token[:, None])[:, 0]
                        - logp
                    ).detach()
                    values, loss = (
                        -advantage,
                        -(weight * (logp.detach() - drawn).exp() * advantage * logp).sum(),
                    )
            loss.backward()
            sides.append((values.detach(), own.grad, head.grad))
        for one, other in zip(*sides, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_entry_wise_clip_by_hand():
    """Check T = (1/2, 1/4, 1/4), S = (1/4, 1/4, 1/2) and κ = 0.1.

    The first entry, ½ ln 2, is clipped to κ. The others are 0 and −¼ ln 2, so the value is
    negative. U holds the entries that are not clipped: the last two, with Q_U = 1/2.
    """
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    logits = student.log().requires_grad_()
    eye = Head(weight_VD=torch.eye(3))
    loss, values, clipped = weighted(
        Terms(name="forward-kl", clip=0.1), logits, eye, teacher.log(), eye, torch.ones(1)
    )
    loss.backward()
    assert values.item() == pytest.approx(0.1 - math.log(2) / 4) and values.item() < 0
    assert clipped.item() == pytest.approx(0.5)
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0.25 * 0.5, 0.25 * 0.5 - 0.25, 0.5 * 0.5 - 0.25]])
    )


@pytest.mark.parametrize("clip", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_clip_matches_autograd_of_the_clipped_sum(clip, temperature):
    torch.manual_seed(0)
    n, d, v = 7, 6, 50
    hidden, table, teacher, head = (
        torch.randn(n, d).requires_grad_(),
        torch.randn(v, d).requires_grad_(),
        torch.randn(n, 5),
        torch.randn(v, 5),
    )
    weight = torch.rand(n)
    terms = Terms(name="forward-kl", temperature=temperature, clip=clip, memory_bytes=3 * 4 * v * 4)
    loss, values, clipped = weighted(
        terms, hidden, Head(weight_VD=table), teacher, Head(weight_VD=head), weight
    )
    loss.backward()
    found = hidden.grad.clone(), table.grad.clone()
    hidden.grad = table.grad = None
    s, t = (
        (rows @ matrix.T / temperature).log_softmax(-1)
        for rows, matrix in ((hidden, table), (teacher, head))
    )
    entries = t.exp() * (t - s)
    expected = entries.clamp(max=clip).sum(-1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(clipped, (t.exp() * (entries > clip)).sum(-1).detach())
    torch.testing.assert_close(found, (hidden.grad, table.grad))
    if clip == 10:
        torch.testing.assert_close(values, (t.exp() * (t - s)).sum(-1).detach())

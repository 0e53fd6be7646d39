"""One prompt, two tokens, a vocabulary of three: loss, gradient and new weights, worked out by
hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from prefix_distill.config import build
from prefix_distill.engine.device import Clock
from prefix_distill.engine.models import Model
from prefix_distill.engine.ranks import Place
from prefix_distill.engine.rollout import Rollout
from prefix_distill.maths.divergence import Terms
from prefix_distill.maths.flops import Ledger, Shape
from prefix_distill.maths.weights import token_weights
from prefix_distill.training import metrics, update
from prefix_distill.training.state import Progress
from prefix_distill.training.update import StudentLoss


class Bigram(torch.nn.Module):
    """hidden = one-hot of the token read; logits = its column of the head: after token c, logit
    k is W[k, c]."""

    def __init__(self, columns):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(3), freeze=False)
        self.out = torch.nn.Linear(3, 3, bias=False)
        self.out.weight.data = torch.tensor(columns).T.contiguous()
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_decoder(self):
        return lambda input_ids, use_cache: SimpleNamespace(
            last_hidden_state=self.embedding(input_ids)
        )

    def get_output_embeddings(self):
        return self.out


def test_loss_gradient_and_new_weight_by_hand():
    # student uniform after every token; teacher after token 0: (1/2, 1/4, 1/4), after token 1:
    # (1/6, 4/6, 1/6)
    student = Model("s", Bigram([[0.0] * 3] * 3), None, None, frozenset())
    teacher = Model(
        "t",
        Bigram([[math.log(2), 0.0, 0.0], [0.0, math.log(4), 0.0], [9.0, -9.0, 3.0]]),
        None,
        None,
        frozenset(),
    )
    place = Place(torch.device("cpu"), torch.device("cpu"), torch.float32, torch.float32, 0, 1, ())
    run = SimpleNamespace(
        student=student,
        teacher=teacher,
        place=place,
        shared=None,
        alignment=None,
        terms=(terms := Terms("reverse-kl")),
        text_terms=terms,
        config=build({"schedule.lr": 0.1}),
        student_shape=Shape(0, 9, ()),
        teacher_shape=Shape(0, 9, ()),
        attempt=lambda ledger, work: work(ledger),
    )
    rollouts = [
        Rollout(0, 0, (0,), (0,), (1, 2), (1, 2), False)
    ]  # reads 0, 1; token 2 is predicted and never read
    weights, divisor = token_weights(rollouts, "token")
    assert divisor == 2

    values, _ = update.accumulate_gradients(
        run, StudentLoss(run), rollouts, weights, divisor, Ledger(), Clock(place.device)
    )

    # KL(uniform ‖ T) = ln 1/3 − mean ln T: (1/3) ln(32/27) after 0 and (1/3) ln 2 after 1
    first, second = math.log(32 / 27) / 3, math.log(2) / 3
    assert values[0, 0] == pytest.approx([first, second], abs=1e-6)

    # ∂/∂ logit k = S_k (ln S_k − ln T_k − KL) / divisor
    def gradient(t, kl):
        return [(math.log(1 / 3) - math.log(p) - kl) / 3 / 2 for p in t]

    by_hand = torch.tensor(
        [gradient((1 / 2, 1 / 4, 1 / 4), first), gradient((1 / 6, 4 / 6, 1 / 6), second), [0.0] * 3]
    ).T
    torch.testing.assert_close(student.net.out.weight.grad, by_hand, atol=1e-7, rtol=1e-6)
    assert teacher.net.out.weight.grad is None

    optimizer = update.make_optimizer(student.net.parameters(), run.config)
    facts = metrics.update_facts(run, rollouts, values, {}, weights, divisor, 0)
    assert facts["loss"] == pytest.approx(math.log(64 / 27) / 6, abs=1e-6)
    update.apply_update(run, None, optimizer, {}, Progress(), 0.1)
    # AdamW's first step: −lr · g / (|g| + ε); the gradient norm is below 1, so nothing is clipped
    expected = torch.tensor([[-0.1 * g / (abs(g) + 1e-8) for g in row] for row in by_hand.tolist()])
    torch.testing.assert_close(student.net.out.weight.detach(), expected, atol=1e-6, rtol=1e-5)

"""Test loss, gradient and new weights by hand: one prompt, two tokens, a vocabulary of three."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import bare_run, state_of

from prefix_distill.engine.models import Model
from prefix_distill.engine.pair import Pair
from prefix_distill.engine.rollout import rollout_of
from prefix_distill.maths.divergence import Terms
from prefix_distill.maths.flops import Shape
from prefix_distill.training.metrics import update_facts
from prefix_distill.training.optimizer import step_optimizer
from prefix_distill.training.update import Update


class Bigram(torch.nn.Module):
    """A bigram model: after token c, the logit of token k is W[k, c].

    The hidden row is the one-hot vector of the input token.
    """

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
    # the student is uniform after every token; the teacher is (1/2, 1/4, 1/4) after token 0 and
    # (1/6, 4/6, 1/6) after token 1
    student = Model(
        name="s",
        net=Bigram([[0.0] * 3] * 3),
        tokenizer=None,
        generation_config=None,
        eos=frozenset(),
    )
    teacher = Model(
        name="t",
        net=Bigram([[math.log(2), 0.0, 0.0], [0.0, math.log(4), 0.0], [9.0, -9.0, 3.0]]),
        tokenizer=None,
        generation_config=None,
        eos=frozenset(),
    )
    pair = Pair(
        student=student,
        teacher=teacher,
        student_shape=Shape(trunk=0, head=9, attention=()),
        teacher_shape=Shape(trunk=0, head=9, attention=()),
    )
    run = bare_run(pair, Terms(name="reverse-kl"), {"schedule.lr": 0.1})
    state = state_of(run)
    # the inputs are tokens 0 and 1; token 2 is only predicted
    rollouts = [rollout_of(0, (0,), (1, 2))]

    update = Update(state, 0, prompts=[])
    losses = update.backward(rollouts)
    assert losses.divisor == 2

    # KL(uniform ‖ T) = ln 1/3 − mean ln T: (1/3) ln(32/27) after 0 and (1/3) ln 2 after 1
    first, second = math.log(32 / 27) / 3, math.log(2) / 3
    assert losses.values[0, 0] == pytest.approx([first, second], abs=1e-6)

    # ∂/∂ logit k = S_k (ln S_k − ln T_k − KL) / divisor
    def gradient(t, kl):
        return [(math.log(1 / 3) - math.log(p) - kl) / 3 / 2 for p in t]

    by_hand = torch.tensor(
        [gradient((1 / 2, 1 / 4, 1 / 4), first), gradient((1 / 6, 4 / 6, 1 / 6), second), [0.0] * 3]
    ).T
    torch.testing.assert_close(student.net.out.weight.grad, by_hand, atol=1e-7, rtol=1e-6)
    assert teacher.net.out.weight.grad is None

    assert update_facts(update, losses).objective == pytest.approx(math.log(64 / 27) / 6, abs=1e-6)
    step_optimizer(state.optimizer, student.trainable, 0.1, run.config.train.grad_clip)
    # AdamW's first step: −lr · g / (|g| + ε); the gradient norm is below 1, so nothing is clipped
    expected = torch.tensor([[-0.1 * g / (abs(g) + 1e-8) for g in row] for row in by_hand.tolist()])
    torch.testing.assert_close(student.net.out.weight.detach(), expected, atol=1e-6, rtol=1e-5)

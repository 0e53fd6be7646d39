"""Test extrapolation: the points that the search scores and accepts, and exact weights."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import Silent, prepared, state_of, tiny_net
from hypothesis import given, strategies
from torch.nn import Linear, Parameter

from prefix_distill.engine.models import extrapolated_parameters
from prefix_distill.engine.sampling import GenerationCost
from prefix_distill.errors import UserError
from prefix_distill.maths.extrapolation import diagnose, due, effective_rank, extrapolate, snapshot
from prefix_distill.training.search import candidate_score


def line(weight: float, anchor: float):
    """Return a parameter with one element, and its anchor."""
    return {"w": Parameter(torch.tensor([weight]))}, {"w": torch.tensor([anchor])}


def search(weight: float, anchor: float, value, kind: str = "effopd", key: tuple = (0,)):
    """Search on a line with the score ``value(w)``.

    Return the result, the points that were scored, and the final point.
    """
    parameters, held = line(weight, anchor)
    points = []

    def score() -> float:
        points.append(parameters["w"].item())
        return value(points[-1])

    found = extrapolate(parameters, held, kind, score, key)
    assert torch.equal(held["w"], parameters["w"].detach()) and parameters["w"].requires_grad
    return found, points, parameters["w"].item()


def some(seed: int = 0) -> tuple[dict, dict]:
    """Return random parameters of several shapes, and an anchor close to them.

    The differences between them are rounded in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (7, 5), "vector": (11,), "experts": (3, 4, 2), "scalar": ()}

    def draw(scale):
        return {
            name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()
        }

    start, step = draw(1.0), draw(1e-3)
    return {name: Parameter(w) for name, w in start.items()}, {
        name: start[name] - step[name] for name in shapes
    }


def scores(*values: float):
    """Return a score function that returns ``values`` in turn and fails after the last one."""
    left = list(values)
    return lambda: left.pop(0)


def same_bits(one: dict, other: dict) -> bool:
    return all(
        torch.equal(one[name].detach().view(torch.int32), other[name].detach().view(torch.int32))
        for name in one
    )


# The search


def test_search_by_hand_accepts_two_candidates_and_rejects_the_third():
    found, points, end = search(1.0, 0.5, lambda w: -abs(w - 3.2))  # Δ = 0.5: candidates at 2, 3, 4
    assert points == [1.0, 2.0, 3.0, 4.0] and end == 3.0
    assert found.k == 2 and found.scores == pytest.approx([-2.2, -1.2, -0.2, -0.8])


def test_an_equal_score_is_not_accepted():
    # candidates at 3 and 5: equal scores
    found, points, end = search(1.0, 0.0, lambda w: -abs(w - 4.0))
    assert points == [1.0, 3.0, 5.0] and (found.k, end) == (1, 3.0)
    found, points, end = search(1.0, 0.0, lambda w: 7.0)
    assert points == [1.0, 3.0] and (found.k, found.scores, end) == (0, [7.0, 7.0], 1.0)


def test_at_most_five_candidates_in_equal_steps():
    found, points, end = search(1.0, 2.0, lambda w: -w)
    assert points == [1.0, -1.0, -3.0, -5.0, -7.0, -9.0] and (found.k, end, len(found.scores)) == (
        5,
        -9.0,
        6,
    )


def test_the_search_stops_at_the_first_rejected_candidate():
    found, points, end = search(1.0, 0.0, {1.0: 1, 3.0: 0, 5.0: 100}.get)
    assert points == [1.0, 3.0] and (found.k, end) == (0, 1.0)


@pytest.mark.parametrize(
    "values, k",
    [
        ((math.nan, 1.0), 0),
        ((1.0, math.nan), 0),
        ((1.0, 2.0, math.nan), 1),
        ((math.nan, math.nan), 0),
        ((-math.inf, 0.0, math.inf, math.inf), 2),
    ],
)
def test_nan_is_never_accepted(values, k):
    parameters, anchor = some()
    found = extrapolate(parameters, anchor, "effopd", scores(*values), ())
    assert found.k == k and len(found.scores) == len(values)


def test_the_anchor_moves_even_if_no_candidate_is_accepted():
    parameters, anchor = line(1.0, 0.0)
    tensor, points = anchor["w"], []

    def score() -> float:
        points.append(parameters["w"].item())
        return -points[-1]

    extrapolate(parameters, anchor, "effopd", score, (1,))
    assert anchor["w"] is tensor and tensor.item() == 1.0
    with torch.no_grad():
        parameters["w"] += 0.25  # as an optimizer step does
    extrapolate(parameters, anchor, "effopd", score, (2,))
    assert points == [1.0, 3.0, 1.25, 1.75] and tensor.item() == 1.25


# Exactness


@given(strategies.integers(0, 10**6), strategies.integers(0, 5))
def test_the_accepted_point_is_the_formula_bit_for_bit(seed, k):
    parameters, anchor = some(seed)
    start = snapshot(parameters)
    wanted = {
        name: start[name] + 2 * k * (start[name] - anchor[name]) if k else start[name]
        for name in start
    }
    found = extrapolate(
        parameters, anchor, "effopd", scores(*range(k + 1), *([0] if k < 5 else [])), ()
    )
    assert found.k == k and same_bits(parameters, wanted) and same_bits(anchor, wanted)


def test_every_candidate_is_computed_from_the_start():
    parameters, anchor = some(3)
    start, seen = snapshot(parameters), []

    def score() -> float:
        seen.append(snapshot(parameters))
        return float(len(seen))

    old = {name: a.clone() for name, a in anchor.items()}
    extrapolate(parameters, anchor, "effopd", score, ())
    assert len(seen) == 6 and same_bits(seen[0], start)
    for k in range(1, 6):
        assert same_bits(
            seen[k], {name: start[name] + 2 * k * (start[name] - old[name]) for name in start}
        ), k


@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_restored_when_the_score_fails(fails_at, error):
    parameters, anchor = some(5)
    # the sign of zero, subnormal numbers and infinities must also be restored
    parameters["vector"].data[:3] = torch.tensor([-0.0, 1e-42, math.inf])
    start, old, calls = snapshot(parameters), {name: a.clone() for name, a in anchor.items()}, []

    def score() -> float:
        calls.append(0)
        if len(calls) > fails_at:
            raise error("the score")
        return float(len(calls))

    with pytest.raises(error, match="the score"):
        extrapolate(parameters, anchor, "effopd", score, ())
    assert same_bits(parameters, start) and same_bits(anchor, old)


def test_snapshots_are_independent_float32_copies():
    parameters = {"a": Parameter(torch.randn(3, 4).T), "b": Parameter(torch.randn(3).bfloat16())}
    copies = snapshot(parameters)
    for name, p in parameters.items():
        copy = copies[name]
        assert (
            torch.equal(copy, p.detach().float())
            and copy.dtype == torch.float32
            and copy.device.type == "cpu"
        )
        assert (
            not copy.requires_grad
            and copy.untyped_storage().data_ptr() != p.untyped_storage().data_ptr()
        )


def test_other_dtypes_are_refused_before_anything_is_touched():
    parameters = {
        "a": Parameter(torch.ones(2)),
        "b": Parameter(torch.ones(2, dtype=torch.bfloat16)),
    }
    with pytest.raises(ValueError, match=r"b is torch\.bfloat16"):
        extrapolate(
            parameters, {name: torch.zeros(2) for name in parameters}, "always-1", scores(), ()
        )
    assert torch.equal(parameters["a"].detach(), torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_bits():
    parameters, anchor = some(7)
    here = {name: Parameter(p.detach().cuda()) for name, p in parameters.items()}
    held = snapshot({name: Parameter(a.cuda()) for name, a in anchor.items()})
    assert all(a.is_pinned() for a in held.values())
    for k in (3, 0, 5):
        values = [*range(k + 1), *([0] if k < 5 else [])]
        found = [
            extrapolate(*side, "effopd", scores(*values), ())
            for side in ((here, held), (parameters, anchor))
        ]
        assert found[0] == found[1] and found[0].k == k
        assert same_bits(snapshot(here), parameters) and same_bits(held, anchor)
        with torch.no_grad():
            for name in here:
                here[name].mul_(1.001)
                parameters[name].mul_(1.001)


# The controls


def test_always_1_takes_the_first_candidate_without_scoring():
    found, points, end = search(1.0, 0.5, None, "always-1")
    assert (found.k, found.scores, points, end) == (1, [], [], 2.0)


def test_random_accepts_each_with_probability_one_half():
    n = 4000
    counts = Counter()
    for key in range(n):
        found, points, end = search(1.0, 0.0, None, "random", (3, key))
        assert not points and not found.scores and end == 1 + 2 * found.k
        counts[found.k] += 1
    for k, chance in enumerate([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32]):
        assert abs(counts[k] - n * chance) < 4 * math.sqrt(n * chance * (1 - chance)), k


def test_random_depends_only_on_its_key():
    def draws(seed):
        return [search(1.0, 0.0, None, "random", (seed, t))[0].k for t in range(40)]

    assert draws(0) == draws(0) != draws(1)


# The steps with a search


def test_due_at_powers_of_two():
    assert [t for t in range(-4, 1100) if due(t)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


# The extrapolated parameters


ATTENTION = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
]
GATED = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]


def weights_and_biases(*layers):
    return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]


MOVED = {
    "llama": ("model.layers", ATTENTION + GATED),
    "qwen3": ("model.layers", ATTENTION + GATED),
    "gemma3": ("model.layers", ATTENTION + GATED),
    "neox": (
        "gpt_neox.layers",
        weights_and_biases(
            "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
        ),
    ),
    "gpt2": (
        "transformer.h",
        weights_and_biases("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
}


@pytest.mark.parametrize("kind", MOVED)
def test_only_linear_layers_of_the_decoder_are_extrapolated(kind):
    net = tiny_net(kind)
    everything, found = dict(net.named_parameters()), extrapolated_parameters(net, "attention-mlp")
    stem, layer = MOVED[kind]
    assert set(found) == {f"{stem}.{i}.{name}" for i in range(2) for name in layer}
    assert all(found[name] is everything[name] for name in found)
    assert list(found) == [name for name in everything if name in found]
    assert extrapolated_parameters(net, "all").keys() == everything.keys()


def test_fused_experts_are_extrapolated_and_their_router_is_not():
    from transformers import AutoModelForCausalLM, MixtralConfig

    net = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", *ATTENTION]
    assert set(extrapolated_parameters(net, "attention-mlp")) == {
        f"model.layers.0.{name}" for name in names
    }


class Whole(torch.nn.Module):
    """A model that is its own decoder and contains the head, tied to the embedding or not."""

    def __init__(self, tied: bool, inner: bool = True):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(6, 4), Linear(4, 6)
        if inner:
            self.inner = Linear(4, 4)
        if tied:
            self.head.weight = self.embed.weight

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_inside_the_decoder_is_not_extrapolated(tied):
    assert set(extrapolated_parameters(Whole(tied), "attention-mlp")) == {
        "inner.weight",
        "inner.bias",
    }


def test_no_parameter_to_extrapolate_is_an_error():
    with pytest.raises(UserError, match="--extrapolate"):
        extrapolated_parameters(Whole(False, inner=False), "attention-mlp")
    with pytest.raises(ValueError, match="norms"):
        extrapolated_parameters(Whole(False), "norms")


def test_a_search_improves_a_real_network():
    net = tiny_net("qwen3").requires_grad_(True)
    parameters = extrapolated_parameters(net, "attention-mlp")
    anchor, ids = snapshot(parameters), torch.arange(20)[None]
    rest = {
        name: p.detach().clone() for name, p in net.named_parameters() if name not in parameters
    }
    net(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for p in parameters.values():
            p -= 1e-3 * p.grad

    def score():
        return -net(ids, labels=ids).loss.item()

    found = extrapolate(parameters, anchor, "effopd", score, ())
    assert found.k > 0 and score() == found.scores[found.k] == max(found.scores)
    assert same_bits(anchor, parameters) and same_bits(rest, dict(net.named_parameters()))


# Diagnostics


def test_effective_rank_in_closed_form():
    torch.manual_seed(0)
    assert effective_rank(torch.eye(9)) == pytest.approx(9)
    assert effective_rank(1e-20 * torch.eye(3)) == pytest.approx(3)
    assert effective_rank(torch.randn(30, 1) @ torch.randn(1, 20)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 5)) == 0.0
    assert math.isnan(effective_rank(torch.full((2, 2), math.inf)))
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    p = [8 / 15, 4 / 15, 2 / 15, 1 / 15]  # from singular values 8, 4, 2, 1, not their squares
    entropy = -sum(x * math.log(x) for x in p)
    assert effective_rank(rotation @ torch.diag(torch.tensor([8.0, 4, 2, 1]))) == pytest.approx(
        math.exp(entropy), rel=1e-5
    )


def test_diagnostics_by_hand():
    delta = {
        "m": torch.eye(2) * 3,
        "v": torch.tensor([3.0, 4.0]),
        "z": torch.zeros(2, 2),
        "e": torch.ones(2, 2, 2),
    }
    final = {
        "m": torch.tensor([[1.0, 1], [1, 1]]),
        "v": torch.tensor([-3.0, -4.0]),
        "z": torch.ones(2, 2),
        "e": torch.zeros(2, 2, 2),
    }
    table = diagnose(delta, final)
    assert table["m"] == pytest.approx(
        {"norm": math.sqrt(18), "effective_rank": 2.0, "cosine": 6 / (math.sqrt(18) * 2)}
    )
    assert table["v"] == pytest.approx({"norm": 5.0, "effective_rank": None, "cosine": -1.0})
    assert table["z"] == {"norm": 0.0, "effective_rank": 0.0, "cosine": None}
    assert table["e"] == pytest.approx(
        {"norm": math.sqrt(8), "effective_rank": None, "cosine": None}
    )
    whole, other = (torch.cat([x.flatten() for x in side.values()]) for side in (delta, final))
    assert (
        table["all"]["norm"] == pytest.approx(whole.norm().item())
        and table["all"]["effective_rank"] is None
    )
    assert table["all"]["cosine"] == pytest.approx(
        torch.cosine_similarity(whole, other, dim=0).item()
    )
    assert diagnose({}, {}) == {"all": {"norm": 0.0, "effective_rank": None, "cosine": None}}


# In a run


def trained(pair, questions, folder, **changes):

    from prefix_distill.training.folder import RunFolder
    from prefix_distill.training.session import Session

    run = prepared(
        pair, questions, train__steps=1, schedule__warmup="0", schedule__lr=1e-2, **changes
    )
    first = {name: p.detach().clone() for name, p in run.pair.student.net.named_parameters()}
    files = RunFolder(folder)
    files.create({})
    files.write_json("run.json", {})
    result = Session(run, files, Silent()).train()
    return run, first, result, files.read_latest_checkpoint(lambda text: None)[1]


def test_a_run_reaches_w_plus_2k_delta_and_keeps_the_moments(pair, questions, tmp_path):
    """Check the weights after one step and an extrapolation with k = 1.

    Attention and MLP matrices are W + 2Δ, and all other weights are W. The optimizer's moments are
    those of a run without extrapolation.
    """
    plain, first, _, state = trained(pair, questions, tmp_path / "plain")
    run, _, result, further = trained(
        pair, questions, tmp_path / "further", extrapolation__kind="always-1"
    )
    names = set(extrapolated_parameters(run.pair.student.net, "attention-mlp"))
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"} < names
    assert not names & {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    }
    for name, p in plain.pair.student.net.named_parameters():
        got = further["student"][name]
        assert (
            torch.equal(got, p + 2 * (p - first[name])) if name in names else torch.equal(got, p)
        ), name
        assert (
            torch.equal(further["anchor"][name], got)
            if name in names
            else name not in further["anchor"]
        )
    assert state["optimizer"].keys() == further["optimizer"].keys()
    assert all(
        torch.equal(state["optimizer"][key], further["optimizer"][key])
        for key in state["optimizer"]
    )
    assert result["extrapolations"] == [{"step": 1, "k": 1, "scores": [], "flops": 0.0}]
    _, _, _, forgotten = trained(
        pair,
        questions,
        tmp_path / "all",
        extrapolation__kind="always-1",
        extrapolation__modules="all",
        extrapolation__reset=True,
    )
    for name, p in plain.pair.student.net.named_parameters():
        assert torch.equal(forgotten["student"][name], p + 2 * (p - first[name])), name
    assert not forgotten["optimizer"]


def test_scores_match_their_definitions_and_use_the_same_samples(pair, questions):
    """Compare each score with its definition.

    heldout-kl: full logits of new rollouts, one rollout at a time. accuracy: graded answers. Two
    calls use the same prompts and samples.
    """
    import torch.nn.functional as F

    from prefix_distill.engine import evaluate
    from prefix_distill.maths.seeds import seed_of

    run = prepared(
        pair,
        questions,
        extrapolation__kind="effopd",
        extrapolation__score="heldout-kl",
        extrapolation__problems=6,
    )
    state = state_of(run)
    meter = state.meter()
    scores = [candidate_score(state, meter) for _ in range(2)]
    assert scores[0] == scores[1] and set(meter.ledger.useful) == {"extrapolation"}
    assert (
        len(run.problems.extrapolation) == 6
        and run.problems.extrapolation[0] not in run.problems.train
    )
    sampler = replace(run.method.eval_sampler, seed=seed_of(0, "extrapolation"))
    kl = []
    how = replace(run.evaluation, sampler=sampler, max_new_tokens=12)
    cost = GenerationCost(meter=meter)
    for r in evaluate.fixed_rollouts(
        run.pair.student, run.problems.extrapolation, how, run.limits, cost
    ):
        s, t = (
            m.net(torch.tensor([p + r.ids])).logits[0, len(p) - 1 : -1].log_softmax(-1)
            for m, p in ((run.pair.student, r.student_prompt), (run.pair.teacher, r.teacher_prompt))
        )
        kl += F.kl_div(t, s, reduction="none", log_target=True).sum(-1).tolist()
    assert scores[0] == pytest.approx(-sum(kl) / len(kl), rel=1e-4)
    graded = prepared(
        ("lab:choice/teacher", "lab:choice/teacher"),
        "lab:choice",
        extrapolation__kind="effopd",
        extrapolation__problems=20,
        rollout__max_new_tokens=192,
    )
    state = state_of(graded)  # answers are sampled beyond the prefix
    assert candidate_score(state, state.meter()) >= 0.8


def test_prompts_without_answers_cannot_be_graded(pair, tmp_path):
    import json

    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(60)))
    with pytest.raises(UserError, match="--answer-column, or use --extrapolate-score heldout-kl"):
        prepared(pair, str(file), extrapolation__kind="effopd")

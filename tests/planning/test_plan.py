"""Test `prefix-distill plan` and the memory forecast against real tensors, the ledgers of real runs
and closed forms."""

import json
import weakref

import pytest
import torch
from helpers import invoke, last_json, make_case, tiny_config, tiny_net
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3TextConfig

from prefix_distill.config import Adapter
from prefix_distill.engine import scoring
from prefix_distill.engine.masters import Masters
from prefix_distill.engine.models import Model, with_checkpointing
from prefix_distill.engine.rollout import student_sides
from prefix_distill.errors import UserError
from prefix_distill.maths.divergence import Head
from prefix_distill.maths.fused import weighted
from prefix_distill.planning import forecast, ghosts, measuring
from prefix_distill.planning import plan as planning
from prefix_distill.planning.case import Network
from prefix_distill.planning.forecast import Forecaster
from prefix_distill.planning.gpus import SIZES
from prefix_distill.planning.measuring import MicroBatch


class Held(TorchDispatchMode):
    """Count the bytes of storages that are created inside this mode, as long as they are alive."""

    def __init__(self, known):
        super().__init__()
        self.sizes, self.now, self.peak = {t.untyped_storage()._cdata: 0 for t in known}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                isinstance(t, torch.Tensor)
                and (key := t.untyped_storage()._cdata) not in self.sizes
            ):
                self.sizes[key] = t.untyped_storage().nbytes()
                weakref.finalize(
                    t.untyped_storage(),
                    lambda key=key: setattr(self, "now", self.now - self.sizes.pop(key)),
                )
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize(
    "kind, recomputes, dtype",
    [
        ("qwen3", False, torch.float32),
        ("gemma3", False, torch.float32),
        ("llama", True, torch.float32),
        ("qwen3", False, torch.bfloat16),
        ("llama", True, torch.bfloat16),
    ],
)
def test_shape_only_tensors_need_the_bytes_of_real_tensors(kind, recomputes, dtype):
    """Compare a forward and a backward pass on shape-only tensors with the same on real tensors.

    The networks have shared prompts, grouped-query attention, sliding windows, a soft-cap and tied
    weights.
    """
    group = make_case().update()
    real = Model(
        name="m",
        net=tiny_net(kind, width=64).requires_grad_(True),
        tokenizer=None,
        generation_config=None,
        eos=frozenset(),
        shares_prompts=True,
    )
    real = with_checkpointing(real) if recomputes else real
    masters = Masters(real, dtype)
    known = [*real.net.parameters(), *real.net.buffers(), *masters.copies]
    teacher_NE, head = torch.zeros(24, 64), Head(weight_VD=torch.zeros(260, 64))
    for p in real.net.parameters():
        p.grad = torch.zeros_like(p)
    with Held(
        [*known, *(p.grad for p in real.net.parameters()), teacher_NE, head.weight_VD]
    ) as held:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            rows = scoring.hidden_rows(masters.student, student_sides(group))
        loss, _, _ = weighted(
            make_case().terms,
            rows,
            masters.head(),
            teacher_NE,
            head,
            torch.ones(24),
            scoring.tokens(group),
        )
        loss.backward()
    settings = Network(torch.float32, recomputes=recomputes)
    ghost = ghosts.sketch("m", tiny_config(kind, width=64), settings)
    ghost.net.requires_grad_(True)
    work = MicroBatch(
        rollouts=group,
        terms=make_case().terms,
        accumulates=True,
        autocast=dtype == torch.bfloat16,
    )
    network = Masters(ghost, dtype)
    found = measuring.measure_update(network, Head(weight_VD=ghosts.make_ghost((260, 64))), work)
    assert max(found.values()) == pytest.approx(held.peak, rel=0.01)


@pytest.mark.long
def test_an_adapter_and_checkpointing_need_less_memory():
    forecaster = Forecaster(
        tiny_config("llama", vocabulary=4000, width=256, layers=3),
        tiny_config("llama", vocabulary=4000, width=256, layers=3),
    )
    plain, recomputed, adapted, itself = (
        forecaster.forecast(make_case(prefix=40, limit=40, answers=0, compared=0, **more))
        for more in (
            {},
            {"recomputes": True},
            {"adapter": Adapter(rank=4)},
            {"adapter": Adapter(rank=4), "starts_as_student": True},
        )
    )
    assert (
        recomputed["phases"]["student_update"] < plain["phases"]["student_update"]
        and recomputed["weights"] == plain["weights"]
    )
    # layers · rank · (in + out) of q, o; k, v; gate, up, down
    pairs = 3 * 4 * ((256 + 256) * 2 + (256 + 128) * 2 + (256 + 512) * 3)
    assert adapted["weights"]["AdamW's moments"] == 8 * pairs and adapted["gradients"] == 4 * pairs
    assert "teacher" in adapted["weights"] and "teacher" not in itself["weights"]


@pytest.mark.long
def test_times_use_the_rates_of_a_run_and_every_card_is_listed(pair, questions, tmp_path):
    given = [
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        "linear:2:1",
        "--max-new-tokens",
        8,
        "--steps",
        3,
        "--batch-size",
        4,
        "--problems",
        2,
        "--kl-prompts",
        2,
        "--tail-every",
        0,
        "--dtype",
        "float32",
    ]
    code, out, err = invoke("run", *given, "--out", tmp_path / "run")
    assert code == 0, err
    code, out, err = invoke("plan", *given, "--prefixes", "full", "--from-run", tmp_path / "run")
    assert code == 0, err
    document = last_json(out)
    row, full = document["prefixes"]
    assert row["tokens"] == [2, 4] and full["tokens"] == [8, 8]
    rates = document["rate"]["flops_per_second"]
    assert (
        full["seconds"]
        == pytest.approx(sum(f["useful"] / rates[p] for p, f in full["flops"].items()))
        and full["seconds"] > row["seconds"] > 0
    )
    assert [card["card"] for card in document["cards"]] == [card.name for card in SIZES]
    flags = ["--generation-rows", "64", "--micro-batch-size", "16"]
    assert all(card["fits"] and card["flags"] == flags for card in document["cards"])
    assert "GiB" in err and "16 GB" in err


@pytest.mark.parametrize(
    "given, words",
    [
        (["--student", "/nowhere", "--teacher", "/nowhere"], "no such folder"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["--prompt-tokens", "9" * 18], f"--prompt-tokens {'9' * 18}: expected at least 1 token"),
        (["--prompt-tokens", "600"], "expected at most 511, because model lab:choice/student has"),
        (["--device-tflops", "nan"], "--device-tflops nan"),
        (["--device-tflops", "1", "--measure"], "keep one"),
        (["--from-run", "/nowhere"], "--from-run /nowhere"),
        (["--prefixes", "9x"], "--prefix 9x: expected"),
    ],
)
def test_invalid_input_is_reported_in_one_line(given, words):
    code, out, err = invoke("plan", *given)
    assert code == 2 and out == "" and words in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--eval-dataset", "{questions}"],
        ["--prompt-template", "Question number one of many: {{prompt}} Answer:"],
        ["--few-shot", "2"],
        ["--dataset", "{questions}:1,{long}:3"],
    ],
    ids=["one set", "eval set", "template", "few-shot", "mixture"],
)
def test_flops_equal_those_of_a_dry_run(pair, questions, tmp_path, more):
    """Check that a plan and a run use the same prompts."""
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(
            json.dumps({"question": "what is " * (i % 7) + f"{i}+1?", "answer": str(i + 1)}) + "\n"
            for i in range(60)
        )
    )
    given = ["--student", pair[0], "--teacher", pair[1], "--dataset", questions]
    given += ["--prefix", 4, "--max-new-tokens", 8, "--steps", 1, "--dtype", "float32"]
    given += [word.format(questions=questions, long=long) for word in more]
    code, out, err = invoke("run", *given, "--dry-run")
    assert code == 0, err
    priced = last_json(out)["flops_per_update"]
    code, out, err = invoke("plan", *given, "--prefixes", "full")
    assert code == 0, err
    for row, name in zip(last_json(out)["prefixes"], ("prefix", "full"), strict=True):
        assert row["flops_total"] == pytest.approx(priced[name], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"recomputes": True},
        {"adapter": Adapter(rank=4)},
        {"micro_batch": 1, "prefix": 60, "limit": 60},
    ],
)
def test_two_depths_predict_the_memory_of_all_layers(more, monkeypatch):
    """Compare a linear extrapolation from two small depths with a trace of all 12 layers."""
    gemma = Gemma3TextConfig(
        **tiny_config("gemma3", vocabulary=600).to_dict()
        | {"num_hidden_layers": 12, "layer_types": None, "sliding_window_pattern": 2}
    )
    configs = [tiny_config("qwen3", vocabulary=600, width=64, layers=12), gemma]
    settled = make_case(**{"prefix": 24, "limit": 40, "answers": 4, "rows": 8} | more)
    short = Forecaster(*configs).forecast(settled)
    assert all(len(ghosts.choose_depths(c)) == 2 for c in configs)
    monkeypatch.setattr(forecast, "choose_depths", lambda config: (12,))
    whole = Forecaster(*configs).forecast(settled)
    assert short["weights"] == whole["weights"]
    for phase, size in whole["phases"].items():
        assert short["phases"][phase] == pytest.approx(size, rel=0.02), phase


@pytest.mark.long
def test_a_pair_of_1_5_and_7_billion_parameters_by_hand(tmp_path, monkeypatch):
    """Plan with Qwen2.5's shapes, from two config.json files without weights.

    Weights, moments, the working copy and the KV cache of 64 answers of 2,048 tokens are compared
    with closed forms.
    """
    small = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }
    large = small | {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    }
    for name, config in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    code, out, err = invoke(
        "plan",
        "--student",
        tmp_path / "small",
        "--teacher",
        tmp_path / "large",
        "--prompt-tokens",
        200,
        "--prefix",
        256,
        "--prefixes",
        256,
        "--max-new-tokens",
        2048,
        "--micro-batch-size",
        4,
        "--kl-prompts",
        1,
        "--device-tflops",
        100,
    )
    assert code == 0, err
    document = last_json(out)

    def layer(d, f, kv):
        return d * d + d + 2 * (d * kv + kv) + d * d + 3 * d * f + 2 * d

    parameters = [
        28 * layer(1536, 8960, 256) + 151_936 * 1536 + 1536,
        28 * layer(3584, 18_944, 512) + 2 * 152_064 * 3584 + 3584,
    ]
    assert [document[role]["parameters"] for role in ("student", "teacher")] == parameters
    [row] = document["prefixes"]
    memory = row["memory"]
    assert (
        memory["weights"]["AdamW's moments"] == 8 * parameters[0]
        and memory["gradients"] == 4 * parameters[0]
    )
    assert memory["weights"]["student"] == pytest.approx(4 * parameters[0], rel=1e-4)
    assert memory["weights"]["working copy"] == pytest.approx(2 * parameters[0], rel=1e-4)
    assert memory["weights"]["teacher"] == pytest.approx(2 * parameters[1], rel=1e-4)
    # answers · tokens · layers · (K, V) · width · bytes
    cache = 64 * (200 + 2048) * 28 * 2 * 256 * 2
    logits = 64 * 151_936 * 4
    assert cache + 2 * logits < memory["phases"]["evaluation"] < cache + 6 * logits + cache / 28
    per_token = 2 * (28 * (layer(1536, 8960, 256) - 2 * 1536 - 1536 - 512) + 151_936 * 1536)
    decode = row["flops"]["student_decode"]["useful"]
    assert decode / (100 * 32 * 255) == pytest.approx(per_token, rel=0.05)  # the rest is attention
    assert row["seconds"] == pytest.approx(row["flops_total"] / 100e12)
    assert [c["card"] for c in document["cards"] if c["fits"]][-1] == "80 GB"
    assert not document["cards"][0]["fits"]


def test_a_data_set_needs_tokenizers(questions, tmp_path):
    for name in ("a", "b"):
        tiny_config("llama").save_pretrained(tmp_path / name)
    code, out, err = invoke(
        "plan", "--student", tmp_path / "a", "--teacher", tmp_path / "b", "--dataset", questions
    )
    assert (
        code == 2
        and out == ""
        and "its tokenizer cannot be read" in err.splitlines()[-1]
        and "--prompt-tokens" in err
    )


@pytest.mark.parametrize(
    "kind, more",
    [("llama", {}), ("gpt2", {"prefix": 100, "limit": 150, "rows": 64, "answers": 64})],
)
def test_the_bound_for_small_models_is_above_the_forecast(kind, more):
    """Check the bound that a run uses for small models instead of a forecast.

    For these models, it is above the forecast by a factor of less than 100.
    """
    settled, config = make_case(**more), tiny_config(kind, vocabulary=900, width=48)
    found = Forecaster(config, config).forecast(settled)["total"]
    model = ghosts.sketch("m", config, Network(torch.float32))
    assert found < forecast.bound_memory(model, model, settled) < 100 * found


@pytest.mark.parametrize("free, verdict", [(1 << 20, "does not fit"), (1 << 40, "fits")])
def test_the_free_memory_of_this_machine_is_compared(monkeypatch, free, verdict):
    monkeypatch.setattr(planning, "read_free_memory", lambda device: free)
    code, out, err = invoke("plan", "--device", "cpu", "--steps", 2)
    assert code == 0, err
    notes = [note for note in last_json(out)["notes"] if note.startswith("this machine has")]
    assert len(notes) == 1 and notes[0].endswith(verdict) and "free on cpu" in notes[0]
    machine = last_json(out)["machine"]
    assert machine == {"device": "cpu", "free_bytes": free, "fits": free > 1 << 30, "flags": None}


def test_the_next_command_of_a_plan_that_does_not_fit_here_is_one_that_does(monkeypatch):
    monkeypatch.setattr(planning, "read_free_memory", lambda device: 5 << 20)
    small = ("--device", "cpu", "--steps", 2, "--prefix", 24, "--prefixes", "full", "--card", 8)
    code, out, err = invoke("plan", *small)
    assert code == 0, err
    machine = last_json(out)["machine"]
    assert not machine["fits"] and "--generation-rows" in machine["flags"]
    words = [str(word) for word in small[:-4]]
    code, out, err = invoke("plan", *words, "--prefixes", "full", *machine["flags"])
    assert code == 0 and last_json(out)["machine"]["fits"], err
    code, _, err = invoke("plan", *words, "--prefixes", "full")
    assert code == 0 and "it does with the flags of the next command" in " ".join(err.split())
    command = " ".join(err.partition("  next ")[2].replace("\\", "").split())
    assert command.startswith("prefix-distill check --prefix 24 ")
    assert command.endswith(" ".join(machine["flags"]))


def test_a_plan_for_another_machine_is_not_compared(monkeypatch):
    monkeypatch.setattr(planning, "choose_device", missing_device)
    code, out, err = invoke("plan", "--device", "cuda", "--steps", 2)
    assert code == 0, err
    assert not any(note.startswith("this machine has") for note in last_json(out)["notes"])


def missing_device(*_, **__):
    raise UserError("device 'cuda': not available here")


def test_a_plan_without_a_dataset_names_none():
    code, _, err = invoke("plan", "--prompt-tokens", "50", "--prefixes", "full")
    assert code == 0 and "prompts: 50 tokens each" in err and "no --dataset" not in err
    code, _, err = invoke(
        "plan",
        *("--student", "lab:choice/student", "--teacher", "lab:choice/teacher"),
        *("--prefixes", "full"),
    )
    assert code == 0 and "256 tokens each (assumed" in err and "no --dataset" not in err

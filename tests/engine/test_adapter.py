"""Test LoRA adapters: training, gradient, saved files, resume and cost.

Also test quantized models, and a teacher that is split between memory and disk.
"""

import json
import shutil

import pytest
import torch
from helpers import (
    SELF,
    Silent,
    assert_same,
    invoke,
    last_json,
    prepared,
    save_tiny,
    state_of,
    trained,
    update_gradient,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_distill import config as configuration
from prefix_distill.engine import loading, scoring
from prefix_distill.engine.batching import reads
from prefix_distill.engine.decoder import make_decoder
from prefix_distill.engine.masters import Masters
from prefix_distill.engine.models import adapter
from prefix_distill.engine.rollout import student_sides, teacher_sides
from prefix_distill.engine.sampling import Request, generate
from prefix_distill.engine.shapes import read_shape
from prefix_distill.errors import UserError
from prefix_distill.maths.flops import Ledger, Passes
from prefix_distill.training.folder import RunFolder
from prefix_distill.training.loss import make_loss
from prefix_distill.training.session import Session
from prefix_distill.training.update import Update

IDS = torch.arange(3, 40)[None]


def logits(net):
    with torch.no_grad():
        return net(IDS).logits


def stir(net, seed=5):
    """Set every adapter weight to a random number, as if it had been trained."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, p in net.named_parameters():
            if ".lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(
    "changes", [{}, {"train__gradient_checkpointing": True}, {"models__cross_tokenizer": "off"}]
)
def test_the_adapters_gradient_follows_from_the_full_gradient(pair, questions, changes):
    """Check that dL/dA = s·Bᵀ G and dL/dB = s·G Aᵀ.

    G is the gradient of the merged weight, from a run that trains all weights.
    """
    run = prepared(pair, questions, adapter__rank=4, adapter__alpha=6, **changes)
    assert set(run.pair.student.trainable) == {
        name for name, _ in run.pair.student.net.named_parameters() if ".lora_" in name
    }
    stir(run.pair.student.net)
    full = prepared(pair, questions)
    full.pair.student.net.load_state_dict(adapter.merge_weights(run.pair.student.net))
    ours, rollouts, _ = update_gradient(run, micro=3)
    theirs, again, _ = update_gradient(full, micro=10)
    assert [r.ids for r in rollouts] == [r.ids for r in again]
    expected, s = {}, 6 / 4
    for name in ours:
        layer, which = name.split(".lora_")
        a, b = (run.pair.student.trainable[f"{layer}.lora_{x}.default.weight"] for x in "AB")
        gradient = theirs[f"{layer}.weight"]
        expected[name] = (
            s * b.T @ gradient if which.startswith("A") else s * gradient @ a.T
        ).detach()
    assert_same(ours, expected, 1e-4)


def test_only_the_adapter_trains_and_peft_loads_its_files(pair, questions, tmp_path):
    """Check that a run changes every adapter matrix and no base weight.

    Plain peft, plain transformers, our loader and the merged folder give the same logits.
    """
    settings = {"adapter__rank": 4, "schedule__lr": 1e-2, "evaluate__every": 2}
    run = prepared(pair, questions, **settings, adapter__merge=True)
    first = {name: p.detach().clone() for name, p in run.pair.student.net.named_parameters()}
    initial = logits(run.pair.student.net)
    assert torch.equal(initial, logits(AutoModelForCausalLM.from_pretrained(pair[0])))  # B is zero
    trained(run, tmp_path / "run")
    for name, p in run.pair.student.net.named_parameters():
        assert torch.equal(p, first[name]) != (".lora_" in name), name
    expected = logits(run.pair.student.net)
    assert (expected - initial).abs().max() > 0.1
    base = AutoModelForCausalLM.from_pretrained(pair[0])
    for net in (
        PeftModel.from_pretrained(base, tmp_path / "run/adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run/model"),
        loading.load_model(
            str(tmp_path / "run/adapter"), device=torch.device("cpu"), dtype=torch.float32
        ).net,
    ):
        torch.testing.assert_close(logits(net), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/adapter").chat_template
    # the best student is saved during the run, as an adapter only
    saved = load_file(tmp_path / "run/best/adapter_model.safetensors")
    assert (
        len(saved) == len(run.pair.student.trainable)
        and not (tmp_path / "run/best/model.safetensors").exists()
    )
    plain = tmp_path / "plain"
    run = prepared(pair, questions, **settings)
    trained(run, plain)
    RunFolder(plain).write_config(configuration.as_dict(run.config))
    assert (
        load_file(plain / "model/adapter_model.safetensors").keys() == saved.keys()
        and not (plain / "adapter").exists()
    )
    for name, one in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items():
        assert torch.equal(one, load_file(plain / "model/adapter_model.safetensors")[name])
    # export merges the adapter into the base weights, from the model folder or a checkpoint
    for which, out in (("model", "a"), ("4", "b")):
        code, _, err = invoke("export", plain, "--which", which, "--out", tmp_path / out)
        assert code == 0, err
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / out)),
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
    card = (plain / "model/README.md").read_text()
    assert "library_name: peft" in card and "`--lora` | `4`" in card and "--lora 4" in card
    code, out, err = invoke(
        "eval",
        "--model",
        plain / "model",
        "--dataset",
        questions,
        "--problems",
        4,
        "--max-new-tokens",
        8,
        "--out",
        tmp_path / "e.jsonl",
    )
    assert code == 0 and last_json(out)["accuracy"]["n"] == 4, err


@pytest.mark.parametrize("changes", [{}, {"weights__select": "soft-or"}])
def test_four_updates_equal_two_and_two_resumed(pair, questions, tmp_path, changes):
    """Check that a run resumed from an adapter-only checkpoint writes the same bytes."""

    def run_in(name, resume=False):
        run = prepared(
            pair, questions, adapter__rank=2, schedule__lr=1e-2, checkpoint__save_every=2, **changes
        )
        files = RunFolder(tmp_path / name)
        if not resume:
            files.create({})
            files.write_json("run.json", {})
        return Session(run, files, Silent(), resume).train()

    whole = run_in("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "half/model")
    again = run_in("half", resume=True)
    assert (
        again["resumed_from"] == 2
        and again["kl_after"] == whole["kl_after"]
        and again["extrapolations"] == whole["extrapolations"]
    )
    names = [
        "model/adapter_model.safetensors",
        *[f"checkpoints/step-00000004/{f}.safetensors" for f in ("student", "optimizer")],
    ]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "half" / name
        ).read_bytes(), name
    # A and B of 7 linear layers in each of 2 blocks
    assert len(load_file(tmp_path / "whole" / names[1])) == 2 * 14


def test_a_self_teacher_is_the_network_without_the_adapter(pair, questions, tmp_path):
    """Check that ``--teacher self`` uses the student's network with the adapter off.

    There is no second copy of the weights, and the teacher does not change during training.
    """
    run = prepared(
        (pair[0], "self"),
        questions,
        adapter__rank=4,
        schedule__lr=1e-2,
        divergence__name="forward-kl",
        **SELF,
    )
    copy = prepared((pair[0], "self"), questions, divergence__name="forward-kl", **SELF)
    assert run.pair.teacher.net is run.pair.student.net and run.pair.teacher.adapter_off

    def rows(model):
        return scoring.hidden_rows(model, teacher_sides(made))

    _, made, values = update_gradient(run)
    _, _, same = update_gradient(copy)
    for key in values:
        torch.testing.assert_close(
            torch.tensor(values[key]), torch.tensor(same[key]), rtol=1e-4, atol=1e-6
        )
    run.pair.student.net.zero_grad()
    trained(run, tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(rows(run.pair.teacher), rows(copy.pair.teacher)) and not torch.equal(
            rows(run.pair.student), rows(run.pair.teacher)
        )
    assert (
        all(p.requires_grad for p in run.pair.student.trainable.values())
        and len(run.pair.student.trainable) == 28
    )
    assert (
        run.pair.teacher_shape == read_shape(copy.pair.student)
        and run.pair.student_shape.trunk > run.pair.teacher_shape.trunk
    )


def test_training_flops_match_torchs_count(pair, questions):
    """Compare the ledger of a training step with torch's count.

    The ledger also counts the input gradient of q, k and v in the first layer. Torch does not
    compute it, because the embedding is frozen; the test subtracts it.
    """
    run = prepared(pair, questions, adapter__rank=4)
    # torch does not count the CPU's fused attention
    run.pair.student.net.set_attn_implementation("eager")
    rollouts = Update(state_of(run), 0, prompts=run.problems.train[:3]).sample()[:4]
    ledger, loss = Ledger(), make_loss(run, Masters(run.pair.student, torch.float32))
    with torch.no_grad():
        teacher_NE = scoring.hidden_rows(run.pair.teacher, teacher_sides(rollouts))
    weight_N = torch.ones(sum(len(r.ids) for r in rollouts))
    with FlopCounterMode(display=False) as counter:
        loss(rollouts, teacher_NE, weight_N)[0].backward()
    read = reads(student_sides(rollouts), run.pair.student.encodes_prompt_once)
    ledger.forward("update", run.pair.student_shape, read, passes=Passes(count=3))
    net = run.pair.student.net.config
    width, kv = net.hidden_size, net.num_key_value_heads * net.head_dim
    from prefix_distill.maths.flops import linear_tokens

    unneeded = 2 * (width * width + 2 * width * kv) * linear_tokens(read)[1]
    real = counter.get_total_flops() - run.pair.teacher_shape.output(len(weight_N))
    assert ledger.executed["update"] - unneeded == pytest.approx(real, rel=0.02)
    full = Ledger()
    full.forward(
        "update", read_shape(prepared(pair, questions).pair.student), read, passes=Passes(count=3)
    )
    assert ledger.useful["update"] < 0.85 * full.useful["update"]


def test_the_base_is_held_in_the_compute_dtype(pair, questions, tmp_path):
    run = prepared(pair, questions, adapter__rank=2, runtime__dtype="bfloat16", schedule__lr=1e-2)
    dtypes = {(".lora_" in name): p.dtype for name, p in run.pair.student.net.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = {name: p.detach().clone() for name, p in run.pair.student.trainable.items()}
    result = trained(run, tmp_path / "run")
    assert result["steps"] == 4 and all(
        not torch.equal(p, before[name]) for name, p in run.pair.student.trainable.items()
    )


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--lora-alpha", "8"], 2, "applies only with --lora; add --lora 16, or omit --lora"),
        (["--lora-merge"], 2, "applies only with --lora; add --lora 16"),
        (["--lora", "0"], 2, "at least 1"),
        (["--lora", "4", "--lora-targets", "nowhere"], 2, "--lora-targets nowhere: no matrix of"),
        (
            [
                "--lora",
                "4",
                "--teacher",
                "self",
                "--privileged-column",
                "solution",
                "--teacher-ema",
                "0.9",
            ],
            2,
            "its weights never change",
        ),
        (["--student-quantize", "nf4"], 2, "cannot be trained; add --lora 16"),
        (["--student-quantize", "nf4", "--lora", "4", "--lora-merge"], 2, "omit --lora-merge"),
        (
            [
                "--teacher",
                "self",
                "--privileged-column",
                "solution",
                "--teacher-ema",
                "0.9",
                "--teacher-quantize",
                "nf4",
            ],
            2,
            "the moving average needs float32 weights",
        ),
        (
            ["--teacher-memory", "2"],
            2,
            "applies only with --teacher-device auto; add it, or omit --teacher-memory",
        ),
        (["--teacher-device", "auto", "--teacher-quantize", "int8"], 2, "with --teacher-quantize"),
    ],
)
def test_incompatible_settings_are_refused(flags, code, message, tmp_path):
    got, out, err = invoke("run", *flags, "--out", tmp_path / "run")
    assert (
        (got, out) == (code, "")
        and message in err.splitlines()[-1]
        and "Traceback" not in err
        and not (tmp_path / "run").exists()
    )


def test_broken_adapters_are_refused(pair, tmp_path):
    def load():
        loading.load_model(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        load()
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": pair[0], "peft_type": "LORA", "r": 2})
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="expected an adapter in peft's format as safetensors"):
        load()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="its adapter does not fit the base model"):
        load()


@pytest.mark.parametrize(
    "kind, limit", [("llama", 250_000), ("llama", 0), ("qwen3", 120_000), ("qwen3", 0)]
)
def test_a_teacher_partly_on_disk_gives_the_same_results(pair, questions, tmp_path, kind, limit):
    """Compare a teacher that is partly on disk with the same teacher in memory.

    Layers that do not fit in memory are loaded when they run. Loss, gradient and generated text
    are the same. Qwen3's head is tied to its embedding.
    """
    save_tiny(tmp_path / "teacher", kind, 2, width=48, layers=4)
    both = (pair[0], str(tmp_path / "teacher"))
    spread = prepared(
        both, questions, runtime__teacher_device="auto", runtime__teacher_memory=limit / 2**30
    )
    whole = prepared(both, questions)
    places = {name: p.device.type for name, p in spread.pair.teacher.net.named_parameters()}
    assert (
        "meta" in places.values()
        and spread.pair.teacher.net.get_output_embeddings().weight.device.type == "cpu"
    )
    (ours, rollouts, values), (theirs, again, same) = (
        update_gradient(spread),
        update_gradient(whole),
    )
    assert [r.ids for r in rollouts] == [r.ids for r in again] and values == same
    assert_same(ours, theirs, 1e-6)
    requests = [
        Request(ids=r.teacher_ids, key=("x", i)) for i, r in enumerate(whole.problems.train[:3])
    ]
    written = [
        generate(
            make_decoder(run.pair.teacher, torch.float32), requests, 12, run.method.text_sampler
        )
        for run in (spread, whole)
    ]
    assert written[0] == written[1]


@pytest.mark.long
@pytest.mark.parametrize("bits, close", [("nf4", 0.12), ("int8", 0.02)])
def test_quantized_models_train_an_adapter(pair, questions, tmp_path, bits, close):
    """Check that quantized weights are close to the full ones, and that the run trains.

    Needs bitsandbytes.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    student = save_tiny(tmp_path / "student", "llama", 1, width=64)
    run = prepared(
        (student, student),
        questions,
        adapter__rank=4,
        models__student_quantize=bits,
        models__teacher_quantize=bits,
        schedule__lr=1e-2,
    )
    full = dict(AutoModelForCausalLM.from_pretrained(student).named_modules())
    held = {
        name: module
        for name, module in run.pair.teacher.net.named_modules()
        if type(module).__name__.startswith("Linear") and "layers" in name
    }
    assert len(held) == 14
    for name, module in held.items():
        weight = module.weight
        few = (
            functional.dequantize_4bit(weight.data, weight.quant_state)
            if bits == "nf4"
            else module.state.CB * module.state.SCB[:, None] / 127
        )
        gap = (few.float() - full[name].weight).norm() / full[name].weight.norm()
        assert 1e-4 < gap < close, (name, gap)
    layer = run.pair.student.net.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.numel() * layer.weight.element_size() <= 64 * 128 * (
        0.5 if bits == "nf4" else 1
    )
    plain = read_shape(loading.load_model(student, device=torch.device("cpu"), dtype=torch.float32))
    assert run.pair.teacher_shape == plain and run.pair.student_shape.frozen == plain.trunk
    result = trained(run, tmp_path / "run")
    assert result["steps"] == 4 and all(
        torch.isfinite(p).all() for p in run.pair.student.trainable.values()
    )
    assert (tmp_path / "run/model/adapter_model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_adapter_trains_on_a_gpu_in_bfloat16_and_nf4(pair, questions, tmp_path):
    """Train a float32 adapter on a base in bfloat16 or NF4.

    In bfloat16, the teacher is split between GPU and main memory.
    """
    pytest.importorskip("bitsandbytes")
    save_tiny(tmp_path / "student", "llama", 1, width=64)
    both = str(tmp_path / "student"), pair[1]
    for name, changes in (
        ("bf16", {"runtime__teacher_device": "auto", "runtime__teacher_memory": 100_000 / 2**30}),
        ("nf4", {"models__student_quantize": "nf4"}),
    ):
        run = prepared(
            both,
            questions,
            adapter__rank=4,
            runtime__device="cuda",
            runtime__dtype="bfloat16",
            schedule__lr=1e-2,
            **changes,
        )
        assert all(
            p.dtype == torch.float32 and p.is_cuda for p in run.pair.student.trainable.values()
        )
        result = trained(run, tmp_path / name)
        assert (
            result["steps"] == 4
            and result["kl_after"]["value"] < result["kl_before"]["value"] + 0.5
        )

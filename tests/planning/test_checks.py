"""Test the preflight checks: a sound pair passes all of them, and each fault is reported.

Also test exit codes and the file that a run saves.
"""

import json

import pytest
import torch
from helpers import byte_tokenizer, invoke, last_json, prepared, save_tiny, tiny_net
from transformers import GenerationConfig

from prefix_distill.engine import loading, trunk
from prefix_distill.planning import checks, memory, text_checks
from prefix_distill.planning.outcomes import SAMPLE
from prefix_distill.training.run import describe_checks

NAMES = [
    "vocabulary",
    "data",
    "prompts",
    "templates",
    "end of text",
    "padding",
    "head",
    "determinism",
    "shared prompts",
    "sampling",
    "context",
    "memory",
    "teacher",
]
LAB = {
    "models__student": "lab:choice/student",
    "models__teacher": "lab:choice/teacher",
    "data__dataset": "lab:choice",
    "evaluate__problems": 8,
    "evaluate__kl_prompts": 8,
    "rollout__max_new_tokens": None,
}


def examined(pair, questions, samples=0, limit=None, **changes):
    run = prepared(pair, questions, **changes)
    return {check.name: check for check in checks.examine(run, samples, limit)}


@pytest.fixture(scope="module")
def sound(pair, questions):
    return examined(pair, questions)


def test_a_sound_pair_passes_every_check(sound, pair, questions):
    """Expect one warning: two random networks do not agree on the first token."""
    assert list(sound) == NAMES[:-1] and [c.name for c in sound.values() if c.status != "ok"] == [
        "prompts"
    ]
    assert all(check.text for check in sound.values()) and json.dumps(
        describe_checks(list(sound.values()))
    )
    lab = examined(pair, questions, 8, **LAB)
    assert list(lab) == NAMES and all(check.status == "ok" for check in lab.values()), lab
    assert lab["teacher"].facts["teacher"]["right"] > lab["teacher"].facts["student"]["right"]
    assert lab["prompts"].facts["first_token_probability"] > 0.5


def with_tokenizer(folder, change, **shape):
    """Save a tiny model with a changed tokenizer and return its path."""
    save_tiny(folder, **shape)
    (folder / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_padded_vocabularies_are_cut_exactly(pair, questions, tmp_path):
    padded = save_tiny(tmp_path / "padded", seed=2, vocabulary=300)
    found = examined((pair[0], padded), questions)["vocabulary"]
    assert (
        found.status == "ok"
        and found.facts["teacher"] == {"ids": 260, "head_rows": 300, "support": 260}
        and "padding rows of the output heads are cut" in found.text
    )


def test_the_prompt_of_each_model_is_shown(pair, questions, tmp_path):
    def change(tokenizer):
        tokenizer.chat_template = "Q: {% for m in messages %}{{ m.content }}{% endfor %} A:"

    found = examined((pair[0], with_tokenizer(tmp_path / "other", change, seed=2)), questions)[
        "prompts"
    ].facts
    assert found["student"]["text"].startswith("<u>") and found["student"]["last"][-1] == [
        259,
        "<a>",
    ]
    assert found["teacher"]["text"].startswith("Q: ") and [
        token for _, token in found["teacher"]["last"]
    ][-2:] == ["A", ":"]


def test_the_first_tokens_probability_is_the_teachers(pair, questions):
    run = prepared(pair, questions)
    chances = []
    for r in run.problems.train[:SAMPLE]:
        token = run.pair.student.net(torch.tensor([r.student_ids])).logits[0, -1].argmax()
        chances.append(
            run.pair.teacher.net(torch.tensor([r.teacher_ids]))
            .logits[0, -1]
            .softmax(-1)[token]
            .item()
        )
    found = text_checks.check_prompts(run)
    assert found.facts["first_token_probability"] == pytest.approx(
        sum(chances) / len(chances), rel=1e-4
    )
    assert (found.status == "warning") == (sum(chances) / len(chances) < 0.01)


def test_a_prompt_with_two_start_tokens_is_reported(pair, questions, tmp_path):
    def change(tokenizer):
        tokenizer.bos_token = "<u>"
        tokenizer.chat_template = "<u><u>{{ messages[0].content }}<a>"

    found = examined((pair[0], with_tokenizer(tmp_path / "twice", change, seed=2)), questions)[
        "prompts"
    ]
    assert found.status == "warning" and found.text.startswith(
        "the teacher's prompt begins with two '<u>'"
    )


def test_different_chat_templates_are_reported(pair, questions, tmp_path):
    def none(tokenizer):
        tokenizer.chat_template = None

    def thinks(tokenizer):
        tokenizer.chat_template += (
            "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}"
        )

    plain = with_tokenizer(tmp_path / "plain", none, seed=2)
    found = examined((pair[0], plain), questions)["templates"]
    assert (
        found.status == "warning"
        and "the student gets chat prompts, the teacher plain prompts" in found.text
    )
    assert examined((pair[0], plain), questions, data__template="plain")["templates"].status == "ok"
    thinking = with_tokenizer(tmp_path / "thinking", thinks, seed=2)
    found = examined((pair[0], thinking), questions)["templates"]
    assert (
        found.status == "warning"
        and "only the teacher's chat template has a thinking switch" in found.text
    )
    assert examined((thinking, thinking), questions)["templates"].status == "ok"
    found = examined((thinking, thinking), questions, data__teacher_thinking="off")["templates"]
    assert found.status == "warning" and "student auto, teacher off" in found.text


def test_what_differs_at_the_end_of_the_prompts_is_reported(pair, questions, tmp_path):
    def opens(tokenizer):
        tokenizer.chat_template += "{% if mood is defined %}{{ mood }}{% endif %}<think>"

    opening = with_tokenizer(tmp_path / "opening", opens, seed=2)
    found = examined((pair[0], opening), questions)["templates"]
    assert found.status == "warning" and "the teacher's '<a><think>'" in found.text
    assert "variables of the teacher's template, for --teacher-template-arg: mood" in found.text
    found = examined((opening, opening), questions, rollout__begin="<think>")["templates"]
    assert found.status == "warning" and "has <think> twice" in found.text


def test_a_turn_that_ends_with_another_token_than_the_model_names(pair, questions, tmp_path):
    def change(tokenizer):
        tokenizer.eos_token = "<u>"

    folder = with_tokenizer(tmp_path / "other", change, seed=2)
    file = tmp_path / "other/generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 258}))
    found = examined((pair[0], folder), questions)["end of text"]
    assert found.status == "warning" and found.facts["teacher"] == [257, 258]
    assert "its chat template ends a turn with <e> (257)" in found.text


def test_different_eos_ids_are_reported(pair, questions, tmp_path):
    other = save_tiny(tmp_path / "other", seed=2, eos="<u>")
    found = examined((pair[0], other), questions)["end of text"]
    assert (
        found.status == "warning"
        and found.facts["student"] == [257]
        and found.facts["teacher"] == [257, 258]
        and "--eos student|teacher|union" in found.text
    )


def test_a_pad_token_equal_to_eos_is_accepted_and_reported(pair, questions, tmp_path):
    def change(tokenizer):
        tokenizer.pad_token = "<e>"

    found = examined((with_tokenizer(tmp_path / "pad", change, seed=1), pair[1]), questions)[
        "padding"
    ]
    assert (
        found.status == "ok"
        and "a response ends by position" in found.text
        and found.facts == {"student": 257, "teacher": 256}
    )


def test_a_head_that_does_not_give_the_models_logits_is_refused(
    pair, questions, tmp_path, monkeypatch
):
    """Load a network that scales its logits although its config does not say so."""
    plain = loading.load_model

    def load(name, **given):
        model = plain(name, **given)
        model.net.lm_head.register_forward_hook(lambda module, inputs, out: out + out.sin())
        return model

    monkeypatch.setattr(loading, "load_model", load)
    code, out, err = invoke(
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--out",
        tmp_path / "run",
    )
    assert (
        (code, out) == (3, "")
        and "head(hidden states) does not equal its logits" in err
        and not (tmp_path / "run").exists()
    )


def test_a_model_that_is_not_deterministic_is_refused(pair, questions, tmp_path, monkeypatch):
    """Add noise to a layer, as dropout does: the loss of a model against itself is then not 0."""
    plain = loading.load_model

    def load(name, **given):
        model = plain(name, **given)
        if name == pair[1]:
            model.net.model.layers[1].mlp.register_forward_hook(
                lambda module, inputs, out: out + 0.01 * torch.randn_like(out)
            )
        return model

    monkeypatch.setattr(loading, "load_model", load)
    # both would find the noise first
    monkeypatch.setattr(trunk, "check_head", lambda model: 0.0)
    monkeypatch.setattr(trunk, "choose_trunk", lambda model: None)
    code, out, err = invoke(
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        8,
        "--max-new-tokens",
        16,
        "--out",
        tmp_path / "run",
    )
    assert (
        (code, out) == (3, "")
        and "error: determinism: the teacher is not deterministic: two identical passes differ by"
        in err
        and "the first tensor that differs is the output of model.layers.1.mlp, by" in err
        and not (tmp_path / "run").exists()
    )
    code, out, err = invoke(
        "check",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        8,
        "--max-new-tokens",
        16,
        "--check-samples",
        0,
    )
    document = last_json(out)
    assert (
        code == 3
        and not document["ok"]
        and [c["name"] for c in document["checks"] if c["status"] == "error"] == ["determinism"]
    )


def test_the_models_sampling_settings_are_reported_and_ignored(sound, pair, questions):
    """Use models of `save_tiny`, with temperature 0.3 and top-k 7 in their generation config."""
    assert (
        "top_k 7 from the student's generation config" in sound["sampling"].text
        and sound["sampling"].facts["ignored"]["teacher"]["top_k"] == 7
    )
    found = examined(pair, questions, rollout__temperature=0.7)["sampling"]
    assert found.status == "warning" and found.facts["temperature"] == 0.7


def test_prompt_lengths_are_compared_with_the_context(sound, pair, questions, tmp_path):
    facts = sound["context"].facts
    assert facts["shortest"] < facts["median"] < facts["longest"] and facts["positions"] == {
        "student": 256,
        "teacher": 256,
    }
    code, _, err = invoke(
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        "500",
        "--out",
        tmp_path / "run",
    )
    assert code == 3 and "256 positions" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "free, size, status, words",
    [
        (1 << 40, "auto", "ok", "less than "),
        (60 << 20, "auto", "ok", "in addition to the loaded weights (peak in"),
        (4 << 20, "auto", "ok", "in addition to the loaded weights (peak in"),
        (4 << 20, "8", "warning", "batches will be halved"),
        (1 << 20, "auto", "error", "alone take"),
    ],
)
def test_needed_memory_is_compared_with_free_memory(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, monkeypatch, free, size, status, words
):
    """Check a network of 100,000 parameters.

    The moments and gradients, 12 bytes per parameter, must fit. If the activations of a batch do
    not fit, batches are halved.
    """
    student = save_tiny(tmp_path / "student", seed=1, width=64, layers=3)
    monkeypatch.setattr(memory, "read_free_memory", lambda device: free)
    code, out, err = invoke(
        "check",
        "--student",
        student,
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        30,
        "--max-new-tokens",
        60,
        "--check-samples",
        0,
        "--dtype",
        "float32",
        "--micro-batch-size",
        size,
    )
    found = {c["name"]: c for c in last_json(out)["checks"]}["memory"]
    assert found["status"] == status and words in found["found"], (found, err)
    assert code == (4 if status == "error" else 0)
    if "needed_bytes" in found["facts"]:
        facts = found["facts"]
        count = loading.count_parameters(student)
        assert (
            facts["fixed_bytes"] == pytest.approx(12 * count, rel=0.01)
            and facts["needed_bytes"] > facts["fixed_bytes"]
        )
        assert (facts["fixed_bytes"] > free) == (status == "error") and (
            facts["needed_bytes"] > free
        ) == (status in ("warning", "error"))


def test_a_teacher_worse_than_the_student_is_reported(pair, questions):
    found = examined(
        pair,
        questions,
        8,
        **LAB | {"models__student": "lab:choice/teacher", "models__teacher": "lab:choice/student"},
    )["teacher"]
    assert (
        found.status == "warning"
        and "the teacher did not beat the student on these 8 problems" in found.text
    )
    assert found.facts["teacher"]["right"] < found.facts["student"]["right"]


def test_a_teacher_that_never_ends_a_turn_is_reported(pair, questions, tmp_path):
    """Compare a teacher that never samples EOS with a student that does.

    Apart from EOS, both sample all 260 ids with equal probability.
    """
    for name, logit in (("ends", 0.0), ("endless", -50.0)):
        net = tiny_net("gpt2")
        with torch.no_grad():  # the hidden row is (1, 0, …), so the logits are column 0 of wte
            net.transformer.ln_f.weight.zero_()
            net.transformer.ln_f.bias.zero_()[0] = 1.0
            net.transformer.wte.weight[:, 0] = 0.0
            net.transformer.wte.weight[257, 0] = logit
        net.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=256)
        net.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    settings = {"evaluate__problems": 4, "rollout__max_new_tokens": 200}
    both = str(tmp_path / "ends"), str(tmp_path / "endless")
    found = examined(both, questions, 4, **settings)["teacher"]
    assert (
        found.facts["student"]["finish_rate"] > 0
        and found.status == "warning"
        and "the teacher never ends a turn within 200 tokens" in found.text
    )
    found = examined((both[0], both[0]), questions, 4, **settings)["teacher"]
    assert "never ends" not in found.text


def test_answers_that_would_take_too_long_are_not_sampled(pair, questions):
    found = examined(pair, questions, 4, 1e-6)["teacher"]
    assert (
        found.status == "ok"
        and found.text.startswith("not sampled")
        and found.facts["expected_seconds"] > 0
    )


def test_a_run_saves_its_checks_and_the_check_command_writes_nothing(
    pair, questions, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--prefix",
        8,
        "--max-new-tokens",
        16,
        "--steps",
        1,
        "--problems",
        4,
        "--kl-prompts",
        4,
    ]
    code, out, err = invoke("check", *flags)
    assert code == 0 and not list(tmp_path.iterdir())
    document = last_json(out)
    assert (
        [c["name"] for c in document["checks"]] == NAMES
        and document["ok"]
        and "<u>" in err
        and "result" in err
    )
    code, out, err = invoke("run", *flags, "--out", "run")
    kept = json.loads((tmp_path / "run/preflight.json").read_text())
    assert code == 0 and [c["name"] for c in kept["checks"]] == NAMES
    warned = [c for c in kept["checks"] if c["status"] == "warning"]
    assert warned and all(f"warning: {c['found']}" in " ".join(err.split()) for c in warned)
    assert {c["found"] for c in warned} <= set(
        json.loads((tmp_path / "run/run.json").read_text())["warnings"]
    )


def test_a_pair_with_different_tokenizers_passes(pair, questions):
    """Check a student with merged tokens that the teacher's vocabulary does not have.

    The teacher's id of the student's first token is found by the bytes of the token.
    """
    found = examined(pair, questions, 4, **LAB | {"models__student": "lab:choice/student-merged"})
    assert (
        list(found) == NAMES
        and found["determinism"].status == "ok"
        and found["vocabulary"].facts["student"]["ids"]
        > found["vocabulary"].facts["teacher"]["ids"]
    )
    assert (
        found["prompts"].facts["first_token_probability"] > 0.01
        and found["end of text"].status == "ok"
    )


def test_prompts_longer_than_the_models_name_the_option_that_drops_them(tmp_path):
    out = tmp_path / "run"
    code, _, err = invoke("run", "--few-shot", "3", "--check-samples", "0", "--out", out)
    assert code == 3 and "--max-prompt-tokens 511" in err and "--max-new-tokens" not in err[-300:]
    assert "the longest prompt has" in err and "512 positions" in err and not out.exists()

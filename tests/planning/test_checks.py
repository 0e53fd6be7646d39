"""Preflight: for every check a pair in order and one with that fault alone; exit codes; what a
run keeps."""

import json

import pytest
import torch
from helpers import byte_tokenizer, invoke, last_json, prepared, save_tiny, tiny_net
from transformers import GenerationConfig

from prefix_distill.engine import loading, trunk
from prefix_distill.planning import checks, text_checks
from prefix_distill.planning.outcomes import SAMPLE
from prefix_distill.training.run import describe_checks

NAMES = [
    "vocabulary",
    "prompts",
    "templates",
    "end of text",
    "padding",
    "head",
    "itself",
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


def test_a_sound_pair_passes_what_was_broken_below(sound, pair, questions):
    """But for its random first token: nothing connects two random networks."""
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
    """A tiny model whose tokenizer was changed."""
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
        and "both heads cut to the real ids" in found.text
    )


def test_prompts_are_shown_as_each_model_reads_them(pair, questions, tmp_path):
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


def test_the_first_token_s_probability_is_the_teacher_s(pair, questions):
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


def test_a_prompt_that_begins_twice(pair, questions, tmp_path):
    def change(tokenizer):
        tokenizer.bos_token = "<u>"
        tokenizer.chat_template = "<u><u>{{ messages[0].content }}<a>"

    found = examined((pair[0], with_tokenizer(tmp_path / "twice", change, seed=2)), questions)[
        "prompts"
    ]
    assert found.status == "warning" and found.text.startswith(
        "the teacher's prompt begins with two '<u>'"
    )


def test_templates_that_differ(pair, questions, tmp_path):
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


def test_ends_of_text_that_differ(pair, questions, tmp_path):
    other = save_tiny(tmp_path / "other", seed=2, eos="<u>")
    found = examined((pair[0], other), questions)["end of text"]
    assert (
        found.status == "warning"
        and found.facts["student"] == [257]
        and found.facts["teacher"] == [257, 258]
        and "--eos student|teacher|union" in found.text
    )


def test_a_pad_that_is_the_end_is_no_trouble_and_said(pair, questions, tmp_path):
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


def test_a_head_that_is_not_the_model_s_is_refused(pair, questions, tmp_path, monkeypatch):
    """A network that scales its logits in a way the config does not tell."""
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


def test_a_model_that_is_not_itself_twice_is_refused(pair, questions, tmp_path, monkeypatch):
    """Noise in a layer, as dropout would be: a loss of 0 against itself is not to be had."""
    plain = loading.load_model

    def load(name, **given):
        model = plain(name, **given)
        if name == pair[1]:
            model.net.model.layers[1].mlp.register_forward_hook(
                lambda module, inputs, out: out + 0.01 * torch.randn_like(out)
            )
        return model

    monkeypatch.setattr(loading, "load_model", load)
    # both would meet the same noise first
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
        and "error: itself: the teacher is not deterministic: two identical passes differ by" in err
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
        and [c["name"] for c in document["checks"] if c["status"] == "error"] == ["itself"]
    )


def test_the_models_own_sampling_is_named_and_has_no_effect(sound, pair, questions):
    """save_tiny's models come with temperature 0.3 and top-k 7."""
    assert (
        "top_k 7 from the student's generation config" in sound["sampling"].text
        and sound["sampling"].facts["ignored"]["teacher"]["top_k"] == 7
    )
    found = examined(pair, questions, rollout__temperature=0.7)["sampling"]
    assert found.status == "warning" and found.facts["temperature"] == 0.7


def test_prompts_against_the_context(sound, pair, questions, tmp_path):
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
    "free, status, code, words",
    [
        (1 << 40, "ok", 0, "less than "),
        (60 << 20, "ok", 0, "in addition to the loaded weights (peak in"),
        (4 << 20, "warning", 0, "batches will be halved"),
        (1 << 20, "error", 4, "alone take"),
    ],
)
def test_memory_against_what_is_free(  # noqa: PLR0913  fixtures and parameters of one test
    pair, questions, tmp_path, monkeypatch, free, status, code, words
):
    """A network of 100,000 numbers: 12 bytes of moments and gradients for each must fit, the
    activations of a batch may have to be halved."""
    student = save_tiny(tmp_path / "student", seed=1, width=64, layers=3)
    monkeypatch.setattr(checks, "read_free_memory", lambda device: free)
    got, out, err = invoke(
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
    )
    found = {c["name"]: c for c in last_json(out)["checks"]}["memory"]
    assert (got, found["status"]) == (code, status) and words in found["found"], (found, err)
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


def test_a_teacher_that_knows_less(pair, questions):
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


def test_a_teacher_that_cannot_end_a_turn(pair, questions, tmp_path):
    """Both draw from all 260 ids alike, but the teacher's head gives the end of text no chance."""
    for name, logit in (("ends", 0.0), ("endless", -50.0)):
        net = tiny_net("gpt2")
        with torch.no_grad():  # hidden states are the last norm's bias, logits its first component
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


def test_answers_that_would_take_too_long_are_left_to_check(pair, questions):
    found = examined(pair, questions, 4, 1e-6)["teacher"]
    assert (
        found.status == "ok"
        and found.text.startswith("not sampled")
        and found.facts["expected_seconds"] > 0
    )


def test_a_run_keeps_what_was_found_and_check_writes_nothing(
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
        "--eval-samples",
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
    assert warned and all(
        f"warning: {c['name']}: {c['found']}" in " ".join(err.split()) for c in warned
    )
    assert {f"{c['name']}: {c['found']}" for c in warned} <= set(
        json.loads((tmp_path / "run/run.json").read_text())["warnings"]
    )


def test_across_tokenizers_each_model_reads_its_own_ids(pair, questions):
    """The merged student has ids that the teacher has not; its first token is looked up by its
    bytes."""
    found = examined(pair, questions, 4, **LAB | {"models__student": "lab:choice/student-merged"})
    assert (
        list(found) == NAMES
        and found["itself"].status == "ok"
        and found["vocabulary"].facts["student"]["ids"]
        > found["vocabulary"].facts["teacher"]["ids"]
    )
    assert (
        found["prompts"].facts["first_token_probability"] > 0.01
        and found["end of text"].status == "ok"
    )

"""Tests of the ids that end responses: a saved model ends them as training did, elsewhere too."""

import json
from pathlib import Path

import pytest
import torch
from helpers import flags, invoke, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

CLOSED = "{% for m in messages %}<u>{{ m.content }}<p>{% endfor %}<a>"  # <p> is 256


@pytest.fixture(scope="module")
def run(tmp_path_factory, questions):
    """Return a run whose students end a turn with a token that no config names."""
    folder = tmp_path_factory.mktemp("ends")
    for k, name in enumerate(("s", "t")):
        save_tiny(folder / name, seed=k)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = CLOSED
        tokenizer.pad_token = "<a>"
        tokenizer.save_pretrained(folder / name)
        network = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            network.lm_head.weight[256] *= 3  # so that the tiny model ends some answers with it
        network.save_pretrained(folder / name)
    out = folder / "run"
    code, _, err = invoke(*flags((str(folder / "s"), str(folder / "t")), questions, out))
    assert code == 0 and "its chat template ends a turn with <p> (256)" in err, err
    return out


def eos_of(folder: Path):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_saved_model_names_the_token_that_closes_a_turn(run, tmp_path):
    for name in ("model", "best"):
        assert eos_of(run / name) == [256, 257]
        assert "<p> (256), <e> (257)" in (run / name / "README.md").read_text(encoding="utf-8")
    for k, which in enumerate(("model", "step-00000003")):
        out = tmp_path / f"exported{k}"
        code, _, err = invoke("export", run, "--which", which, "--out", out)
        assert code == 0 and eos_of(out) == [256, 257], err


def test_plain_transformers_ends_answers_where_training_did(run):
    network = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    config = GenerationConfig.from_pretrained(run / "model")
    assert set(config.eos_token_id) == {256, 257}
    rows = [
        json.loads(line)
        for line in (run / "examples-after.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ids = tokenizer("<u>hi<p><a>", return_tensors="pt", add_special_tokens=False).input_ids
    torch.manual_seed(0)
    found = network.generate(
        ids.expand(64, -1),
        attention_mask=torch.ones(64, ids.shape[1], dtype=torch.long),
        max_new_tokens=32,
        temperature=1.0,
        top_k=0,
    )
    ended = set()
    for row in found[:, ids.shape[1] :].tolist():
        ends = [position for position, token in enumerate(row) if token in (256, 257)]
        if not ends:
            continue
        ended.add(row[ends[0]])
        assert set(row[ends[0] + 1 :]) <= {config.pad_token_id}
    assert 256 in ended and rows


def test_ids_that_the_model_names_already_stay_as_they_are(pair, questions, tmp_path):
    code, _, err = invoke(*flags(pair, questions, tmp_path / "run"))
    assert code == 0, err
    assert eos_of(tmp_path / "run" / "model") == eos_of(Path(pair[0]))

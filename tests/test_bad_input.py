"""Test that bad input gives a one-line error and leaves no files.

The line on stderr says what was expected, what was got and what to do; stdout is empty. The exit
code is 2, or 3 if each part is valid but the combination is not.
"""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import byte_tokenizer, invoke, save_tiny, tiny_net
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase

LINE = '{"question": "1+1?", "answer": "2"}\n'


@pytest.fixture(scope="module")
def broken(tmp_path_factory, pair):
    """Return a folder with faulty models, datasets, config files and arms files."""
    root = tmp_path_factory.mktemp("broken")
    other = save_tiny(root / "other", seed=3, vocabulary=261)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["42"])
    tokenizer.save_pretrained(other)
    save_tiny(root / "few-rows", seed=3, vocabulary=259)
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
    (root / "full").mkdir()
    (root / "full" / "something").write_text("x")
    (root / "a-file").write_text("x")
    (root / "folder.jsonl").mkdir()
    for name, (text, _) in CONFIGS.items():
        (root / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, (text, _) in ARMS.items():
        (root / f"arms {name}.yaml").write_text(text)
    for name, (suffix, content, _) in DATASETS.items():
        (root / f"{name}{suffix}").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return root


BAD = {
    "missing data file": (["--dataset", "{root}/nowhere.jsonl"], "no such file"),
    "wrong column": (
        ["--prompt-column", "problem"],
        "no column 'problem'; it has question, answer",
    ),
    "prefix 0": (["--prefix", "0"], "--prefix 0: expected at least 1 token"),
    "prefix grammar": (["--prefix", "lots"], "--prefix lots: expected"),
    "prefix beyond positions": (
        ["--prefix", "500"],
        "--prefix 500: expected at most 238 tokens, because the models have 256 positions and the "
        "longest prompt has 18; lower --prefix, or lower --max-prompt-tokens to drop long prompts",
    ),
    "different tokenizers": (
        ["--teacher", "{root}/other", "--cross-tokenizer", "off"],
        "tokenizers differ on 1 ids",
    ),
    "unknown cross-tokenizer": (
        ["--cross-tokenizer", "gold"],
        "expected one of strict, simct, simct-released, off; change it",
    ),
    "lower-case teacher": (
        ["--teacher", "{root}/lower-case"],
        "its tokenizer changes the text 'Two words, 2 Words.'",
    ),
    "head too small": (
        ["--teacher", "{root}/few-rows"],
        "contains the token '<a>' (id 259), but the model has only 259 ids",
    ),
    "sampled across tokenizers": (
        ["--teacher", "{root}/other", "--estimator", "sampled"],
        "units are compared on all shared tokens",
    ),
    "clip across tokenizers": (
        ["--teacher", "{root}/other", "--clip", "1", "--divergence", "forward-kl"],
        "the clip needs one vocabulary; omit --clip",
    ),
    "teacher's eos across tokenizers": (
        ["--teacher", "{root}/other", "--eos", "teacher"],
        "the student's vocabulary lacks the teacher's EOS tokens; omit --eos",
    ),
    "ranked text across tokenizers": (
        ["--teacher", "{root}/other", "--off-policy", "sft", "--select", "soft-or"],
        "text without units",
    ),
    "no EOS": (["--student", "{root}/no-eos"], "end-of-sequence"),
    "NaN weights": (["--student", "{root}/nan"], "model.layers.1.mlp.up_proj.weight contains NaN"),
    "out in use": (["--out", "{root}/full"], "not empty"),
    "unreadable GGUF": (["--student", "{root}/bad.gguf"], "cannot be loaded"),
    "missing model": (["--teacher", "{root}/nowhere"], "no such folder"),
    "model of 400 emoji": (["--teacher", "😀" * 400], "error: model 😀"),
    "GGUF of 300 characters": (["--teacher", "a" * 300 + ".gguf"], "no such file; check the path"),
    "model in nobody's folder": (["--student", "~nobody/x"], "no such folder; check the path"),
    "temperature nan": (["--temperature", "nan"], "--temperature nan: expected a finite number"),
    "negative learning rate": (
        ["--lr", "-1"],
        "error: --lr -1: expected a number above 0; change it",
    ),
    "jsd at its end": (["--divergence", "jsd:1"], "use reverse-kl"),
    "unknown divergence": (["--divergence", "kl"], "--divergence kl: expected"),
    "estimator without K": (["--estimator", "top-k:0"], "expected full, sampled or top-k:K"),
    "a schedule cut short": (["--prefix", "linear:4"], "--prefix linear:4: expected"),
    "a staircase that never rises": (
        ["--prefix", "staircase:4:4:0"],
        "expected a whole number of steps of at least 1 after the last colon, got '0'",
    ),
    "window without K": (
        ["--window", "last"],
        "--window last: expected all, or one of first",
    ),
    "off-policy share": (["--off-policy", "sft:1.5"], "--off-policy sft:1.5: expected"),
    "sampled forward KL": (
        ["--estimator", "sampled", "--divergence", "forward-kl"],
        "--estimator sampled with --divergence forward-kl",
    ),
    "steps of an embedded task": (
        ["--dataset", "lab:choice:31-32"],
        "the numbers of steps must be between 1 and 30",
    ),
    "range of steps": (["--dataset", "lab:choice:many"], "expected a range such as 20-25"),
    "unknown role": (["--student", "lab:tied/student-wide"], "no model 'tied' 'student-wide'"),
    "set without value": (["--set", "train.steps"], "expected section.key=value"),
    "unknown flag": (
        ["--stepz", "3"],
        "--stepz: no such option of this command; did you mean --steps?",
    ),
    "not a number": (
        ["--steps", "many"],
        "error: --steps many: expected a whole number, such as 100",
    ),
    "a batch of words": (
        ["--batch-size", "many"],
        "error: --batch-size many: expected a whole number, such as 8",
    ),
    "a rate of words": (["--lr", "low"], "error: --lr low: expected a number, such as 5e-05"),
    "a seed of words": (
        ["demo", "--seed", "x"],
        "error: --seed x: expected a whole number, such as 0",
    ),
    "problems of words": (
        ["probe", "--out", "out", "--problems", "x"],
        "error: --problems x: expected a whole number, such as 100",
    ),
    "plan of words": (
        ["plan", "--prompt-tokens", "x"],
        "error: --prompt-tokens x: expected a whole number, such as 128",
    ),
    "steps beyond counting": (
        ["--steps", "1" + "0" * 30],
        "--steps: expected a number below 2^63",
    ),
    "negative steps": (
        ["--steps", "-1"],
        "error: --steps -1: expected a number of at least 0; change it",
    ),
    "digits beyond text": (["--prefix", "9" * 5000], "--prefix 999"),
    "window beyond counting": (["--window", "first:" + "9" * 5000], "--window first:999"),
    "top-k beyond counting": (["--estimator", "top-k:" + "9" * 5000], "--estimator top-k:999"),
    "warm-up beyond counting": (["--warmup", "9" * 5000], "--warmup 999"),
    "learning rate of no float": (
        ["--set", "schedule.lr=1" + "0" * 400],
        "schedule.lr: expected a number below 2^63",
    ),
    "set of a list": (
        ["--set", "train.steps=[1, 2]"],
        "train.steps: expected a whole number, got [1, 2]; change it",
    ),
    "set of a date": (["--set", "train.steps=2020-13-45"], "the value is not valid YAML"),
    "set of a section": (["--set", "train=5"], "unknown setting 'train'"),
    "set of a yes": (
        ["--set", "train.steps=yes"],
        "train.steps: expected a whole number, got True",
    ),
    "no batch": (["--batch-size", "0"], "--batch-size 0: expected a number of at least 1"),
    "no samples": (["--samples", "0"], "--samples 0: expected a number of at least 1"),
    "nothing kept": (
        ["--top-p", "0"],
        "--top-p 0: expected a number above 0 and at most 1; change it",
    ),
    "loss at no temperature": (
        ["--kl-temperature", "0"],
        "--kl-temperature 0: expected a number above 0",
    ),
    "infinite clip": (["--grad-clip", "inf"], "--grad-clip inf: expected a finite number"),
    "teacher is the student": (
        ["--teacher", "self"],
        "the same model with the same prompt, so the loss is zero",
    ),
    "template without solution": (
        ["--privileged-column", "answer", "--privileged-template", "{{problem}}"],
        "it has no {solution}",
    ),
    "no privileged column": (
        ["--privileged-column", "hint"],
        "no column 'hint'; it has question, answer; change --privileged-column",
    ),
    "column that is no record": (["--prompt-column", "question.text"], "row 0 has no prompt text"),
    "thinking without a switch": (
        ["--student-thinking", "on"],
        "its chat template has no thinking switch",
    ),
    "every prompt too long": (
        ["--max-prompt-tokens", "2"],
        ".jsonl: all 36 prompts are longer than --max-prompt-tokens 2",
    ),
    "responses beyond positions": (
        ["--max-new-tokens", "5000", "--prefix", "8"],
        "--max-new-tokens 5000: expected at most",
    ),
    "device without driver": (["--device", "cuda:99"], "device 'cuda:99': not available here"),
    "device of no kind": (["--device", "cuda:x"], "device 'cuda:x': not available here"),
    "device without numbers": (["--device", "meta"], "device 'meta': not available here"),
    "teacher's device": (["--teacher-device", "warp"], "device 'warp': not available here"),
    "dtype": (["--dtype", "float16"], "expected one of auto, float32, bfloat16; change it"),
    "no out": (["--out", ""], "--out '': expected a folder name, got empty text; name a folder"),
    "resume no out": (["--resume", "--out", ""], "--resume: name the run folder with --out"),
    "out is a file": (["--out", "{root}/a-file"], "it is a file; name a folder"),
    "out below a file": (["--out", "{root}/a-file/out"], "cannot be written (Not a directory)"),
    "out of no name": (
        ["--set", 'checkpoint.out="a\\0b"'],
        "checkpoint.out: expected Unicode text without NUL",
    ),
    "out in /proc": (["--out", "/proc/out"], "cannot be written (No such file or directory)"),
    "out too long": (["--out", "x" * 5000], "cannot be written (File name too long)"),
    "missing config": (
        ["--config", "{root}/nowhere.yaml"],
        "nowhere.yaml: no such file; check the path",
    ),
    "config is a folder": (
        ["--config", "{root}/full"],
        "cannot be read (Is a directory); check the path",
    ),
    "dataset is a folder": (
        ["--dataset", "{root}/folder.jsonl"],
        "expected a folder with .jsonl, .json, .csv, .tsv, .parquet, .txt files, or one written by",
    ),
    "dataset name too long": (["--dataset", "x" * 5000], "not a valid path"),
    "dataset of another kind": (
        ["--dataset", "{root}/bad.gguf"],
        "expected one of .jsonl, .json, .csv, .tsv, .parquet",
    ),
    "preset misspelt": (["--dataset", "gms8k"], "neither a file nor a preset; did you mean gsm8k?"),
    "more rows than there are": (
        ["--dataset", "{questions}#41"],
        "expected at least 41 rows, got 40; lower the number after #",
    ),
    "no number of rows": (["--dataset", "{questions}#all"], "expected a number of rows after #"),
    "weight of nothing": (
        ["--dataset", "{questions}:0,{questions}:1"],
        "expected datasets with weights above 0",
    ),
    "streaming of JSON": (
        ["--dataset", "{root}/json of a record.json", "--streaming"],
        "--streaming cannot read a .json file row by row",
    ),
    "prompt template without a prompt": (
        ["--prompt-template", "Q:"],
        "expected {prompt} in it once, got it 0 times",
    ),
    "prompt template of no column": (
        ["--prompt-template", "{{level}} {{prompt}}"],
        "row 0 has no 'level' for --prompt-template",
    ),
    "more examples than rows": (
        ["--few-shot", "41"],
        "has 36 rows with a solution outside the evaluation set",
    ),
    "every row an example": (["--few-shot", "36"], "no row is left to train on"),
    "negative examples": (["--few-shot", "-1"], "--few-shot -1: expected a number of at least 0"),
    "eval of examples alone": (
        ["eval", "--model", "{student}", "--dataset", "{questions}#5", "--few-shot", "5"],
        "has no other row to evaluate",
    ),
    "unknown task": (["--dataset", "lab:chess"], "unknown task 'chess'"),
    "model is a file": (["--student", "{root}/a-file"], "no such folder; check the path"),
    "model without config": (["--student", "{root}/full"], "the folder has no config.json"),
    "hub id of nobody": (
        ["--student", "nobody/nothing-of-this-name"],
        "model nobody/nothing-of-this-name: no such folder, and not loadable from the hub (no "
        "connection); check the path or the network",
    ),
    "resume nothing": (["--resume", "--out", "{root}/nothing"], "no config.yaml"),
    "eval of a negative limit": (
        ["eval", "--problems", "-1"],
        "error: --problems -1: expected a number of at least 0; change it",
    ),
    "eval without samples": (
        ["eval", "--samples", "0"],
        "error: --samples 0: expected a number of at least 1; change it",
    ),
    "eval below temperature 0": (
        ["eval", "--temperature", "-1"],
        "error: --temperature -1: expected a number of at least 0; change it",
    ),
    "eval over a file": (["eval", "--out", "{root}/a-file"], "the file exists; name another"),
    "eval below a file": (
        ["eval", "--out", "{root}/a-file/e.jsonl"],
        "cannot be written (Not a directory); name another file",
    ),
    "eval into /proc": (["eval", "--out", "/proc/e.jsonl"], "cannot be written"),
    "eval without a GPU": (
        ["eval", "--model", "{student}", "--dataset", "{questions}", "--device", "cuda:99"],
        "device 'cuda:99'",
    ),
    "eval on more ranks than a batch has prompts": (
        ["eval", "--model", "{student}", "--dataset", "{questions}", "--gpus", "64"],
        "--gpus 64: expected 64 visible GPUs, got ",
    ),
    "eval of small head": (
        ["eval", "--model", "{root}/few-rows", "--dataset", "{questions}"],
        "contains the token '<a>' (id 259), but the model has only 259 ids",
    ),
    "probe of no problems": (
        ["probe", "--problems", "0", "--out", "out"],
        "expected at least 1 prompt",
    ),
    "probe into /proc": (["probe", "--out", "/proc/out"], "cannot be written"),
    "report on an empty folder": (["report", ".", "--out", "out"], "no finished run found"),
    "report on nothing": (["report", "nowhere", "--out", "out"], "nowhere: no such folder"),
    "report into no folder": (["report", ".", "--out", ""], "--out: expected the name of a file"),
    "compare into no folder": (
        ["compare", "{root}/nowhere.yaml", "--out", ""],
        "--out: expected the name of a file",
    ),
    "export into no folder": (
        ["export", "{student}", "--out", ""],
        "--out: expected the name of a file",
    ),
    "eval into no file": (["eval", "--out", ""], "--out '': expected a folder name"),
    "probe into no folder": (["probe", "--out", ""], "--out '': expected a folder name"),
    "demo into no folder": (["demo", "--out", ""], "--out: expected the name of a file"),
    "demo in use": (["demo", "--out", "{root}/full"], "not empty"),
    "compare without a file": (
        ["compare", "{root}/nowhere.yaml", "--out", "out"],
        "nowhere.yaml: no such file; check the path",
    ),
    "unknown command": (["distil"], "distil: no such command; prefix-distill --help lists them"),
}

CONFIGS = {  # name → (text, message)
    "typo": ("train: {stepz: 5}\n", "unknown setting 'train.stepz'; did you mean train.steps?"),
    "a list": ("- train\n", "expected sections such as 'train: {steps: 5}', got list"),
    "a word": ("train\n", "got str"),
    "false": ("false\n", "got bool"),
    "section of a number": (
        "train: 5\n",
        "expected sections with keys, such as 'schedule: {lr: 1e-4}', got 'train: 5'",
    ),
    "section of nothing": ("train:\n", "such as 'schedule: {lr: 1e-4}', got 'train: None'"),
    "section of a list": ("train: [steps]\n", "got 'train: ['steps']'; correct it"),
    "unclosed": ("train: {steps: 5\n", "not valid YAML"),
    "tabs": ("train:\n\tsteps: 5\n", "not valid YAML"),
    "section twice": (
        "train: {steps: 5}\nschedule: {lr: 1e-3}\ntrain: {batch_size: 2}\n",
        "the key 'train' is repeated in line 3",
    ),
    "key twice": ("train:\n  steps: 5\n  steps: 6\n", "the key 'steps' is repeated in line 3"),
    "python object": (
        "train: !!python/object/apply:os.system ['touch marker']\n",
        "could not determine a constructor for the tag",
    ),
    "aliases of aliases": (
        "a: &a [x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "its aliases and merge keys expand to more than 65,536 nodes",
    ),
    "merges of merges": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "its aliases and merge keys expand to more than 65,536 nodes",
    ),
    "many merges of many keys": (
        f"a: &a {{{', '.join(f'k{i}: 1' for i in range(300))}}}\n"
        + "".join(f"b{i}: {{<<: *a}}\n" for i in range(300)),
        "its aliases and merge keys expand to more than 65,536 nodes",
    ),
    "an alias of itself": ("train: &a {steps: *a}\n", "the anchor in line 1 contains itself"),
    "a merge of itself": (
        "# train\ntrain: &a {<<: *a, steps: 5}\n",
        "the anchor in line 2 contains itself",
    ),
    "a merge of a number": (
        "train: {<<: 5}\n",
        "the merge key in line 1 needs a mapping or a list of mappings",
    ),
    "two merge keys": (
        "a: &a {steps: 5}\nb: &b {steps: 6}\ntrain: {<<: *a, <<: *b}\n",
        "the merge key '<<' is repeated in line 3; merge a list: <<: [*a, *b]",
    ),
    "key twice beside a merge": (
        "a: &a {steps: 5}\ntrain: {<<: *a, steps: 6, steps: 7}\n",
        "the key 'steps' is repeated in line 2",
    ),
    "deep": ("[" * 2000, "not valid YAML"),
    "nan": ("schedule: {lr: .nan}\n", "schedule.lr nan: expected a finite number"),
    "infinity": ("schedule: {lr: .inf}\n", "schedule.lr inf: expected a finite number"),
    "an empty integer": ("train: {steps: !!int ''}\n", "not valid YAML"),
    "half a character": (
        'data: {prompt_column: "\\ud800"}\n',
        "data.prompt_column: expected Unicode text without NUL, got '\\ud800'",
    ),
    "a NUL in text": (
        'rollout: {begin: "a\\0b"}\n',
        "rollout.begin: expected Unicode text without NUL, got 'a\\x00b'",
    ),
    "yes for a number": ("train: {steps: yes}\n", "train.steps: expected a whole number, got True"),
    "number for a yes": (
        "extrapolation: {reset: 1}\n",
        "extrapolation.reset: expected true or false, got 1",
    ),
    "number in words": (
        "train: {steps: five}\n",
        "train.steps: expected a whole number, got 'five'; change it",
    ),
    "fraction": ("train: {steps: 2.5}\n", "train.steps: expected a whole number, got 2.5"),
    "null": ("train: {steps: null}\n", "train.steps: expected a whole number, got None"),
    "a date": (
        "schedule: {prefix: 2020-01-01}\n",
        "--prefix 2020-01-01: expected at least 1 token (512)",
    ),
    "no date": ("schedule: {prefix: 2020-13-45}\n", "not valid YAML (month must be in 1..12)"),
    "key of a list": ("train: {[1]: 2}\n", "unhashable key"),
    "key of a number": ("5: {6: 7}\n", "unknown setting '5.6'"),
    "number of 5,000 digits": ("train: {steps: " + "9" * 5000 + "}\n", "not valid YAML"),
    "utf-16": (
        "train: {steps: 5}\n".encode("utf-16"),
        "expected UTF-8 text, got other bytes; save it as UTF-8",
    ),
    "bytes": (bytes(range(256)), "expected UTF-8 text, got other bytes"),
    "nul": ("train: {steps: \0}\n", "not valid YAML"),
    "ten megabytes": ("# a long comment\n" * 600_000, "expected at most 65,536 characters"),
    "a long key": (f"train: {{{'x' * 5000}: 1}}\n", "not valid YAML"),
}

ARMS = {  # arms files of `compare`: name → (text, message)
    "nothing": ("", "expected arms to contain keys, got None"),
    "no arm": ("arms: {}\n", "expected at least one arm under 'arms', got none"),
    "unknown key": ("arms: {a: {}}\nseed: 3\n", "unknown key 'seed'; expected one of base, seeds"),
    "seeds of text": ("arms: {a: {}}\nseeds: many\n", "expected a list of different whole numbers"),
    "a seed twice": (
        "arms: {a: {}}\nseeds: [1, 1]\n",
        "expected a list of different whole numbers",
    ),
    "arm of a number": ("arms: {a: 5}\n", "expected arm 'a' to contain keys, got 5"),
    "arm of a setting without a section": (
        "arms: {a: {lr: 3}}\n",
        "arm 'a': expected sections with keys, such as 'schedule: {lr: 1e-4}', got 'lr: 3'",
    ),
    "arm twice": ("arms:\n  a: {}\n  a: {}\n", "the key 'a' is repeated in line 3"),
    "arm of no folder": ("arms: {../a: {}}\n", "a folder cannot have the name '../a'"),
    "arm of a NUL": ('arms: {"a\\0": {}}\n', "a folder cannot have the name"),
    "arm of half a character": ('arms: {"\\ud800": {}}\n', "a folder cannot have the name"),
    "arm of 300 characters": (f"arms: {{{'a' * 300}: {{}}}}\n", "a folder cannot have the name"),
    "also of no file": (
        "arms: {a: {}}\nalso: {b/c: {}}\n",
        "also: a file cannot have the name 'b/c'; rename the dataset",
    ),
    "a seed too large": (
        f"arms: {{a: {{}}}}\nseeds: [1{'0' * 23}]\n",
        "runtime.seed: expected a number below 2^63",
    ),
    "tune to nothing": (
        "arms: {a: {}}\ntune: {train.weight_decay: [null]}\n",
        "train.weight_decay: expected a number, got None",
    ),
    "arm of a wrong setting": ("arms: {a: {train: {stepz: 3}}}\n", "unknown setting 'train.stepz'"),
    "arm named by a number": (
        "arms: {5: {}}\n",
        "a folder cannot have the name '5'; rename the arm",
    ),
    "start from nobody": (
        "arms: {a: {start: b}}\n",
        "arm 'a' starts from 'b'; expected another arm of this file",
    ),
    "start from a list": ("arms: {a: {start: [b]}}\n", "arm 'a' starts from '['b']'"),
    "reference to nobody": (
        "arms: {a: {}}\nreference: b\n",
        "reference 'b': expected one of its arms (a)",
    ),
    "reference to a list": (
        "arms: {a: {}}\nreference: [a]\n",
        "reference '['a']': expected one of its arms (a)",
    ),
    "tune two": (
        "arms: {a: {}}\ntune: {schedule.lr: [1e-4], train.steps: [1]}\n",
        "expected tune to contain one setting",
    ),
    "tune a number": ("arms: {a: {}}\ntune: 5\n", "expected tune to contain keys, got 5"),
}

DATASETS = {  # name → (suffix, content, message)
    "words": (
        ".csv",
        "words,more\na,b\n",
        "no prompt column (messages, conversations, conversation, dialog, dialogue, prompt, "
        "question, question_stem, problem, instruction, query, input, inputs, ctx, text, chosen) "
        "among words, more",
    ),
    "empty": (".jsonl", "", "it has no rows"),
    "blank lines": (".jsonl", "\n\n", "it has no rows"),
    "null prompt": (
        ".jsonl",
        LINE + '{"question": null}\n',
        "row 1 has no prompt text (got 'None')",
    ),
    "missing prompt": (
        ".jsonl",
        LINE + '{"other": "x"}\n',
        "row 1 has no prompt text (got 'None')",
    ),
    "number for a prompt": (
        ".jsonl",
        LINE + '{"question": 5}\n',
        "row 1 has no prompt text (got '5')",
    ),
    "record for a prompt": (
        ".jsonl",
        LINE + '{"question": {"x": 1}}\n',
        "row 1 has no prompt text",
    ),
    "list for a prompt": (".jsonl", LINE + '{"question": ["x"]}\n', "row 1 has no prompt text"),
    "spaces for a prompt": (".jsonl", LINE + '{"question": " \\n "}\n', "row 1 has no prompt text"),
    "torn line": (".jsonl", LINE + '{"ques', "not readable as jsonl (line 2, column 2"),
    "text": (".jsonl", "hello world\n", "line 1, column 1: Expecting value"),
    "lists for rows": (".jsonl", '["a"]\n["b"]\n', "row 0: expected an object"),
    "deep": (
        ".jsonl",
        '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        "not readable as jsonl (its objects are nested too deeply)",
    ),
    "half a character": (".jsonl", '{"question": "\\ud800"}\n', "an unpaired surrogate"),
    "half an answer": (
        ".jsonl",
        '{"question": "a", "answer": "\\udfff"}\n',
        "an unpaired surrogate",
    ),
    "no UTF-8": (
        ".jsonl",
        LINE.encode() + b'{"question": "\xff\xfe"}\n',
        "(line 2: expected UTF-8, got other bytes); save the file as UTF-8",
    ),
    "utf-16": (".jsonl", LINE.encode("utf-16"), "the text is UTF-16, expected UTF-8"),
    "json of null": (".json", "null", "row 0: expected an object"),
    "json of a number": (".json", "5", "row 0: expected an object"),
    "json of words": (".json", '["a", "b"]', "row 0: expected an object"),
    "json of nothing": (".json", "[]", "it has no rows"),
    "json of a record": (".json", '{"data": [{"words": "a"}]}', "no prompt column"),
    "torn json": (".json", '[{"question": "a"}, {"ques', "not readable as json"),
    "broken quotes": (
        ".csv",
        'question,answer\n"a,b\nc,d\n',
        "not readable as csv (unexpected end of data)",
    ),
    "too many cells": (".csv", "question,answer\na,b,c\n", "line 2: expected 2 cells, got 3"),
    "too few cells": (".csv", "question,answer\na,b\nc\n", "line 3: expected 2 cells, got 1"),
    "empty cell": (".csv", "question,answer\n,2\n", "row 0 has no prompt text"),
    "header alone": (".csv", "question,answer\n", "it has no rows"),
    "column twice": (".csv", "question,question\na,b\n", "expected distinct column names"),
    "semicolons": (".csv", "words;more\na;b\n", "among words, more"),
    "latin-1": (".csv", b"question,answer\nna\xefve,b\n", "(line 2: expected UTF-8"),
    "text for parquet": (".parquet", "hello", "not readable as parquet"),
    "torn parquet": (".parquet", b"PAR1xxxxPAR1", "not readable as parquet"),
    "text for gzip": (".jsonl.gz", "hello", "Not a gzipped file"),
    "torn gzip": (
        ".jsonl.gz",
        __import__("gzip").compress(LINE.encode() * 1000)[:-20],
        "ended before",
    ),
    "no messages": (".jsonl", '{"messages": []}\n', "row 0 has no prompt text (got '[]')"),
    "answer alone": (
        ".jsonl",
        '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "row 0 has no prompt text",
    ),
    "message without content": (
        ".jsonl",
        '{"messages": [{"role": "user"}]}\n',
        "row 0 has no prompt text",
    ),
    "message of null": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": null}]}\n',
        "row 0 has no prompt text",
    ),
    "message of nothing": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": ""}]}\n',
        "row 0 has no prompt text",
    ),
    "unknown role": (
        ".jsonl",
        '{"messages": [{"role": "martian", "content": "a"}]}\n',
        "row 0 has the roles martian before its answer",
    ),
    "role of a number": (
        ".jsonl",
        '{"messages": [{"role": 5, "content": "a"}]}\n',
        "row 0 has the roles 5 before its answer",
    ),
    "no user last": (
        ".jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}\n',
        "row 0 has the roles user, system before its answer",
    ),
}

ENVIRONMENTS = {  # name → (variables, message)
    "world of words": (
        {"WORLD_SIZE": "two"},
        "environment WORLD_SIZE='two': expected a whole number from 1",
    ),
    "no world": ({"WORLD_SIZE": "0"}, "environment WORLD_SIZE='0'"),
    "negative world": ({"WORLD_SIZE": "-2"}, "environment WORLD_SIZE='-2'"),
    "empty world": ({"WORLD_SIZE": ""}, "environment WORLD_SIZE=''"),
    "world without rank": (
        {"WORLD_SIZE": "2"},
        "RANK is not set; start the ranks with --gpus or torchrun",
    ),
    "world without master": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    "world without port": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
        "MASTER_PORT is not set",
    ),
    "port of words": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
        "environment MASTER_PORT='http'",
    ),
    "rank beyond world": (
        {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "environment RANK='5'",
    ),
    "rank alone": ({"RANK": "1"}, "environment RANK='1': expected a whole number from 0 to 0"),
    "rank of words": ({"RANK": "first"}, "environment RANK='first'"),
    "local rank": ({"LOCAL_RANK": "x"}, "environment LOCAL_RANK='x'"),
}


def edit(name, **keys):
    """Return a function that changes keys of a JSON file in a folder. ... removes a key."""

    def change(folder):
        tree = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(
            json.dumps({key: value for key, value in tree.items() if value is not ...})
        )

    return change


def put(name, content):
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


class Pickled:
    """An object that creates the file `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def pickled(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        with open(folder / name, "wb") as file:
            pickle.dump(Pickled(folder.parent / "marker"), file)

    return change


def shards_of_pickle(folder):
    names = list(load_file(folder / "model.safetensors"))
    pickled("x.bin")(folder)
    put(
        "model.safetensors.index.json",
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "x.bin")}),
    )(folder)


def named_pickle(folder):
    pickled("x.bin")(folder)
    edit("config.json", transformers_weights="x.bin")(folder)


def code(name, **keys):
    def change(folder):
        edit(name, **keys)(folder)
        put("mine.py", f"open({str(folder.parent / 'marker')!r}, 'w')\n")(folder)

    return change


UP = "model.layers.1.mlp.up_proj.weight"
MODELS = {  # name → (function that damages a valid model folder, message)
    "pickle alone": (pickled("pytorch_model.bin"), "no file named model.safetensors found"),
    "shards of pickle": (
        shards_of_pickle,
        "model.safetensors.index.json names x.bin; expected .safetensors files only",
    ),
    "pickle by name": (named_pickle, "it is neither a safetensors file"),
    "own model code": (
        code(
            "config.json",
            model_type="mine",
            auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
        ),
        "read that code, then add --trust-remote-code to run it",
    ),
    "own tokenizer code": (
        code(
            "tokenizer_config.json",
            tokenizer_class="Mine",
            auto_map={"AutoTokenizer": ["mine.T", None]},
        ),
        "read that code, then add --trust-remote-code to run it",
    ),
    "config of no JSON": (put("config.json", "{"), "is not a valid JSON file"),
    "config of a list": (put("config.json", "[]"), "cannot be loaded (TypeError"),
    "config of null": (put("config.json", "null"), "cannot be loaded (TypeError"),
    "config of bytes": (put("config.json", b"\xff\xfe\0"), "is not a valid JSON file"),
    "deep config": (put("config.json", "[" * 100_000), "cannot be loaded (RecursionError"),
    "config of nothing": (put("config.json", "{}"), "Should have a `model_type` key"),
    "unknown architecture": (edit("config.json", model_type="nonsense"), "model type `nonsense`"),
    "another architecture": (
        edit("config.json", model_type="bert"),
        "its files lack the weight bert.",
    ),
    "no layer": (
        edit("config.json", num_hidden_layers=0),
        "num_hidden_layers 0; expected at least 1",
    ),
    "negative layers": (
        edit("config.json", num_hidden_layers=-1),
        "num_hidden_layers -1; expected at least 1",
    ),
    "layers in words": (
        edit("config.json", num_hidden_layers="two"),
        "expected int, got str (value: 'two')",
    ),
    "ten million layers": (
        edit("config.json", num_hidden_layers=10**7),
        "num_hidden_layers 10000000; expected at most 1000",
    ),
    "a layer more": (
        edit("config.json", num_hidden_layers=3),
        "lack the weight model.layers.2.input_layernorm.weight that its config.json asks for (9",
    ),
    "no width": (edit("config.json", hidden_size=0), "hidden_size 0; expected at least 1"),
    "absurd width": (edit("config.json", hidden_size=10**19), "cannot be loaded"),
    "unknown width": (
        edit("config.json", hidden_size=...),
        "has shape [260, 32], but its config.json asks for [260, 4096]",
    ),
    "width of null": (
        edit("config.json", hidden_size=None),
        "'hidden_size' expected int, got NoneType",
    ),
    "heads that do not divide": (
        edit("config.json", num_attention_heads=3),
        "is not a multiple of the number of attention heads",
    ),
    "a larger vocabulary": (
        edit("config.json", vocab_size=300),
        "has shape [260, 32], but its config.json asks for [300, 32] (2 such weights)",
    ),
    "absurd vocabulary": (edit("config.json", vocab_size=10**15), "cannot be loaded"),
    "no positions": (
        edit("config.json", max_position_embeddings=0),
        "max_position_embeddings 0; expected at least 1",
    ),
    "unknown activation": (
        edit("config.json", hidden_act="import os"),
        "cannot be loaded (KeyError: 'import os')",
    ),
    "unknown dtype": (edit("config.json", dtype="float9000"), "float9000"),
    "missing weight": (
        weights(lambda t: t.pop(UP)),
        f"its files lack the weight {UP} that its config.json asks for (1 such weights)",
    ),
    "weight of another shape": (
        weights(lambda t: t.update({UP: torch.zeros(3, 3)})),
        f"weight {UP} has shape [3, 3], but its config.json asks for [64, 32]",
    ),
    "no weight": (
        weights(lambda t: t.clear()),
        "its files lack the weight lm_head.weight that its config.json asks for (21 such weights)",
    ),
    "torn weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 9000),
        "SafetensorError",
    ),
    "weights of text": (
        put(
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        ),
        "is a git-lfs pointer in place of the file; run `git lfs pull`",
    ),
    "weights of nothing": (put("model.safetensors", b""), "SafetensorError"),
    "absurd header": (put("model.safetensors", b"\xff" * 8 + b"{}"), "header too large"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "the folder has no tokenizer.json",
    ),
    "tokenizer of no JSON": (put("tokenizer.json", "{"), "cannot be loaded (JSONDecodeError"),
    "tokenizer of a list": (put("tokenizer.json", "[]"), "cannot be loaded (TypeError"),
    "tokenizer of nothing": (
        put("tokenizer.json", "{}"),
        "cannot be loaded (KeyError: 'added_tokens')",
    ),
    "settings of a list": (put("tokenizer_config.json", "[]"), "cannot be loaded"),
    "tokenizer without vocabulary": (
        lambda folder: put(
            "tokenizer.json",
            json.dumps(
                (tree := json.loads((folder / "tokenizer.json").read_text()))
                | {"model": tree["model"] | {"vocab": {}}}
            ),
        )(folder),
        "tokenizers: no token of",
    ),
    "tokenizer without model": (edit("tokenizer.json", model=None), "ModelUntagged"),
    "unknown end of sequence": (
        edit("tokenizer_config.json", eos_token="<nope>"),
        "the tokenizer's EOS token '<nope>' has id 260; expected an id of the model, 0 to 259",
    ),
    "end outside of the vocabulary": (
        edit("generation_config.json", eos_token_id=99999),
        "EOS id 99999; expected an id of its vocabulary",
    ),
    "negative end": (edit("generation_config.json", eos_token_id=-1), "EOS id -1"),
    "end in words": (edit("generation_config.json", eos_token_id="x"), "EOS id 'x'"),
    "ends of a kind": (
        edit("generation_config.json", eos_token_id=[257, [1]]),
        "EOS id [1]",
    ),
    "end of a fraction": (
        edit("generation_config.json", eos_token_id=2.5),
        "EOS id 2.5",
    ),
    "generation config of no JSON": (
        put("generation_config.json", "{"),
        "is not a valid JSON file",
    ),
    "template that raises": (
        put("chat_template.jinja", "{{ raise_exception('no user') }}"),
        "its chat template rejects prompt",
    ),
    "template of a wrong syntax": (
        put("chat_template.jinja", "{% for %}"),
        "its chat template rejects prompt",
    ),
    "template that reaches inside": (
        put("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "access to attribute '__class__'",
    ),
    "template that imports": (
        put("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('touch marker') }}"),
        "access to attribute '__init__'",
    ),
    "template without end": (
        put("chat_template.jinja", "{% for i in range(10**12) %}x{% endfor %}"),
        "Range too big",
    ),
    "template of itself": (
        put("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "maximum recursion depth",
    ),
}


def checkpoints(change):
    return lambda folder: [change(step) for step in (folder / "checkpoints").iterdir()]


def folder_in_place_of(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


RUNS = {  # name → (function that damages a valid run folder, message of --resume)
    "settings of no YAML": (put("config.yaml", "train: {"), "config.yaml: not valid YAML"),
    "settings of nothing": (put("config.yaml", ""), "its config.yaml is damaged"),
    "settings of bytes": (
        put("config.yaml", b"\xff\xfe"),
        "config.yaml: expected UTF-8 text, got other bytes",
    ),
    "unknown settings": (
        put("config.yaml", "train: {steps: 2, stepz: 3}\nschedule: {lr_schedule: linear}\n"),
        "unknown setting 'train.stepz'",
    ),
    "settings of a wrong type": (
        put("config.yaml", "train: {steps: two}\nschedule: {lr_schedule: linear}\n"),
        "train.steps: expected a whole number",
    ),
    "state of a list": (checkpoints(put("state.json", "[]")), "no intact checkpoint in it"),
    "state of no JSON": (checkpoints(put("state.json", "{")), "no intact checkpoint in it"),
    "state of a wrong kind": (
        checkpoints(edit("state.json", sha256=5)),
        "no intact checkpoint in it",
    ),
    "facts of a list": (checkpoints(edit("state.json", facts=[])), "no intact checkpoint in it"),
    "no state": (
        checkpoints(lambda step: (step / "state.json").unlink()),
        "no intact checkpoint in it",
    ),
    "format of the future": (
        checkpoints(edit("state.json", format=99)),
        "format 99, this version reads 1; resume with the version that wrote it",
    ),
    "torn checkpoints": (
        checkpoints(lambda step: os.truncate(step / "student.safetensors", 100)),
        "no intact checkpoint in it",
    ),
    "no student": (
        checkpoints(lambda step: (step / "student.safetensors").unlink()),
        "no intact checkpoint in it",
    ),
    "weights of another model": (
        checkpoints(
            lambda step: edit(
                "state.json",
                sha256={
                    "optimizer.safetensors": json.loads((step / "state.json").read_text())[
                        "sha256"
                    ]["optimizer.safetensors"]
                },
            )(step)
        ),
        "are not those of",
    ),
    "no measurements": (
        lambda folder: (folder / "before.json").unlink(),
        "before.json cannot be read",
    ),
    "measurements of nothing": (
        put("before.json", "{}"),
        "before.json: expected the rollouts of a run",
    ),
    "metrics in a folder": (
        folder_in_place_of("metrics.jsonl"),
        "metrics.jsonl cannot be read (Is a directory); remove or repair it, then --resume",
    ),
    "scores in a folder": (
        folder_in_place_of("scores.jsonl"),
        "scores.jsonl cannot be read (Is a directory); remove or repair it, then --resume",
    ),
}


TOGETHER = (
    "prefix beyond positions",
    "responses beyond positions",
    "different tokenizers",
    "lower-case teacher",
    "tokenizer without vocabulary",
)  # cases with exit code 3


def refused(message, root, *arguments, expected=2):
    """Run a command, check that it fails with the message and writes no file, and return stderr."""
    before = sorted(root.rglob("*"))
    code, out, err = invoke(*arguments)
    assert code == expected and out == "", (code, out, err)
    lines = err.splitlines()
    assert (
        len([line for line in lines if line.startswith("error: ")]) == 1
        and lines[-1].startswith("error: ")
        and message in lines[-1]
    ), err
    assert "Traceback" not in err and len(lines[-1]) < 1100
    assert sorted(root.rglob("*")) == before and not (root / "marker").exists()
    return lines


def flags(pair, questions, **changes):
    values = {
        "student": pair[0],
        "teacher": pair[1],
        "dataset": questions,
        "out": "out",
        "steps": "1",
        "device": "cpu",
    } | changes
    return [
        text
        for name, value in values.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return an empty working folder, which also contains the folder for temporary files."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_flags(case, broken, pair, questions, here):
    given, message = BAD[case]
    given = [text.format(root=broken, student=pair[0], questions=questions) for text in given]
    if given[0].startswith("--"):
        command = (
            ["run", *given] if "--resume" in given else ["run", *flags(pair, questions), *given]
        )
    else:
        command = given
    assert len(refused(message, here, *command, expected=3 if case in TOGETHER else 2)) == 1
    assert len(list((broken / "full").iterdir())) == 1


@pytest.mark.parametrize("case", CONFIGS)
def test_config_files(case, broken, here):
    assert (
        len(
            refused(
                CONFIGS[case][1], here, "run", "--config", broken / f"{case}.yaml", "--out", "out"
            )
        )
        == 1
    )


@pytest.mark.parametrize("case", ARMS)
def test_arms_files(case, broken, here):
    assert (
        len(refused(ARMS[case][1], here, "compare", broken / f"arms {case}.yaml", "--out", "out"))
        == 1
    )


@pytest.mark.parametrize("case", DATASETS)
def test_datasets(case, broken, pair, here, capfd):
    suffix, _, message = DATASETS[case]
    assert (
        len(
            refused(
                message,
                here,
                "eval",
                "--model",
                pair[0],
                "--dataset",
                broken / f"{case}{suffix}",
                "--device",
                "cpu",
            )
        )
        == 1
    )
    assert capfd.readouterr().err == ""  # no library writes its own messages


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environments(case, pair, questions, here, monkeypatch):
    variables, message = ENVIRONMENTS[case]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert len(refused(message, here, "run", *flags(pair, questions))) == 1


@pytest.mark.parametrize("case", MODELS)
def test_models(case, pair, questions, here, capfd):
    change, message = MODELS[case]
    shutil.copytree(pair[0], here / "model")
    change(here / "model")
    capfd.readouterr()
    assert (
        len(
            refused(
                message,
                here,
                "run",
                *flags(pair, questions, student=here / "model"),
                expected=3 if case in TOGETHER else 2,
            )
        )
        == 1
    )
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def finished(pair, questions, tmp_path_factory):
    """Return a run folder and secrets: one step, with secrets in the environment and umask 027."""
    out = tmp_path_factory.mktemp("finished") / "run"
    secrets = {
        "HF_TOKEN": "hf_SECRETSECRET",
        "WANDB_API_KEY": "SECRETKEY42",
        "OPENAI_API_KEY": "sk-SECRET",
    }
    old, kept = os.umask(0o027), dict(os.environ)
    try:
        os.environ.update(secrets)
        code, _, err = invoke(
            "run",
            *flags(
                pair,
                questions,
                out=out,
                prefix="4",
                max_new_tokens="8",
                batch_size="1",
                samples="2",
                problems="2",
                kl_prompts="2",
                save_every="1",
            ),
        )
    finally:
        os.umask(old)
        os.environ.clear()
        os.environ.update(kept)
    assert code == 0, err
    return out, secrets


@pytest.mark.parametrize("case", RUNS)
def test_run_folders(case, finished, here):
    change, message = RUNS[case]
    shutil.copytree(finished[0], here / "run")
    change(here / "run")
    # Notes and skipped checkpoints may precede the error, so the number of lines is not checked.
    refused(message, here, "run", "--resume", "--out", here / "run", "--steps", "2")


@pytest.mark.parametrize(
    "case, change",
    {
        "run.json of a number": put("run.json", "5"),
        "run.json of a wrong result": edit("run.json", result=5),
        "no settings": lambda folder: (folder / "config.yaml").unlink(),
        "settings of no YAML": put("config.yaml", "{"),
        "scores of numbers": put("scores.jsonl", '{"step": 1}\n'),
        "measurements of a list": put("after.json", "[]"),
        "run.json of no JSON": put("run.json", "{"),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_report_rejects_damaged_runs(case, change, finished, here):
    shutil.copytree(finished[0], here / "run")
    change(here / "run")
    refused("run", here, "report", here / "run", "--out", here / "report")


def test_files_follow_the_umask_and_contain_no_secret(finished):
    out, secrets = finished
    files = list(out.rglob("*"))
    assert len(files) > 15
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == (0o750 if file.is_dir() else 0o640), file
        content = b"" if file.is_dir() else file.read_bytes()
        assert not [
            name
            for name, value in secrets.items()
            if value.encode() in content or name.encode() in content
        ], file


def test_trust_remote_code_runs_the_code_of_a_model(pair, questions, here):
    """Without the flag this folder is rejected; see the case "own model code"."""
    shutil.copytree(pair[0], here / "model")
    MODELS["own model code"][0](here / "model")
    invoke("run", *flags(pair, questions, student=here / "model"), "--trust-remote-code")
    assert (here / "marker").exists()


def test_a_separate_process_writes_only_the_error_line(pair, questions, here):
    shutil.copytree(pair[0], here / "model")
    MODELS["missing weight"][0](here / "model")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "prefix_distill",
            "run",
            *flags(pair, questions, student=here / "model"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = done.stderr.splitlines()
    # a slow machine also says that libraries are loaded
    rest = [line for line in lines if not line.startswith("loading libraries")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(rest) == 1 and rest[0].startswith("error: model "), done.stderr


def test_the_tables_have_at_least_200_cases():
    counts = [len(table) for table in (BAD, CONFIGS, ARMS, DATASETS, ENVIRONMENTS, MODELS, RUNS)]
    assert sum(counts) >= 200, counts

"""Options of other tools on our command line.

Each name is translated to our option, or refused with a hint what to use instead.
"""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
from helpers import DIVERGENCES, PLUGINS, ROOT, invoke

from prefix_distill import config as configuration
from prefix_distill.api import spelling_tables, spellings
from prefix_distill.api.renamed import ONLY_OF
from prefix_distill.api.spellings import BATCH, CONVERTED, LORA, RENAMED, RESUME
from prefix_distill.cli import main
from prefix_distill.config import files
from prefix_distill.errors import UserError

PAGE = (ROOT / "prefix_distill/help/migration.md").read_text(encoding="utf-8")
GROUP = typer.main.get_command(main.app)


def understood(*words: str, command: str = "run") -> list[str]:
    return main.translate_arguments(GROUP, [command, *words])[0][1:]


def settings(*words: str) -> dict:
    """Return the config values that `run` parses from these words, without running it."""
    given = GROUP.commands["run"].make_context("run", understood(*words)).params
    values = {
        k.replace("__", "."): v for k, v in given.items() if "__" in k and v not in (None, ())
    }
    for path, value in values.items():
        if isinstance(value, list):  # this flag may be repeated
            values[path] = ",".join(value)
    return (
        values
        | configuration.read_assignments(given["assignments"])
        | ({"resume": True} if given["resume"] else {})
    )


@pytest.mark.parametrize(
    "words, expected",
    {
        "--learning_rate 1e-4": {"schedule.lr": 1e-4},
        "--learning_rate=1e-4 --seed=3": {"schedule.lr": 1e-4, "runtime.seed": 3},
        "--learning-rate 1e-4 --batch_size 2": {"schedule.lr": 1e-4, "train.batch_size": 2},
        "--output_dir runs/x --model_name_or_path a/b --teacher_model_name_or_path c/d "
        "--dataset_name e/f": {
            "checkpoint.out": "runs/x",
            "models.student": "a/b",
            "models.teacher": "c/d",
            "data.dataset": "e/f",
        },
        "--dataset_train_split train[:10] --dataset_test_split validation": {
            "data.split": "train[:10]",
            "evaluate.split": "validation",
        },
        "--max_completion_length 512 --max_steps 7 --max_grad_norm 0.5": {
            "rollout.max_new_tokens": 512,
            "train.steps": 7,
            "train.grad_clip": 0.5,
        },
        "--eval_strategy steps --eval_steps 5 --save_strategy no": {
            "evaluate.every": 5,
            "checkpoint.save_every": 0,
        },
        "--num_train_epochs 3": {"train.epochs": 3.0},
        "--num_train_epochs 1.5 --max_steps -1": {"train.epochs": 1.5},
        "--num_train_epochs 3 --max_steps 9": {"train.steps": 9},
        "--push_to_hub --hub_model_id me/x": {"export.push": "me/x"},
        "--push_to_hub True --hub_model_id me/x --hub_private_repo False": {
            "export.push": "me/x",
            "export.public": True,
        },
        "--push_to_hub me/x --hub_private_repo True": {"export.push": "me/x"},
        "--push_to_hub False --hub_model_id me/x --hub_private_repo False": {},
        "--push-to-hub me/x --seed 1": {"export.push": "me/x", "runtime.seed": 1},
        "--eval-samples 5": {"evaluate.problems": 5},
        "--eval_samples=5": {"evaluate.problems": 5},
        "--beta 0": {"divergence.name": "forward-kl"},
        "--beta 1.0": {"divergence.name": "reverse-kl"},
        "--beta 0.3": {"divergence.name": "jsd:0.3"},
        "--lmbda 1": {"rollout.off_policy": "none"},
        "--warmup_ratio 0.1": {"schedule.warmup": "10%"},
        "--warmup_steps 20": {"schedule.warmup": "20"},
        "--warmup_steps 0.03": {"schedule.warmup": "3%"},
        "--lr_scheduler_type cosine": {"schedule.lr_schedule": "cosine"},
        "--lr_scheduler_type constant_with_warmup": {"schedule.lr_schedule": "constant"},
        "--bf16": {"runtime.dtype": "bfloat16"},
        "--bf16 True --seed 1": {"runtime.dtype": "bfloat16", "runtime.seed": 1},
        "--bf16=false": {"runtime.dtype": "float32"},
        "--torch_dtype bfloat16": {"runtime.dtype": "bfloat16"},
        "--gradient_checkpointing True": {"train.gradient_checkpointing": True},
        "--gradient_checkpointing": {"train.gradient_checkpointing": True},
        "--gradient_checkpointing False": {"train.gradient_checkpointing": False},
        "--activation_checkpointing": {"train.gradient_checkpointing": True},
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 8": {
            "train.batch_size": 32,
            "train.micro_batch_size": 4,
        },
        "--gradient_accumulation_steps 2 --gpus 3": {
            "train.batch_size": 48,
            "train.micro_batch_size": 8,
            "runtime.gpus": 3,
        },
        "--output_dir runs/x --resume_from_checkpoint True": {
            "checkpoint.out": "runs/x",
            "resume": True,
        },
        "--resume_from_checkpoint runs/x/": {"checkpoint.out": "runs/x/", "resume": True},
        "--resume_from_checkpoint runs/x --out runs/x/": {
            "checkpoint.out": "runs/x/",
            "resume": True,
        },
        "--resume_from_checkpoint None": {},
        "--optim adamw_torch --adam_beta2 0.999 --adam_epsilon 1e-08 --fp16 False --deepspeed none "
        "--logging_steps 1 --do_train": {},
        "--use_peft --lora_r 32 --lora_alpha 64 --lora_target_modules q_proj v_proj --seed 1": {
            "adapter.rank": 32,
            "adapter.alpha": 64.0,
            "adapter.targets": "q_proj,v_proj",
            "runtime.seed": 1,
        },
        "--dataset_streaming True": {"data.streaming": True},
        "--dataset_streaming False": {"data.streaming": False},
        "--use_peft True --load_in_4bit": {"adapter.rank": 16, "models.student_quantize": "nf4"},
        "--use_peft False --lora_dropout 0.0": {},
        "--temperature 0.9 --top_p 0.9 --top_k 20 --weight_decay 0.1": {
            "rollout.temperature": 0.9,
            "rollout.top_p": 0.9,
            "rollout.top_k": 20,
            "train.weight_decay": 0.1,
        },
    }.items(),
)
def test_a_name_sets_what_it_means(words, expected):
    assert settings(*words.split()) == expected


@pytest.mark.parametrize(
    "words, message",
    {
        "--lmbda 0.25": "--off-policy divergence:0.75, with which the",
        "--seq_kd True": "--seq_kd True: use --off-policy",
        "--learnng_rate 1e-4 --stepz 3 --use_vllm": "(1) --learnng_rate: no such option of this "
        "command; did you mean --learning_rate?; (2) --stepz: no such option of this command; did "
        "you mean --steps?; (3) --use_vllm True: transformers' generate",
        "--zzzzzzzz 3": "--zzzzzzzz: no such option of this command",
        "--push_to_hub True": "add --hub_model_id USER/NAME",
        "--push_to_hub --seed 1": "add --hub_model_id USER/NAME",
        "--push_to_hub me/x --hub_model_id me/y --push_to_hub True": "both set --push-to-hub",
        "--max_length 1024": "use --max-prompt-tokens for the prompt and --max-new-tokens",
        "--fp16": "use --dtype bfloat16 or float32",
        "--use_vllm True": "generate with a KV cache",
        "--vllm_mode server": "generate with a KV cache",
        "--disable_dropout False": "dropout is off in both",
        "--adam_beta1 0.8": "the optimizer is AdamW",
        "--shuffle_dataset False": "shuffled by --seed",
        "--min_p 0.1": "--temperature, --top-p and --top-k only",
        "--data_seed 0": "use --seed",
        "--model_revision v2": "download that revision",
        "--lr_scheduler_type polynomial": "use --lr-schedule",
        "--eval_strategy epoch": "use --eval-every with a number",
        "--learning_rate 1e-4 --lr 2e-4": "--learning_rate and --lr both set --lr",
        "--batch_size 4 --per_device_train_batch_size 4": "--batch-size and "
        "--per_device_train_batch_size 4 both "
        "set --batch-size",
        "--per_device_train_batch_size 0": "expected a whole number of at least 1",
        "--gradient_accumulation_steps x": "expected a whole number",
        "--out runs/x --resume_from_checkpoint runs/x/checkpoint-500": "a run resumes in its own "
        "folder",
        "--output_dir": "expected a value",
        "--bf16 maybe": "expected True or False",
        "--beta much": "expected a number",
        "--fp16 --seq_kd": "(1) --fp16 True: use --dtype bfloat16 or float32; "
        "(2) --seq_kd True: use --off-policy",
    }.items(),
)
def test_a_name_without_counterpart_is_refused_in_one_line(words, message):
    with pytest.raises(UserError) as stop:
        understood(*words.split())
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "words",
    [
        ("--beta", "2"),
        ("--per_device_train_batch_size", "4", "--gpus", "9", "--dataset_config", "main"),
    ],
)
def test_the_command_ends_with_exit_code_2(words):
    code, out, err = invoke("run", *words)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ")


def test_values_and_words_after_two_dashes_are_not_translated():
    assert understood("--instruction", "--learning_rate", "--begin=--beta") == [
        "--instruction",
        "--learning_rate",
        "--begin=--beta",
    ]
    assert main.translate_arguments(GROUP, ["report", "a", "--", "--beta"])[0] == [
        "report",
        "a",
        "--",
        "--beta",
    ]
    assert understood("--model_name_or_path", "m", command="eval") == ["--model", "m"]
    assert understood("--limit", "3", command="eval") == ["--problems", "3"]


def test_options_of_other_commands_are_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r"--gradient_accumulation_steps: no such option of this"):
        understood("--gradient_accumulation_steps", "2", command="eval")
    with pytest.raises(UserError, match=r"\(1\) --modell: .*mean --model\?; \(2\) --lr: no such"):
        understood("--modell", "a/b", "--lr", "1", command="eval")


def test_translations_are_reported_once():
    code, _, err = invoke(
        "run", "--learning_rate", "1e-4", "--max_steps", "3", "--batch_size", "2", "--prefix", "0"
    )
    assert code == 2 and err.splitlines()[0] == (
        "translated: --learning_rate 1e-4 → --lr 1e-4; --max_steps 3 → --steps 3 (see "
        "prefix-distill help migration)"
    )
    assert len(err.splitlines()) == 2
    _, _, err = invoke("run", "--do_train", "True", "--prefix", "0")
    assert err.startswith("translated: --do_train True → nothing (already the default) (see ")


def test_a_switch_that_is_off_by_default_may_be_turned_off_without_a_config_file():
    """eval has no --set, the only way to turn off a switch that a config file turned on."""
    assert understood("--dataset_streaming", "False", command="eval") == []
    assert understood("--dataset_streaming", "True", command="eval") == ["--streaming"]
    with pytest.raises(UserError, match="no such option"):  # eval has no such switch
        understood("--activation_checkpointing", "False", command="eval")


def test_our_own_flags_are_not_reported_as_translations():
    _, _, err = invoke("run", "--batch_size", "2", "--prefix", "0")
    assert err.startswith("error: ")


def test_every_key_is_reachable_by_set_and_by_a_flag_in_both_spellings():
    """Set every option to a valid value other than its default.

    Each is given as --set, as --flag and as --flag_with_underscores.
    """
    others = {
        "models.teacher_ema": 0.5,
        "data.template_args": "mood=calm",
        "data.teacher_template_args": "mood=calm",
        "data.template_date": "2026-05-31",
        "weights.keep": 0.25,
        "schedule.prefix": "full",
        "schedule.warmup": "7",
        "rollout.off_policy": "sft",
        "divergence.name": "forward-kl",
        "divergence.estimator": "top-k:8",
        "weights.window": "first:3",
        "weights.select": "soft-or",
        "weights.position": "moderate",
        "rollout.top_p": 0.5,
        "runtime.plugin": str(PLUGINS / "skew_kl.py"),
    }
    for path, field in configuration.options().items():
        kind = configuration.value_type(field.type)
        fit = [value for value in configuration.choices(field.type) if value != field.default]
        value = others.get(path) or (
            fit[-1] if fit else {bool: True, int: 3, float: 0.5, str: "some text"}[kind]
        )
        assert value != field.default, path
        flag = field.metadata["flag"]
        words = [] if kind is bool else [str(value)]
        for given in (
            ["--set", f"{path}={value}"],
            [flag, *words],
            ["--" + flag[2:].replace("-", "_"), *words],
        ):
            found = settings(*given)
            assert set(found) == {path} and files._convert(path, found[path], field) == value, path


@pytest.mark.parametrize(
    "package, file, name",
    [
        ("trl", "trainer/distillation_config.py", "DistillationConfig"),
        ("trl", "experimental/gkd/gkd_config.py", "GKDConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/model_config.py", "ModelConfig"),
        ("trl", "scripts/utils.py", "ScriptArguments"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ],
)
def test_every_field_of_trl_and_transformers_is_known(package, file, name):
    """Parse the fields from the source files, because importing them is slow."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )
    fields = [
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.dump(node.annotation)
    ]
    own = {
        field.metadata["flag"][2:].replace("-", "_") for field in configuration.options().values()
    } | {"report_to"}
    assert len(fields) > 4 and [f for f in fields if f not in own and not spellings.known(f)] == []


def test_beta_is_the_divergence_that_was_compared_with_trl():
    """test_trl.py compares loss and gradient of each of these with TRL's."""

    for divergence, beta in DIVERGENCES.items():
        assert settings("--beta", str(beta)) == {"divergence.name": divergence}


def test_the_page_has_every_name_with_its_counterpart():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
    for name, flag in RENAMED.items():
        assert rows[name].startswith(f"`{flag}`"), name
    for name, (_, text) in CONVERTED.items():
        assert rows[name] == text, name
    assert {*BATCH, RESUME, LORA} < rows.keys()
    text = " ".join(PAGE.split())
    for hint, names in spelling_tables.HINTS.items():
        assert f"- {' '.join(f'`{name}`' for name in names.split())}: {hint}" in text, hint


def test_an_option_of_another_command_is_named_with_it():
    config_flags = {configuration.flag(path) for path in configuration.options()}
    owners: dict[str, list[str]] = {}
    for name, command in GROUP.commands.items():
        for parameter in command.params:
            if parameter.opts[0].startswith("--") and parameter.opts[0] not in config_flags:
                owners.setdefault(parameter.opts[0][2:].replace("-", "_"), []).append(name)
    assert {flag: name for flag, [name, *others] in owners.items() if not others} == ONLY_OF
    code, _, err = invoke("run", "--card", "4090")
    assert code == 2
    assert err == "error: --card: no such option of this command; it is an option of " + (
        "prefix-distill plan\n"
    )
    assert "did you mean --model?" in invoke("eval", "--student", "x")[2]
    assert "did you mean --thinking?" in invoke("eval", "--student-thinking", "off")[2]


@pytest.mark.parametrize(
    ("word", "advice"),
    [("version", "did you mean --version?"), ("reprot", "did you mean report?")],
)
def test_an_unknown_command_gets_a_hint(word, advice):
    code, out, err = invoke(word)
    assert (code, out, err) == (2, "", f"error: {word}: no such command; {advice}\n")


def test_a_missing_argument_is_explained_with_an_example_that_parses():
    for name, command in GROUP.commands.items():
        if not any(parameter.required for parameter in command.params):
            continue
        code, _, err = invoke(name)
        start, _, example = err.strip().partition("; for example: prefix-distill ")
        assert code == 2 and start.startswith(f"error: {name}: expected "), err
        command.make_context(name, shlex.split(example)[1:])

"""A flat YAML file of TRL's names sets what its flags set."""

import pytest
from helpers import invoke, last_json

import prefix_distill
from prefix_distill.api.flat import read_settings_file
from prefix_distill.errors import UserError

TRL = """
model_name_or_path: a/student
teacher_model_name_or_path: a/teacher
dataset_name: gsm8k
learning_rate: 2.0e-5
lr_scheduler_type: cosine
warmup_ratio: 0.1
beta: 0.5
lmbda: 1.0
max_completion_length: 192
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_train_epochs: 2
max_steps: -1
bf16: true
gradient_checkpointing: false
lora_target_modules: [q_proj, v_proj]
lora_r: 8
use_peft: true
report_to: [tensorboard, wandb]
push_to_hub: true
hub_model_id: me/x
hub_token: null
resume_from_checkpoint: null
logging_steps: 1
optim: adamw_torch
output_dir: runs/x
seed: 3
"""


def test_a_file_of_trl_sets_what_its_names_mean(tmp_path):
    file = tmp_path / "gkd.yaml"
    file.write_text(TRL)
    values, names, notes = read_settings_file(str(file))
    assert values == {
        "models.student": "a/student",
        "models.teacher": "a/teacher",
        "data.dataset": "gsm8k",
        "schedule.lr": "2e-05",
        "schedule.lr_schedule": "cosine",
        "schedule.warmup": "10%",
        "divergence.name": "jsd:0.5",
        "rollout.off_policy": "none",
        "rollout.max_new_tokens": 192,
        "train.batch_size": 16,
        "train.micro_batch_size": 4,
        "train.epochs": "2",
        "runtime.dtype": "bfloat16",
        "train.gradient_checkpointing": False,
        "adapter.targets": "q_proj,v_proj",
        "adapter.rank": 8,
        "trackers.to": "tensorboard,wandb",
        "export.push": "me/x",
        "checkpoint.out": "runs/x",
        "runtime.seed": 3,
    }
    assert names["schedule.lr"] == "--lr" and any("--learning_rate" in note for note in notes)
    config = prefix_distill.Config.from_yaml(file, steps=32, epochs=None)
    assert config.schedule.lr == 2e-5 and config.train.steps == 32 and config.adapter.rank == 8


def test_our_flags_and_sections_work_beside_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 5}\nlr: 1e-3\nbatch_size: 2\ndivergence: forward-kl\n")
    assert read_settings_file(str(file))[0] == {
        "train.steps": 5,
        "schedule.lr": "1e-3",
        "train.batch_size": 2,
        "divergence.name": "forward-kl",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "learnng_rate: 1e-4\nstepz: 3\nuse_vllm: true\n",
            "(1) --learnng_rate: no such option of this command; did you mean --learning_rate?; "
            "(2) --stepz: no such option of this command; did you mean --steps?; (3) --use_vllm",
        ),
        ("nothing_such: null\n", "--nothing_such: no such option"),
        ("chat_template_kwargs: {a: 1}\n", "use --template-arg, --teacher-template-arg"),
        ("train: {steps: 5}\nmax_steps: 6\n", "train.steps is set twice"),
        ("resume_from_checkpoint: true\n", "give --resume on the command line"),
        (
            "trian: {steps: 5, lr: 1}\n",
            "unknown settings: (1) 'trian.steps'; did you mean train.steps? (2) 'trian.lr'; did "
            "you mean schedule.lr?",
        ),
        ("learning_rate: fast\n", "--lr: expected a number, got 'fast'"),
    ],
)
def test_wrong_names_are_refused_at_once_in_one_line(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    code, out, err = invoke("run", "--config", file)
    assert code == 2 and out == "" and message in err.splitlines()[-1]


def test_all_unknown_keys_are_named_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {stepz: 5}\nschedule: {prefixx: 3}\n")
    with pytest.raises(UserError, match=r"did you mean train\.steps.*did you mean schedule.prefix"):
        prefix_distill.Config.from_yaml(file)


def test_a_run_with_a_file_of_trl_equals_the_flags(pair, questions, tmp_path):
    file = tmp_path / "gkd.yaml"
    file.write_text(
        f"model_name_or_path: {pair[0]}\nteacher_model_name_or_path: {pair[1]}\n"
        f"dataset_name: {questions}\nlearning_rate: 1e-3\nmax_steps: 2\nbeta: 0.5\n"
        "max_completion_length: 16\nper_device_train_batch_size: 2\nbf16: false\n"
    )
    small = ("--check-samples", "0", "--problems", "2", "--kl-prompts", "2", "--dry-run")
    _, out, err = invoke("run", "--config", file, *small)
    assert err.splitlines()[0].startswith("translated: --model_name_or_path ")
    ours = ("--student", pair[0], "--teacher", pair[1], "--dataset", questions, "--lr", "1e-3")
    ours += ("--steps", "2", "--divergence", "jsd:0.5", "--max-new-tokens", "16")
    ours += ("--batch-size", "2", "--micro-batch-size", "2", "--dtype", "float32")
    _, expected, _ = invoke("run", *ours, *small)
    found, wanted = last_json(out)["config"], last_json(expected)["config"]
    for document in (found, wanted):
        document["checkpoint"].pop("out")
    assert found == wanted


def test_former_names_work_in_python_and_say_the_present_one(caplog):
    with caplog.at_level("INFO", logger="prefix_distill"):
        config = prefix_distill.Config.from_options(eval_samples=7)
    assert config.evaluate.problems == 7 and "eval_samples is now called problems" in caplog.text

"""Tests of exported models: the model card, the exported files and the upload.

transformers and the hub's libraries load what was written.
"""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from helpers import ROOT, invoke, last_json, save_tiny
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefix_distill import config as configuration
from prefix_distill.training import card
from prefix_distill.training.card import TAGS

INSTRUCTION = "Answer in 'one' line;\n```no $HOME``` | \"quotes\" --and flags"


@pytest.mark.parametrize(
    "parts, choices",
    [
        (
            ("best", "model", "checkpoints/step-00000000", "checkpoints/step-00000012"),
            "model, best or a checkpoint's step (0, 12)",
        ),
        (("checkpoints/step-00000000",), "a checkpoint's step (0)"),
        (("model",), "model"),
        ((), "after the first checkpoint (none yet)"),
    ],
)
def test_the_error_lists_what_a_run_folder_can_export(tmp_path, parts, choices):
    run = tmp_path / "run"
    for part in parts:
        (run / part).mkdir(parents=True)
    run.mkdir(exist_ok=True)
    for name in ("config.yaml", "run.json"):
        (run / name).write_text("{}")
    code, out, err = invoke("export", run, "--which", "7", "--out", tmp_path / "out")
    assert code == 2 and out == ""
    assert err == f"error: run folder {run}: expected --which {choices}, got 7\n"


@pytest.fixture(scope="module")
def run(pair, questions, tmp_path_factory):
    """Run two steps of a student that is stored in bfloat16 and has two chat templates.

    The run has a best model and a checkpoint after each step.
    """
    root = tmp_path_factory.mktemp("export")
    student = root / "student"
    shutil.copytree(pair[0], student)
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": template}
    tokenizer.save_pretrained(student)
    code, _, err = invoke(
        "run",
        "--student",
        student,
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--steps",
        "2",
        "--prefix",
        "auto:4:4",
        "--max-new-tokens",
        "16",
        "--batch-size",
        "2",
        "--samples",
        "2",
        "--problems",
        "4",
        "--kl-prompts",
        "2",
        "--eval-every",
        "1",
        "--save-every",
        "1",
        "--keep-checkpoints",
        "2",
        "--lr",
        "1e-3",
        "--instruction",
        INSTRUCTION,
        "--gradient-checkpointing",
        "--out",
        root / "run",
    )
    assert code == 0, err
    return root / "run"


def test_the_chat_templates_in_a_subfolder_are_saved_and_exported(run, tmp_path):
    code, _, err = invoke("export", run, "--out", tmp_path / "exported")
    assert code == 0, err
    for folder in (run / "model", run / "best", tmp_path / "exported"):
        assert set(AutoTokenizer.from_pretrained(folder).chat_template) == {"default", "tool_use"}


def test_the_card_states_the_scores_without_local_paths(run, pair, questions):
    text = (run / "model/README.md").read_text(encoding="utf-8")
    found = ModelCard(text)
    assert (
        found.data.library_name == "transformers"
        and "prefix-distill" in found.data.tags
        and found.data.get("base_model") is None
    )
    result = json.loads((run / "run.json").read_text())["result"]
    for score in (result["accuracy_before"], result["accuracy_after"]):
        assert f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}] of 4" in text
    for kl in (result["kl_before"], result["kl_after"]):
        assert f"{kl['value']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}], n = {kl['n']}" in text
    assert (
        f"torch {torch.__version__}" in text
        and f"| tokens in the loss | {result['tokens']:,} |" in text
    )
    from prefix_distill.display import flops_text

    for value in (
        result["flops"]["useful"],
        result["flops"]["executed"],
        result["full_rollout_cost"],
    ):
        assert flops_text(value) in text
    for name in (str(run.parent / "student"), pair[1], questions):
        text = text.replace(name, "")
    assert str(run.parent) not in text and "/tmp" not in text
    assert f"after {result['best']['step']} step" in (run / "best/README.md").read_text()


def test_the_command_in_the_card_reproduces_the_config(run):
    [(_, command)] = re.findall(
        r"^(`{4,})sh\n(.*?)\n\1$",
        (run / "model/README.md").read_text(encoding="utf-8"),
        re.S | re.M,
    )
    assert command.startswith("prefix-distill run ")
    shell = subprocess.run(
        ["sh", "-c", f"set -- {command}\nprintf '%s\\0' \"$@\""],
        capture_output=True,
        text=True,
        check=True,
    )
    code, out, err = invoke(*shell.stdout.split("\0")[1:-1], "--dry-run")
    assert code == 0, err
    again, saved = last_json(out)["config"], yaml.safe_load((run / "config.yaml").read_text())
    for key in ("out", "allow_changed"):
        again["checkpoint"].pop(key)
    assert again == saved and saved["data"]["instruction"] == INSTRUCTION


@pytest.mark.parametrize(
    "name, found",
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("openai/gsm8k#1000", "openai/gsm8k"),
        ("lab:choice/student", None),
        ("self", None),
        (None, None),
        ("models/x.gguf", None),
        ("data/train.jsonl", None),
        ("/home/me/model", None),
        ("./model", None),
        ("gsm8k", "openai/gsm8k"),
        ("tests/conftest.py", None),
    ],
)
def test_only_hub_names_enter_the_front_matter(name, found, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert card.hub_id(name) == found


def test_front_matter_of_hub_models():
    config = configuration.build(
        {
            "models.student": "Qwen/Qwen3-0.6B",
            "models.teacher": "Qwen/Qwen3-8B",
            "data.dataset": "openai/gsm8k",
            "trackers.name": "a: name",
        }
    )
    found = ModelCard(card.make_checkpoint_card(config, 25)).data.to_dict()
    assert found == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "finetune",
        "teacher": "Qwen/Qwen3-8B",
        "datasets": ["openai/gsm8k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }


@pytest.mark.parametrize(
    "which, dtype", [("model", "auto"), ("model", "float16"), ("best", "bfloat16"), ("1", "auto")]
)
def test_an_export_converts_the_dtype(run, tmp_path, which, dtype):
    code, out, err = invoke(
        "export", run, "--which", which, "--dtype", dtype, "--out", tmp_path / "deep/out"
    )
    assert code == 0, err
    document, folder = last_json(out), tmp_path / "deep/out"
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (
        net.dtype == kind
        and document["dtype"] == str(kind)[6:]
        and document["parameters"] == sum(p.numel() for p in net.parameters())
    )
    held = load_file(
        run
        / (
            "checkpoints/step-00000001/student.safetensors"
            if which == "1"
            else f"{which}/model.safetensors"
        )
    )
    exported = load_file(folder / "model.safetensors")
    assert held.keys() == exported.keys() and all(
        torch.equal(exported[name], t.to(kind)) for name, t in held.items()
    )
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(run / "model").chat_template
    )
    assert GenerationConfig.from_pretrained(folder).temperature == 0.3
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        text == (run / which / "README.md").read_text(encoding="utf-8")
        if which != "1"
        else "after 1 step of" in text
    )
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--out", "used"],
            "error: --out used: it exists and is not an empty folder; name another",
        ),
        (
            ["--out", "new", "--which", "worst"],
            "expected --which model, best or a checkpoint's step (1, 2), got worst",
        ),
        (
            ["--out", "new", "--which", "77"],
            "expected --which model, best or a checkpoint's step (1, 2), got 77",
        ),
        (
            ["--out", "new", "--dtype", "int8"],
            "error: --dtype int8: expected one of auto, float32, bfloat16, float16",
        ),
        (
            ["--out", "new", "--gguf", "q4_k_m"],
            "error: --gguf q4_k_m: expected one of f32, f16, bf16, q8_0; llama.cpp's "
            "llama-quantize makes smaller",
        ),
        (
            ["--out", "new", "--gguf", "f16"],
            "llama.cpp's converter is not installed; install the extra export-gguf: pip install -e",
        ),
        (
            ["--out", "new", "--push-to-hub", "nobody"],
            "error: --push-to-hub 'nobody': expected USER/NAME",
        ),
        (["--out", "new", "--hub-public"], "error: --hub-public: applies only with --push-to-hub"),
        (["--out", "a" * 300], "cannot be written (File name too long); name another folder"),
        (["--out", "used/file"], "it exists and is not an empty folder; name another"),
        (["--out", "used/file/x"], "error: --out used/file/x: cannot be written ("),
        (["--out", "new", "--which", "a" * 300], "(1, 2), got " + "a" * 60),
        (["--out", "new", "--which", "9" * 5000], "(1, 2), got " + "9" * 60),
    ],
)
def test_a_bad_export_is_one_error_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if "llama" in name else find(name, *rest),
    )
    code, out, err = invoke("export", run, *arguments)
    assert (
        code == 2
        and out == ""
        and message in err.splitlines()[-1]
        and not (tmp_path / "new").exists()
    )


@pytest.mark.parametrize(
    "source, message",
    [
        ("runs/none", "error: export runs/none: no such folder; check the path, or add --out"),
        ("used", "error: export used: expected a run folder or a model folder, got neither"),
    ],
)
def test_an_export_without_out_checks_the_path_first(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    code, out, err = invoke("export", source)
    assert code == 2 and out == "" and err.startswith(message)


@pytest.mark.parametrize("name", ["😀" * 400, "a" * 300, "~nobody/x"])
@pytest.mark.parametrize("arguments", [["--out", "new"], ["--push-to-hub", "me/student"]])
def test_an_impossible_model_name_is_one_error_line(tmp_path, monkeypatch, name, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("export", name, *arguments)
    assert code == 2 and out == "" and len(err.splitlines()) == 1, err
    assert not (tmp_path / "new").exists()


def test_a_weight_that_overflows_float16_is_named(tmp_path):
    net = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "big"))
    with torch.no_grad():
        net.model.norm.weight[3] = 1e5
    net.save_pretrained(tmp_path / "big")
    code, _, err = invoke(
        "export", tmp_path / "big", "--dtype", "float16", "--out", tmp_path / "out"
    )
    assert (
        code == 2
        and "the weight model.norm.weight overflows; use bfloat16 or float32" in err
        and not (tmp_path / "out").exists()
    )


@pytest.fixture
def hub(monkeypatch):
    """Start a local hub that accepts everything and records the requests.

    Each record is (path, authorization, body).
    """
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            calls.append((self.path, self.headers.get("Authorization"), body))
            answer = {"url": f"{url}/me/student"}
            if "preupload" in self.path:
                answer = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                }
            if "/commit/" in self.path:
                answer = {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{url}/me/student/commit/{'0' * 40}",
                }
            self.send_response(
                200 if self.headers.get("Authorization") == "Bearer hf_secret" else 401
            )
            content = json.dumps(answer).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            calls.append((self.path, None, b""))
            name = str(self.headers.get("Authorization")).removeprefix("Bearer hf_")
            if "whoami" not in self.path or name == "silent":
                self.send_error(404)
                return
            role = {"secret": "write", "limited": "fineGrained", "reader": "read"}.get(name)
            self.send_response(200 if role else 401)
            content = json.dumps({"name": "me", "auth": {"accessToken": {"role": role}}}).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield calls
    server.shutdown()


def test_a_push_uploads_the_files_of_the_folder(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = invoke("export", run, "--which", "best", "--push-to-hub", "me/student")
    assert code == 0 and last_json(out)["pushed"].endswith("me/student"), err
    made = json.loads(next(body for path, _, body in hub if path.endswith("repos/create")))
    assert made.get("visibility", made.get("private")) in ("private", True) and (
        made["organization"],
        made["name"],
    ) == ("me", "student")
    lines = [
        json.loads(line)
        for line in next(body for path, _, body in hub if "/commit/" in path).splitlines()
    ]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    expected = {}
    for path in (run / "best").rglob("*"):
        if path.is_file():
            expected[path.relative_to(run / "best").as_posix()] = path.read_bytes()
    assert files == expected


def test_a_failed_push_is_reported_after_everything_is_saved(run, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = invoke(
        "export", run, "--out", tmp_path / "it s", "--push-to-hub", "me/student", "--hub-public"
    )
    last = err.splitlines()[-1]
    assert (
        code == 1
        and last_json(out)["pushed"] is None
        and (tmp_path / "it s/model.safetensors").is_file()
    )
    assert (
        last.startswith("error: --push-to-hub me/student: the upload failed (")
        and "hf_wrong" not in out + err
    )
    assert last.endswith(
        f"prefix-distill export '{tmp_path / 'it s'}' --push-to-hub me/student --hub-public"
    )
    made = json.loads(next(body for path, _, body in hub if path.endswith("repos/create")))
    assert made.get("visibility", made.get("private")) in ("public", False)


@pytest.fixture
def pair_and_data(pair, questions):
    return pair, questions


def small_run(pair, questions):
    return [
        "run",
        "--student",
        pair[0],
        "--teacher",
        pair[1],
        "--dataset",
        questions,
        "--steps",
        "1",
        "--prefix",
        "4",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "2",
        "--samples",
        "1",
        "--problems",
        "2",
        "--kl-prompts",
        "2",
        "--tail-every",
        "0",
        "--push-to-hub",
        "me/student",
    ]


def test_a_run_pushes_its_model_at_its_end(pair, questions, tmp_path, hub, monkeypatch):
    """The upload succeeds, and then fails because the token may not write."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = invoke(*small_run(pair, questions), "--out", tmp_path / "one")
    assert (
        code == 0
        and last_json(out)["pushed"].endswith("me/student")
        and any("/commit/" in path for path, *_ in hub)
    ), err
    monkeypatch.setenv("HF_TOKEN", "hf_limited")
    code, out, err = invoke("run", "--resume", "--out", tmp_path / "one")
    assert code == 1 and last_json(out)["steps"] == 1 and last_json(out)["pushed"] is None
    assert err.splitlines()[-1].endswith(
        f"prefix-distill export {tmp_path / 'one/model'} --push-to-hub me/student"
    )


@pytest.mark.parametrize(
    "case",
    [
        ("hf_secret", True, "HF_HUB_OFFLINE keeps the hub out of reach"),
        (None, False, "expected a login, got none"),
        ("hf_wrong", False, "the hub does not accept the login"),
        ("hf_reader", False, "got one that may only read"),
    ],
)
def test_a_push_that_must_fail_is_refused_before_the_run(
    pair_and_data, tmp_path, hub, monkeypatch, case
):
    """A case: token, whether the hub is switched off, and words of the error."""
    token, offline, words = case
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    code, out, err = invoke(*small_run(*pair_and_data), "--out", tmp_path / "one")
    assert code == 2 and out == "" and not (tmp_path / "one").exists()
    assert words in err.splitlines()[-1] and "hf_" not in err
    code, _, err = invoke("check", *small_run(*pair_and_data)[1:])
    assert code == 2 and words in err.splitlines()[-1]


def test_a_silent_hub_is_a_warning(pair, questions, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_silent")
    code, _, err = invoke(*small_run(pair, questions), "--dry-run", "--out", tmp_path / "one")
    assert code == 0 and "the hub did not answer" in err

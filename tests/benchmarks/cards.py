"""Plan runs of public models on common cards: the flags that fit, and the time.

    python tests/benchmarks/cards.py [--keep] [--quick]

The models are those of public_models.yaml. Prompts have 200 tokens, the prefix 512, answers at most
2,048; the other options have their defaults: 100 steps of 32 rollouts, an evaluation of 200
problems before and after. Nothing runs on a card: memory is computed from the configs, and time
from the assumptions that `prefix-distill plan --card` prints. ``--quick`` plans the smallest pair
for one card and writes nothing.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import measure
import yaml

CARDS = ("t4", "4090", "a6000", "a100-80")
PAIRS = (
    ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
    ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B"),
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B"),
)
SETTINGS = {
    "schedule.prefix": "512",
    "rollout.max_new_tokens": 2048,
    "runtime.device": "cuda",
}


def write_configs(folder: Path) -> None:
    """Write a config.json for every public model, in a folder of its name."""
    models = yaml.safe_load((measure.HERE / "public_models.yaml").read_text(encoding="utf-8"))
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(model["config"]), encoding="utf-8")


def plan_pair(folder: Path, pair: tuple[str, str], cards: tuple[str, ...]) -> dict[str, Any]:
    """Return the plan of one pair: its sizes, and how it fits each card."""
    from prefix_distill import config as configuration
    from prefix_distill.planning import plan

    models = dict(zip(("models.student", "models.teacher"), pair, strict=True))
    folders = {key: str(folder / name) for key, name in models.items()}
    config = configuration.build(SETTINGS | folders)
    document = plan.plan(config, prompt_tokens=200, prefixes="512", card=",".join(cards))
    return {
        "student": pair[0],
        "teacher": pair[1],
        "parameters": [document[role]["parameters"] for role in ("student", "teacher")],
        "assumptions": document["assumptions"],
        "cards": document["cards"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one pair, one card; write nothing")
    parser.add_argument("--keep", action="store_true", help="write results/cards.json")
    given = parser.parse_args()
    if given.quick and given.keep:
        parser.error("--quick writes nothing; drop --keep")
    most = 1 if given.quick else None
    with tempfile.TemporaryDirectory() as text:
        write_configs(Path(text))
        plans = [plan_pair(Path(text), pair, CARDS[:most]) for pair in PAIRS[:most]]
    measure.record("cards", {"settings": SETTINGS, "pairs": plans}, given.keep)


if __name__ == "__main__":
    main()

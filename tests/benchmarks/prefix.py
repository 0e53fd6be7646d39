"""Run a grid of tests/benchmarks/arms/: accuracy against FLOPs, and a verdict on each claim.

    python tests/benchmarks/prefix.py [--arms prefix] [--out runs/prefix] [--quick]

The script runs (or resumes) `prefix-distill compare tests/benchmarks/arms/ARMS.yaml --out OUT`. It
records results/ARMS.csv (a row per arm, seed and evaluation), ARMS.json (means, paired intervals,
costs, claims) and ARMS.png. The last printed line is JSON. The arms files:

    prefix         the built-in task `choice`; about 90 minutes on one core, the others less
    prefix-shared  the built-in task `shared`
    prefix-tied    the built-in task `tied`
    prefix-wide    another student on `choice`
    prefix-real    SmolLM2 by held-out KL; requires the packages of real_pair.py, and ``--work``
                   keeps the pair
    plugins        token selection, extrapolation and self-distillation with their controls
    cross          a student and a teacher with different tokenizers
    lora           adapters of three ranks

``--quick`` runs two steps with one seed, one learning rate and 20 problems, and records nothing.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy
import torch
import yaml
from measure import HERE, machine, record

from prefix_distill import config as configuration
from prefix_distill import display
from prefix_distill.cli import quiet
from prefix_distill.engine import loading
from prefix_distill.engine.sampling import Request, Sampler, generate
from prefix_distill.prompts import templates
from prefix_distill.prompts.load import load_evaluation_prompts
from prefix_distill.results import compare, evaluation, plots
from prefix_distill.results import summary as report
from prefix_distill.results.compare import Arms
from prefix_distill.results.evaluations_csv import write_csv
from prefix_distill.results.runs import AXES, StoredRun, by_arm, collect_runs
from prefix_distill.results.summary import Resampled
from prefix_distill.training import prepare as preflight
from prefix_distill.training.run import settled

MARGIN = 0.03  # largest deficit in accuracy of an arm that "matches"
PICTURED: dict[
    str, dict[str, tuple[tuple[str, ...], str]]
] = {  # suffix of the picture → (arms, x axis)
    "prefix": {"": (("full", "sft", "5%", "10%", "20%", "40%", "auto", "linear"), AXES[0])},
    "plugins": {
        "-select": (
            (
                "full",
                "full soft-or 0.1",
                "full random 0.1",
                "full entropy-sample 0.1",
                "full bottom 0.5",
                "40%",
                "40% soft-or 0.1",
                "40% random 0.1",
            ),
            AXES[0],
        ),
        "-updates": (
            (
                "slow",
                "slow effopd",
                "slow effopd heldout-kl",
                "slow always-1",
                "slow random",
                "slow 3x",
                "slow 10x",
            ),
            AXES[3],
        ),
        "-flops": (
            (
                "slow",
                "slow effopd",
                "slow effopd heldout-kl",
                "slow always-1",
                "slow random",
                "slow 3x",
                "slow 10x",
            ),
            AXES[0],
        ),
    },
    "cross": {},
    "lora": {},
}
# (published or expected claim, better arm, worse arm)
ORDERINGS = (
    ("on-policy beats the teacher's text (GKD)", "full", "sft"),
    ("a longer prefix is better if the budget allows (2602.15260)", "40%", "5%"),
    ("the first K tokens beat the middle K", "first-19", "middle-19"),
    ("the first K tokens beat the last K", "first-19", "last-19"),
    ("the first K tokens beat a random window", "first-19", "random-19"),
    ("the first K tokens beat the K of highest KL", "first-19", "highest-kl-19"),
    ("the last K tokens are the worst window", "middle-19", "last-19"),
    ("an on-policy prefix beats the teacher's prefix, reverse KL", "10%", "off-policy-reverse"),
    ("an on-policy prefix beats the teacher's prefix, forward KL", "10%", "off-policy-forward"),
    ("on a short prefix reverse KL beats forward KL", "10%", "on-policy-forward"),
    ("the whole vocabulary beats the sampled token (lower variance)", "10%", "sampled"),
    *(
        (f"TIP: soft-or at {share} beats all tokens", f"{base} soft-or {share}", base)
        for base in ("full", "40%")
        for share in (0.5, 0.2, 0.1)
    ),
    *(
        (
            f"TIP: soft-or beats {other} at {share}",
            f"{base} soft-or {share}",
            f"{base} {other} {share}",
        )
        for base in ("full", "40%")
        for other in ("random", "entropy-sample")
        for share in (0.5, 0.2, 0.1)
    ),
    ("TIP: the overconfident tokens beat random ones", "full overconfident 0.1", "full random 0.1"),
    ("TIP: soft-or beats the tokens of highest entropy", "full soft-or 0.1", "full entropy 0.1"),
    (
        "TIP: soft-or beats the tokens of highest divergence",
        "full soft-or 0.1",
        "full divergence 0.1",
    ),
    ("TIP: a random half beats the bottom half by soft-or", "full random 0.5", "full bottom 0.5"),
    ("EffOPD: extrapolation beats none", "slow effopd", "slow"),
    ("EffOPD: scoring beats always taking k = 1", "slow effopd", "slow always-1"),
    ("EffOPD: scoring beats a random choice", "slow effopd", "slow random"),
    ("EffOPD beats three times the learning rate", "slow effopd", "slow 3x"),
    ("EffOPD beats ten times the learning rate", "slow effopd", "slow 10x"),
    (
        "EffOPD: scoring by accuracy beats scoring by held-out KL",
        "slow effopd",
        "slow effopd heldout-kl",
    ),
    ("EffOPD: attention and MLP alone beat all weights", "slow effopd", "slow effopd all weights"),
    ("EffOPD also gains at the tuned learning rate", "full effopd", "full"),
    ("EffOPD also gains on a prefix", "40% effopd", "40%"),
    *(
        (f"prefix + TIP + EffOPD beats {name} alone", "40% soft-or 0.5 effopd", alone)
        for name, alone in (
            ("the prefix", "40%"),
            ("TIP", "full soft-or 0.5"),
            ("EffOPD", "full effopd"),
        )
    ),
    *(
        (
            f"PW-OPSD: moderate weights beat uniform ones ({start}, {reduction})",
            f"{start} moderate {reduction}",
            f"{start} uniform {reduction}",
        )
        for start in ("student", "half")
        for reduction in ("token", "sequence")
    ),
    *(
        (
            f"PW-OPSD: rising weights beat falling ones ({start}, {reduction})",
            f"{start} moderate {reduction}",
            f"{start} decreasing {reduction}",
        )
        for start in ("student", "half")
        for reduction in ("token", "sequence")
    ),
    *(
        (
            f"PW-OPSD: a mean over rollouts beats a mean over tokens ({start}, uniform)",
            f"{start} uniform sequence",
            f"{start} uniform token",
        )
        for start in ("student", "half")
    ),
    *(
        (text, base + better, base + worse)
        for base in ("", "20% ")
        for text, better, worse in (
            ("one-token units alone beat spans (2610.08448)", "strict", "simct"),
            ("SimCT as in its paper beats its released code", "simct", "simct-released"),
        )
    ),
    *(
        (f"on-policy units beat the teacher's text, re-encoded ({arm})", arm, "sft")
        for arm in ("strict", "simct", "simct-released", "20% simct")
    ),
    ("a prefix of SimCT's units beats full rollouts of them", "20% simct", "simct"),
    *(
        (f"all weights beat a LoRA adapter of rank {rank}", "all weights", f"LoRA {rank}")
        for rank in (2, 8, 32)
    ),
    *(
        (
            f"OPSD: the entry-wise clip helps ({start})",
            f"{start} uniform token clipped",
            f"{start} uniform token",
        )
        for start in ("student", "half")
    ),
)


def verdict(low: float, high: float) -> str:
    return "reproduced" if low > 0 else "reversed" if high < 0 else "not reproduced"


def difference(curves, better: str, worse: str) -> dict:
    """Return the final accuracy of one arm minus another's, with the paired interval."""
    low, high = report.interval(curves[better][2][:, -1] - curves[worse][2][:, -1])
    return {
        "value": (curves[better][1][-1] - curves[worse][1][-1]).item(),
        "low": low,
        "high": high,
    }


def gain(curve) -> dict:
    """Return an arm's final accuracy minus its initial one, with the paired interval."""
    low, high = report.interval(curve[2][:, -1] - curve[2][:, 0])
    return {
        "value": (curve[1][-1] - curve[1][0]).item(),
        "low": low,
        "high": high,
        "verdict": verdict(low, high),
    }


def speed_up(drawn: Resampled, arm: str, reference: str, what: str) -> dict:
    """Return how many times fewer steps or useful FLOPs an arm needs than the reference.

    Both costs are those of 90% of the reference's gain. The published figure is three.
    """
    sides = [drawn.curve(name) for name in (reference, arm)]

    def one(accuracies, costs) -> float:
        wanted = accuracies[0][0] + 0.9 * (accuracies[0][-1] - accuracies[0][0])
        needed = [
            report.first_cost(cost, accuracy, wanted)
            for accuracy, cost in zip(accuracies, costs, strict=True)
        ]
        return (
            needed[0] / needed[1] if 0 < needed[1] < math.inf else 0.0
        )  # 0: the arm does not reach it, or the reference has no gain

    steps = [[float(step) for step in side[0]] for side in sides]
    accuracy_draws = [side[2].tolist() for side in sides]
    cost_draws = [side[4].tolist() for side in sides]
    draws = numpy.array(
        [
            one((ref, own), steps if what == "updates" else (ref_cost, own_cost))
            for ref, own, ref_cost, own_cost in zip(*accuracy_draws, *cost_draws, strict=True)
        ],
        dtype=numpy.float32,
    )
    low, high = report.interval(draws)
    value = one(
        [side[1].tolist() for side in sides],
        steps if what == "updates" else [side[3].tolist() for side in sides],
    )
    return {
        "value": value,
        "low": low,
        "high": high,
        "verdict": "reproduced" if low >= 3 else "reversed" if high < 1 else "not reproduced",
    }


def claims(
    drawn: Resampled, rows: dict[str, dict], longer: dict[str, list[list[float]]]
) -> list[dict]:
    """Return every claim whose arms were run, with its verdict.

    ``longer``: arm → for each seed, whether the answer to each longer problem is correct.
    """
    found, curves = [], {arm: drawn.curve(arm) for arm in drawn.arms}
    for text, better, worse in ORDERINGS:
        if better in curves and worse in curves:
            gap = difference(curves, better, worse)
            found.append(
                {
                    "claim": text,
                    "better": better,
                    "worse": worse,
                    **gap,
                    "verdict": verdict(gap["low"], gap["high"]),
                }
            )
    found += [
        {
            "claim": f"EffOPD reaches 90 % of the gain without it in a third of the {what}",
            "better": "slow effopd",
            "worse": "slow",
            **speed_up(drawn, "slow effopd", "slow", what),
            "unit": "times",
        }
        for what in ("updates", "useful FLOPs")
        if "slow effopd" in rows
    ]
    found += [
        {
            "claim": f"OPSD raises the accuracy of its initial model ({start})",
            "better": arm,
            "worse": "untrained",
            **gain(curves[arm]),
        }
        for start in ("student", "half")
        if (arm := f"{start} uniform token") in curves
    ]
    constant = [arm for arm in rows if arm.endswith("%") and arm[:-1].isdigit() and "5%" in rows]
    best = max(constant, key=lambda arm: rows[arm]["accuracy"], default=None)
    if "full" in rows and best is not None:
        gap = difference(curves, best, "full")
        found.append(
            {
                "claim": f"the best constant prefix matches full rollouts (within {MARGIN:.0%})",
                "better": best,
                "worse": "full",
                **gap,
                "verdict": verdict(gap["low"] + MARGIN, gap["high"] + MARGIN),
            }
        )
        ratio = max(
            (rows[arm]["cost_ratios"][0.95] | {"arm": arm} for arm in constant),
            key=lambda r: r["value"] or 0,
        )
        found.append(
            {
                "claim": "a prefix reaches 95 % of full rollouts' gain at half the cost or less",
                "better": ratio["arm"],
                "worse": "full",
                **{k: ratio[k] for k in ("value", "low", "high")},
                "unit": "times",
                "verdict": verdict(ratio["low"] - 2, ratio["high"] - 2),
            }
        )
    if "auto" in rows and best is not None:
        gap = difference(curves, "auto", best)
        found.append(
            {
                "claim": f"auto is within {MARGIN:.0%} of the best constant prefix",
                "better": "auto",
                "worse": best,
                **gap,
                "verdict": verdict(gap["value"] + MARGIN, gap["value"] + MARGIN),
            }
        )
        ratio = rows["auto"]["flops_useful"] / rows[best]["flops_useful"]
        found.append(
            {
                "claim": "auto costs at most 1.5 times the best constant prefix",
                "better": "auto",
                "worse": best,
                "value": ratio,
                "low": ratio,
                "high": ratio,
                "unit": "times",
                "verdict": verdict(1.5 - ratio, 1.5 - ratio),
            }
        )
    for arm in ("5%", "10%", "full"):
        if longer and arm in longer:
            # [seeds, problems]
            gaps = numpy.array(longer["untrained"]) - numpy.array(longer[arm])
            low, high = report.interval(drawn.resample(gaps[:, None])[:, 0])
            found.append(
                {
                    "claim": "distillation hurts problems longer than those in training "
                    "(2602.15260: short prefixes, weak students)",
                    "better": "untrained",
                    "worse": arm,
                    "value": gaps.mean().item(),
                    "low": low,
                    "high": high,
                    "verdict": verdict(low, high),
                }
            )
    return found


def right(file: Path) -> list[float]:
    """Return the share of correct answers per problem in a file that `eval` wrote."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        sum(r["correct"] for r in record["responses"]) / len(record["responses"])
        for record in records
    ]


def untrained(arms: Arms, rows: list[dict]) -> tuple[dict, dict[str, list[list[float]]]]:
    """Return the row of the untrained student, and its answers to the additional data sets.

    The accuracy on the test problems is the first evaluation of any arm. The answers are: data set
    → for each seed, the share of correct answers to each problem.
    """
    answers: dict[str, list[list[float]]] = {}
    for name, also in arms.also.items():
        for seed in arms.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "answers.jsonl"
                evaluation.evaluate_model(
                    configuration.build(
                        also
                        | {
                            "models.student": arms.base["models.student"],
                            "runtime.seed": seed,
                            "checkpoint.out": str(file),
                        }
                    )
                )
                answers.setdefault(name, []).append(right(file))
    means = {name: sum(map(sum, seeds)) / sum(map(len, seeds)) for name, seeds in answers.items()}
    return {"arm": "untrained", "accuracy": rows[0]["before"], "also": means}, answers


def saving(arms: Arms, rows: list[dict]) -> dict | None:
    """Return the useful FLOPs of a step with full rollouts over those with each arm's prefix.

    The ledger computes both at the mean answer length of the trained reference student. The ratio
    is the saving that the lengths of prompts and answers allow at an equal number of steps. Return
    None without a reference arm.
    """
    if arms.reference is None:
        return None
    run = preflight.prepare(configuration.build(arms.settings(arms.reference, arms.seeds[0])))
    full = next(row["mean_tokens"] for row in rows if row["arm"] == arms.reference)
    prompts = run.problems.train[: run.config.train.batch_size]

    def cost(tokens):
        return run.update_cost(prompts, tokens)

    lengths = [len(p.student_ids) for p in prompts]
    return {
        "prompt_tokens": sum(lengths) / len(lengths),
        "full_tokens": full,
        "of_one_token": cost(full) / cost(1),
        "per_update": {
            row["arm"]: cost(full) / cost(row["prefix"]) for row in rows if row["prefix"] < full
        },
    }


def extrapolations(runs: list[StoredRun]) -> dict:
    """Return the accepted k of every trigger for each arm with extrapolation.

    Each arm has the k by seed and the candidates' mean share of the useful FLOPs. Where it was
    measured, ``cosine`` compares the displacement at a trigger with the final one, as the mean over
    seeds.
    """
    found = {}
    for arm, group in by_arm(runs).items():
        if any(run.result["extrapolations"] for run in group):
            spent = [
                run.result["flops"]["by_phase"].get("extrapolation", {"useful": 0.0})["useful"]
                / run.result["flops"]["useful"]
                for run in group
            ]
            found[arm] = {
                "k": [[x["k"] for x in run.result["extrapolations"]] for run in group],
                "share": sum(spent) / len(spent),
            }
            tables = [
                json.loads((run.path / "displacement.json").read_text())
                for run in group
                if (run.path / "displacement.json").exists()
            ]
            if tables:
                found[arm]["cosine"] = {
                    rows[0]["step"]: sum(row["modules"]["all"]["cosine"] for row in rows)
                    / len(rows)
                    for rows in zip(*tables, strict=True)
                }
    return found


def canonical(runs: list[StoredRun], arms: Arms) -> dict[str, float]:
    """Return, for each arm, the share of canonically tokenized answers.

    An answer is canonical if the student's tokenizer encodes its text to the sampled tokens. The
    share is that of 100 sampled answers (first seed). The untrained student is included.
    """
    found, base = {}, configuration.build(arms.base)
    dataset = settled(base.evaluate.dataset, "--eval-dataset")
    problems = load_evaluation_prompts(dataset, split="test", limit=100).prompts
    folders = {"untrained": settled(base.models.student, "--student")} | {
        arm: str(group[0].path / "model") for arm, group in by_arm(runs).items()
    }
    for arm, folder in folders.items():
        model = loading.load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
        requests = [
            Request(ids=tuple(templates.render(model, p, "chat")), key=("canonical", i))
            for i, p in enumerate(problems)
        ]
        sampler = Sampler(
            eos=model.eos,
            pad=model.tokenizer.pad_token_id,
            support=len(model.tokenizer),
            seed=0,
            rows=len(requests),
        )
        answers = [
            r.ids[:-1] if r.finished else r.ids
            for r in generate(model, requests, max_new_tokens=192, sampler=sampler)
        ]
        texts = [model.tokenizer.decode(list(ids)) for ids in answers]
        own = [tuple(model.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        found[arm] = sum(map(tuple.__eq__, answers, own)) / len(answers)
    return found


def arms_text(name: str, work: Path) -> str:
    """Return the arms file with the paths of the real pair in place of its variables."""
    text = (HERE / "arms" / f"{name}.yaml").read_text()
    if "$PAIR/" not in text:
        return text
    import real_pair
    from scaling import pair

    return text.replace("$PAIR/", f"{pair(work)}/").replace(
        "{dataset: $QUESTIONS", f"{{dataset: {real_pair.questions()}"
    )


def quick(text: str) -> str:
    """Return the arms file reduced to a minute or two."""
    tree = yaml.safe_load(text)
    tree["seeds"], tree["tune"], tree["also"] = [0], {}, {}
    tree["base"]["train"]["steps"] = 2
    evaluate = tree["base"]["evaluate"]
    evaluate |= {"problems": min(20, evaluate["problems"]), "every": 1, "kl_prompts": 4}
    tree["arms"] = {
        arm: {k: v for k, v in keys.items() if k != "train"}
        for arm, keys in tree["arms"].items()
        if arm
        in (
            "full",
            "sft",
            "5%",
            "10%",
            "auto",
            "full soft-or 0.5",
            "slow",
            "slow effopd",
            "student uniform token",
            "strict",
            "simct",
        )
    }
    return yaml.safe_dump(tree)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arms", default="prefix", help="name of a file in tests/benchmarks/arms")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--work", type=Path, help="folder for the real pair (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="two steps, one seed; record nothing")
    given = parser.parse_args()
    quiet.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        text = arms_text(given.arms, given.work or Path(scratch) / "pair")
        file = Path(scratch) / f"{given.arms}.yaml"
        file.write_text(quick(text) if given.quick else text)
        out = Path(scratch) / "out" if given.quick else given.out or Path("runs") / given.arms
        arms = compare.read_arms(str(file))
        compare.compare(arms, out, display.Terminal(), preflight.prepare)
        runs = collect_runs([out])
        rows = report.summarize(runs, arms.reference)
        before, answers = untrained(arms, rows)
        named = {row["arm"]: row for row in [before, *rows]}
        drawn = Resampled(by_arm(runs)) if all(run.right for run in runs) else None
        longer = (
            {
                arm: [right(run.path / "also-longer.jsonl") for run in group]
                for arm, group in by_arm(runs).items()
            }
            | {"untrained": answers["longer"]}
            if "longer" in arms.also
            else {}
        )
        if not given.quick:
            write_csv(runs, HERE / "results" / f"{given.arms}.csv")
            for end, (pictured, against) in PICTURED.get(given.arms, PICTURED["prefix"]).items():
                figure = plots.draw_report(
                    runs, title="", only=[arm for arm in pictured if arm in named], against=against
                )
                (HERE / "results" / f"{given.arms}{end}.png").write_bytes(plots.encode_png(figure))
        document = {
            "arms_file": given.arms,
            "machine": machine(),
            "summary": list(named.values()),
            "saving": saving(arms, rows),
            "claims": claims(drawn, named, longer) if drawn and drawn.paired else [],
            "extrapolations": extrapolations(runs),
            "decisions": {
                f"{run.arm} seed {run.seed}": [d["reason"] for d in run.result["prefix_decisions"]]
                for run in runs
                if run.result["prefix_decisions"]
            },
        }
        if given.arms == "cross" and not given.quick:
            document["canonical"] = canonical(runs, arms)
            first = [
                run.result["evaluations"][0]["alignment"]
                for run in runs
                if run.arm == arms.reference
            ]
            document["alignment"] = {
                name: sum(row[name] for row in first) / len(first) for name in first[0]
            }
        record(given.arms, document, not given.quick)


if __name__ == "__main__":
    main()

"""How much prefix is enough? The grids of tests/benchmarks/arms/: accuracy against FLOPs, and the published orderings one by one.

    python tests/benchmarks/prefix.py [--arms prefix] [--out runs/prefix] [--quick]

Runs (or goes on with) `prefix-distill compare tests/benchmarks/arms/ARMS.yaml --out OUT` and records results/ARMS.csv (a row per
arm, seed and evaluation), ARMS.json (means, paired intervals, costs, claims) and ARMS.png; prints one JSON line last. `prefix` is the
choice-of-method task, `prefix-shared` and `prefix-tied` the other two, `prefix-wide` another student on the first,
`prefix-real` SmolLM2 by held-out KL (needs what real_pair.py needs; ``--work`` keeps the pair). On 2 cores `prefix` takes about 90
minutes on one of them, the others less. ``--quick``: two updates, one seed, one rate, 20 problems, nothing recorded.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from measure import HERE, machine, record

from prefix_distill import cli, compare, preflight, report
from prefix_distill import config as configuration

MARGIN = 0.03  # points by which an arm may be behind and still "match"
PICTURED = ("full", "sft", "5%", "10%", "20%", "40%", "auto", "linear")
# (who says so, better arm, worse arm)
ORDERINGS = (
    ("on-policy beats the teacher's text (GKD)", "full", "sft"),
    ("a longer prefix wins while there is budget (2602.15260)", "40%", "5%"),
    ("the first K tokens beat the middle K", "first-19", "middle-19"),
    ("the first K tokens beat the last K", "first-19", "last-19"),
    ("the first K tokens beat a random window", "first-19", "random-19"),
    ("the first K tokens beat the K of highest KL", "first-19", "highest-kl-19"),
    ("the last K tokens are the worst window", "middle-19", "last-19"),
    ("an on-policy prefix beats the teacher's prefix, reverse KL", "10%", "off-policy-reverse"),
    ("an on-policy prefix beats the teacher's prefix, forward KL", "10%", "off-policy-forward"),
    ("on a short prefix reverse KL beats forward KL", "10%", "on-policy-forward"),
    ("the whole vocabulary beats the sampled token (lower variance)", "10%", "sampled"),
)


def verdict(low: float, high: float) -> str:
    return "reproduced" if low > 0 else "reversed" if high < 0 else "not reproduced"


def difference(curves, better: str, worse: str) -> dict:
    """Final accuracy of one arm minus another's, with the paired interval."""
    low, high = report.interval(curves[better][2][:, -1] - curves[worse][2][:, -1])
    return {"value": (curves[better][1][-1] - curves[worse][1][-1]).item(), "low": low, "high": high}


def claims(drawn: report.Resampled, rows: dict[str, dict], longer: dict[str, list[list[float]]]) -> list[dict]:
    """Every published ordering whose arms were run. ``longer``: arm → seed → right or wrong per longer problem."""
    found, curves = [], {arm: drawn.curve(arm) for arm in drawn.arms}
    for text, better, worse in ORDERINGS:
        if better in curves and worse in curves:
            gap = difference(curves, better, worse)
            found.append({"claim": text, "better": better, "worse": worse, **gap, "verdict": verdict(gap["low"], gap["high"])})
    constant = [arm for arm in rows if arm.endswith("%") and arm[:-1].isdigit()]
    best = max(constant, key=lambda arm: rows[arm]["accuracy"], default=None)
    if "full" in rows and constant:
        gap = difference(curves, best, "full")
        found.append({"claim": f"the best constant prefix matches full rollouts (within {MARGIN:.0%})", "better": best, "worse": "full",
                      **gap, "verdict": verdict(gap["low"] + MARGIN, gap["high"] + MARGIN)})
        ratio = max((rows[arm]["cost_ratios"][0.95] | {"arm": arm} for arm in constant), key=lambda r: r["value"] or 0)
        found.append({"claim": "a prefix reaches 95 % of full rollouts' gain at half the cost or less", "better": ratio["arm"],
                      "worse": "full", **{k: ratio[k] for k in ("value", "low", "high")}, "unit": "times",
                      "verdict": verdict(ratio["low"] - 2, ratio["high"] - 2)})
    if "auto" in rows and constant:
        gap = difference(curves, "auto", best)
        found.append({"claim": f"auto is within {MARGIN:.0%} of the best constant prefix", "better": "auto", "worse": best, **gap,
                      "verdict": verdict(gap["value"] + MARGIN, gap["value"] + MARGIN)})
        ratio = rows["auto"]["flops_useful"] / rows[best]["flops_useful"]
        found.append({"claim": "auto costs at most 1.5 times the best constant prefix", "better": "auto", "worse": best,
                      "value": ratio, "low": ratio, "high": ratio, "unit": "times", "verdict": verdict(1.5 - ratio, 1.5 - ratio)})
    for arm in ("5%", "10%", "full"):
        if longer and arm in longer:
            gaps = torch.tensor(longer["untrained"]) - torch.tensor(longer[arm])  # [seeds, problems]
            low, high = report.interval(torch.einsum("rk,kp,rp->r", drawn.seeds, gaps.double(), drawn.problems))
            found.append({"claim": "distillation hurts problems longer than any trained on (2602.15260: short prefixes, weak students)",
                          "better": "untrained", "worse": arm, "value": gaps.double().mean().item(), "low": low, "high": high,
                          "verdict": verdict(low, high)})
    return found


def right(file: Path) -> list[float]:
    """Share of right answers per problem in a file of `eval`'s."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [sum(r["correct"] for r in record["responses"]) / len(record["responses"]) for record in records]


def untrained(arms: compare.Arms, rows: list[dict]) -> tuple[dict, dict[str, list[list[float]]]]:
    """The student as it is: on the test problems (any arm's first evaluation) and on the other ones → (row, data set → seed →
    right or wrong per problem)."""
    answers: dict[str, list[list[float]]] = {}
    for name, also in arms.also.items():
        for seed in arms.seeds:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "answers.jsonl"
                preflight.evaluate_model(configuration.build(also | {
                    "models.student": arms.base["models.student"], "runtime.seed": seed, "checkpoint.out": str(file)}))
                answers.setdefault(name, []).append(right(file))
    means = {name: sum(map(sum, seeds)) / sum(map(len, seeds)) for name, seeds in answers.items()}
    return {"arm": "untrained", "accuracy": rows[0]["before"], "also": means}, answers


def saving(arms: compare.Arms, rows: list[dict]) -> dict | None:
    """Useful FLOPs of an update with full rollouts over one with the arm's prefix, by the ledger, at the trained students' mean
    full length: what prompt and trace lengths allow at equal updates. None without a reference."""
    if arms.reference is None:
        return None
    run = preflight.prepare(configuration.build(arms.settings(arms.reference, arms.seeds[0])))
    full = next(row["mean_tokens"] for row in rows if row["arm"] == arms.reference)
    prompts = run.train_prompts[: run.config.train.batch_size]
    cost = lambda tokens: run.update_cost(prompts, tokens)
    lengths = [len(p.student_ids) for p in prompts]
    return {"prompt_tokens": sum(lengths) / len(lengths), "full_tokens": full, "of_one_token": cost(full) / cost(1),
            "per_update": {row["arm"]: cost(full) / cost(row["prefix"]) for row in rows if row["prefix"] < full}}


def arms_text(name: str, work: Path) -> str:
    """The arms file, with the real pair's paths where it asks for them."""
    text = (HERE / "arms" / f"{name}.yaml").read_text()
    if "$PAIR/" not in text:
        return text
    import real_pair
    from scaling import pair

    return text.replace("$PAIR/", f"{pair(work)}/").replace("{dataset: $QUESTIONS", f"{{dataset: {real_pair.questions()}")


def quick(text: str) -> str:
    """The arms file cut down to a minute or two."""
    tree = yaml.safe_load(text)
    tree["seeds"], tree["tune"], tree["also"] = [0], {}, {}
    tree["base"]["train"]["steps"] = 2
    evaluate = tree["base"]["evaluate"]
    evaluate |= {"problems": min(20, evaluate["problems"]), "every": 1, "kl_prompts": 4}
    tree["arms"] = {arm: {k: v for k, v in keys.items() if k != "train"} for arm, keys in tree["arms"].items()
                    if arm in ("full", "sft", "10%", "auto")}
    return yaml.safe_dump(tree)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arms", default="prefix", help="name of a file in tests/benchmarks/arms")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder for the real pair (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="two updates, one seed, nothing recorded")
    given = parser.parse_args()
    cli.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        text = arms_text(given.arms, given.work or Path(scratch) / "pair")
        file = Path(scratch) / f"{given.arms}.yaml"
        file.write_text(quick(text) if given.quick else text)
        out = Path(scratch) / "out" if given.quick else given.out or Path("runs") / given.arms
        arms = compare.read(str(file))
        compare.compare(arms, out, cli.train_in, lambda text: print(text, file=sys.stderr))
        runs = report.collect([out])
        rows = report.summary(runs, arms.reference)
        before, answers = untrained(arms, rows)
        named = {row["arm"]: row for row in [before, *rows]}
        drawn = report.Resampled(report.by_arm(runs)) if all(run.right for run in runs) else None
        longer = {arm: [right(run.path / "also-longer.jsonl") for run in group] for arm, group in report.by_arm(runs).items()
                  } | {"untrained": answers["longer"]} if "longer" in arms.also else {}
        if not given.quick:
            report.write_csv(runs, HERE / "results" / f"{given.arms}.csv")
            pictured = [arm for arm in PICTURED if arm in named]
            (HERE / "results" / f"{given.arms}.png").write_bytes(report.png(report.draw(runs, "", pictured)))
        document = {"arms_file": given.arms, "machine": machine(), "summary": list(named.values()), "saving": saving(arms, rows),
                    "claims": claims(drawn, named, longer) if drawn and drawn.paired else [],
                    "decisions": {f"{run.arm} seed {run.seed}": [d["reason"] for d in run.result["prefix_decisions"]]
                                  for run in runs if run.result["prefix_decisions"]}}
        record(given.arms, document, not given.quick)


if __name__ == "__main__":
    sys.exit(main())

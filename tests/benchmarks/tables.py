"""Write results/README.md from the recorded results and from the text in tables.md.jinja.

    python tests/benchmarks/tables.py [--write] [--quick]

Print the page, then one JSON line. ``--write`` also updates results/README.md. Every number of
the page comes from results/*.json or results/*.csv. The script needs no torch and takes less than a
second. ``--quick`` changes nothing; the option exists because every benchmark has it.
"""

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = RESULTS / "README.md"
SIGNS = {"reproduced": "+", "not reproduced": "0", "reversed": "−"}
TASKS = {"choice": "prefix", "shared": "prefix-shared", "tied": "prefix-tied"}


def read(name: str) -> dict[str, Any]:
    """Return the recorded document results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_csv(name: str) -> list[dict[str, str]]:
    """Return the rows of results/NAME.csv."""
    with open(RESULTS / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_arm(name: str) -> dict[str, dict[str, Any]]:
    """Return the summary of results/NAME.json as arm → row."""
    return {row["arm"]: row for row in read(name)["summary"]}


# Cells


def markdown(header: str, rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table.

    ``header``: the column titles, separated by ``|``. ``left``: the columns that hold text; the
    others hold numbers and are aligned to the right.
    """
    titles = [title.strip() for title in header.split("|")]
    rule = ["---" if column in left else "--:" for column in range(len(titles))]
    lines = [titles, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(score: dict[str, Any], key: str = "value") -> str:
    """Return a share in percent, with its 95% interval if it has one."""
    if score.get("low") is None:
        return f"{score[key]:.1%}"
    return f"{score[key]:.1%} [{score['low']:.1%}, {score['high']:.1%}]"


def fixed(value: float, digits: int) -> str:
    """Return a number with the given number of decimals."""
    return f"{value:.{digits}f}"


def percent(share: float, digits: int = 0) -> str:
    """Return a share in percent."""
    return f"{100 * share:.{digits}f}%"


def accuracy(row: dict[str, Any]) -> str:
    """Return the accuracy of a summary's row with its interval."""
    return interval(row, "accuracy")


def points(claim: dict[str, Any]) -> str:
    """Return a difference in points (or a ratio) with its interval."""
    if claim.get("unit") == "times":
        if claim["value"] is None:
            return "not reached"
        return f"{claim['value']:.1f} × [{claim['low']:.1f}, {claim['high']:.1f}]"
    value = f"{100 * claim['value']:+.1f}"
    if claim["low"] is None:
        return value
    return f"{value} [{100 * claim['low']:+.1f}, {100 * claim['high']:+.1f}]"


def cost_ratio(ratio: dict[str, Any]) -> str:
    """Return the reference's cost over an arm's, to reach the same accuracy."""
    if ratio["value"] is None:
        return "not reached"
    return f"{ratio['value']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]"


def accuracy_of(arms: dict[str, dict[str, Any]], arm: str) -> str:
    """Return the accuracy of an arm; return an empty cell if the grid does not have it."""
    if arm not in arms:
        return ""
    return accuracy(arms[arm])


def gflops(row: dict[str, Any]) -> str:
    """Return the useful FLOPs in billions; return an empty cell for the untrained student."""
    if row["arm"] == "untrained":
        return ""
    return f"{row['flops_useful'] / 1e9:.1f} G"


def arm_name(arm: str) -> str:
    """Return an arm's name as code; `untrained` is not an arm."""
    if arm == "untrained":
        return arm
    return f"`{arm}`"


def machine(name: str) -> str:
    """Return processor, threads and versions of a recorded result."""
    document = read(name)
    facts = document.get("machine", document)
    versions = [
        f"{package} {number.removesuffix('+cpu')}" for package, number in facts["versions"].items()
    ]
    threads = f"{facts['threads']} threads".replace("1 threads", "1 thread")
    return f"{facts['cpu']}, {threads}, {', '.join(versions)}"


def claim(name: str, better: str, worse: str) -> dict[str, Any]:
    """Return the recorded claim in points on two arms.

    Raises LookupError if results/NAME.json has none.
    """
    for candidate in read(name)["claims"]:
        arms = candidate["better"], candidate["worse"]
        if arms == (better, worse) and candidate.get("unit") != "times":
            return candidate
    raise LookupError(f"results/{name}.json: expected a claim on {better} and {worse}, got none")


# Tables


def demo_table() -> str:
    """Return the table of `prefix-distill demo`, seed 0."""
    document = read("demo")
    student, teacher, arms = document["student"], document["teacher"], document["arms"]
    untrained_tokens = f"{arms[0]['evaluations'][0]['mean_tokens']:.0f}"
    rows = [["student, untrained", interval(student), "", "", untrained_tokens]]
    for arm, name in zip(arms, ("24-token prefix", "full rollouts"), strict=True):
        rows.append(
            [
                name,
                interval(arm["accuracy"]),
                f"{arm['flops_useful'] / 1e9:.1f} G",
                f"{arm['seconds']:.0f} s",
                f"{arm['mean_tokens']:.0f}",
            ]
        )
    rows.append(["teacher", interval(teacher), "", "", ""])
    header = f"| accuracy, {student['n']} held-out problems [95%] | useful FLOPs | training time"
    return markdown(f"{header} | tokens per answer", rows)


def prefix_table() -> str:
    """Return the arms of the prefix grid on `choice`."""
    rows = []
    for row in read("prefix")["summary"]:
        cells = [arm_name(row["arm"]), accuracy(row), f"{row['also']['longer']:.1%}"]
        if row["arm"] == "untrained":
            rows.append(cells + 6 * [""])
            continue
        tail = ""
        if row["kl_tail"] is not None:
            tail = f"{row['kl_tail_before']:.3f} → {row['kl_tail']:.3f}"
        cells += [gflops(row), f"{row['seconds']:.0f} s", tail]
        cells += [cost_ratio(row["cost_ratios"][share]) for share in ("0.5", "0.9", "1.0")]
        rows.append(cells)
    header = (
        "arm | accuracy [95%] | longer problems | useful FLOPs | training time | KL beyond its "
        "prefix, before → after | cost of `full` ÷ cost of the arm, to reach 50% of the gain of "
        "`full` | to reach 90% | to reach 100%"
    )
    return markdown(header, rows)


def controls_table() -> str:
    """Return the accuracies of the same arms on the three tasks."""
    tasks = [by_arm(name) for name in TASKS.values()]
    rows = []
    for arm in by_arm(TASKS["tied"]):
        cells = [accuracy_of(arms, arm) for arms in tasks]
        rows.append([arm_name(arm), *cells])
    return markdown(f"arm | {' | '.join(f'`{task}`' for task in TASKS)}", rows)


def claims_table(name: str = "prefix") -> str:
    """Return every claim of a grid; those on `auto` have a separate table."""
    rows = []
    for row in read(name)["claims"]:
        if "auto" in row["claim"]:
            continue
        arms = f"{arm_name(row['better'])} against {arm_name(row['worse'])}"
        words = row["claim"].replace(" %", "%")
        rows.append([words, arms, points(row), row["verdict"]])
    header = "published or expected | arms | difference, points or × [95%] | found here"
    return markdown(header, rows, left=(0, 1, 3))


def auto_table() -> str:
    """Return `auto` and the best constant prefix for both students."""
    rows = []
    for name, student in (("prefix", "0.09 M"), ("prefix-wide", "0.14 M")):
        arms = by_arm(name)
        claims = read(name)["claims"]
        close = next(row for row in claims if row["claim"].startswith("auto is within"))
        cost = next(row for row in claims if row["claim"].startswith("auto costs"))
        best = close["worse"]
        rows.append(
            [
                student,
                f"`{best}`: {accuracy(arms[best])}",
                accuracy(arms["auto"]),
                points(close),
                f"{cost['value']:.2f}",
            ]
        )
    header = (
        "student parameters | best constant prefix | `auto` | difference, points | FLOPs of "
        "`auto` ÷ FLOPs of the best constant prefix"
    )
    return markdown(header, rows)


def select_table() -> str:
    """Return the accuracies of the token selections."""
    arms = by_arm("plugins")
    kinds = [""]
    for kind in ("soft-or", "random", "entropy-sample"):
        kinds += [f"{kind} {share}" for share in (0.5, 0.2, 0.1)]
    kinds += ["overconfident 0.1", "entropy 0.1", "divergence 0.1", "bottom 0.5"]
    rows = []
    for kind in kinds:
        names = [f"{rollouts} {kind}".strip() for rollouts in ("full", "40%")]
        cells = [accuracy_of(arms, name) for name in names]
        rows.append([f"`{kind}`" if kind else "all", *cells])
    return markdown(
        "trained tokens | accuracy on full rollouts [95%] | accuracy on a prefix of 40% [95%]", rows
    )


def extrapolation_table() -> str:
    """Return the arms of extrapolation and the accepted k of their searches."""
    document = read("plugins")
    rows = []
    for row in document["summary"]:
        arm = row["arm"]
        if not arm.startswith("slow") and arm not in ("full", "40%") and "effopd" not in arm:
            continue
        share, accepted = "", ""
        searches = document["extrapolations"].get(arm)
        if searches is not None:
            share = f"{searches['share']:.0%}"
            accepted = " · ".join(" ".join(map(str, seed)) for seed in searches["k"])
        rows.append([arm_name(arm), accuracy(row), gflops(row), share, accepted])
    header = (
        "arm | accuracy [95%] | useful FLOPs | share of candidates | accepted k after steps 1, 2, "
        "4, 8, 16 (three seeds)"
    )
    return markdown(header, rows, left=(0, 4))


def self_table() -> str:
    """Return the arms of self-distillation."""
    arms = by_arm("plugins")
    columns = ("uniform", ""), ("moderate", ""), ("decreasing", ""), ("uniform", " clipped")
    rows = []
    for start, name in (("student", "`student-told`"), ("half", "`teacher-half`")):
        for reduction in ("token", "sequence"):
            names = [f"{start} {weight} {reduction}{more}" for weight, more in columns]
            before = f"{arms[names[0]]['before']:.1%}"
            cells = [accuracy_of(arms, arm) for arm in names]
            rows.append([f"{name}, {reduction}", before, *cells])
    header = "start, reduction | before | uniform | moderate | decreasing | uniform, κ = 0.05"
    return markdown(header, rows)


def selection_cost_table() -> str:
    """Return time and memory of the loss on selected tokens."""
    names = {"naive": "all, full logits", "all": "all, our chunked loss"}
    rows = []
    for row in read("selection")["table"]:
        rows.append(
            [
                names.get(row["arm"]) or f"`soft-or`, {row['arm']}",
                f"{row['seconds']:.1f}",
                f"{row['extra_bytes'] / 2**20:,.0f} MiB",
                f"{row['time_over_all']:.2f}",
                f"{row['memory_over_all']:.2f}",
                f"{row['memory_over_naive']:.3f}",
            ]
        )
    header = (
        "trained tokens | seconds | extra memory | time ÷ our loss on all | memory ÷ our loss on "
        "all | memory ÷ full logits"
    )
    return markdown(header, rows)


def lora_table() -> str:
    """Return adapters of three ranks and training of all weights."""
    document = read("lora")
    claims = {row["worse"]: row for row in document["claims"]}
    rows = []
    for row in document["summary"]:
        arm = row["arm"]
        difference = points(claims[arm]) if arm in claims else ""
        rows.append([arm, accuracy(row), gflops(row), difference])
    header = "arm | accuracy [95%] | useful FLOPs | all weights − the adapter, points [95%]"
    return markdown(header, rows)


def collapse_table() -> str:
    """Return what --stop-when collapse does at three learning rates on three tasks."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in read("collapse")["runs"]:
        groups.setdefault((run["task"], run["rate"]), []).append(run)
    rows = []
    for (task, rate), runs in groups.items():
        stops = [str(run["stopped_after"]) for run in runs if run["stopped_after"] is not None]
        ends = []
        for key in ("accuracy_before", "accuracy_after", "accuracy_at_stop"):
            ends.append(" ".join(percent(run[key]) for run in runs))
        harmed = sum(run["is_harmed"] for run in runs)
        rows.append([f"`{task}`", f"{rate:g}", *ends, f"{harmed} of {len(runs)}", " ".join(stops)])
    header = "task | rate | untrained | trained to the end | with the rule | harmed"
    return markdown(f"{header} | stopped after step", rows)


def cards_table() -> str:
    """Return how pairs of public models fit common cards: what trains, and the planned time."""
    pairs = read("cards")["pairs"]
    titles = [f"{row['card'].upper()}, {row['memory_gb']} GB" for row in pairs[0]["cards"]]
    rows = []
    for pair in pairs:
        names = [short_name(pair[role]) for role in ("student", "teacher")]
        rows.append([" ← ".join(names), *map(card_cell, pair["cards"])])
    return markdown(f"student ← teacher | {' | '.join(titles)}", rows, left=range(len(titles) + 1))


def short_name(model: str) -> str:
    """Return the name of a hub model without its owner and without Instruct."""
    return model.partition("/")[2].removesuffix("-Instruct")


def card_cell(row: dict[str, Any]) -> str:
    """Return what trains on a card, and how long: "LoRA + C, 1.8 h"; a dash if nothing fits."""
    if not row["fits"]:
        return "–"
    trains = "LoRA" if "--lora" in row["flags"] else "all"
    if "--gradient-checkpointing" in row["flags"]:
        trains = f"{trains} + C"
    return f"{trains}, {row['seconds'] / 3600:.1f} h"


def plan_table() -> str:
    """Return forecast and measured memory of the runs in plan.py."""
    rows = []
    for name, run in read("plan")["runs"].items():
        megabytes = [
            f"{run[key] / 1e6:,.0f} MB" for key in ("resident", "resident_exact_malloc", "forecast")
        ]
        errors = [f"{run[key]:+.1%}" for key in ("error", "error_exact_malloc", "flops_error")]
        rows.append([name, *megabytes, *errors])
    header = (
        "run | measured | with exact malloc | forecast | error | error with exact malloc | error "
        "of FLOPs"
    )
    return markdown(header, rows)


def cross_table() -> str:
    """Return the arms of the grid with two tokenizers."""
    document = read("cross")
    rows = []
    for row in document["summary"]:
        tokens = "" if row["arm"] == "untrained" else f"{row['mean_tokens']:.0f}"
        canonical = f"{document['canonical'][row['arm']]:.0%}"
        rows.append([arm_name(row["arm"]), accuracy(row), gflops(row), tokens, canonical])
    header = (
        "arm | accuracy [95%] | useful FLOPs | tokens per answer | share of canonically tokenized "
        "answers"
    )
    return markdown(header, rows)


def real_cross_table() -> str:
    """Return the modes on SmolLM2 and Gemma-3."""
    rows = []
    for mode, row in read("cross_tokenizer")["modes"].items():
        after, text = row["kl_after"], row["log_likelihood_per_byte"]
        before_spans = row["alignment_before"]["kl_spans"]
        after_spans = row["alignment_after"]["kl_spans"]
        rows.append(
            [
                f"`{mode}`",
                f"{row['kl_before']['value']:.3f} → {after['value']:.3f} "
                f"[{after['low']:.3f}, {after['high']:.3f}]",
                f"{before_spans:.2f} → {after_spans:.2f}",
                f"{text['before']:.3f} → {text['after']:.3f}",
                f"{row['alignment_share']:.3%}",
            ]
        )
    header = (
        "mode | KL of 1:1 units, before → after [95%] | KL of spans | log-likelihood of the "
        "teacher's text, per byte | share of the step's time spent on alignment"
    )
    return markdown(header, rows)


def gold_table() -> str:
    """Return a step across tokenizers compared with TRL's GOLDTrainer."""
    rows = []
    for arm, row in read("gold")["arms"].items():
        name, ratios = "GOLD", ["", ""]
        if arm != "gold":
            low, high = row["time_ratio_range"]
            name = f"ours, `{arm}`"
            ratios = [
                f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['memory_ratio']:.2f}",
            ]
        memory = f"{row['peak_bytes'] / 2**30:.2f} GiB"
        rows.append([name, f"{row['seconds']:.1f}", memory, f"{row['tokens']:.0f}", *ratios])
    header = "step | seconds | peak memory | sampled tokens | time ÷ GOLD | memory ÷ GOLD"
    return markdown(header, rows)


def real_table() -> str:
    """Return the held-out KL of the SmolLM2 run by step."""
    rows = []
    for row in read_csv("real"):
        low, high = float(row["kl_low"]), float(row["kl_high"])
        rows.append(
            [
                row["update"],
                f"{float(row['kl']):.3f} [{low:.3f}, {high:.3f}]",
                f"{float(row['kl_prefix']):.3f}",
                f"{float(row['kl_tail']):.3f}",
                f"{float(row['flops_useful']) / 1e12:.1f} T",
            ]
        )
    header = (
        "steps | reverse KL, nats per token [95%] | first 64 tokens | later tokens | useful FLOPs"
    )
    return markdown(header, rows, left=())


def real_grid_table() -> str:
    """Return the held-out KL of the three short arms on SmolLM2."""
    arms: dict[str, list[dict[str, str]]] = {}
    for row in read_csv("prefix-real"):
        arms.setdefault(row["arm"], []).append(row)
    rows = []
    for arm, evaluations in arms.items():
        first, last = evaluations[0], evaluations[-1]
        change = f"{float(first['kl']):.3f} → {float(last['kl']):.3f}"
        rows.append([f"`{arm}`", change, f"{float(last['flops_useful']) / 1e12:.1f} T"])
    return markdown("arm | held-out reverse KL, before → after | useful FLOPs", rows)


def update_table() -> str:
    """Return whole steps compared with TRL."""
    rows = []
    for row in read("update_vs_trl")["cases"]:
        low, high = row["time_ratio_range"]
        sides = [
            f"{row[f'{side}_seconds']:.3g} s, {row[f'{side}_peak_bytes'] / 2**30:.2f} GiB"
            for side in ("ours", "trl")
        ]
        time = f"{row['time_ratio']:.2f} [{low:.2f}, {high:.2f}]"
        name = row["name"].replace("embedded", "built-in")
        rows.append([f"`{name}`", *sides, time, f"{row['memory_ratio']:.2f}"])
    trl = read("update_vs_trl")["trl"]
    return markdown(f"step | ours | TRL {trl} | time, ours ÷ TRL | peak memory, ours ÷ TRL", rows)


def divergence_table() -> str:
    """Return the loss alone compared with three other implementations."""
    rows = []
    for row in read("divergence")["table"]:
        ratios = ["", ""]
        if row["arm"] != "ours":
            ratios = [f"{row['time_ratio']:.2f}", f"{row['memory_ratio']:.3f}"]
        memory = f"{row['extra_bytes'] / 2**20:,.0f} MiB"
        name = f"{row['divergence']}, {row['arm']}"
        rows.append([name, f"{row['rows']:,}", f"{row['seconds']:.1f}", memory, *ratios])
    header = (
        "loss alone | rows | seconds | extra memory | time of ours ÷ this row | memory of ours ÷ "
        "this row"
    )
    return markdown(header, rows)


def rollout_table() -> str:
    """Return prefill and decoding compared with transformers' `generate`."""
    document = read("rollout")
    rows = []
    for row in document["table"]:
        ratio = ""
        if row["arm"] != "ours":
            ratio = f"{row['ours_over_it']:.2f}"
        prefill, step = f"{row['prefill_seconds']:.2f} s", f"{1e3 * row['step_seconds']:.0f} ms"
        rows.append([f"{row['case']}, {row['arm']}", prefill, step, ratio])
    header = (
        f"sampling {document['tokens']} tokens | prefill | decoding step | time of ours ÷ this row"
    )
    return markdown(header, rows)


def decoding_table() -> str:
    """Return the parts of sampling before and after they became cheaper."""
    rows = []
    for row in read("decoding")["table"]:
        low, high = row["ratio_range"]
        floor = ""
        if row["floor_seconds"] is not None:
            floor = f"{row['floor_seconds'] / row['before_seconds']:.2f}"
        ratio = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        before = f"{1e3 * row['before_seconds']:,.1f} ms"
        rows.append(
            [f"{row['model']}: {row['part']}", before, ratio, f"{row['cpu_ratio']:.2f}", floor]
        )
    header = "part | before | time, after ÷ before | CPU time, after ÷ before | floor ÷ before"
    return markdown(header, rows)


def working_copy_table() -> str:
    """Return three ways to train in bfloat16: time, memory, and errors of the gradient."""
    rows = []
    for row in read("working_copy")["table"]:
        seconds = []
        for part in ("gradients", "step"):
            ratio, low, high = row[f"{part}_ratio"]
            seconds.append(f"{row[f'{part}_seconds']:.2f} s ({ratio:.2f} [{low:.2f}, {high:.2f}])")
        peak = f"{row['peak_bytes'] / 2**30:.2f} GiB ({row['peak_ratio']:.2f})"
        errors = []
        for key in ("error", "tensor_error"):
            errors.append(f"{row[key]:.1%} ({row[f'{key}_ratio']:.2f})")
        rows.append([f"`{row['arm']}`", *seconds, peak, *errors])
    header = (
        "student in bfloat16 (÷ `autocast`) | gradients of an update | AdamW and refresh | "
        "peak memory | error of the gradient | median error of a tensor"
    )
    return markdown(header, rows)


def scaling_table() -> str:
    """Return a step's time by prefix length and number of samples."""
    rows = []
    for row in read("scaling")["table"]:
        if not row["shared"]:
            continue
        ratio = ""
        if row["over_repeated"]:
            ratio = f"{row['over_repeated']:.2f}"
        rows.append(
            [
                str(row["prefix"]),
                str(row["samples"]),
                f"{row['seconds']:.1f}",
                f"{row['flops_useful'] / 1e12:.2f} T",
                ratio,
            ]
        )
    header = (
        "prefix, tokens | samples | seconds | useful FLOPs | time with prompts encoded once ÷ "
        "encoded for every sample"
    )
    return markdown(header, rows, left=())


def shared_prompts_table() -> str:
    """Return a step's time with prompts that run once per sample, and once for all samples."""
    rows = []
    for row in read("shared_prompts")["table"]:
        cells = [row["dtype"]]
        for name in ("ratio", "cpu_ratio"):
            low, high = row[f"{name}_range"]
            cells.append(f"{row[name]:.2f} [{low:.2f}, {high:.2f}]")
        rows.append([*cells, f"{row['after_flops'] / row['before_flops']:.2f}"])
    return markdown("once for all samples ÷ once per sample | time | CPU time | FLOPs", rows)


def graders_table() -> str:
    """Return how many solutions each grader finds right, by the answer they are compared with."""
    rows = []
    for kind, counts in read("graders")["table"].items():
        cells = [str(counts[name]) for name in ("graded", "ours", "math-verify", "lm-eval")]
        rows.append([f"{kind} answer", *cells])
    return markdown("compared with | solutions | right by ours | by math-verify | by lm-eval", rows)


def limit_table() -> str:
    """Return each phase's share of the machine's limit."""
    document = read("limit")
    rate = f"{document['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s"
    bandwidth = f"{document['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    names = {
        "teacher_score": f"teacher scoring, of {rate}",
        "student_update": f"student update, of {rate}",
        "student_prefill": f"prefill, of {rate}",
        "student_decode": f"decoding, of {bandwidth}",
    }
    shares = document["share_of_limit"].items()
    return markdown(
        "phase | share of the limit", [[names[phase], f"{share:.0%}"] for phase, share in shares]
    )


def ranks_table() -> str:
    """Return the throughput of two ranks compared with one."""
    names = {
        "laboratory": "the built-in pair, 128 rollouts of 48 tokens",
        "SmolLM2": "SmolLM2-135M → its 20-layer student, 16 rollouts of 32 tokens",
    }
    rows = []
    for row in read("ranks")["table"]:
        low, high = row["throughput_low"], row["throughput_high"]
        rows.append(
            [
                names[row["case"]],
                f"{row['seconds_1_rank']:.2f} s",
                f"{row['seconds_2_ranks']:.2f} s",
                f"{row['throughput']:.2f} × [{low:.2f}, {high:.2f}]",
            ]
        )
    return markdown("step | 1 rank | 2 ranks | throughput", rows)


def methods_table() -> str:
    """Return README.md's table of methods: a sign for each claim that methods.yaml names."""
    methods = yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))
    rows = []
    for name, method in methods.items():
        signs = " ".join(SIGNS[claim(*named)["verdict"]] for named in method["claims"])
        paper = ""
        if "paper" in method:
            paper = f"[{method['paper']}]"
        found = f"[{signs}][{method['anchor']}]"
        rows.append([name, f"`{method['flag']}`", paper, method["words"], found])
    header = "method | flag | paper | published or expected | found here"
    return markdown(header, rows, left=(0, 1, 2, 3, 4))


def page() -> str:
    """Return the text of results/README.md."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fixed": fixed, "percent": percent}
    environment.tests["match"] = str.startswith
    functions = {name: value for name, value in globals().items() if name.endswith("_table")}
    functions |= {"read": read, "by_arm": by_arm, "machine": machine, "claim": claim}
    return environment.get_template("tables.md.jinja").render(functions)


def main() -> None:
    """Print the page and one JSON line; with --write, update the file."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update results/README.md")
    parser.add_argument(
        "--quick", action="store_true", help="change nothing; this script is always quick"
    )
    given = parser.parse_args()
    text = page()
    if given.write:
        PAGE.write_text(text, encoding="utf-8")
    print(text, end="")
    print(json.dumps({"page": str(PAGE), "lines": text.count("\n"), "written": given.write}))


if __name__ == "__main__":
    main()

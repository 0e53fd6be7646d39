"""Test how check, plan, probe, compare, report and --dry-run end, and where show and env write.

The file screens/closing.txt holds the summaries at 80, 100 and 120 columns.
PREFIX_DISTILL_WRITE_SCREENS=1 writes it.
"""

import json
import os
import re
from pathlib import Path

import pytest
from helpers import TESTS, invoke, last_json, write_run

from prefix_distill.api.documents import CheckResult, Comparison, DryRun, PlanResult, ProbeResult
from prefix_distill.api.prospects import (
    summarize_check,
    summarize_dry_run,
    summarize_plan,
    summarize_probe,
)
from prefix_distill.api.result import Estimate, Flops
from prefix_distill.api.summaries import summarize
from prefix_distill.display import lay_out

if os.name != "nt":
    from terminals import watch_commands

FILE = TESTS / "screens" / "closing.txt"
WIDTHS = (80, 100, 120)
WORDS = ["--student", "Qwen/Qwen3-0.6B", "--teacher", "Qwen/Qwen3-4B", "--dataset", "gsm8k"]
WORDS += ["--prefix", "512"]
GB = 10**9
PRICE = {
    "flops": 1.2e15,
    "full_rollout_flops": 5.5e15,
    "least_seconds": 2700.0,
    "not_in_flops": ["--tail-every"],
    "disk": {"training": 15 * GB, "finished": 9 * GB},
}
WARNING = (
    "the student got 3 of 8 right and finished 100% of its answers; the teacher got 3 of 8 right "
    "and finished 100% of its answers; the teacher did not beat the student on these 8 problems; "
    "raise --check-samples, or use another teacher"
)
MEMORY = "the run needs 19.5 GiB in addition to the loaded weights; 22.1 GiB free on cuda:0"
SMALL = ["--lora", "64", "--gradient-checkpointing", "--generation-rows", "8"]
SMALL += ["--micro-batch-size", "4"]
LARGE = ["--generation-rows", "64", "--micro-batch-size", "32"]


def make_checks(**statuses):
    checks = []
    for name, status in statuses.items():
        checks.append({"name": name, "status": status, "found": MEMORY, "facts": {}})
    return tuple(checks)


def make_check(checks, warnings=()):
    return CheckResult(
        document={"price": PRICE, "steps": 100},
        ok=all(check["status"] != "error" for check in checks),
        checks=checks,
        notes=(),
        warnings=warnings,
    )


def fit(card, memory, flags, seconds=None):
    return {
        "card": card,
        "memory_gb": memory,
        "fits": flags is not None,
        "flags": flags,
        "seconds": seconds,
    }


def make_plan(machine, fits, rate=None, seconds=None):
    prefixes = []
    for prefix, flops in (("512", 1.2e15), ("50%", 2.5e15), ("full", 5.5e15)):
        row = {"prefix": prefix, "flops_total": flops, "seconds": seconds}
        prefixes.append({**row, "memory": {"total": 19.5 * 2**30}})
    document = {
        "method": "all weights",
        "updates": 100,
        "prefixes": prefixes,
        "machine": machine,
        "cards": fits,
        "rate": rate,
        "disk": PRICE["disk"],
        "notes": [],
        "warnings": [],
    }
    return PlanResult.read(document)


def make_probe(prefix, reason, saving):
    return ProbeResult(
        document={},
        out=Path("runs/probe"),
        recommended_prefix=prefix,
        reason=reason,
        expected_saving=saving,
        kl=Estimate(value=0.2063, low=0.1148, high=0.4534, n=2000),
        flops=Flops(useful=1e12, executed=1e12, by_phase={}),
        seconds=480,
    )


def make_arm(name, accuracy, times, share=1.0):
    ratios = {}
    if times is not None:
        missed = {"value": None, "low": 0.0, "high": 0.0, "reached": 0.0}
        ratios = {1.0: missed, 0.9: missed, 0.5: missed}
        ratios[share] = {"value": times, "low": times - 1, "high": times + 1, "reached": 1.0}
    return {
        "arm": name,
        "state": "finished",
        "accuracy": accuracy,
        "low": accuracy and accuracy - 0.04,
        "high": accuracy and accuracy + 0.04,
        "answers": 600,
        "kl": 0.2,
        "flops_useful": 5.5e15,
        "cost_ratios": ratios,
        "folders": [f"runs/arms/{name}/seed-0", f"runs/arms/{name}/seed-1"],
    }


def make_comparison(*arms, reference="full", warnings=()):
    document = {
        "out": "runs/arms",
        "page": "runs/arms/report.html",
        "runs": 2 * len(arms),
        "reference": reference,
        "arms": list(arms),
        "warnings": list(warnings),
    }
    return Comparison.read(document)


PASSED = make_checks(vocabulary="ok", head="ok", memory="ok", teacher="warning")
FAILED = make_checks(vocabulary="ok", head="ok", memory="error")
HERE = {"device": "cuda:0", "free_bytes": 22.1 * 2**30, "fits": True, "flags": None}
TOO_SMALL = {"device": "cuda:0", "free_bytes": 11.2 * 2**30, "fits": False, "flags": SMALL}
FITS = [fit("8 GB", 8, None), fit("12 GB", 12, SMALL), fit("16 GB", 16, SMALL)]
FITS += [fit("24 GB", 24, LARGE), fit("80 GB", 80, LARGE)]
DRY = {
    "config": {"train": {"steps": 100}},
    "price": PRICE,
    "checks": list(PASSED),
    "warnings": [WARNING],
}
SUFFICES = (
    "a prefix suffices: after the first 24 of the teacher's 153 tokens, the student closes 91% of "
    "the gap between the accuracies of student and teacher (31.2% and 90.0%)"
)
NOTHING = (
    "nothing to recommend: the teacher did not beat the student on these problems; student and "
    "teacher reach 31.2% and 30.0%; use another teacher or other problems"
)
LEFT_OUT = "left out, because they have not finished: runs/arms/long/seed-1; finish them"
PREFIX = make_arm("prefix-24", 0.895, 4.1)
SHORT = make_arm("prefix-8", 0.6, 2.5, share=0.5)
FULL = make_arm("full", 0.91, 1.0)
SUMMARIES = {
    "check": summarize_check(make_check(PASSED, (WARNING,)), WORDS),
    "check that fails": summarize_check(make_check(FAILED), WORDS),
    "run --dry-run": summarize_dry_run(DryRun(document=DRY), WORDS),
    "plan that fits": summarize_plan(make_plan(HERE, FITS), WORDS, for_cards=False),
    "plan that does not fit": summarize_plan(make_plan(TOO_SMALL, FITS), WORDS, for_cards=False),
    "plan --card t4,4090 --from-run": summarize_plan(
        make_plan(
            TOO_SMALL,
            [fit("t4", 16, SMALL, 30_000), fit("4090", 24, LARGE, 2400)],
            rate={"source": "measured in runs/first"},
            seconds=5400,
        ),
        WORDS,
        for_cards=True,
    ),
    "probe": summarize_probe(make_probe(24, SUFFICES, 4.6), WORDS[:6]),
    "probe without recommendation": summarize_probe(make_probe(None, NOTHING, 1.0), WORDS[:6]),
    "compare": summarize(make_comparison(FULL, PREFIX, SHORT, warnings=[LEFT_OUT])),
    "report": summarize(make_comparison(PREFIX, reference=None)),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_is_as_in_the_file_and_fits_its_terminal(name):
    lines = []
    for width in WIDTHS:
        laid_out = lay_out(SUMMARIES[name], width, in_color=False)
        assert max(map(len, laid_out)) <= width
        lines += [f"== {name}, {width} columns", *laid_out]
    shown = "\n".join(lines) + "\n"
    wanted = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    if os.environ.get("PREFIX_DISTILL_WRITE_SCREENS"):
        if name == next(iter(SUMMARIES)):
            wanted = ""
        FILE.write_text(wanted + shown, encoding="utf-8")
        return
    assert shown in wanted


def test_the_next_command_of_a_plan_has_the_flags_that_fit():
    fits = [fit("8 GB", 8, None), fit("24 GB", 24, LARGE)]
    hopeless = TOO_SMALL | {"flags": None}
    for machine, flags in ((HERE, ()), (TOO_SMALL, SMALL), (hopeless, LARGE), (None, LARGE)):
        summary = summarize_plan(make_plan(machine, fits), WORDS, for_cards=False)
        assert summary.command == " ".join(["prefix-distill check", *WORDS, *flags])
    for_cards = summarize_plan(make_plan(HERE, fits), WORDS, for_cards=True)
    assert for_cards.command.endswith(" ".join(LARGE))
    nowhere = summarize_plan(make_plan(hopeless, fits[:1]), WORDS, for_cards=False)
    assert nowhere.command == "" and "choose smaller models" in nowhere.rows["machine"]


def test_a_comparison_names_the_best_arms_and_what_they_save():
    rows = summarize(make_comparison(FULL, PREFIX, SHORT)).rows
    assert rows["best"].startswith("full: 91.0%") and not rows["reference"]
    assert rows["saving"].startswith("4.1× [3.1, 5.1] for prefix-24 to reach 100% of the gain")
    better = make_arm("prefix-24", 0.93, 4.1)
    equal = make_arm("prefix-32", 0.93, 3.0)
    summary = summarize(make_comparison(FULL, better, equal))
    assert summary.rows["best"].count("93.0%") == 2
    assert summary.rows["reference"].startswith("full: 91.0%")
    assert "for prefix-32" in summary.rows["saving"] and "for full" not in summary.rows["saving"]
    assert summary.command == "prefix-distill show runs/arms/prefix-24/seed-0"
    far = make_arm("prefix-1", 0.3, None) | {"cost_ratios": {1.0: {"value": None}}}
    assert "no other arm reaches half" in summarize(make_comparison(FULL, far)).rows["saving"]
    ungraded = make_arm("a", None, None), make_arm("b", None, None) | {"kl": 0.1}
    assert summarize(make_comparison(*ungraded)).rows["best"].startswith("b: KL 0.1 nats")


# on a terminal of 80 columns, which has stdout, too

TINY = ("--device", "cpu", "--dtype", "float32", "--steps", 2, "--batch-size", 2, "--samples", 1)
TINY += ("--problems", 8, "--kl-prompts", 1, "--check-samples", 0)


def closing(screen):
    """Return the lines of the summary at the end of a screen."""
    start = len(screen) - 1
    while screen[start].startswith(" "):
        start -= 1
    lines = screen[start:]
    assert 3 <= len(lines) <= 12 and max(map(len, lines)) <= 80
    assert not any(line.startswith("{") for line in screen)
    return lines


def words_of(lines):
    """Return lines as one, without breaks of text and commands."""
    return " ".join(" ".join(lines).replace(" \\ ", " ").split())


ARMS = {
    "base": {
        "train": {"steps": 1, "batch_size": 2},
        "rollout": {"samples": 1, "max_new_tokens": 16},
        "evaluate": {"problems": 4, "kl_prompts": 1, "check_samples": 0},
    },
    "arms": {"short": {"schedule": {"prefix": "4"}}, "full": {"schedule": {"prefix": "full"}}},
    "reference": "full",
}


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_every_command_ends_well_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text(json.dumps(ARMS))
    commands = [
        ["check", *TINY, "--out", "run"],
        ["run", *TINY, "--dry-run"],
        ["plan", "--steps", 2, "--prefix", 24, "--prefixes", "full"],
        ["compare", "arms.yaml", "--out", "out"],
        ["show", "out/short/seed-0", "--limit", 1],
        ["probe", "--problems", 8, "--max-new-tokens", 16, "--out", "probe"],
        ["env"],
    ]
    check, dry, plan, compare, show, probe, env = watch_commands(commands, 80)
    price = (
        r"FLOPs \S+ [MG]FLOP for 2 steps; .* time at least \S+ s on this machine, .* disk up to "
    )
    lines = closing(check)
    assert re.fullmatch(r"1[12] of 12 checks are ok(, 1 warning)?", lines[0])
    assert re.search(price, words_of(lines))
    command = words_of(lines).partition(" next ")[2].split()
    assert sorted(command) == sorted(["prefix-distill", "run", *map(str, TINY), "--out", "run"])
    lines = closing(dry)
    assert lines[0] == "dry run of 2 steps: nothing was written"
    assert re.search(price, words_of(lines)) and "--dry-run" not in words_of(lines)
    assert " next prefix-distill run --" in words_of(lines)
    lines = closing(plan)
    assert lines[0].startswith("all weights, 2 steps, --prefix 24: needs ")
    labels = [line.split()[0] for line in lines[1:] if re.match(r"  \S", line)]
    assert labels == ["machine", "cards", "FLOPs", "time", "disk", "next"]
    assert lines[-1] == "  next      prefix-distill check --prefix 24 --steps 2"
    lines = closing(compare)
    assert lines[0] == "out: 2 runs of 2 arms" and lines[1].startswith("  best ")
    assert re.search(r"page out/report.html .* next prefix-distill show out/", words_of(lines))
    assert any(re.search(r"^before · .* after \(step 1\) · ", line) for line in show)
    assert "1 of 4 problems (--limit)" in words_of(show) and not any("{" in line for line in show)
    lines = closing(probe)
    assert re.search(r"recommended why .* KL .* picture probe/probe.png", words_of(lines))
    assert any(line.startswith("devices: ") for line in env) and "{" not in words_of(env)


# in a pipe


def test_in_a_pipe_the_summary_goes_to_stderr_and_the_document_to_stdout(tmp_path):
    write_run(tmp_path / "a", 0, [0.1, 0.5], 1.0)
    write_run(tmp_path / "b", 0, [0.1, 0.6], 2.0)
    out = tmp_path / "out"
    code, said, err = invoke("report", tmp_path, "--out", out, "--reference", "a")
    assert code == 0 and len(said.splitlines()) == 1
    assert last_json(said)["arms"][0]["folders"] == [str(tmp_path / "a")]
    assert "2 runs of 2 arms" in err and "  next  " in err and "\x1b" not in err
    code, said, err = invoke("run", *TINY, "--dry-run")
    assert code == 0 and len(said.splitlines()) == 1
    assert last_json(said)["price"]["flops"] > 0 and "dry run of 2 steps" in err


def test_the_price_of_a_long_run_is_that_of_its_steps(monkeypatch):
    """A linear schedule has another length at every step; 20 of 40 steps stand for all."""
    from prefix_distill.planning import price

    arguments = ("run", *TINY, "--steps", 40, "--prefix", "linear:1:1", "--dry-run")
    exact = last_json(invoke(*arguments)[1])["price"]
    monkeypatch.setattr(price, "MOST", 20)
    estimated = last_json(invoke(*arguments)[1])["price"]
    assert estimated["flops"] == pytest.approx(exact["flops"], rel=0.05)
    assert exact["flops"] < exact["full_rollout_flops"]
    # a CPU core has between 0.1 GFLOP/s and 10 TFLOP/s
    assert 1e8 < exact["flops"] / exact["least_seconds"] < 1e13

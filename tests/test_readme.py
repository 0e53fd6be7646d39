"""README.md: every command runs, every table is what the committed results say, and CI does what
it tells people to do."""

import csv
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer
from helpers import BENCHMARKS, PROGRAMS, ROOT, command, invoke, last_json

from prefix_distill.cli import main, spellings

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = BENCHMARKS / "results"
GROUP = typer.main.get_command(main.app)
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
INSTALL = [line for line in COMMANDS if line.startswith(("python3 -m venv", "pip ", "pytest "))]
OURS = [line for line in COMMANDS if line.startswith("prefix-distill ")]
LONG = [line for line in COMMANDS if line.startswith("python ")]
UNLISTED = [
    f"python tests/benchmarks/{name}.py"
    for name in PROGRAMS
    if not any(f"/{name}.py" in line for line in LONG)
]


def test_every_command_is_of_a_kind_that_is_executed():
    assert sorted(INSTALL + OURS + LONG) == sorted(COMMANDS) and len(OURS) == 16 and len(LONG) == 18


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci/run").read_text()
    block = next(b for b in re.findall(r"```sh\n(.*?)```", README, re.S) if "pytest" in b)
    for line in block.splitlines():
        words = shlex.split(line)
        mine = next(
            shlex.split(x)
            for x in script.splitlines()
            if x.split()[:1] == words[:1] and words[-1] in x
        )
        assert [w for w in mine if w not in ("--quiet", "-q", "--durations", "15", "&")] == words


@pytest.mark.parametrize(
    "left_out",
    [(" probe", " compare", " report", "--gpus"), pytest.param((), marks=pytest.mark.long)],
    ids=["most", "all"],
)
def test_commands_run_in_order(tmp_path, monkeypatch, left_out):
    """The demo, the first run on the embedded models, and what follows, exactly as printed. Probe,
    comparison, report and ranks have tests of their own and run here with -m long."""
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    for line in OURS:
        if any(word in line for word in left_out):
            continue
        if "--gpus" in line:  # ranks write to this process's own stdout
            done = command(*shlex.split(line)[1:])
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = invoke(*shlex.split(line)[1:])
        assert code == 0, err
        document = last_json(out)
        if " demo" in line:
            prefix, full = document["arms"]
            assert (prefix["name"], full["name"]) == ("prefix", "full") and prefix[
                "updates"
            ] == full["updates"]
            assert prefix["accuracy"]["low"] > document["student"]["high"] + 0.1
            assert full["accuracy"]["low"] > document["student"]["high"] + 0.1
            assert prefix["flops_useful"] < full["flops_useful"] / 2
            assert Path(document["picture"]).stat().st_size > 10_000
        if "--select" in line:
            assert {"selection", "extrapolation"} < document["flops"]["by_phase"].keys() and len(
                document["extrapolations"]
            ) == 2
        if "--cross-tokenizer" in line:
            assert (
                document["evaluations"][0]["alignment"]["span_share"] > 0.05
                and "tokens are shared" in err
            )
        if "--gpus 2" in line:
            assert (
                document["steps"] == 2
                and json.loads(Path("runs/ranks/run.json").read_text())["ranks"] == 2
            )
        if "--teacher self" in line:
            assert document["kl_after"]["value"] < document["kl_before"]["value"]
        if " check" in line:
            assert (
                document["ok"]
                and {c["status"] for c in document["checks"]} == {"ok"}
                and "what was found" in err
            )
        if " plan" in line:
            assert [row["prefix"] for row in document["prefixes"]] == [
                "25%",
                "50%",
                "full",
            ] and all(row["seconds"] > 0 for row in document["prefixes"])
        if ":3,lab:" in line:
            assert "sampled with --seed" in err and document["steps"] == 2
        if "--lora" in line:
            assert (
                Path("runs/lora/adapter/adapter_model.safetensors").is_file()
                and Path("runs/lora/model/model.safetensors").is_file()
            )
        if " export" in line:
            assert document["dtype"] == "bfloat16" and Path(
                "runs/first-bf16/README.md"
            ).read_text().startswith("---")
        if " probe" in line:
            assert 4 <= document["recommended_prefix"] <= 40 and document["expected_saving"] > 3
        if " compare" in line:
            assert [row["arm"] for row in document["arms"]] == ["full", "short", "text", "warmed"]
        if " report" in line:
            assert {row["arm"] for row in document["arms"]} == {
                "first",
                "full",
                "short",
                "text",
                "warmed",
            }
            assert Path("runs/report/report.html").stat().st_size > 10_000


@pytest.mark.parametrize("line", LONG + UNLISTED)
def test_long_experiments_start_and_benchmarks_offer_quick(line, monkeypatch, capsys):
    """Full runs take up to an hour. test_benchmarks.py runs each `--quick` under -m long, and
    test_laboratory.py runs the steps of the rebuild. They start in this process, because importing
    torch repeatedly takes longest."""
    script, *flags = shlex.split(line)[1:]
    run = runpy.run_path
    if script == "-m":
        (script, *flags), run = flags, runpy.run_module
        monkeypatch.delitem(sys.modules, script, raising=False)  # another test may have imported it
    monkeypatch.setattr(sys, "argv", [script, *flags, "--help"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run(script, run_name="__main__")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in said for flag in flags if flag.startswith("--"))
    assert "--quick" in said or Path(script).parent != Path("tests/benchmarks")


def percent(score: dict) -> str:
    return f"{float(score['value']):.1%} [{float(score['low']):.1%}, {float(score['high']):.1%}]"


def demo_table() -> str:
    found = json.loads((RESULTS / "demo.json").read_text())
    rows = [
        "| | accuracy, 200 held-out problems [95 %] | useful FLOPs | training time | mean tokens "
        "of an answer |",
        "|---|--:|--:|--:|--:|",
        f"| student, untrained | {percent(found['student'])} | | | "
        f"{found['arms'][0]['evaluations'][0]['mean_tokens']:.0f} |",
    ]
    for arm, name in zip(found["arms"], ("24-token prefix", "full rollouts"), strict=True):
        rows.append(
            f"| {name} | {percent(arm['accuracy'])} | {arm['flops_useful'] / 1e9:.1f} G | "
            f"{arm['seconds']:.0f} s | {arm['mean_tokens']:.0f} |"
        )
    return "\n".join([*rows, f"| teacher | {percent(found['teacher'])} | | | |"])


def points(row: dict) -> str:
    """An accuracy with its interval, if it has one."""
    if row.get("low") is None:
        return f"{row['accuracy']:.1%}"
    return f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def ratio(found: dict) -> str:
    if found["value"] is None:
        return "not reached"
    return f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def prefix_table() -> str:
    rows = [
        "| arm | accuracy [95 %] | longer problems | useful FLOPs | training time | KL beyond its "
        "prefix, before → after | full's cost ÷ its own, to half of full's gain | to 90 % | to all "
        "|",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in result("prefix")["summary"]:
        longer = f"{r['also']['longer']:.1%}"
        if r["arm"] == "untrained":
            rows.append(f"| untrained | {points(r)} | {longer} | | | | | | |")
            continue
        tail = "" if r["kl_tail"] is None else f"{r['kl_tail_before']:.3f} → {r['kl_tail']:.3f}"
        rows.append(
            f"| `{r['arm']}` | {points(r)} | {longer} | {r['flops_useful'] / 1e9:.1f} G | "
            f"{r['seconds']:.0f} s | {tail} | "
            f"{' | '.join(ratio(r['cost_ratios'][share]) for share in ('0.5', '0.9', '1.0'))} |"
        )
    return "\n".join(rows)


def bound_sentence() -> str:
    found = result("prefix")["saving"]
    each = ", ".join(
        f"{found['per_update'][arm]:.1f} times ({arm.replace('%', ' %')})"
        for arm in ("5%", "10%", "20%", "40%")
    )
    return (
        f"Prompts have {found['prompt_tokens']:.0f} tokens and full answers "
        f"{found['full_tokens']:.0f}, so an update with full rollouts costs, by the ledger, {each} "
        f"the FLOPs of one with the prefix; {found['of_one_token']:.0f} times those of one with a "
        "single token."
    )


def controls_table() -> str:
    tasks = {"choice": "prefix", "shared": "prefix-shared", "tied": "prefix-tied"}
    found = {task: {r["arm"]: r for r in result(name)["summary"]} for task, name in tasks.items()}
    rows = ["| arm | " + " | ".join(f"`{task}`" for task in tasks) + " |", "|---|--:|--:|--:|"]
    for arm in found["tied"]:
        name = arm if arm == "untrained" else f"`{arm}`"
        rows.append(
            f"| {name} | "
            + " | ".join(points(found[task][arm]) if arm in found[task] else "" for task in tasks)
            + " |"
        )
    return "\n".join(rows)


def claims_table(name: str = "prefix") -> str:
    rows = ["| published or expected | arms | difference [95 %] | here |", "|---|---|--:|---|"]
    for c in result(name)["claims"]:
        if "auto" in c["claim"]:
            continue
        if c.get("unit") == "times":
            value = f"{c['value']:.1f} × [{c['low']:.1f}, {c['high']:.1f}]"
        else:
            value = f"{100 * c['value']:+.1f}" + (
                "" if c["low"] is None else f" [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]"
            )
        rows.append(
            f"| {c['claim']} | `{c['better']}` against `{c['worse']}` | {value} | {c['verdict']} |"
        )
    return (
        "\n".join(rows)
        .replace("against `untrained`", "against untrained")
        .replace("`untrained`", "untrained")
    )


def plugin_claims() -> str:
    return claims_table("plugins")


def select_table() -> str:
    arms = {r["arm"]: r for r in result("plugins")["summary"]}
    rows = ["| taught | of full rollouts | of a prefix of 40 % |", "|---|--:|--:|"]
    kinds = [
        "",
        *(
            f"{kind} {share}"
            for kind in ("soft-or", "random", "entropy-sample")
            for share in (0.5, 0.2, 0.1)
        ),
        "overconfident 0.1",
        "entropy 0.1",
        "divergence 0.1",
        "bottom 0.5",
    ]
    for kind in kinds:
        cells = [
            points(arms[arm]) if (arm := f"{base} {kind}".strip()) in arms else ""
            for base in ("full", "40%")
        ]
        rows.append(f"| {f'`{kind}`' if kind else 'all'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def effopd_table() -> str:
    found = result("plugins")
    rows = [
        "| arm | accuracy [95 %] | useful FLOPs | of them candidates | accepted k after updates 1, "
        "2, 4, 8, 16 (three seeds) |",
        "|---|--:|--:|--:|---|",
    ]
    for r in found["summary"]:
        if r["arm"].startswith("slow") or r["arm"] in ("full", "40%") or "effopd" in r["arm"]:
            more = found["extrapolations"].get(r["arm"])
            tail = (
                " | "
                if more is None
                else f"{more['share']:.0%} | "
                f"{' · '.join(' '.join(map(str, ks)) for ks in more['k'])}"
            )
            rows.append(
                f"| `{r['arm']}` | {points(r)} | {r['flops_useful'] / 1e9:.1f} G | {tail} |"
            )
    return "\n".join(rows)


def opsd_table() -> str:
    arms = {r["arm"]: r for r in result("plugins")["summary"]}
    rows = [
        "| start, reduction | before | uniform | moderate | decreasing | uniform, κ = 0.05 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for start, name in (("student", "`student-told`"), ("half", "`teacher-half`")):
        for reduction in ("token", "sequence"):
            cells = [
                arms.get(f"{start} {weight} {reduction}{more}")
                for weight, more in (
                    ("uniform", ""),
                    ("moderate", ""),
                    ("decreasing", ""),
                    ("uniform", " clipped"),
                )
            ]
            rows.append(
                f"| {name}, {reduction} | {cells[0]['before']:.1%} | "
                f"{' | '.join(points(c) if c else '' for c in cells)} |"
            )
    return "\n".join(rows)


def selection_table() -> str:
    names = {"naive": "all, full logits", "all": "all, our loss in chunks"}
    rows = [
        "| taught | seconds | extra memory | time, to our loss on all | memory, to our loss on all "
        "| memory, to full logits |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in result("selection")["table"]:
        name = names.get(r["arm"]) or f"`soft-or`, {r['arm']}"
        rows.append(
            f"| {name} | {r['seconds']:.1f} | {r['extra_bytes'] / 2**20:,.0f} MiB | "
            f"{r['time_over_all']:.2f} | {r['memory_over_all']:.2f} | {r['memory_over_naive']:.3f} "
            "|"
        )
    return "\n".join(rows)


def lora_table() -> str:
    found = result("lora")
    claims = {c["worse"]: c for c in found["claims"]}
    rows = [
        "| arm | accuracy [95 %] | useful FLOPs | all weights beat it by, points [95 %] |",
        "|---|--:|--:|--:|",
    ]
    for r in found["summary"]:
        cost = "" if r["arm"] == "untrained" else f"{r['flops_useful'] / 1e9:.1f} G"
        c = claims.get(r["arm"])
        by = (
            ""
            if c is None
            else f"{100 * c['value']:+.1f} [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}]"
        )
        rows.append(f"| {r['arm']} | {points(r)} | {cost} | {by} |")
    return "\n".join(rows)


def cards_table() -> str:
    found = result("plan")["cards"]
    sizes = sorted({r["card_gb"] for r in found})
    rows = [
        "| teacher | what trains | memory at 4 rollouts a micro-batch | "
        f"{' | '.join(f'{size} GB' for size in sizes)} |",
        "|---|---|--:|" + "--:|" * len(sizes),
    ]
    for key in dict.fromkeys(
        (r["teacher"], r["method"], r["gradient_checkpointing"]) for r in found
    ):
        mine = {
            r["card_gb"]: r
            for r in found
            if (r["teacher"], r["method"], r["gradient_checkpointing"]) == key
        }
        cells = [str(mine[size]["micro_batch"] or "–") for size in sizes]
        rows.append(
            f"| {key[0]} | {key[1]}{', gradient checkpointing' * key[2]} | "
            f"{mine[sizes[0]]['total'] / 1e9:.1f} GB | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def plan_table() -> str:
    rows = [
        "| run | measured | with exact malloc | forecast | off by | by, with exact malloc | FLOPs "
        "off by |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, r in result("plan")["runs"].items():
        rows.append(
            f"| {name} | {r['resident'] / 1e6:,.0f} MB | {r['resident_exact_malloc'] / 1e6:,.0f} "
            f"MB | {r['forecast'] / 1e6:,.0f} MB | {r['error']:+.1%} | "
            f"{r['error_exact_malloc']:+.1%} | {r['flops_error']:+.1%} |"
        )
    return "\n".join(rows)


def cross_table() -> str:
    found = result("cross")
    rows = [
        "| arm | accuracy [95 %] | useful FLOPs | tokens of an answer | answers in the tokenizer's "
        "own tokens |",
        "|---|--:|--:|--:|--:|",
    ]
    for r in found["summary"]:
        name = r["arm"] if r["arm"] == "untrained" else f"`{r['arm']}`"
        cost = "" if r["arm"] == "untrained" else f"{r['flops_useful'] / 1e9:.1f} G"
        tokens = "" if r["arm"] == "untrained" else f"{r['mean_tokens']:.0f}"
        rows.append(
            f"| {name} | {points(r)} | {cost} | {tokens} | {found['canonical'][r['arm']]:.0%} |"
        )
    return "\n".join(rows)


def cross_claims() -> str:
    return claims_table("cross")


def real_cross_table() -> str:
    rows = [
        "| | KL of 1:1 units, before → after [95 %] | KL of spans | log-likelihood of the "
        "teacher's text, per byte | alignment, share of an update |",
        "|---|--:|--:|--:|--:|",
    ]
    for mode, r in result("cross_tokenizer")["modes"].items():
        after, text = r["kl_after"], r["log_likelihood_per_byte"]
        rows.append(
            f"| `{mode}` | {r['kl_before']['value']:.3f} → {after['value']:.3f} "
            f"[{after['low']:.3f}, {after['high']:.3f}] | {r['alignment_before']['kl_spans']:.2f} "
            f"→ {r['alignment_after']['kl_spans']:.2f} | {text['before']:.3f} → "
            f"{text['after']:.3f} | {r['alignment_share']:.3%} |"
        )
    return "\n".join(rows)


def gold_table() -> str:
    rows = [
        "| update | seconds | peak memory | tokens sampled | time, ours / GOLD | memory, ours / "
        "GOLD |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for arm, r in result("gold")["arms"].items():
        ratios = (
            " | "
            if arm == "gold"
            else (
                f"{r['time_ratio']:.2f} [{r['time_ratio_range'][0]:.2f}, "
                f"{r['time_ratio_range'][1]:.2f}] | {r['memory_ratio']:.2f}"
            )
        )
        name = "GOLD" if arm == "gold" else f"ours, `{arm}`"
        rows.append(
            f"| {name} | {r['seconds']:.1f} | {r['peak_bytes'] / 2**30:.2f} GiB | "
            f"{r['tokens']:.0f} | {ratios} |"
        )
    return "\n".join(rows)


def auto_table() -> str:
    rows = [
        "| student | best constant prefix | `auto` | difference, points | FLOPs of `auto` ÷ the "
        "constant's |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, student in (("prefix", "0.09 M"), ("prefix-wide", "0.14 M")):
        found = result(name)
        arms = {r["arm"]: r for r in found["summary"]}
        close, cost = (
            next(c for c in found["claims"] if c["claim"].startswith(text))
            for text in ("auto is within", "auto costs")
        )
        rows.append(
            f"| {student} | `{close['worse']}`: {points(arms[close['worse']])} | "
            f"{points(arms['auto'])} | {100 * close['value']:+.1f} [{100 * close['low']:+.1f}, "
            f"{100 * close['high']:+.1f}] | {cost['value']:.2f} |"
        )
    return "\n".join(rows)


def real_grid_table() -> str:
    rows = ["| arm | held-out reverse KL, before → after | useful FLOPs |", "|---|--:|--:|"]
    with open(RESULTS / "prefix-real.csv") as file:
        found = list(csv.DictReader(file))
    for arm in dict.fromkeys(r["arm"] for r in found):
        first, *_, last = [r for r in found if r["arm"] == arm]
        rows.append(
            f"| `{arm}` | {float(first['kl']):.3f} → {float(last['kl']):.3f} | "
            f"{float(last['flops_useful']) / 1e12:.1f} T |"
        )
    return "\n".join(rows)


def real_table() -> str:
    rows = [
        "| updates | reverse KL, nats per token [95 %] | first 64 tokens | beyond | useful FLOPs |",
        "|--:|--:|--:|--:|--:|",
    ]
    with open(RESULTS / "real.csv") as file:
        for r in csv.DictReader(file):
            rows.append(
                f"| {r['update']} | {float(r['kl']):.3f} [{float(r['kl_low']):.3f}, "
                f"{float(r['kl_high']):.3f}] | {float(r['kl_prefix']):.3f} | "
                f"{float(r['kl_tail']):.3f} | {float(r['flops_useful']) / 1e12:.1f} T |"
            )
    return "\n".join(rows)


def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def update_table() -> str:
    rows = [
        "| update | ours | TRL 1.16 | time, ours / TRL | peak memory, ours / TRL |",
        "|---|--:|--:|--:|--:|",
    ]
    for r in result("update_vs_trl")["cases"]:
        low, high = r["time_ratio_range"]
        rows.append(
            f"| `{r['name']}` | {r['ours_seconds']:.3g} s, {r['ours_peak_bytes'] / 2**30:.2f} GiB "
            f"| {r['trl_seconds']:.3g} s, {r['trl_peak_bytes'] / 2**30:.2f} GiB | "
            f"{r['time_ratio']:.2f} [{low:.2f}, {high:.2f}] | {r['memory_ratio']:.2f} |"
        )
    return "\n".join(rows)


def divergence_table() -> str:
    rows = [
        "| loss alone | rows | seconds | extra memory | time, ours / it | memory, ours / it |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in result("divergence")["table"]:
        ratios = (
            " | | "
            if r["arm"] == "ours"
            else f" | {r['time_ratio']:.2f} | {r['memory_ratio']:.3f} "
        )
        rows.append(
            f"| {r['divergence']}, {r['arm']} | {r['rows']:,} | {r['seconds']:.1f} | "
            f"{r['extra_bytes'] / 2**20:,.0f} MiB{ratios}|"
        )
    return "\n".join(rows)


def rollout_table() -> str:
    rows = [
        "| sampling 32 tokens | prefill | a decoding step | whole call, ours / it |",
        "|---|--:|--:|--:|",
    ]
    for r in result("rollout")["table"]:
        ratio = "" if r["arm"] == "ours" else f"{r['ours_over_it']:.2f}"
        rows.append(
            f"| {r['case']}, {r['arm']} | {r['prefill_seconds']:.2f} s | "
            f"{1e3 * r['step_seconds']:.0f} ms | {ratio} |"
        )
    return "\n".join(rows)


def scaling_table() -> str:
    rows = [
        "| prefix, tokens | G | seconds | useful FLOPs | prompts read once / every time |",
        "|--:|--:|--:|--:|--:|",
    ]
    for r in result("scaling")["table"]:
        if r["shared"]:
            ratio = f"{r['over_repeated']:.2f}" if r["over_repeated"] else ""
            rows.append(
                f"| {r['prefix']} | {r['samples']} | {r['seconds']:.1f} | "
                f"{r['flops_useful'] / 1e12:.2f} T | {ratio} |"
            )
    return "\n".join(rows)


def limit_table() -> str:
    found = result("limit")
    rate, reading = (
        f"{found['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s",
        f"{found['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
    )
    names = {
        "teacher_score": f"teacher scoring, of {rate}",
        "student_update": f"student update, of {rate}",
        "student_prefill": f"prefill, of {rate}",
        "student_decode": f"decoding, of {reading}",
    }
    return "\n".join(
        ["| phase | share of the limit |", "|---|--:|"]
        + [f"| {names[phase]} | {share:.0%} |" for phase, share in found["share_of_limit"].items()]
    )


def ranks_table() -> str:
    rows = ["| an update of | 1 rank | 2 ranks | throughput |", "|---|--:|--:|--:|"]
    names = {
        "laboratory": "the laboratory's pair, 128 rollouts of 48 tokens",
        "SmolLM2": "SmolLM2-135M → its 20-layer student, 16 rollouts of 32 tokens",
    }
    for r in result("ranks")["table"]:
        rows.append(
            f"| {names[r['case']]} | {r['seconds_1_rank']:.2f} s | {r['seconds_2_ranks']:.2f} s | "
            f"{r['throughput']:.2f} × [{r['throughput_low']:.2f}, {r['throughput_high']:.2f}] |"
        )
    return "\n".join(rows)


def soak_sentence() -> str:
    found = result("soak")
    assert found["differing"] == [] and found["kills"] >= 50 and found["gpus"] == 1
    kinds = found["by_kind"]
    return (
        f"`python tests/benchmarks/soak.py` killed runs {found['kills']} times with `kill -9`: "
        f"{kinds['any moment']} at any moment, {kinds[CHECKPOINT]} inside a checkpoint's write, "
        f"{kinds[BEST]} inside the best model's, {kinds[BEFORE]} before there was a checkpoint; "
        f"all {found['runs']} ended with the same {found['files_compared']} files as an "
        "undisturbed run, times aside."
    )


CHECKPOINT, BEST, BEFORE = (
    "inside a checkpoint's write",
    "inside the best model's write",
    "before the first checkpoint",
)


@pytest.mark.parametrize(
    "table",
    [
        demo_table,
        cards_table,
        plan_table,
        lora_table,
        ranks_table,
        soak_sentence,
        prefix_table,
        bound_sentence,
        controls_table,
        claims_table,
        auto_table,
        select_table,
        effopd_table,
        opsd_table,
        plugin_claims,
        cross_table,
        cross_claims,
        real_cross_table,
        gold_table,
        selection_table,
        real_grid_table,
        real_table,
        update_table,
        divergence_table,
        rollout_table,
        scaling_table,
        limit_table,
    ],
)
def test_tables_are_the_committed_results(table):
    assert " ".join(table().split()) in " ".join(README.split())


def test_sentences_with_measured_numbers_say_them():
    static, limit = result("rollout")["static_cache"], result("limit")
    text = " ".join(README.split())
    assert f"{1e3 * static['static']['step_seconds']:.0f} ms a step in a bare loop" in text
    assert (
        f"{1e3 * static['compiled']['step_seconds']:.0f} ms after a first step of "
        f"{static['compiled']['first_step_seconds']:.0f} s"
    ) in text
    assert (
        f"An update of {limit['update_seconds']:.1f} s would take {limit['floor_seconds']:.1f} s"
        in text
    )
    assert all(
        result(name)["cpu"] in text
        for name in ("update_vs_trl", "divergence", "rollout", "scaling", "limit")
    )


def test_sentences_on_the_plug_ins_say_what_was_recorded():
    found, text = result("plugins"), " ".join(README.split())
    arms, cosine = (
        {r["arm"]: r for r in found["summary"]},
        found["extrapolations"]["slow effopd"]["cosine"],
    )
    updates, flops = (
        next(c["value"] for c in found["claims"] if c["claim"].endswith(f"its {what}"))
        for what in ("updates", "useful FLOPs")
    )
    ends = [f"{100 * arms[arm]['accuracy']:.1f}" for arm in ("slow effopd", "slow")]
    assert f"end at {ends[0]} instead of {ends[1]} %" in text
    assert f"{updates:.1f} times fewer updates but only {flops:.1f} times fewer FLOPs" in text
    assert (
        f"a cosine of {cosine['1']:.2f} with the whole way" in text
        and f"from update 8 to 16 still {cosine['16']:.2f}" in text
    )
    for arm in ("student uniform token", "half uniform token"):
        assert (
            f"from {100 * arms[arm]['before']:.0f} to {100 * arms[arm]['accuracy']:.0f} %" in text
        )
    cost = arms["full soft-or 0.5"]["flops_useful"] / arms["full"]["flops_useful"]
    assert 1.2 < cost < 1.3 and "costs a quarter more FLOPs on full rollouts" in text


def test_sentences_on_the_plan_say_what_was_recorded():
    text, rows = " ".join(README.split()), result("plan")["runs"].values()
    assert max(abs(r["error_exact_malloc"]) for r in rows) < 0.04 and all(
        r["flops_error"] == 0 for r in rows
    )
    assert (
        "forecast to within 4 %, FLOPs exactly" in text
        and f"up to {max(-r['error'] for r in rows):.0%}".replace("%", " %") + " below" in text
    )
    assert (
        sum(r["error"] < -0.1 for r in rows) == 3
        and len(rows) == 5
        and "missed in three of five runs" in text
    )


def test_sentences_across_tokenizers_say_what_was_recorded():
    text, found = " ".join(README.split()), result("cross_tokenizer")["modes"]["strict"]
    shares = found["alignment_before"]
    assert (
        f"{shares['exact_share']:.0%} of the tokens of the student's answers align one to one, "
        f"{shares['span_share']:.0%} in spans"
    ) in text
    assert (
        f"{shares['student_mass']:.0%} of the student's probability and "
        f"{shares['teacher_mass']:.0%} of the teacher's" in text
    )
    lab = result("cross")["alignment"]
    assert f"student's tokens {lab['exact_share'] * 100:.0f} % align one to one" in text
    assert (
        f"{100 - lab['student_mass'] * 100:.0f} % of its probability is on tokens that the teacher "
        "does not have" in text
    )
    assert all(
        mode["alignment_share"] < 0.03 for mode in result("cross_tokenizer")["modes"].values()
    )


def test_modules_and_flags_it_names_exist():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert any(
            (ROOT / folder / name).exists() for folder in ("prefix_distill", "", "tests/benchmarks")
        ), name
    known = {
        flag
        for command in [GROUP, *GROUP.commands.values()]
        for parameter in command.params
        for flag in parameter.opts
    }
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text):
        assert flag in known | {"--nproc-per-node", "--help", "--quick"} or spellings.known(
            flag[2:]
        ), flag


def test_flags_and_defaults_it_states_are_those_of_the_config():
    """`--flag value` (default) in README and pages is the config's (test_panels.py: --help's)."""
    from prefix_distill.config import flag, options
    from prefix_distill.config.files import _convert

    defaults = {flag(path): (path, field) for path, field in options().items()}
    stated = re.findall(r"`(--[a-z-]+) ([^`]+)` \((?:the )?default\)", README)
    migration = (ROOT / "prefix_distill/help/migration.md").read_text(encoding="utf-8")
    differs = migration.split("## What differs")[1].split("A line of TRL")[0]
    stated += [
        pair
        for row in differs.splitlines()
        if row.startswith("|")
        for pair in re.findall(r"`(--[a-z-]+) ([^`]+)`", row.split("|")[3])
        if "off-policy" not in pair[0]
    ]
    assert len(stated) >= 12
    for name, value in stated:
        path, field = defaults[name]
        assert (
            _convert(
                path,
                float(value)
                if isinstance(field.default, float)
                else int(value)
                if type(field.default) is int
                else value,
                field.type,
            )
            == field.default
        ), (name, value)


def test_the_methods_table_names_every_value_that_an_option_has():
    """Of options with a few fixed values whose rows list them."""
    from prefix_distill.config import choices, options

    groups, found = [], 0
    for row in README.split("## Methods")[1].split("\n## ")[0].splitlines():
        if row.startswith("| ") and row[2] != "|":
            groups.append("")
        groups[-1:] = [groups[-1] + row] if groups and row.startswith("|") else groups[-1:]
    for path, field in options().items():
        values = choices(field.type)
        for rows in (rows for rows in groups if f"`{field.metadata['flag']} " in rows):
            found += bool(values)
            assert [
                value for value in values if value not in rows and value not in ("none", "auto")
            ] == [], path
    assert found >= 4

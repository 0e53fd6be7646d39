"""`prefix-distill demo`: the embedded pair distilled with a prefix and with full rollouts, same updates, side by side."""

from pathlib import Path

from ..config import sections as configuration
from ..display import flops_text, share_text
from ..engine.evaluate import evaluate
from ..training.folder import RunFolder
from ..training.prepare import prepare

UPDATES, PROMPTS, RATE, PREFIX = 30, 16, 4e-4, 24
PROBLEMS, EVERY = 200, 10
ARMS = (("prefix", str(PREFIX)), ("full", "full"))
COLOURS = {"prefix": "#0072B2", "full": "#D55E00"}  # Okabe and Ito's, distinct to every eye


def demonstrate(folder: Path, seed: int, train_in) -> tuple:
    """Runs both arms in ``folder`` through ``train_in(run, run_folder, label=…)`` → (table, result document)."""
    arms, teacher = [], None
    for name, prefix in ARMS:
        run = prepare(
            configuration.build(
                {
                    "schedule.prefix": prefix,
                    "schedule.lr": RATE,
                    "schedule.warmup": "0",
                    "train.steps": UPDATES,
                    "train.batch_size": PROMPTS,
                    "train.micro_batch_size": PROMPTS,
                    "rollout.samples": 1,
                    "rollout.rows": PROBLEMS,
                    "evaluate.problems": PROBLEMS,
                    "evaluate.every": EVERY,
                    "checkpoint.save_every": 0,
                    "runtime.seed": seed,
                    "checkpoint.out": str(folder / name),
                }
            )
        )
        if teacher is None:
            teacher = evaluate(
                run.teacher,
                run.problems,
                run.eval_sampler,
                samples=1,
                place=run.place,
                max_new_tokens=run.config.rollout.max_new_tokens,
                answer_format=run.answer_format,
            )
        result = train_in(run, RunFolder(folder / name), label=f"{name} arm:")
        last, phases = result["evaluations"][-1], result["seconds"]["by_phase"]
        arms.append(
            {
                "name": name,
                "prefix": run.prefix.length(0),
                "updates": result["steps"],
                "accuracy": last["accuracy"],
                "flops_useful": result["flops"]["useful"],
                "flops_executed": result["flops"]["executed"],
                "seconds": sum(v for phase, v in phases.items() if phase != "evaluation"),
                "finish_rate": last["finish_rate"],
                "mean_tokens": last["mean_tokens"],
                "tokens_taught": result["tokens"],
                "evaluations": result["evaluations"],
            }
        )
    student = arms[0]["evaluations"][0]
    picture = folder / "accuracy-against-flops.png"
    draw(arms, teacher.accuracy["value"], picture)
    document = {
        "teacher": teacher.accuracy,
        "student": student["accuracy"],
        "arms": arms,
        "picture": str(picture),
        "flops_ratio_full_to_prefix": arms[1]["flops_useful"] / arms[0]["flops_useful"],
    }
    return _table(arms, student, teacher), document


def _table(arms: list[dict], student: dict, teacher):
    from rich.table import Table

    table = Table(
        title=f"Same {UPDATES} updates of {PROMPTS} rollouts; accuracy on {PROBLEMS} held-out problems, "
        "one sample each, 95 % interval"
    )
    for column in (
        "",
        "prefix",
        "accuracy",
        "useful FLOPs",
        "training time",
        "answers that end",
        "mean tokens",
    ):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "student, untrained",
        "–",
        share_text(student["accuracy"]),
        "–",
        "–",
        f"{student['finish_rate']:.0%}",
        f"{student['mean_tokens']:.0f}",
    )
    for arm in arms:
        table.add_row(
            f"{arm['name']} arm",
            str(arm["prefix"]),
            share_text(arm["accuracy"]),
            flops_text(arm["flops_useful"]),
            f"{arm['seconds']:.0f} s",
            f"{arm['finish_rate']:.0%}",
            f"{arm['mean_tokens']:.0f}",
        )
    table.add_row(
        "teacher",
        "–",
        share_text(teacher.accuracy),
        "–",
        "–",
        f"{teacher.finish_rate:.0%}",
        f"{teacher.mean_tokens:.0f}",
    )
    return table


def draw(arms: list[dict], teacher: float, file: Path) -> None:
    """Accuracy against useful FLOPs, one line per arm with 95 % intervals, the teacher as a level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    axes.axhline(100 * teacher, color="#555555", linestyle=":", linewidth=1)
    axes.text(
        1,
        100 * teacher + 1,
        "teacher",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        color="#555555",
    )
    for arm in arms:
        colour = COLOURS[arm["name"]]
        x = [row["flops_useful"] / 1e9 for row in arm["evaluations"]]
        y, low, high = (
            [100 * row["accuracy"][key] for row in arm["evaluations"]]
            for key in ("value", "low", "high")
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x,
            y,
            marker="o" if arm["name"] == "prefix" else "s",
            color=colour,
            linestyle="-" if arm["name"] == "prefix" else "--",
            label=f"{arm['name']} rollouts"
            if arm["name"] == "full"
            else f"prefix of {arm['prefix']} tokens",
        )
    axes.set_xlabel("useful training FLOPs (billions)")
    axes.set_ylabel("accuracy on held-out problems (%)")
    axes.set_title(f"{UPDATES} updates of {PROMPTS} rollouts, evaluated every {EVERY}", fontsize=10)
    axes.set_ylim(0, 106)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)

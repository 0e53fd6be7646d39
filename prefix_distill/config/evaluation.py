"""The options of evaluation: what is measured, when, and how answers are sampled and graded."""

from dataclasses import dataclass
from typing import Literal

from .options import option


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    dataset: str | None = option(
        None,
        "--eval-dataset",
        "Held-out problems; same syntax as --dataset.",
        shown="the test split of the built-in task or preset, else rows held out of --dataset",
    )
    split: str | None = option(
        None,
        "--eval-split",
        "Split of a hub or built-in evaluation set.",
        shown="the preset's, else test",
    )
    problems: int = option(
        200,
        "--problems",
        "Held-out problems to evaluate before, during and after training; 0 evaluates none.",
        low=0,
    )
    rollouts: int = option(1, "--eval-rollouts", "Answers sampled per held-out problem.", low=1)
    every: int = option(
        0,
        "--eval-every",
        "Steps between evaluations; 0 evaluates only before and after training.",
        low=0,
    )
    temperature: float = option(
        1.0, "--eval-temperature", "Sampling temperature of evaluation; 0 is greedy.", low=0
    )
    top_p: float = option(
        1.0,
        "--eval-top-p",
        "Probability mass that nucleus sampling keeps in evaluation; 1 keeps all tokens.",
        above=0,
        high=1,
    )
    top_k: int = option(
        0,
        "--eval-top-k",
        "Number of most likely tokens that sampling keeps in evaluation; 0 keeps all.",
        low=0,
    )
    sampling: Literal["options", "model"] = option(
        "options",
        "--eval-sampling",
        "Sampling of evaluation: options (--eval-temperature, --eval-top-p, --eval-top-k) or model "
        "(what the student's generation_config.json recommends).",
    )
    teacher: Literal["auto", "off"] = option(
        "auto",
        "--eval-teacher",
        "Evaluation of the teacher after training, to report how much of the gap is closed: auto "
        "(unless the teacher is the student itself or sees privileged text) or off.",
    )
    kl_prompts: int = option(
        32,
        "--kl-prompts",
        "Held-out prompts for the KL, which is measured on full-length rollouts.",
        low=1,
    )
    tail_every: int = option(
        25,
        "--tail-every",
        "Steps between tail probes, which measure the KL beyond the prefix; 0 disables them.",
        low=0,
    )
    tail_prompts: int = option(8, "--tail-prompts", "Held-out prompts per tail probe.", low=1)
    check_samples: int = option(
        8,
        "--check-samples",
        "Held-out problems that both models answer before the run, if that takes less than about "
        "15 seconds; 0 skips this check.",
        low=0,
    )
    grader: str | None = option(
        None,
        "--grader",
        "Your own grader FILE.py:FUNCTION, a function of (row, response) that returns a score from "
        "0 to 1; it replaces reference answers.",
        shown="none",
    )
    grader_timeout: float = option(
        10.0,
        "--grader-timeout",
        "Time limit of --grader in seconds per answer; an answer that takes longer scores 0.",
        above=0,
    )
    answer_format: Literal["auto", "boxed", "hash", "last-number", "choice", "exact"] = option(
        "auto",
        "--answer-format",
        "How the final answer is extracted: auto (as the dataset defines, else boxed, hash or last "
        "number), boxed, hash (#### 42), last-number, choice (a letter) or exact.",
    )

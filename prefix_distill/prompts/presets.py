"""Data sets by short name: where each one is, what its columns hold, how its answers are written
and read, and its license.

Ids, configurations, splits, columns and licenses are what their cards state.
"""

import difflib
from dataclasses import dataclass

BOXED = r"Reason step by step, and put your final answer within \boxed{}."
LETTER = r"Reason step by step, and put the letter of your answer within \boxed{}."


@dataclass(frozen=True)
class Preset:
    """A data set on the hub. ``split``, ``test``, ``examples``: what is trained on, evaluated on
    and shown by --few-shot, where nothing else is asked for. ``solution``: the column with a worked
    solution, if it is not ``answer``. ``options``: the column that lists the options of a question
    whose ``answer`` is a letter; ``wrong``: the columns of the wrong options, where ``answer``
    holds the right one's text and their order is drawn. ``answer`` None: the last turn of a
    conversation, where it boxes an answer. ``cut`` and ``solution_cut``: patterns of what is
    removed from prompt and solution. ``sorted``: rows of a subject stand together."""

    hub: str
    split: str
    test: str
    prompt: str
    answer: str | None
    license: str
    note: str
    config: str | None = None
    examples: str | None = None
    solution: str | None = None
    options: str | None = None
    wrong: tuple[str, ...] = ()
    answer_format: str = "boxed"
    instruction: str | None = BOXED
    cut: str | None = None
    solution_cut: str | None = None
    sorted: bool = False


PRESETS = {
    "gsm8k": Preset(
        "openai/gsm8k",
        "train",
        "test",
        "question",
        "answer",
        "MIT",
        "grade-school word problems",
        config="main",
        answer_format="auto",
        solution_cut=r"<<[^<>]*>>|\n*####[^\n]*",
    ),
    "math": Preset(
        "DigitalLearningGmbH/MATH-lighteval",
        "train",
        "test",
        "problem",
        "solution",
        "MIT",
        "competition mathematics, 7 subjects, 5 levels",
        config="default",
        sorted=True,
    ),
    "math-500": Preset(
        "HuggingFaceH4/MATH-500",
        "test",
        "test",
        "problem",
        "answer",
        "none stated (its source MATH: MIT)",
        "500 problems of MATH's test split: not to be trained on where it is evaluated",
        solution="solution",
    ),
    "aime24": Preset(
        "HuggingFaceH4/aime_2024",
        "train",
        "train",
        "problem",
        "answer",
        "none stated",
        "30 problems of 2024; answers 0 to 999",
        solution="solution",
    ),
    "aime25": Preset(
        "math-ai/aime25",
        "test",
        "test",
        "problem",
        "answer",
        "none stated",
        "30 problems of 2025; answers 0 to 999; no solutions",
    ),
    "gpqa": Preset(
        "Idavidrein/gpqa",
        "train",
        "train",
        "Question",
        "Correct Answer",
        "CC-BY-4.0",
        "198 graduate-level questions; behind a form on the hub: accept its terms and log in",
        config="gpqa_diamond",
        solution="Explanation",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        answer_format="choice",
        instruction=LETTER,
    ),
    "mmlu-pro": Preset(
        "TIGER-Lab/MMLU-Pro",
        "test",
        "test",
        "question",
        "answer",
        "MIT",
        "questions of 14 subjects with up to ten options",
        examples="validation",
        solution="cot_content",
        options="options",
        answer_format="choice",
        instruction=LETTER,
        sorted=True,
    ),
    "deepmath-103k": Preset(
        "zwhe99/DeepMath-103K",
        "train",
        "train",
        "question",
        "final_answer",
        "MIT",
        "hard mathematics with three R1 solutions each, a 2 GB download: --streaming reads what "
        "the run needs",
        solution="r1_solution_1",
    ),
    "openthoughts3": Preset(
        "open-thoughts/OpenThoughts3-1.2M",
        "train",
        "train",
        "conversations",
        None,
        "Apache-2.0",
        "mathematics, code and science with QwQ-32B solutions, 28 GB: --streaming reads what the "
        "run needs; what boxes no answer is not graded",
        instruction=None,
    ),
    "dapo-math-17k": Preset(
        "open-r1/DAPO-Math-17k-Processed",
        "train",
        "train",
        "prompt",
        "reward_model.ground_truth",
        "none stated (its source BytedTsinghua-SIA/DAPO-Math-17k: Apache-2.0)",
        "each problem once; answers are whole numbers",
        config="all",
        cut=r"^Solve the following math problem step by step\. The last line of your response "
        r"should be of the form Answer: [^\n]*\n\n"
        r"|\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*$",
    ),
}


def nearest(name: str, cutoff: float = 0.75) -> str | None:
    """The preset whose name is most like ``name``, if one is."""
    return next(iter(difflib.get_close_matches(name.lower(), PRESETS, 1, cutoff)), None)

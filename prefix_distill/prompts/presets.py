"""Datasets by short name: location, columns, answer format and license.

Ids, configurations, splits, columns and licenses are those that the datasets' cards state.
"""

import difflib
from dataclasses import dataclass

BOXED = r"Reason step by step, and put your final answer within \boxed{}."
LETTER = r"Reason step by step, and put the letter of your answer within \boxed{}."


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A dataset on the hub.

    - ``split``, ``test``, ``examples``: the default splits for training, evaluation and --few-shot
      (``examples`` None: ``split``).
    - ``prompt``, ``answer``: columns. ``answer`` None: the boxed answer in the last turn of a
      conversation.
    - ``solution``: the column with a worked solution, if it is not ``answer``.
    - ``options``: the column that lists the options of a question; ``answer`` is then a letter.
    - ``wrong``: the columns of the wrong options; ``answer`` is then the text of the right option,
      and the seed determines the order of the options.
    - ``cut``, ``solution_cut``: patterns that are removed from the prompt and the solution.
    - ``sorted``: whether rows of one subject are adjacent.
    """

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
        hub="openai/gsm8k",
        split="train",
        test="test",
        prompt="question",
        answer="answer",
        license="MIT",
        note="grade-school word problems",
        config="main",
        answer_format="auto",
        solution_cut=r"<<[^<>]*>>|\n*####[^\n]*",
    ),
    "math": Preset(
        hub="DigitalLearningGmbH/MATH-lighteval",
        split="train",
        test="test",
        prompt="problem",
        answer="solution",
        license="MIT",
        note="competition mathematics, 7 subjects, 5 levels",
        config="default",
        sorted=True,
    ),
    "math-500": Preset(
        hub="HuggingFaceH4/MATH-500",
        split="test",
        test="test",
        prompt="problem",
        answer="answer",
        license="none stated (its source MATH: MIT)",
        note="500 problems of MATH's test split; do not train on them and evaluate on MATH",
        solution="solution",
    ),
    "aime24": Preset(
        hub="HuggingFaceH4/aime_2024",
        split="train",
        test="train",
        prompt="problem",
        answer="answer",
        license="none stated",
        note="30 problems of 2024; answers 0 to 999",
        solution="solution",
    ),
    "aime25": Preset(
        hub="math-ai/aime25",
        split="test",
        test="test",
        prompt="problem",
        answer="answer",
        license="none stated",
        note="30 problems of 2025; answers 0 to 999; no solutions",
    ),
    "gpqa": Preset(
        hub="Idavidrein/gpqa",
        split="train",
        test="train",
        prompt="Question",
        answer="Correct Answer",
        license="CC-BY-4.0",
        note="198 graduate-level questions; accept the terms on the hub and log in first",
        config="gpqa_diamond",
        solution="Explanation",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        answer_format="choice",
        instruction=LETTER,
    ),
    "mmlu-pro": Preset(
        hub="TIGER-Lab/MMLU-Pro",
        split="test",
        test="test",
        prompt="question",
        answer="answer",
        license="MIT",
        note="questions of 14 subjects with up to ten options",
        examples="validation",
        solution="cot_content",
        options="options",
        answer_format="choice",
        instruction=LETTER,
        sorted=True,
    ),
    "deepmath-103k": Preset(
        hub="zwhe99/DeepMath-103K",
        split="train",
        test="train",
        prompt="question",
        answer="final_answer",
        license="MIT",
        note="hard mathematics, three R1 solutions per problem; 2 GB, so use --streaming to read "
        "only the rows that the run needs",
        solution="r1_solution_1",
    ),
    "openthoughts3": Preset(
        hub="open-thoughts/OpenThoughts3-1.2M",
        split="train",
        test="train",
        prompt="conversations",
        answer=None,
        license="Apache-2.0",
        note="mathematics, code and science with QwQ-32B solutions; 28 GB, so use --streaming to "
        "read only the rows that the run needs; prompts without a boxed answer are not graded",
        instruction=None,
    ),
    "dapo-math-17k": Preset(
        hub="open-r1/DAPO-Math-17k-Processed",
        split="train",
        test="train",
        prompt="prompt",
        answer="reward_model.ground_truth",
        license="none stated (its source BytedTsinghua-SIA/DAPO-Math-17k: Apache-2.0)",
        note="each problem once; answers are whole numbers",
        config="all",
        cut=r"^Solve the following math problem step by step\. The last line of your response "
        r"should be of the form Answer: [^\n]*\n\n"
        r"|\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*$",
    ),
}


def closest_preset(name: str, cutoff: float = 0.75) -> str | None:
    """Return the preset with the most similar name, or None below a similarity of ``cutoff``."""
    close = difflib.get_close_matches(name.lower(), PRESETS, 1, cutoff)
    if not close:
        return None
    return close[0]

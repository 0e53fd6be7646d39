"""The usual names of columns; the first one that a dataset has is taken."""

from collections.abc import Iterable

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
PROMPT_COLUMNS = (
    *CONVERSATION_COLUMNS,
    "prompt",
    "question",
    "question_stem",
    "problem",
    "instruction",
    "query",
    "input",
    "inputs",
    "ctx",
    "text",
    "chosen",
)
# final answers come before worked solutions, which come before replies
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "target",
    "targets",
    "gold",
    "correct_answer",
    "correct answer",
    "final_ans",
    "expected_answer",
    "answer_number",
    "solution",
    "output",
    "response",
    "completion",
)
OPTION_COLUMNS = ("options", "choices", "endings")
OPTION_ANSWER_COLUMNS = (
    "answer",
    "answerkey",
    "answer_key",
    "correct_answer",
    "label",
    "answer_idx",
    "answer_index",
    "correct_option",
    "correct",
    "cop",
    "gold",
    *ANSWER_COLUMNS[1:],
)
# the right option of a question whose wrong options have columns of their own
RIGHT_OPTION_COLUMNS = ("correct answer", "correct_answer", "right_answer", "best_answer", "answer")
TOOL_COLUMNS = ("tools",)
SYSTEM_COLUMNS = ("system", "system_prompt")
# prompt column → the columns whose text belongs to it, and whether that text comes first
CONTEXTS = {
    "instruction": (("input", "context"), False),
    "question": (
        ("context", "passage", "article", "body", "premise", "story", "narrative"),
        True,
    ),
    "query": (("context", "passage"), True),
    "inputs": (("definition",), True),
}


def list_names(names: Iterable[str], most: int = 20) -> str:
    """Return the names of columns with commas; of more than ``most``, how many are left out."""
    listed = list(names)
    more = len(listed) - most
    text = ", ".join(listed[:most])
    if more > 0:
        text += f" and {more} more"
    return text

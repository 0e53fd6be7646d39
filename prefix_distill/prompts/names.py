"""The usual names of columns; the first one that a dataset has is taken."""

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
PROMPT_COLUMNS = (
    *CONVERSATION_COLUMNS,
    "prompt",
    "question",
    "problem",
    "instruction",
    "query",
    "input",
    "inputs",
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
    "solution",
    "output",
    "response",
    "completion",
)
OPTION_COLUMNS = ("options", "choices")
OPTION_ANSWER_COLUMNS = (
    "answer",
    "answerkey",
    "answer_key",
    "correct_answer",
    "label",
    "answer_idx",
    "answer_index",
    *ANSWER_COLUMNS[1:],
)
TOOL_COLUMNS = ("tools",)
SYSTEM_COLUMNS = ("system", "system_prompt")
# prompt column → the columns whose text belongs to it, and whether that text comes first
CONTEXTS = {
    "instruction": (("input", "context"), False),
    "question": (("context", "passage"), True),
    "query": (("context", "passage"), True),
}

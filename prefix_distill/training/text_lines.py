"""Write texts of models on one line of a terminal, with a mark where the prefix ends."""

from typing import Any

# files of a run folder: JSON lines of evaluations, and of rollouts that were printed
EVALUATIONS, ROLLOUTS = "samples.jsonl", "rollouts.jsonl"
MARK = "‖"
PROMPT_CHARACTERS = 200  # shown of a rollout's prompt, its end
# control characters but tab and line feed → the character that shows them
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Return a text without control characters, which could change the terminal."""
    return text.replace("\r\n", "\n").translate(VISIBLE)


def one_line(text: str) -> str:
    """Return a text on one line; line breaks become ↵."""
    return " ↵ ".join(line.strip() for line in visible(text).strip().split("\n"))


def rollout_line(row: dict[str, Any], answer: dict[str, Any]) -> str:
    """Return a rollout as a line.

    ``row``: that of its step in rollouts.jsonl; ``answer``: one of the row's answers.
    """
    sampled_by = ""
    if answer.get("from_teacher"):
        sampled_by = ", sampled by the teacher"
    end = f"{MARK} (the prefix of {row['prefix']} tokens ends here)"
    if answer["finished"]:
        end = f"(ends after {answer['tokens']} tokens)"
    prompt = one_line(answer["prompt"])[-PROMPT_CHARACTERS:]
    return f"rollout of step {row['step']}{sampled_by}: {prompt} → {one_line(answer['text'])} {end}"

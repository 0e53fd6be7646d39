"""Split a conversation that is written as one text into its turns."""

import re
from dataclasses import dataclass

from .prompt import Message

# role names of ShareGPT, of transcripts and of chat templates
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_BOS = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*"
_LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_LLAMA_TURN = re.compile(r"\[INST\](.*?)\[/INST\](.*?)(?=(?:<s>)?\s*\[INST\]|$)", re.DOTALL)
# Alpaca's prompt: a preamble, the task, and the answer
_ALPACA = re.compile(r"(?:.*\n)?###\s*Instruction:.*?\n\s*(?=###\s*Response:)", re.DOTALL)
_ALPACA_ANSWER = re.compile(r"###\s*Response:")
# a question and its answer under headings: "Question: … Answer: …", "### Problem … ### Solution …"
_QUESTION = re.compile(r"\s*(?:#+ *)?(?:question|problem|prompt|input|task|q)\s*[:\n]", re.I)
_ANSWER = re.compile(r"\n\s*(?:#+ *)?(?:answer|solution|response|output|a)\s*[:\n]", re.I)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a kind of transcript opens a turn (with the role as a group) and closes it.

    ``is_marked``: control tokens open the turns, so that no other text looks like it.
    """

    opener: re.Pattern[str]
    end: str
    is_marked: bool = True


_FORMS = (
    _Form(opener=re.compile(r"<\|im_start\|>(\w+)(?:\n|$)"), end="<|im_end|>"),
    _Form(
        opener=re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*"),
        end="<|eot_id|>",
    ),
    _Form(opener=re.compile(r"<start_of_turn>(\w+)(?:\n|$)"), end="<end_of_turn>"),
    _Form(opener=re.compile(r"(?m:^)<\|(system|user|assistant)\|>(?:\n|$)"), end="<|end|>"),
    _Form(opener=re.compile(r"\s*### ?(Human|User|Assistant|System): ?"), end="", is_marked=False),
    _Form(opener=re.compile(r"(?:^|\n\n)(Human|Assistant): ?"), end="", is_marked=False),
)


# the same on lines of their own, as a text without other structure has them
_LINES = _Form(opener=re.compile(r"(?:^|\n+)(Human|User|Assistant): ?"), end="", is_marked=False)


def split_transcript(text: str) -> list[Message] | None:
    """Return the turns of a text that is a whole conversation; None if it is none.

    The text must start with a turn. The forms are those of chat templates (ChatML, Llama 2 and 3,
    Gemma, Zephyr and Phi), of Alpaca, and Human: … Assistant: ….
    """
    for form in _FORMS:
        messages = _split_turns(text, form)
        if messages is not None:
            return messages
    return _split_llama(text) or _split_alpaca(text)


def _split_turns(text: str, form: _Form) -> list[Message] | None:
    before, *parts = form.opener.split(text)
    roles = []
    for name in parts[::2]:
        roles.append(SHAREGPT_ROLES.get(name.lower(), name.lower()))
    if "user" not in roles or not (form.is_marked or "assistant" in roles):
        return None
    if not re.fullmatch(_BOS, before):
        return None
    messages = []
    for role, words in zip(roles, parts[1::2], strict=True):
        if form.end:
            words = words.strip()
            for end in (form.end, "</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>"):
                words = words.removesuffix(end).rstrip()
        messages.append({"role": role, "content": words})
    return messages


def _split_llama(text: str) -> list[Message] | None:
    turns = list(_LLAMA_TURN.finditer(text))
    if not turns or not re.fullmatch(_BOS, text[: turns[0].start()]):
        return None
    messages = []
    for turn in turns:
        question, answer = turn[1], turn[2].strip()
        system = _LLAMA_SYSTEM.search(question)
        if system is not None:
            messages.append({"role": "system", "content": system[1].strip()})
            question = question.replace(system[0], "")
        messages.append({"role": "user", "content": question.strip()})
        messages.append({"role": "assistant", "content": answer.removesuffix("</s>").strip()})
    return messages


def _split_alpaca(text: str) -> list[Message] | None:
    """Return the text before "### Response:" and the answer after it; None without an answer."""
    task = _ALPACA.match(text)
    if task is None:
        return None
    heading = _ALPACA_ANSWER.match(text, task.end())
    if heading is None or not text[heading.end() :].strip():
        return None
    answer = text[heading.end() :].strip()
    return [
        {"role": "user", "content": task[0].strip()},
        {"role": "assistant", "content": answer},
    ]


def find_reply(text: str) -> str | None:
    """Return the control tokens that open an assistant's turn in the text, or None."""
    for form in _FORMS:
        if not form.is_marked:
            continue
        for opener in form.opener.finditer(text):
            if opener[1].lower() in ("assistant", "model"):
                return opener[0].strip()
    return None


def split_pair(text: str) -> list[Message] | None:
    """Return lines such as "User: …", or a question and its last answer under headings, as turns.

    None: the text has no such form, or no answer.
    """
    messages = _split_turns(text, _LINES)
    if messages is not None:
        return messages
    headings = list(_ANSWER.finditer(text))
    if not headings or not _QUESTION.match(text):
        return None
    answer = text[headings[-1].end() :].strip()
    if not answer:
        return None
    return [
        {"role": "user", "content": text[: headings[-1].start()].strip()},
        {"role": "assistant", "content": answer},
    ]

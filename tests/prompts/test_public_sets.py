"""A table of public datasets: a row of each in its published columns, and how it must be read.

The columns are those that the datasets' cards state; the texts are ours.
"""

import json

import pytest

from prefix_distill.errors import UserError
from prefix_distill.prompts.load import load_prompts

PROSE = "Six times seven is forty-two, since seven times six is forty-two."
OPTIONS = "6·7?\n\nA. 40\nB. 42\nC. 44"
LISTED = ["40", "42", "44"]


def turn(role, text, **more):
    return {"role": role, "content": text, **more}


def said(speaker, text, **more):
    return {"from": speaker, "value": text, **more}


ASKED, REPLY = turn("user", "6·7?"), turn("assistant", "It is \\boxed{42}.")
FIRST = [turn("user", "Hi"), turn("assistant", "Hello")]
BOXED = REPLY["content"]
RENDERED = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n6·7?<|im_end|>\n"
RENDERED += "<|im_start|>assistant\nIt is \\boxed{42}.<|im_end|>\n"

# name → (row, the last turn or all messages, the reference, text of the note)
LOADED = {
    "ultrachat": (
        {"prompt": "Hi", "prompt_id": "1", "messages": [*FIRST, ASKED, turn("assistant", PROSE)]},
        [*FIRST, ASKED],
        None,
        "prompt from messages",
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "6·7?",
            "chosen": [ASKED, REPLY],
            "rejected": [ASKED, REPLY],
            "messages": [ASKED, REPLY],
            "score_chosen": 8.0,
        },
        [ASKED],
        BOXED,
        "not used: prompt, chosen, rejected, score_chosen",
    ),
    "UltraFeedback": (
        {
            "source": "s",
            "instruction": "6·7?",
            "models": ["m"],
            "completions": [{"response": "42"}],
            "correct_answers": ["None"],
        },
        "6·7?",
        None,
        "not used: source, models, completions, correct_answers",
    ),
    "OpenHermes": (
        {
            "custom_instruction": None,
            "system_prompt": None,
            "conversations": [
                said("system", "S"),
                said("human", "6·7?", weight=None),
                said("gpt", "42", weight=None),
            ],
        },
        [turn("system", "S"), ASKED],
        "42",
        "",
    ),
    "Tulu 3 mixture": (
        {"id": "1", "messages": [turn("system", "S"), ASKED, REPLY], "source": "s"},
        [turn("system", "S"), ASKED],
        BOXED,
        "",
    ),
    "MetaMathQA": (
        {
            "type": "GSM_Rephrased",
            "query": "6·7?",
            "original_question": "7·6?",
            "response": "6·7=42.\n#### 42\nThe answer is: 42",
        },
        "6·7?",
        "6·7=42.\n#### 42\nThe answer is: 42",
        "answer from response",
    ),
    "Orca-Math": ({"question": "6·7?", "answer": PROSE}, "6·7?", None, "does not apply"),
    "MMLU": (
        {"question": "6·7?", "subject": "s", "choices": LISTED, "answer": 1},
        OPTIONS,
        "B",
        "",
    ),
    "MMLU as CSV": (
        {"question": "6·7?", "A": "40", "B": "42", "C": "44", "answer": "B"},
        OPTIONS,
        "B",
        "with the options in A, B, C",
    ),
    "C-Eval": (
        {
            "id": 0,
            "question": "6·7?",
            "A": "40",
            "B": "42",
            "C": "44",
            "answer": "B",
            "explanation": "",
        },
        OPTIONS,
        "B",
        "not used: id, explanation",
    ),
    "ARC": (
        {
            "id": "1",
            "question": "6·7?",
            "choices": {"text": LISTED, "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        OPTIONS,
        "B",
        "",
    ),
    "HellaSwag": (
        {
            "ind": 1,
            "activity_label": "a",
            "ctx_a": "6",
            "ctx_b": "7?",
            "ctx": "6·7?",
            "endings": LISTED,
            "label": "1",
        },
        OPTIONS,
        "B",
        "prompt from ctx, with the options in endings",
    ),
    "CommonsenseQA": (
        {
            "question": "6·7?",
            "question_concept": "x",
            "choices": {"label": ["A", "B", "C"], "text": LISTED},
            "answerKey": "B",
        },
        OPTIONS,
        "B",
        "",
    ),
    "TruthfulQA, multiple choice": (
        {"question": "6·7?", "mc1_targets": {"choices": LISTED, "labels": [0, 1, 0]}},
        "6·7?",
        None,
        "no answer column: 0 of 1 references can be graded (1 missing), so accuracy does not apply",
    ),
    "GPQA": (
        {
            "Question": "6·7?",
            "Correct Answer": "42",
            "Incorrect Answer 1": "40",
            "Incorrect Answer 2": "44",
            "Explanation": PROSE,
        },
        ("40", "42", "44"),
        "letter",
        "Incorrect Answer 1, Incorrect Answer 2",
    ),
    "SciQ": (
        {
            "question": "6·7?",
            "distractor3": "44",
            "distractor1": "40",
            "distractor2": "41",
            "correct_answer": "42",
            "support": PROSE,
        },
        ("40", "41", "42", "44"),
        "letter",
        "not used: support",
    ),
    "MMLU-Pro": (
        {
            "question": "6·7? ",
            "options": LISTED,
            "answer": "B",
            "answer_index": 1,
            "cot_content": PROSE,
        },
        OPTIONS,
        "B",
        "answer from answer",
    ),
    "options that are letters": (
        {"question": "?", "options": ["B", "A", "C"], "answer": "A"},
        "?\n\nA. B\nB. A\nC. C",
        "A",
        "",
    ),
    "numbers as options": (
        {"question": "6·7?", "options": [40, 42, 44], "answer": 42},
        OPTIONS,
        "B",
        "",
    ),
    "AQuA": (
        {
            "question": "6·7?",
            "options": ["A)40", "B)42", "C)44"],
            "rationale": PROSE,
            "correct": "B",
        },
        OPTIONS,
        "B",
        "not used: rationale",
    ),
    "MathQA": (
        {
            "Problem": "6·7?",
            "Rationale": PROSE,
            "options": "a ) 40 , b ) 42 , c ) 44",
            "correct": "b",
        },
        OPTIONS,
        "B",
        "",
    ),
    "MedMCQA": (
        {"question": "6·7?", "opa": "40", "opb": "42", "opc": "44", "cop": 1, "exp": PROSE},
        OPTIONS,
        "B",
        "with the options in opa, opb, opc",
    ),
    "MedQA": (
        {
            "question": "6·7?",
            "answer": "42",
            "options": {"A": "40", "B": "42", "C": "44"},
            "answer_idx": "B",
        },
        OPTIONS,
        "B",
        "",
    ),
    "RACE": (
        {"article": "An article.", "question": "6·7?", "options": LISTED, "answer": "B"},
        f"An article.\n\n{OPTIONS}",
        "B",
        "the text of article before it",
    ),
    "Social IQA": (
        {
            "context": "A talks.",
            "question": "6·7?",
            "answerA": "40",
            "answerB": "42",
            "answerC": "44",
            "label": "3",
        },
        f"A talks.\n\n{OPTIONS}",
        "C",
        "the answers count the options from 1",
    ),
    "COPA": (
        {"premise": "It is 42.", "choice1": "40", "choice2": "42", "question": "cause", "label": 1},
        "It is 42.\n\ncause\n\nA. 40\nB. 42",
        "B",
        "the text of premise before it",
    ),
    "BoolQ": (
        {"question": "Is it 42?", "answer": True, "passage": "It is."},
        "It is.\n\nIs it 42?",
        "True",
        "",
    ),
    "DROP": (
        {
            "section_id": "s",
            "passage": "It is 42.",
            "question": "6·7?",
            "answers_spans": {"spans": ["42"], "types": ["number"]},
        },
        "It is 42.\n\n6·7?",
        None,
        "not used: section_id, answers_spans",
    ),
    "SQuAD": (
        {
            "title": "t",
            "context": "It is 42.",
            "question": "6·7?",
            "answers": {"text": ["42", "42"], "answer_start": [6, 6]},
        },
        "It is 42.\n\n6·7?",
        None,
        "not used: title, answers",
    ),
    "HotpotQA": (
        {
            "question": "6·7?",
            "answer": "42",
            "context": {"title": ["t"], "sentences": [["It is 42."]]},
        },
        "6·7?",
        "42",
        "not used: context (not text)",
    ),
    "MBPP": (
        {"task_id": 1, "text": "Write f.", "code": "def f(): 1", "test_list": ["assert f()"]},
        "Write f.",
        None,
        "not used: task_id, code, test_list",
    ),
    "HumanEval": (
        {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "assert f()"},
        "def f():\n",
        None,
        "not used: canonical_solution, test",
    ),
    "APPS": (
        {"problem_id": 1, "question": "Write f.", "solutions": '["x"]', "input_output": "{}"},
        "Write f.",
        None,
        "",
    ),
    "DeepScaleR": ({"problem": "6·7?", "answer": "42", "solution": PROSE}, "6·7?", "42", ""),
    "OpenR1-Math": (
        {
            "problem": "6·7?",
            "solution": PROSE,
            "answer": "42",
            "generations": [PROSE],
            "messages": [ASKED, turn("assistant", PROSE)],
        },
        [ASKED],
        "42",
        "answer from answer",
    ),
    "s1K": (
        {
            "solution": "42",
            "question": "6·7?",
            "cot_type": "math",
            "cot": None,
            "thinking_trajectories": [PROSE],
            "attempt": PROSE,
        },
        "6·7?",
        "42",
        "",
    ),
    "LIMO": ({"question": "6·7?", "solution": PROSE, "answer": "42"}, "6·7?", "42", ""),
    "Big-Math": (
        {"problem": "6·7?", "answer": "42", "domain": ["d"], "llama8b_solve_rate": 0.5},
        "6·7?",
        "42",
        "",
    ),
    "Skywork-OR1": (
        {
            "prompt": [ASKED],
            "reward_model": {"ground_truth": '["42"]', "style": "rule"},
            "extra_info": {"index": 1},
        },
        [ASKED],
        "42",
        "",
    ),
    "Skywork-OR1, code": (
        {
            "prompt": [ASKED],
            "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": ["2"]}'},
        },
        [ASKED],
        None,
        "does not apply",
    ),
    "AIME 2024": (
        {"ID": "1", "Problem": "6·7?", "Solution": PROSE, "Answer": 42},
        "6·7?",
        "42",
        "not used: ID, Solution",
    ),
    "AMC": ({"id": 0, "problem": "6·7?", "answer": 42.0, "url": "u"}, "6·7?", "42.0", ""),
    "Omni-MATH": (
        {"domain": ["d"], "difficulty": 8.0, "problem": "6·7?", "solution": PROSE, "answer": "42"},
        "6·7?",
        "42",
        "",
    ),
    "OlympiadBench": (
        {
            "question": "6·7?",
            "solution": [PROSE],
            "final_answer": ["42"],
            "context": None,
            "image_1": None,
            "unit": None,
        },
        "6·7?",
        "42",
        "",
    ),
    "SVAMP": (
        {"ID": "1", "Body": "Six bags hold 7 each.", "Question": "6·7?", "Answer": "42.0"},
        "Six bags hold 7 each.\n\n6·7?",
        "42.0",
        "the text of Body before it",
    ),
    "ASDiv": (
        {"body": "Six bags hold 7.", "question": "6·7?", "answer": "42 (apples)", "formula": "6*7"},
        "Six bags hold 7.\n\n6·7?",
        "42 (apples)",
        "",
    ),
    "MultiArith": ({"question": "6·7?", "final_ans": "42"}, "6·7?", "42", "answer from final_ans"),
    "natural instructions": (
        {"definition": "Multiply.", "inputs": "6·7?", "targets": "42"},
        "Multiply.\n\n6·7?",
        "42",
        "",
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                said("human", "6·7?"),
                said("gpt", "call"),
                said("tool", "42"),
                said("gpt", "42"),
            ]
        },
        [ASKED, turn("assistant", "call"), turn("tool", "42")],
        "42",
        "",
    ),
    "Dolly": (
        {"instruction": "6·7?", "context": "It is 42.", "response": "42", "category": "qa"},
        "6·7?\n\nIt is 42.",
        "42",
        "",
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 6·7?\n\nAssistant: 42",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 6·7?\n\nAssistant: 41",
        },
        [*FIRST, ASKED],
        "42",
        "not used: rejected",
    ),
    "HH prompts": (
        {"prompt": "\n\nHuman: 6·7?\n\nAssistant:", "response": "42"},
        [ASKED],
        "42",
        "split into turns",
    ),
    "No Robots": (
        {"prompt": "6·7?", "prompt_id": "1", "messages": [ASKED, REPLY], "category": "c"},
        [ASKED],
        BOXED,
        "",
    ),
    "WildChat": (
        {
            "conversation": [
                turn("user", "6·7?", language="en"),
                turn("assistant", "42", toxic=False),
            ],
            "turn": 1,
            "model": "m",
        },
        [ASKED],
        "42",
        "not used: turn, model",
    ),
    "Orca DPO": (
        {"system": "S", "question": "6·7?", "chosen": "42", "rejected": "41"},
        [turn("system", "S"), ASKED],
        None,
        "",
    ),
    "ChatML in text": ({"text": RENDERED}, [turn("system", "S"), ASKED], BOXED, "split into turns"),
    "Guanaco": ({"text": "### Human: 6·7?### Assistant: 42"}, [ASKED], "42", "split into turns"),
    "Llama 2 in text": (
        {"text": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n6·7? [/INST] 42 </s>"},
        [turn("system", "S"), ASKED],
        "42",
        "split into turns",
    ),
    "code Alpaca": (
        {
            "instruction": "6·7?",
            "input": "",
            "output": PROSE,
            "prompt": f"Below is a task.\n\n### Instruction:\n6·7?\n\n### Response:\n{PROSE}",
        },
        "Below is a task.\n\n### Instruction:\n6·7?",
        None,
        "split into turns",
    ),
    "ChatML without an answer": (
        {"prompt": RENDERED[: RENDERED.index("\nIt is")], "answer": "42"},
        [turn("system", "S"), ASKED],
        "42",
        "split into turns",
    ),
    "Llama 3 in text": (
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n6·7?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n42<|eot_id|>"
        },
        [ASKED],
        "42",
        "split into turns",
    ),
    "Gemma in text": (
        {
            "text": "<bos><start_of_turn>user\n6·7?<end_of_turn>\n<start_of_turn>model\n42"
            "<end_of_turn>\n"
        },
        [ASKED],
        "42",
        "",
    ),
    "Zephyr in text": (
        {"text": "<|system|>\nS</s>\n<|user|>\n6·7?</s>\n<|assistant|>\n42</s>"},
        [turn("system", "S"), ASKED],
        "42",
        "",
    ),
    "Llama 2 with several turns": (
        {"text": "<s>[INST] Hi [/INST] Hello </s><s>[INST] 6·7? [/INST] 42 </s>"},
        [*FIRST, ASKED],
        "42",
        "",
    ),
    "a question about control tokens": (
        {"question": "What does <|im_start|>user do?", "answer": "42"},
        "What does <|im_start|>user do?",
        "42",
        "",
    ),
    "a question that quotes a conversation": (
        {"question": f"Explain <|user|> and <|assistant|>:\n{RENDERED}", "answer": "42"},
        f"Explain <|user|> and <|assistant|>:\n{RENDERED}",
        "42",
        "",
    ),
    "lines of speakers": ({"text": "User: 6·7?\nAssistant: 42"}, [ASKED], "42", "split into turns"),
    "headings in text": (
        {"text": "### Question:\n6·7?\n\n### Answer:\n42"},
        "### Question:\n6·7?",
        "42",
        "split into turns",
    ),
    "a prompt for a base model": (
        {"prompt": "Question: 2·2?\nAnswer: 4\nQuestion: 6·7?\nAnswer:", "completion": "42"},
        "Question: 2·2?\nAnswer: 4\nQuestion: 6·7?\nAnswer:",
        "42",
        "",
    ),
    "options in the turns": (
        {"messages": [turn("user", OPTIONS)], "choices": LISTED, "answer": "B"},
        [turn("user", OPTIONS)],
        "B",
        "not used: choices",
    ),
    "NQ-open": (
        {"question": "6·7?", "answer": ["42", "forty-two"]},
        "6·7?",
        "42, forty-two",
        "several references are joined, an answer must have all of them in 1 of 1 rows",
    ),
    "a prompt that shows its answer": (
        {"prompt": f"6·7? {PROSE}", "completion": PROSE},
        f"6·7? {PROSE}",
        None,
        "the prompt shows its reference answer in 1 of 1 rows",
    ),
    "sides of a triangle": (
        {"question": "6·7?", "a": "3", "b": "4", "c": "5", "answer": "12"},
        "6·7?",
        "12",
        "not used: a, b, c",
    ),
    "preferences between two answers": (
        {"question": "6·7?", "answer_a": "41", "answer_b": "42", "preference": "b"},
        "6·7?",
        None,
        "not used: answer_a, answer_b, preference",
    ),
    "MuSR": (
        {
            "narrative": "A talks.",
            "question": "6·7?",
            "choices": "['40', '42', '44']",
            "answer_index": 1,
            "answer_choice": "42",
        },
        f"A talks.\n\n{OPTIONS}",
        "B",
        "",
    ),
    "options that no one can read": (
        {"question": "6·7?", "choices": "['40' '42' '44']", "answer": "42"},
        "6·7?",
        "42",
        "not used: choices (not a list of options)",
    ),
    "LogiQA": (
        {"context": "A talks.", "query": "6·7?", "options": LISTED, "correct_option": 1},
        f"A talks.\n\n{OPTIONS}",
        "B",
        "",
    ),
    "AGIEval": (
        {"query": "6·7?", "choices": ["(A)40", "(B)42", "(C)44"], "gold": [1]},
        OPTIONS,
        "B",
        "",
    ),
    "OpenBookQA": (
        {
            "question_stem": "6·7?",
            "choices": {"text": LISTED, "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        OPTIONS,
        "B",
        "",
    ),
    "OpenMathReasoning": (
        {"problem": "6·7?", "generated_solution": PROSE, "expected_answer": "42"},
        "6·7?",
        "42",
        "",
    ),
    "MGSM": (
        {"question": "6·7?", "answer": None, "answer_number": 42, "equation_solution": None},
        "6·7?",
        "42",
        "answer from answer_number",
    ),
    "a number as input": (
        {"instruction": "Double it.", "input": 21, "output": 42},
        "Double it.\n\n21",
        "42",
        "",
    ),
    "two system messages": (
        {"system": "Other", "messages": [turn("system", "S"), ASKED, REPLY]},
        [turn("system", "S"), ASKED],
        BOXED,
        "the conversation's system turn replaces the column's in 1 of 1 rows",
    ),
    "stories": ({"text": "Once upon a time."}, "Once upon a time.", None, "prompt from text"),
}

# name → (row, the message)
REFUSED = {
    "TriviaQA": (
        {"question": "6·7?", "answer": {"aliases": ["42"], "value": "42"}},
        "name a field with --answer-column answer.FIELD",
    ),
    "LiveCodeBench": (
        {"question_title": "f", "question_content": "Write f.", "public_test_cases": "[]"},
        "no prompt column",
    ),
    "OASST": (
        {"message_id": "1", "parent_id": None, "text": "6·7?", "role": "prompter"},
        "each row is one message",
    ),
    "Chatbot Arena": (
        {"winner": "model_a", "conversation_a": [ASKED, REPLY], "conversation_b": [ASKED, REPLY]},
        "no prompt column",
    ),
    "Winogrande": (
        {"sentence": "_ is.", "option1": "40", "option2": "42", "answer": "2"},
        "no prompt column",
    ),
    "PIQA": ({"goal": "6·7?", "sol1": "40", "sol2": "42", "label": 1}, "no prompt column"),
    "ShareGPT with calls": (
        {"conversations": [said("human", "6·7?"), said("function_call", "f"), said("gpt", "42")]},
        "has the roles user, function_call before its answer",
    ),
    "Capybara": ({"conversation": [{"input": "6·7?", "output": "42"}]}, "has no prompt text"),
    "a reply without a question": (
        {"text": "<|im_start|>assistant\n42<|im_end|>"},
        "has an assistant's turn (<|im_start|>assistant) in its text",
    ),
    "a reply inside a text": (
        {"text": "x\n<|im_start|>user\n6·7?<|im_end|>\n<|im_start|>assistant\n42"},
        "has an assistant's turn (<|im_start|>assistant) in its text",
    ),
}


def arrange(row, order):
    """Return the row with other columns first, or with names in capitals."""
    if order == "reversed":
        return dict(reversed(row.items()))
    if order == "capitals":
        return {name.upper(): value for name, value in row.items()}
    return row


def load(folder, row):
    path = folder / "x.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return load_prompts(str(path))


@pytest.mark.parametrize("order", ["given", "reversed", "capitals"])
@pytest.mark.parametrize("name", LOADED)
def test_a_public_dataset_is_read_right(name, order, tmp_path):
    row, prompt, reference, note = LOADED[name]
    if order == "capitals" and "reward_model" in row:
        pytest.skip("the names inside a record keep their case")
    loaded = load(tmp_path, arrange(row, order))
    [found] = loaded.prompts
    if isinstance(prompt, tuple):  # options in an order of the seed
        lines = found.problem.splitlines()[2:]
        assert sorted(line[3:] for line in lines) == list(prompt)
        assert lines["ABCDE".index(found.answer)].endswith(". 42")
        return
    if isinstance(prompt, list):
        assert list(found.messages) == prompt
    else:
        assert found.messages == ({"role": "user", "content": prompt},)
    assert found.answer == reference
    if order == "given":
        assert note in " ".join(loaded.notes)


@pytest.mark.parametrize("order", ["given", "reversed", "capitals"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_public_dataset_that_needs_a_choice_is_refused(name, order, tmp_path):
    row, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        load(tmp_path, arrange(row, order))
    assert message in str(error.value) or order == "capitals"
    assert "\n" not in str(error.value)

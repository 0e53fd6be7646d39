"""Test tokenizers with ids beyond the rows of the embedding and the output layer."""

import json

import pytest
from helpers import byte_tokenizer, invoke, prepared, save_tiny
from transformers import AddedToken

from prefix_distill.engine.token_bytes import TokenBytes
from prefix_distill.errors import UserError

ROWS = 260


def save_with(folder, token: str, special: bool = True, **settings) -> str:
    """Save a tiny model whose tokenizer has one more token, of id 260, than the model has rows."""
    save_tiny(folder, seed=3)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_unused_token_beyond_the_rows_is_noted_and_left_out(tmp_path, pair, questions):
    """The padding token is one: rollouts then pad with an EOS id, which has a row."""
    student = save_with(tmp_path / "model", "<more>", pad_token="<more>")
    out = tmp_path / "run"
    code, _, err = invoke(
        *["run", "--student", student, "--teacher", pair[1], "--dataset", questions],
        *["--steps", "1", "--prefix", "8", "--max-new-tokens", "12", "--batch-size", "2"],
        *["--problems", "2", "--kl-prompts", "2", "--check-samples", "2", "--out", out],
    )
    assert code == 0, err
    assert f"the tokenizer of {student} has tokens beyond the model's 260 ids" in err
    assert "not used: '<more>' (id 260)" in err
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert "vocabulary: the same 260 ids in student and teacher" in notes
    result = json.loads((out / "run.json").read_text())["result"]
    assert result["evaluations"]


def test_eval_leaves_out_an_unused_token(tmp_path, questions):
    model = save_with(tmp_path / "model", "<more>", pad_token="<more>")
    code, _, err = invoke(
        *["eval", "--model", model, "--dataset", questions, "--max-new-tokens", "8"],
        *["--problems", "3", "--out", tmp_path / "e.jsonl"],
    )
    assert code == 0, err
    assert "not used: '<more>' (id 260)" in err


@pytest.mark.parametrize("option", ["template", "begin"])
def test_a_prompt_with_a_token_beyond_the_rows_is_refused(tmp_path, questions, option):
    model = save_with(tmp_path / "model", "<more>")
    flags = ["--dataset", questions]
    where = "prompt 0 contains"
    if option == "template":
        file = tmp_path / "model/chat_template.jinja"
        file.write_text(file.read_text() + "<more>")
    else:
        flags += ["--begin", "<more>"]
        where = "--begin contains"
    code, _, err = invoke("eval", "--model", model, *flags, "--out", tmp_path / "e.jsonl")
    assert code == 2
    assert f"{where} the token '<more>' (id 260), but the model has only 260 ids" in err


def test_a_question_with_the_name_of_a_token_is_read_as_plain_text(tmp_path):
    model = save_with(tmp_path / "model", "<more>")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "is <more> a token?", "answer": "1"}) + "\n")
    code, _, err = invoke("eval", "--model", model, "--dataset", rows, "--max-new-tokens", "4")
    assert code == 0, err


def test_aligned_text_is_read_without_tokens_beyond_the_rows(tmp_path):
    """Another model may write the text of any token that is not special."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["42"])
    assert TokenBytes(tokenizer, "all").encode("a42") == (*tokenizer("a").input_ids, ROWS)
    side = TokenBytes(tokenizer, "with rows", ids=ROWS)
    assert side.encode("a42") == tuple(byte_tokenizer()("a42").input_ids)
    assert len(side.table) == ROWS and ROWS not in side.canonical().values()


def test_a_teacher_with_a_token_beyond_the_rows_is_aligned(tmp_path, pair, questions):
    teacher = save_with(tmp_path / "teacher", "42", special=False)
    run = prepared((pair[0], teacher), questions)
    assert run.pair.alignment is None and run.pair.teacher.support == ROWS


def test_text_of_ordinary_tokens_beyond_the_rows_is_refused(tmp_path, pair, questions):
    """Tokens that are not added ones may stand in any text."""
    student = save_tiny(tmp_path / "student", vocabulary=300)
    teacher = save_tiny(tmp_path / "teacher", vocabulary=300)
    for folder in (student, teacher):
        tokenizer = byte_tokenizer()
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["model"]["vocab"]["zz"] = 300
        path = f"{folder}/tokenizer.json"
        with open(path, "w") as file:
            json.dump(spec, file)
    with pytest.raises(UserError, match="has ids up to 300, but the model has only 300 ids"):
        prepared((student, teacher), questions)

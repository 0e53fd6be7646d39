"""Tests of answers: how they are extracted, and which are equal."""

import pytest

from prefix_distill.prompts.answers import extract_answer, extract_reference, is_correct


@pytest.mark.parametrize(
    "text, form, answer",
    [
        (r"so \boxed{\frac{1}{2}} it is, not \boxed{3}.", "auto", "3"),
        (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{unclosed", "boxed", None),
        ("work #### 42\nmore 7", "auto", "42"),
        ("25:87 01:05 ####05", "hash", "05"),
        ("25:87 01:05", "hash", None),
        ("it costs $1,234.50 in all", "auto", "1234.50"),
        ("between 3 and -4", "last-number", "-4"),
        ("no number here", "auto", None),
        ("  yes \n", "exact", "yes"),
    ],
)
def test_extraction(text, form, answer):
    assert extract_answer(text, form) == answer


@pytest.mark.parametrize(
    "response, gold, right",
    [
        (r"\boxed{18.0}", "$18$", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"the answer is \boxed{\frac{2}{4}}", r"Thus $\boxed{\frac12}$.", True),
        ("#### 5", "… #### 05", True),
        ("I get 1,200", "#### 1200", True),
        ("I get 1201", "#### 1200", False),
        (r"\boxed{x+1}", "1+x", True),
        (r"\boxed{x+1}", "x-1", False),
        ("", "3", False),
        (r"\boxed{\sqrt{}}", "3", False),
    ],
)
def test_grading(response, gold, right):
    assert is_correct(response, gold) is right


def test_exact_compares_text_and_hash_ignores_other_numbers():
    assert is_correct("Paris", "Paris", "exact") and not is_correct("paris", "Paris", "exact")
    assert not is_correct("26:14 25:05", "05", "hash") and is_correct("26:14 ####05", "05", "hash")


def test_a_reference_may_be_a_whole_solution():
    assert (
        extract_reference("Janet makes 9 * 2 = 18.\n#### 18") == "18"
        and extract_reference(r"so \boxed{7}") == "7"
    )
    assert extract_reference(" Paris ") == "Paris"

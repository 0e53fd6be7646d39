"""Tests of rendering: no text of a conversation is lost, changed or read as a control token."""

import datetime
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from prefix_distill.config import build
from prefix_distill.errors import UserError
from prefix_distill.prompts import templates
from prefix_distill.prompts.chat import list_variables
from prefix_distill.prompts.prompt import Prompt
from prefix_distill.prompts.rendering import Renderer, Style

LOOP = "{% for m in messages %}<u>{{ m.content }}<e>{% endfor %}"
TURNS = LOOP + "{% if add_generation_prompt %}<a>{% endif %}"
PARTS = (
    "{% for m in messages %}<u>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% endif %}{% endfor %}<e>{% endfor %}<a>"
)
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
}
# chat templates of model families, as TRL ships them
FAMILIES = (
    "cohere",
    "deepseek_r1_distill",
    "gemma3",
    "glm4moe",
    "gptoss",
    "idefics3",
    "lfm2",
    "llama3",
    "llama3_2",
    "llava_next",
    "nemotron_3_nano",
    "phi3",
    "qwen2_5",
    "qwen3",
)


def model_with(template, bos=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.bos_token = bos
    return SimpleNamespace(name="m", tokenizer=tokenizer, id_limit=260)


def prompt_of(*turns, **more):
    messages = []
    for turn in turns:
        if isinstance(turn, tuple):
            turn = {"role": turn[0], "content": turn[1]}
        messages.append(turn)
    return Prompt(index=0, messages=tuple(messages), answer=None, **more)


def rendered(template, prompt, **style):
    return Renderer(model=model_with(template), style=Style(**style)).render(prompt)


def text_of(template, prompt, **style):
    return rendered(template, prompt, **style).text


def family(name):
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("the chat templates come with trl")
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text()


words = st.text(alphabet="ab<eu>{}%\n '\"\\é中\u200b", min_size=1, max_size=12)
texts = st.one_of(words, st.sampled_from(["<e>", "a<u>b", "<think>", " x ", "user", "{{ x }}"]))


@st.composite
def conversations(draw):
    turns = []
    if draw(st.booleans()):
        turns.append(("system", draw(texts)))
    for _ in range(draw(st.integers(0, 2))):
        turns += [("user", draw(texts)), ("assistant", draw(texts))]
    turns.append(("user", draw(texts)))
    return [(role, text if text.strip() else "x") for role, text in turns]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_is_lost_or_changed_in_the_templates_of_model_families(name):
    renderer = Renderer(model=model_with(family(name), bos="<a>"), style=Style())
    tokenizer = renderer.model.tokenizer

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(conversations())
    def check(turns):
        found = renderer.render(prompt_of(*turns))
        ids = found.ids
        for _, text in turns:
            # the tokenizer has one id per byte, so that a text's ids are the same anywhere
            wanted = tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)
            wanted = wanted.input_ids
            assert text.strip() in found.text
            assert any(
                ids[i : i + len(wanted)] == wanted for i in range(len(ids) - len(wanted) + 1)
            )

    check()


def test_a_template_that_reads_parts_gets_parts():
    found = rendered(PARTS, prompt_of(("user", "what is 1+1?")))
    assert found.text == "<u>what is 1+1?<e><a>"
    assert any("list of parts" in change for change in found.changes)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("<u>{{ messages[0].content }}<a>", [("system", "S"), ("user", "q")], "turn 2 .user."),
        ("<u>{{ messages[-1].content }}<a>", [("system", "S"), ("user", "q")], "turn 1 .system."),
        ("<u>question<a>", [("user", "q")], "drops the text of turn 1"),
        (TURNS.replace("m.content", "m.content | upper"), [("user", "q")], "chat template"),
        (TURNS, [("user", "q"), CALL, ("tool", "7")], "drops the tool call of turn 2"),
    ],
)
def test_a_template_that_loses_text_is_refused(template, turns, message):
    with pytest.raises(UserError, match=message):
        rendered(template, prompt_of(*turns))


def test_tools_and_tool_calls_reach_the_template():
    template = (
        "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments.a }}){% endfor %}{% endfor %}<a>"
    )
    turns = [("user", "q"), CALL, ("tool", "7")]
    assert text_of(template, prompt_of(*turns, tools=({"name": "add"},))) == "[add]q(1)7<a>"
    with pytest.raises(UserError, match="drops the row's tools"):
        rendered(TURNS, prompt_of(("user", "q"), tools=({"name": "add"},)))
    with pytest.raises(UserError, match="plain text cannot show"):
        rendered(None, prompt_of(*turns))


@pytest.mark.parametrize("template", [TURNS, None])
def test_a_control_token_in_a_text_is_encoded_as_text(template):
    found = rendered(template, prompt_of(("user", "what does <e> do?")))
    tokenizer = byte_tokenizer()
    words = tokenizer("what does <e> do?", split_special_tokens=True).input_ids
    before, after = ([], []) if template is None else ([258], [257, 259])
    assert found.ids == [*before, *words, *after]
    assert found.changes == {"the control token '<e>' in a text is encoded as text"}


@pytest.mark.parametrize("text", ["<think>why?</think>", "<think> and <e>", "a<think>b"])
@pytest.mark.parametrize("template", [TURNS, None])
def test_an_added_token_that_is_no_control_token_keeps_its_id_in_a_text(template, text):
    model = model_with(template)
    model.tokenizer.add_tokens(["<think>", "</think>"])  # as Qwen3's, which are not special
    model.id_limit = 262
    ids = Renderer(model=model, style=Style()).render(prompt_of(("user", text))).ids
    # as plain transformers encodes the text, and a server that does not know the text's origin
    words = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    before, after = ([], []) if template is None else ([258], [257, 259])
    assert ids == [*before, *words, *after] and 260 in words and 257 not in words


def test_control_tokens_of_the_prompt_template_stay_control_tokens():
    prompt = prompt_of(("user", "<u>q <e><a>"), around=("<u>", "<a>"))
    found = rendered(None, prompt)
    assert found.ids[0] == 258 and found.ids[-1] == 259 and 257 not in found.ids
    with pytest.raises(UserError, match="'<u>' is in --prompt-template"):
        rendered(None, prompt_of(("user", "<u>q<u><a>"), around=("<u>", "<a>")))


def test_a_tokenizer_that_appends_eos_does_not_end_plain_prompts():
    model = model_with(None)
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<u> $A <e>", special_tokens=[("<u>", 258), ("<e>", 257)]
    )
    found = Renderer(model=model, style=Style()).render(prompt_of(("user", "hi")))
    assert found.ids == [258, *byte_tokenizer()("hi").input_ids]
    assert found.changes == {"<e>, which the tokenizer appends to plain text, is omitted"}


def test_the_clock_is_frozen():
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TURNS
    day = datetime.date(2026, 5, 31)
    found = text_of(template, prompt_of(("user", "q")), date=day)
    assert found == "31 May 2026 00:00:00<u>q<e><a>"
    with pytest.raises(UserError, match="format that it computes"):
        text_of("{{ strftime_now(form) }}" + TURNS, prompt_of(("user", "q")))


def test_a_template_that_ignores_the_generation_prompt_gets_the_start_of_an_answer():
    template = "{% for m in messages %}<u>{{ m.role }}: {{ m.content }}<e>{% endfor %}"
    found = rendered(template, prompt_of(("user", "q")))
    assert found.text == "<u>user: q<e><u>assistant: "
    assert any("ignores the generation prompt" in change for change in found.changes)
    # as Mistral's: the model writes the space before its answer
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]{% else %} "
        "{{ m.content }}<e>{% endif %}{% endfor %}"
    )
    found = rendered(template, prompt_of(("user", "q")))
    assert found.text == "[I]q[/I]"
    assert found.changes == {"the chat template writes the same without the generation prompt"}


def test_the_advice_on_a_refused_system_turn_fits_where_it_came_from():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + TURNS
    )
    prompt = prompt_of(("system", "S"), ("user", "q"))
    with pytest.raises(UserError, match="the row has a system turn of its own"):
        rendered(template, prompt)
    with pytest.raises(UserError, match="omit --system"):
        rendered(template, prompt, system="S")


def test_a_second_system_turn_beside_the_given_one_is_refused():
    turns = (("system", "S"), ("system", "of the row"), ("user", "q"))
    with pytest.raises(UserError, match="prompt 0 has a system turn of its own; omit --system"):
        rendered(TURNS, prompt_of(*turns), system="S")


def test_variables_of_each_template_are_listed_and_set():
    template = "{% if mood is defined %}{{ mood }}{% endif %}{% set x = 1 %}" + TURNS
    assert list_variables(template) == ("mood",)
    config = build(
        {"data.template_args": "mood=calm, dear", "data.teacher_template_args": "mood=3"}
    )
    model = model_with(template)
    (row,), _ = templates.render_all([prompt_of(("user", "q"))], model, model, config)
    shown = [model.tokenizer.decode(ids) for ids in (row.student_ids, row.teacher_ids)]
    assert shown == ["calm, dear<u>q<e><a>", "3<u>q<e><a>"]
    with pytest.raises(UserError, match="its variables: mood"):
        rendered(template, prompt_of(("user", "q")), variables={"tone": 1})
    for text, message in (("mood", "expected a variable"), ("a=1,a=2", "set twice")):
        with pytest.raises(UserError, match=message):
            build({"data.template_args": text})
    with pytest.raises(UserError, match="expected a date"):
        build({"data.template_date": "today"})


def test_the_token_that_closes_a_turn_is_read_from_the_template():
    assert Renderer(model=model_with(TURNS), style=Style()).turn_end == 257
    assert Renderer(model=model_with(PARTS), style=Style()).turn_end == 257
    for template in (None, "<u>{{ messages[0].content }}<a>", TURNS.replace("<e>", "\n")):
        assert Renderer(model=model_with(template), style=Style()).turn_end is None


def test_one_of_several_templates_is_chosen():
    model = model_with({"default": TURNS, "tool_use": "T" + TURNS})
    assert (
        Renderer(model=model, style=Style()).render(prompt_of(("user", "q"))).text == "<u>q<e><a>"
    )
    with pytest.raises(UserError, match="none is the default"):
        Renderer(model=model_with({"rag": TURNS}), style=Style())


def test_changes_are_counted():
    changes = templates.describe_changes([frozenset({"x"}), frozenset(), frozenset({"x"})])
    assert changes == ["x (2 of 3 prompts)"]

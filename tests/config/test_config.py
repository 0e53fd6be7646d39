"""Tests of the settings: the grammar of --prefix, types and nearest keys.

Any input yields a value or one clear line.
"""

import re

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_distill import __version__, config
from prefix_distill.errors import UserError
from prefix_distill.maths.schedule import parse_prefix, warmup_steps


@pytest.mark.parametrize(
    "text, limit, length",
    [
        ("512", 2048, 512),
        ("25%", 2048, 512),
        ("12.5%", 192, 24),
        ("full", 2048, 2048),
        ("1%", 10, 1),
        ("100%", 10, 10),
        (" 8 ", 8, 8),
    ],
)
def test_prefix_grammar(text, limit, length):
    schedule = parse_prefix(text, limit)
    assert [schedule.length(step) for step in (0, 1, 1000)] == [length] * 3


@pytest.mark.parametrize(
    "text", ["0", "-3", "0%", "101%", "half", "", "9", "linear:1:256", "1e3", "%"]
)
def test_invalid_prefixes_are_refused(text):
    with pytest.raises(UserError, match="prefix"):
        parse_prefix(text, 8)


@given(st.text(max_size=12), st.integers(1, 4096))
@settings(max_examples=300, deadline=None)
def test_any_prefix_text_is_a_length_in_range_or_one_error(text, limit):
    try:
        assert 1 <= parse_prefix(text, limit).length(0) <= limit
    except UserError as error:
        assert "prefix" in str(error)


@given(
    st.dictionaries(
        st.sampled_from([*config.options(), "train.stepz", "x"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-5, 5),
            st.floats(),
            st.text(max_size=6),
            st.lists(st.integers(), max_size=2),
        ),
        max_size=4,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_settings_are_all_accepted_or_refused_in_one_line(values):
    try:
        built = config.build(values)
    except UserError as error:
        assert str(error)
    else:
        for path, value in values.items():
            assert config.get(built, path) in (value, str(value)) or (
                type(value) is bool and config.get(built, path) == ("on" if value else "off")
            )


def test_warmup_is_steps_or_a_share():
    assert [warmup_steps(t, 200) for t in ("0", "7", "5%", "2.5%")] == [0, 7, 10, 5]
    with pytest.raises(UserError):
        warmup_steps("some", 10)


def test_a_number_is_never_converted_to_another_type():
    assert config.build({"schedule.lr": 1, "schedule.prefix": 16}).schedule.prefix == "16"
    for path, value in (
        ("train.steps", 2.5),
        ("train.steps", True),
        ("train.steps", "5"),
        ("models.trust_remote_code", 1),
    ):
        with pytest.raises(UserError, match=f"{path}: expected"):
            config.build({path: value})


def read_yaml_text(folder, text: str) -> dict:
    (folder / "run.yaml").write_text(text)
    return config.read_tree(str(folder / "run.yaml"))


def test_anchors_and_merge_keys(tmp_path):
    tree = read_yaml_text(
        tmp_path,
        """
short: &short {steps: 5, batch_size: 2}
wide: &wide {steps: 9, micro_batch_size: 4}
alias: *short
merged: {<<: *short, samples: 1}
own key wins: {steps: 7, <<: *short}
first mapping wins: &both {<<: [*short, *wide]}
merged twice: {<<: *both, grad_clip: 0.5}
literal: {"<<": 1}
""",
    )
    assert tree["alias"] == tree["short"] == {"steps": 5, "batch_size": 2}
    assert tree["merged"] == {"steps": 5, "batch_size": 2, "samples": 1}
    assert tree["own key wins"] == {"steps": 7, "batch_size": 2}
    assert tree["first mapping wins"] == {"steps": 5, "batch_size": 2, "micro_batch_size": 4}
    assert tree["merged twice"] == tree["first mapping wins"] | {"grad_clip": 0.5}
    assert tree["literal"] == {"<<": 1}


def test_nodes_are_counted_after_aliases_are_expanded(tmp_path):
    def text(size: int) -> str:  # expands to 4 + 12·(size + 1) nodes
        items = ",".join(["x"] * size)
        aliases = ", ".join(["*a"] * 11)
        return f"a: &a [{items}]\nb: [{aliases}]\n"

    largest = (config.LARGEST - 4) // 12 - 1
    tree = read_yaml_text(tmp_path, text(largest))
    assert tree["b"] == [["x"] * largest] * 11
    with pytest.raises(UserError, match="expand to more than 65,536 nodes"):
        read_yaml_text(tmp_path, text(largest + 1))


def test_a_full_file_without_aliases_is_below_the_limit_of_nodes(tmp_path):
    keys = ",".join(f"k{number}" for number in range(10_000))
    assert len(read_yaml_text(tmp_path, f"{{{keys}}}")) == 10_000


def test_on_and_off_are_text_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: {student_thinking: off, teacher_thinking: on}\nmodels: {cross_tokenizer: off}\n"
    )
    built = config.build(
        config.read_yaml(str(tmp_path / "run.yaml"))
        | config.read_assignments(["data.student_thinking=on"])
    )
    assert (
        built.data.student_thinking,
        built.data.teacher_thinking,
        built.models.cross_tokenizer,
    ) == ("on", "on", "off")
    with pytest.raises(UserError, match=r"runtime\.dtype: expected text, got True"):
        config.build({"runtime.dtype": True})


def test_every_flag_is_declared_once_with_a_help_text():
    flags = [field.metadata["flag"] for field in config.options().values()]
    assert len(set(flags)) == len(flags) and all(
        field.metadata["help"].endswith((".", ")")) for field in config.options().values()
    )


def test_every_help_text_is_a_few_short_sentences_with_all_choices():
    for path, field in config.options().items():
        text = field.metadata["help"]
        assert len(re.findall(r"[.)](?: |$)", text)) >= 1, path
        sentences = re.split(r"\. (?=[A-Z])", text)
        assert len(text) <= 300 and len(sentences) <= 5, path
        assert max(len(sentence.split()) for sentence in sentences) <= 30, path
        for choice in config.choices(field.type):
            assert re.search(rf"(?<![\w-]){choice}(?![\w-])", text), (path, choice)


def test_every_option_has_a_topic_and_twelve_are_main_options():
    topics = [config.topic(path) for path in config.options()]
    assert topics.count(config.MAIN) == 12
    assert config.topic("schedule.lr") == config.MAIN
    assert config.topic("schedule.warmup") == config.topic("train.grad_clip") == "Training"


def test_every_limit_of_an_option_is_checked_and_no_other_is_declared():
    """A value just outside each limit raises an error that names the option and the limit."""
    bounds = {
        "low": ("at least", -1),
        "above": ("above", 0),
        "high": ("at most", 1),
        "below": ("below", 0),
    }
    checked = 0
    for path, field in config.options().items():
        limits = field.metadata.keys() - {"flag", "help", "shown", "main"}
        for name in limits:
            word, step = bounds[name]
            limit = field.metadata[name]
            with pytest.raises(UserError, match=f"^{path} .*: expected .*{word} {limit}"):
                config.build({path: limit + step})
            flag = field.metadata["flag"]
            with pytest.raises(UserError, match=f"^{flag} .*: expected .*{word} {limit}"):
                config.build({path: limit + step}, {path: flag})
            checked += 1
        if config.choices(field.type):
            with pytest.raises(UserError, match=f"^{path} no such value: expected one of"):
                config.build({path: "no such value"})
            assert limits == set()
        elif config.value_type(field.type) is float:
            assert limits, f"{path}: nan would be accepted"
    assert checked > 35


def test_the_version_equals_that_of_pyproject():
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.mark.parametrize("number", ["1:30", "-1:30", "010", "-010", "1:30:00.5"])
def test_a_number_of_base_60_or_8_is_text(tmp_path, number):
    """YAML 1.1 reads 1:30 as 90 and 010 as 8."""
    file = tmp_path / "c.yaml"
    file.write_text(f"train: {{steps: {number}}}")
    with pytest.raises(UserError, match=rf"train\.steps: expected a whole number, got '{number}'"):
        config.build(config.read_yaml(str(file)))
    assert config.read_assignments([f"data.system={number}"]) == {"data.system": number}

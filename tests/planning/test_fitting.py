"""Test the flags that `plan` finds for a card, and the time that it expects there."""

import itertools
import json
from dataclasses import replace

import pytest
from helpers import invoke, last_json, make_case, tiny_config

from prefix_distill.config import build
from prefix_distill.errors import UserError
from prefix_distill.maths.flops import Shape
from prefix_distill.maths.schedule import parse_prefix
from prefix_distill.planning import fitting, timing
from prefix_distill.planning.forecast import Forecaster
from prefix_distill.planning.gpus import CARDS, Card, read_cards


def long_case(**more):
    return make_case(
        **{"samples": 4, "limit": 200, "rows": 16, "answers": 16, "compared": 0} | more
    )


@pytest.fixture(scope="module")
def forecaster():
    return Forecaster(tiny_config("qwen3", width=64), tiny_config("qwen3", width=64))


def test_more_memory_never_fits_less_and_what_is_found_fits(forecaster):
    case = long_case()
    needed = forecaster.forecast(case)["total"]
    least = forecaster.forecast(replace(case, rows=1, micro_batch=1))["total"]
    ranks = []
    for share in (0.0, 0.1, 0.4, 0.7, 1.0, 2.0):
        free = least + share * (needed - least)
        found = fitting.search(forecaster, case, free)
        assert found is not None and forecaster.forecast(found)["total"] <= free
        is_enough = found.micro_batch >= fitting.ENOUGH
        ranks.append((is_enough, not found.recomputes, found.rows))
        if found.recomputes and is_enough:
            # without checkpointing, too few rollouts fit
            plain = replace(found, recomputes=False, micro_batch=fitting.ENOUGH)
            assert forecaster.forecast(plain)["total"] > free
    for less, more in itertools.pairwise(ranks):
        assert less[0] <= more[0] and less[2] <= more[2]
        assert not less[0] or less[1] <= more[1]
    assert ranks[0][2] < ranks[-1][2] == 16 and ranks[-1][:2] == (True, True)
    assert found.micro_batch == 8


def test_rows_are_lowered_where_the_cache_of_an_evaluation_does_not_fit(forecaster):
    case = long_case(micro_batch=1)
    total = forecaster.forecast(case)
    assert total["set_by"] == "evaluation"
    found = fitting.search(forecaster, case, total["total"] - 1)
    assert found is not None and found.rows == 8 and found.adapter is None and not found.recomputes


def test_fewer_rows_never_need_more_memory(forecaster):
    sizes = [forecaster.forecast(long_case(rows=rows))["total"] for rows in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)


def test_nothing_fits_a_card_without_room(forecaster):
    assert fitting.search(forecaster, long_case(), 1000.0) is None


def test_the_flags_are_those_of_the_case():
    case = long_case(rows=2, micro_batch=1, adapter=fitting.LORA, recomputes=True)
    assert fitting.list_flags(build({}), case) == [
        *("--lora", "64", "--gradient-checkpointing"),
        *("--generation-rows", "2", "--micro-batch-size", "1"),
    ]


@pytest.mark.parametrize("bandwidth, bound", [(1e9, "step"), (1e-4, "memory")])
def test_decoding_takes_the_time_of_its_steps_or_of_what_they_read(bandwidth, bound):
    """Compare with the closed form: 3 steps of 4 rollouts in batches of 2, each of 10 tokens."""
    model = tiny_config("llama", width=64)
    shape = Shape(trunk=1000, head=500, attention=((64.0, None),))
    settings = {"train.steps": 3, "train.batch_size": 2, "rollout.samples": 2}
    work = timing.Workload(
        config=build(settings),
        student=model,
        shapes=(shape, shape),
        prompts=[(5, 5)],
        schedule=parse_prefix("10", 20),
        limit=20,
    )
    card = Card(name="c", memory=24, bandwidth=bandwidth, rates=(("float32", 1e9),))
    found = timing.estimate_run(work, long_case(rows=2), card, trained=7)
    kv = model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    cache = 2 * model.num_hidden_layers * kv * 4
    read = (1500 * 4 + 2 * cache * (5 + 5)) / (bandwidth * 1e9 * timing.BANDWIDTH_SHARE)
    step = {"step": timing.STEP_SECONDS, "memory": read}[bound]
    assert step == max(timing.STEP_SECONDS, read)
    assert found["student_decode"] == pytest.approx(3 * 2 * 9 * step)
    optimizer = 3 * 28 * 7 / (bandwidth * 1e9 * timing.BANDWIDTH_SHARE)
    assert found["optimizer"] == pytest.approx(optimizer)


@pytest.mark.parametrize("steps, every, count", [(0, 5, 1), (10, 0, 2), (10, 5, 3), (11, 5, 4)])
def test_evaluations_are_counted_before_during_and_after(steps, every, count):
    config = build({"train.steps": steps, "evaluate.every": every})
    assert timing.count_evaluations(config) == count


def test_cards_are_read_by_name_size_or_both():
    cards = read_cards("RTX 4090, T4,m3-max:128,24")
    assert [(c.name, c.memory) for c in cards] == [
        *(("4090", 24), ("t4", 16), ("m3-max:128", 128), ("24 GB", 24.0)),
    ]
    assert CARDS["4090"].has_bfloat16
    assert not any(CARDS[name].has_bfloat16 for name in ("t4", "v100", "p100"))


@pytest.mark.parametrize("text", ["4900", "t4:x", "0", "nan", "inf", "4090,"])
def test_an_unknown_card_is_one_line_with_the_nearest_names(text):
    with pytest.raises(UserError, match=r"--card .*use one of") as caught:
        read_cards(text)
    assert "\n" not in str(caught.value)


def test_the_command_refuses_an_unknown_card():
    code, out, err = invoke("plan", "--card", "4900")
    assert code == 2 and out == "" and "4090" in err and len(err.strip().splitlines()) == 1


def write_qwen3(folder, **sizes):
    """Write the config.json of a Qwen3 model, without weights."""
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return folder


@pytest.mark.long
def test_a_small_student_of_a_4b_teacher_fits_24_gb_with_fewer_rows(tmp_path):
    """Plan with the shapes of Qwen3-0.6B and Qwen3-4B."""
    small, large = (28, 1024, 16, 3072), (36, 2560, 32, 9728)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    student = write_qwen3(tmp_path / "student", **dict(zip(names, small, strict=True)))
    teacher = write_qwen3(tmp_path / "teacher", **dict(zip(names, large, strict=True)))
    given = ["plan", "--student", student, "--teacher", teacher, "--prompt-tokens", 200]
    given += ["--prefix", 512, "--prefixes", 512]
    code, out, err = invoke(*given, "--card", "8,16,24,4090,48")
    assert code == 0, err
    document = last_json(out)
    rows = {row["card"]: row for row in document["cards"]}
    assert not rows["8 GB"]["fits"] and rows["8 GB"]["flags"] is None
    assert document["prefixes"][0]["memory"]["total"] > 24e9  # the config's own flags do not fit
    sizes = []
    for name in ("16 GB", "24 GB", "48 GB"):
        row = rows[name]
        assert row["fits"] and row["total"] <= (row["memory_gb"] - 1) * 1e9
        flags = row["flags"]
        assert flags[-4::2] == ["--generation-rows", "--micro-batch-size"]
        is_lora = "--lora" in flags
        is_checkpointed = "--gradient-checkpointing" in flags
        sizes.append((not is_lora, not is_checkpointed, *map(int, flags[-3::2])))
    assert [size[:2] for size in sizes] == sorted(size[:2] for size in sizes)
    assert [size[2] for size in sizes] == sorted(size[2] for size in sizes)
    without_lora, _, row_count, micro_batch = sizes[1]
    assert without_lora and row_count < 64 and micro_batch >= fitting.ENOUGH
    assert rows["4090"]["flags"] == rows["24 GB"]["flags"] and rows["4090"]["seconds"] > 0
    assert rows["24 GB"]["seconds"] is None
    # The printed flags need the printed memory.
    printed = [str(word) for word in rows["24 GB"]["flags"]]
    code, out, err = invoke(*given, *printed, "--card", "24")
    assert code == 0, err
    assert last_json(out)["prefixes"][0]["memory"]["total"] == rows["24 GB"]["total"]

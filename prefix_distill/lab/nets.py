"""The laboratory's tokenizers and networks: their shapes and training stages."""

import re
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT, UNKNOWN = SPECIALS = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|unknown|>",
)
VOCABULARY = {token: i for i, token in enumerate([*SPECIALS, "####", *"0123456789", " ", ":"])}
# what the second tokenizer merges, in this order
MERGED = [":0", ":1", ":2", ":3", ":4", "20", "22", "24"]
VOCABULARY_MERGED = {token: i for i, token in enumerate([*VOCABULARY, *MERGED])}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """`updates` AdamW steps on `batch` problems; lr falls linearly to `last` * lr; a share of them
    are short-cuts.

    The share `told` of the problems is given together with the worked solution, which is then the
    answer as well: the share of short-cuts is one of the other problems.

    With `few`, problems have any number of steps, and every other update takes three times as many
    of at most five, which teaches the first and the last step sooner than long problems do. Without
    it, they have as many steps as the task's test problems, so that the labels long problems begin
    with are met more often. The stage ends early once `solved` reaches `until`.
    """

    updates: int
    batch: int
    lr: float
    short_cuts: float = 0.0
    few: bool = True
    last: float = 0.05
    until: float = 1.0
    told: float = 0.0


@dataclass(frozen=True)
class Net:
    """One net of the laboratory and how it is trained. `merged`: its tokens are those of the
    second tokenizer."""

    task: str
    role: str
    layers: int
    width: int
    seed: int
    stages: tuple[Stage, ...]
    merged: bool = False


NETS = (
    Net(
        "choice",
        "teacher",
        3,
        96,
        0,
        (Stage(600, 12, 3e-3, 0.25), Stage(450, 16, 1.8e-3, last=0.02)),
    ),
    Net(
        "choice",
        "student",
        2,
        64,
        1,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
    ),
    Net(
        "choice",
        "student-wide",
        2,
        80,
        6,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
    ),
    Net(
        "choice",
        "student-told",
        2,
        64,
        1,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(400, 24, 2e-3, 0.72, few=False, last=0.02, told=0.6),
        ),
    ),
    Net(
        "choice",
        "teacher-half",
        3,
        96,
        0,
        (Stage(600, 12, 3e-3, 0.25), Stage(300, 16, 1.8e-3, 0.4, few=False, last=0.02, told=0.6)),
    ),
    Net(
        "choice",
        "student-merged",
        2,
        64,
        7,
        (
            Stage(800, 12, 6e-3, 0.25),
            Stage(700, 12, 4e-3, 0.25),
            Stage(200, 32, 1.5e-3, 0.72, last=0.02),
        ),
        merged=True,
    ),
    Net(
        "tied",
        "teacher",
        3,
        96,
        2,
        (Stage(600, 12, 3e-3), Stage(300, 16, 1.8e-3, few=False, last=0.02)),
    ),
    Net(
        "tied",
        "student",
        2,
        64,
        3,
        (Stage(400, 12, 5e-3, last=0.8), Stage(1600, 12, 2e-3, few=False, last=0.3, until=0.06)),
    ),
    Net("shared", "teacher", 3, 96, 4, (Stage(600, 12, 3e-3), Stage(300, 16, 1.8e-3, last=0.02))),
    Net("shared", "student", 2, 64, 5, (Stage(2000, 12, 2.5e-3, last=0.3, until=0.06),)),
)


def make_tokenizer(merged: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, except "####" and the special tokens; `merged`: a BPE
    that merges an operator with some digits, and some labels."""
    if merged:
        tokenizer = Tokenizer(
            models.BPE(
                VOCABULARY_MERGED,
                [(pair[0], pair[1]) for pair in MERGED],
                unk_token=UNKNOWN,
                ignore_merges=True,
            )
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    words = r"####|[0-9:]+|[\s\S]" if merged else r"####|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(net: Net) -> LlamaForCausalLM:
    """The untrained net."""
    torch.manual_seed(net.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY_MERGED if net.merged else VOCABULARY),
            hidden_size=net.width,
            intermediate_size=net.width * 8 // 3 // 8 * 8,
            num_hidden_layers=net.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=VOCABULARY[PAD],
            eos_token_id=VOCABULARY[END],
            bos_token_id=None,
        )
    )


def encode(text: str, merged: bool = False) -> list[int]:
    """Token ids of plain task text."""
    if merged:
        return second_tokenizer().encode(text).ids
    return [VOCABULARY[token] for token in re.findall("####|.", text)]


@cache
def second_tokenizer() -> Tokenizer:
    """The second tokenizer's core."""
    return make_tokenizer(merged=True).backend_tokenizer

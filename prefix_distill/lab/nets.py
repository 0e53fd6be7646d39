"""The built-in tokenizers and networks, with their shapes and training stages."""

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
TOKENS = (*SPECIALS, "####", *"0123456789", " ", ":")
# the merges of the second tokenizer, in order
MERGED = (":0", ":1", ":2", ":3", ":4", "20", "22", "24")
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}
VOCABULARY_MERGED = {token: i for i, token in enumerate((*TOKENS, *MERGED))}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a network's training: ``updates`` AdamW steps on ``batch`` problems each.

    - ``lr``: the peak learning rate, which falls linearly to ``last`` × ``lr``.
    - ``short_cuts``: the share of problems whose answer is a short-cut.
    - ``privileged``: the share of problems whose prompt shows the worked solution. Their answer is
      that solution; ``short_cuts`` is then the share of the other problems.
    - ``short_problems``: whether problems have any number of steps and every second update takes
      three times as many problems of at most five steps. This teaches the first and the last step
      sooner than long problems do. Otherwise problems have as many steps as the test problems, so
      that the first labels of long problems occur more often.
    - ``until``: end the stage early when ``estimate_accuracy`` reaches this value.
    """

    updates: int
    batch: int
    lr: float
    short_cuts: float = 0.0
    short_problems: bool = True
    last: float = 0.05
    until: float = 1.0
    privileged: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Net:
    """One built-in network: its shape, seed and training.

    ``merged``: whether it uses the second tokenizer.
    """

    task: str
    role: str
    layers: int
    width: int
    seed: int
    stages: tuple[Stage, ...]
    merged: bool = False

    @property
    def knows_privileged(self) -> bool:
        """Return whether the network was trained on prompts that show the solution."""
        return any(stage.privileged > 0 for stage in self.stages)


CHOICE_STUDENT = (
    Stage(updates=800, batch=12, lr=6e-3, short_cuts=0.25),
    Stage(updates=700, batch=12, lr=4e-3, short_cuts=0.25),
    Stage(updates=200, batch=32, lr=1.5e-3, short_cuts=0.72, last=0.02),
)
NETS = (
    Net(
        task="choice",
        role="teacher",
        layers=3,
        width=96,
        seed=0,
        stages=(
            Stage(updates=600, batch=12, lr=3e-3, short_cuts=0.25),
            Stage(updates=450, batch=16, lr=1.8e-3, last=0.02),
        ),
    ),
    Net(task="choice", role="student", layers=2, width=64, seed=1, stages=CHOICE_STUDENT),
    Net(task="choice", role="student-wide", layers=2, width=80, seed=6, stages=CHOICE_STUDENT),
    Net(
        task="choice",
        role="student-told",
        layers=2,
        width=64,
        seed=1,
        stages=(
            *CHOICE_STUDENT[:2],
            Stage(
                updates=400,
                batch=24,
                lr=2e-3,
                short_cuts=0.72,
                short_problems=False,
                last=0.02,
                privileged=0.6,
            ),
        ),
    ),
    Net(
        task="choice",
        role="teacher-half",
        layers=3,
        width=96,
        seed=0,
        stages=(
            Stage(updates=600, batch=12, lr=3e-3, short_cuts=0.25),
            Stage(
                updates=300,
                batch=16,
                lr=1.8e-3,
                short_cuts=0.4,
                short_problems=False,
                last=0.02,
                privileged=0.6,
            ),
        ),
    ),
    Net(
        task="choice",
        role="student-merged",
        layers=2,
        width=64,
        seed=7,
        stages=CHOICE_STUDENT,
        merged=True,
    ),
    Net(
        task="tied",
        role="teacher",
        layers=3,
        width=96,
        seed=2,
        stages=(
            Stage(updates=600, batch=12, lr=3e-3),
            Stage(updates=300, batch=16, lr=1.8e-3, short_problems=False, last=0.02),
        ),
    ),
    Net(
        task="tied",
        role="student",
        layers=2,
        width=64,
        seed=3,
        stages=(
            Stage(updates=400, batch=12, lr=5e-3, last=0.8),
            Stage(updates=1600, batch=12, lr=2e-3, short_problems=False, last=0.3, until=0.06),
        ),
    ),
    Net(
        task="shared",
        role="teacher",
        layers=3,
        width=96,
        seed=4,
        stages=(
            Stage(updates=600, batch=12, lr=3e-3),
            Stage(updates=300, batch=16, lr=1.8e-3, last=0.02),
        ),
    ),
    Net(
        task="shared",
        role="student",
        layers=2,
        width=64,
        seed=5,
        stages=(Stage(updates=2000, batch=12, lr=2.5e-3, last=0.3, until=0.06),),
    ),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, except "####" and the special tokens."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    return _complete(tokenizer, r"####|[\s\S]")


def make_merged_tokenizer() -> PreTrainedTokenizerFast:
    """Return the second tokenizer: a BPE that merges pairs of a colon or digit with a digit."""
    pairs = [(pair[0], pair[1]) for pair in MERGED]
    tokenizer = Tokenizer(
        models.BPE(VOCABULARY_MERGED, pairs, unk_token=UNKNOWN, ignore_merges=True)
    )
    return _complete(tokenizer, r"####|[0-9:]+|[\s\S]")


def _complete(tokenizer: Tokenizer, words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits text into ``words`` and has a chat template."""
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
    """Return the network with its initial weights."""
    torch.manual_seed(net.seed)
    vocabulary = VOCABULARY
    if net.merged:
        vocabulary = VOCABULARY_MERGED
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
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


def encode(text: str, net: Net) -> list[int]:
    """Return the token ids of a problem's text for a network, without special tokens."""
    if net.merged:
        return _second_tokenizer().encode(text).ids
    return [VOCABULARY[token] for token in re.findall("####|.", text)]


@cache
def _second_tokenizer() -> Tokenizer:
    return make_merged_tokenizer().backend_tokenizer

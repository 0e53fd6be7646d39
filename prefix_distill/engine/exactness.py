"""Find out, by measuring, which ways of decoding rows together leave a model's numbers alone.

Hybrids with recurrent states, and models with caches of their own, allow less than a transformer.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..errors import UserError
from .decoding import FASTEST, WAYS, Decoding
from .device import is_out_of_memory
from .models import Model
from .processors import RowProcessor
from .sampling import Request, Sampler, generate
from .text_ids import make_row, text_ids
from .trace import describe_failure, join, name_difference, recording

# largest relative difference of logits. Rounding gives about 1e-6 in float32 and up to 0.05 in
# bfloat16, wrong states give 0.2 and more.
TOLERANCE = 1e-3
TOLERANCE_OF_HALF_PRECISION = 0.1
# prompts and responses of the checks: (first token, prompt length, response length)
ROWS = ((0, 7, 4), (0, 7, 9), (3, 7, 9), (0, 12, 9))
STRETCH = 4  # tokens; the first row ends with its first stretch and leaves
LONGEST_RESPONSE = max(response for _, _, response in ROWS)
LONGEST_ROW = max(prompt + response for _, prompt, response in ROWS)

# the check beyond a window: the widest window, and the tokens before and after it
WIDEST, PROMPT, BEYOND = 1024, 8, 8

Logits = dict[tuple[object, ...], list[torch.Tensor]]  # one tensor [V] per token, by key


def _relative_norm(difference: torch.Tensor, expected: torch.Tensor) -> float:
    smallest = torch.finfo(expected.dtype).tiny  # all values may be equal
    return (difference.norm() / expected.norm().clamp_min(smallest)).item()


@torch.no_grad()
def find_decoding(model: Model) -> Decoding:
    """Return the fastest way of decoding that gives the logits of one forward pass.

    The model writes given texts with its KV cache. Prompts differ in length, two rows have the same
    prompt, and one row ends before the others. Of a model that is not deterministic nothing can be
    found; a later check reports it. UserError: no way gives the logits of a forward pass, so
    samples would come from another distribution than the one that the loss trains.
    """
    if model.rope_switch is not None and model.rope_switch < LONGEST_ROW:
        return FASTEST  # the texts would cross the length at which RoPE changes
    dictation = _dictate(model)
    allowed = model.choose_tolerance(TOLERANCE, TOLERANCE_OF_HALF_PRECISION)
    expected = dictation.read_in_one_pass(model)
    if not torch.equal(expected[0], dictation.read_text(model, dictation.requests[0])):
        return FASTEST
    for way in WAYS:
        obstacle = dictation.compare(model, way, expected=expected, allowed=allowed)
        if obstacle is None:
            return way
    raise _refuse_decoding(model, obstacle)


def _refuse_decoding(model: Model, obstacle: str | None) -> UserError:
    return UserError(
        f"model {model.name}: decoding with a KV cache does not give the logits of a forward pass "
        f"({obstacle}), so rollouts would not be samples of the model that is trained; use another "
        "model"
    )


@torch.no_grad()
def check_window(model: Model) -> None:
    """Raise UserError if a cached prompt changes hidden states beyond the attention's window.

    Of some models, the window counts from the end of the prompt, so that one pass over both gives
    other states. Nothing is compared if the config names no window of at most WIDEST tokens, or if
    the states differ within the window already, because then the cache cannot be continued.
    """
    window = _find_window(model.config)
    if window is None:
        return
    length = PROMPT + window + BEYOND
    if min(length, model.positions or length, model.rope_switch or length) < length:
        return
    ids_1T = make_row(model, length)
    allowed = model.choose_tolerance(TOLERANCE, TOLERANCE_OF_HALF_PRECISION)
    expected_TD = model.trunk(ids_1T)[0].float()
    try:
        cached_TD = _run_after_cache(model, ids_1T)
    except Exception as error:  # a cache without these operations may raise anything
        if is_out_of_memory(error):
            raise
        return
    change_T = (cached_TD - expected_TD[PROMPT:]).norm(dim=-1) / expected_TD[PROMPT:].norm(dim=-1)
    # rounding may send single tokens to other experts
    within = change_T[: min(BEYOND, window)].median().item()
    beyond = change_T[-BEYOND:].median().item()
    if beyond <= allowed or not within <= allowed:
        return
    text = f"beyond its window of {window} tokens, hidden states differ by {beyond:.1g} of their "
    with recording(model.net, keep=BEYOND) as whole:
        model.trunk(ids_1T)
    with recording(model.net, keep=BEYOND) as cached:
        _run_after_cache(model, ids_1T)
    where = name_difference(model, join(whole), join(cached), allowed=allowed)
    raise _refuse_decoding(model, "; ".join(filter(None, (f"{text}norm", where))))


def _run_after_cache(model: Model, ids_1T: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [T - PROMPT, D] after a cached prompt of PROMPT tokens."""
    mask_1T = torch.ones_like(ids_1T)
    _, cache = model.trunk_cached(ids_1T[:, :PROMPT], mask_1T[:, :PROMPT])
    hidden_1TD, _ = model.trunk_cached(ids_1T[:, PROMPT:], mask_1T, cache)
    return hidden_1TD[0].float()


def _find_window(config: PreTrainedConfig) -> int | None:
    """Return the largest window of attention, in tokens, of those up to WIDEST."""
    sizes = []
    for name, value in config.to_dict().items():
        if re.search(r"window|chunk_size|topk$", name) and type(value) is int:
            sizes.append(value)
    return max((size for size in sizes if 0 < size <= WIDEST), default=None)


def _dictate(model: Model) -> "_Dictation":
    """Return the prompts and texts of ROWS, in ids of ``model``; the first text ends with EOS."""
    ids = text_ids(model, 40)
    requests = []
    texts: dict[tuple[object, ...], tuple[int, ...]] = {}
    for start, prompt, response in ROWS:
        key: tuple[object, ...] = (start, prompt, response)
        requests.append(Request(ids=tuple(ids[start : start + prompt]), key=key))
        texts[key] = tuple(ids[start + prompt : start + prompt + response])
    first = requests[0].key
    texts[first] = (*texts[first][:-1], min(model.eos))  # this row ends and leaves the batch
    return _Dictation(requests=requests, texts=texts)


@dataclass(frozen=True, kw_only=True)
class _Dictation:
    """Prompts and the texts that a model writes after them, by the requests' keys."""

    requests: list[Request]
    texts: dict[tuple[object, ...], tuple[int, ...]]

    def read_in_one_pass(self, model: Model) -> list[torch.Tensor]:
        """Return the logits [T, V] of every text from one forward pass per row."""
        return [self.read_text(model, request) for request in self.requests]

    def read_text(self, model: Model, request: Request) -> torch.Tensor:
        """Return the logits [T, V] of one text from one forward pass."""
        text = self.texts[request.key]
        ids_1T = torch.tensor([[*request.ids, *text]], device=model.device)
        logits_TV = model.read_logits(ids_1T)[0, :, : model.vocabulary]
        start = len(request.ids) - 1
        return logits_TV[start : start + len(text)].float().to(model.device)

    def compare(
        self, model: Model, way: Decoding, *, expected: list[torch.Tensor], allowed: float
    ) -> str | None:
        """Decode the texts in one ``way``; return what differs from the ``expected`` logits."""
        try:
            written = self.write(model, way, self.requests)
        except Exception as error:  # a cache without these operations may raise anything
            if is_out_of_memory(error):
                raise
            return describe_failure(model.net, error)
        if not all(written.values()):
            method = getattr(model.net.generate, "__qualname__", "generate")
            return (
                f"{method} does not call logits processors, which read the logits "
                f"[1, {model.vocabulary}] of a step and draw its token"
            )
        for request, theirs in zip(self.requests, expected, strict=True):
            ours = torch.stack(written[request.key])[:, : theirs.shape[-1]]
            measure = _relative_gap if model.is_full_precision else _median_gap
            gap = measure(ours, theirs)
            if not gap <= allowed:
                text = f"they differ by {gap:.1g} of their norm"
                where = None
                if way is WAYS[-1]:
                    where = self.name_difference(model, request, allowed)
                return "; ".join(filter(None, (text, where)))
        return None

    def write(self, model: Model, way: Decoding, requests: list[Request]) -> Logits:
        """Decode the texts of ``requests`` in one ``way``; return the logits that they had."""
        tested = way
        if way.stretch is not None:
            tested = replace(way, stretch=STRETCH)
        sampler = _DictatingSampler(
            eos=frozenset({min(model.eos)}),
            pad=min(model.eos),
            support=model.vocabulary,
            seed=0,
            texts=self.texts,
        )
        generate(replace(model, decoding=tested), requests, LONGEST_RESPONSE, sampler=sampler)
        return sampler.logits

    def name_difference(self, model: Model, request: Request, allowed: float) -> str | None:
        """Return a clause on the first tensor that decoding one row with the cache changes."""
        text = self.texts[request.key]
        ids_1T = torch.tensor([[*request.ids, *text[:-1]]], device=model.device)
        with recording(model.net) as whole:
            model.read_logits(ids_1T)
        with recording(model.net) as steps:
            self.write(model, WAYS[-1], [request])
        decoded = slice(len(request.ids), None)
        return name_difference(model, join(whole), join(steps), allowed=allowed, tokens=decoded)


def _relative_gap(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of the expected logits, each row centered."""
    centred = expected - expected.mean(-1, keepdim=True)
    difference = logits - logits.mean(-1, keepdim=True) - centred
    return _relative_norm(difference, centred)


def _median_gap(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the median over tokens of the relative gap, for half precision.

    In a mixture of experts, rounding sends single tokens to other experts: of tiny random networks
    up to 10% of the tokens differ by up to 0.5 of their norm then, and the median by 0.01. A wrong
    cache, state or position changes all tokens, or all after the first stretch.
    """
    gaps = []
    for ours, theirs in zip(logits, expected, strict=True):
        gaps.append(_relative_gap(ours[None], theirs[None]))
    return torch.tensor(gaps).median().item()


@dataclass(frozen=True, kw_only=True)
class _DictatingSampler(Sampler):
    """A sampler whose tokens are given; it collects the ``logits`` of every key and position."""

    texts: dict[tuple[object, ...], tuple[int, ...]]
    logits: Logits = field(default_factory=dict)

    def race(self, keys: list[tuple[object, ...]], device: torch.device) -> RowProcessor:
        """Return the processor that writes the texts of ``keys``."""
        self.logits.update({key: [] for key in keys})
        return _DictatingProcessor(self, keys)


class _DictatingProcessor(RowProcessor):
    """Writes the text of every row and records its logits."""

    def __init__(self, sampler: _DictatingSampler, keys: list[tuple[object, ...]]):
        self.sampler = sampler
        self.keys = keys
        self.position = 0

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows alone."""
        self.keys = [self.keys[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        dictated = torch.full_like(scores, -torch.inf)
        for key, logits, choice in zip(self.keys, scores, dictated, strict=True):
            text = self.sampler.texts[key]
            if self.position < len(text):
                self.sampler.logits[key].append(logits.float().clone())
            choice[text[min(self.position, len(text) - 1)]] = 0.0
        self.position += 1
        return dictated

"""Measure what sampling saves beside the matrix products, before and after, in one run.

    python tests/benchmarks/decoding.py [--quick] [--pairs 5] [--tokens 64] [--work FOLDER]

    linear   the linear layers of a decoding step: torch's, and those of engine/decoder.py, which
             keep the weights in another layout
    prefill  the output layer on the last hidden row of 8 prompts, with and without gaps
    cache    64 decoding steps of the KV cache: transformers' DynamicCache and our buffered layers
    noise    the sampling noise of a step and the choice of its tokens: row by row with torch's
             argmax, and as in engine/processors.py
    ends     the search for EOS tokens after a stretch, in Python lists and in one tensor
    loop     a whole call of engine/sampling.generate: generate's own loop and the lean one
    all      the same with everything as before, and as it is

A whole call samples 64 tokens from the built-in student, and 16 from the other.

About 5 minutes on 2 cores. Pairs of before and after alternate; the ratio is the median over pairs.
*floor* is what remains if the modules of the network are called in a bare loop with greedy
decoding. Models: the 20-layer student of real_pair.py in both dtypes with prompts of 48 tokens, and
the built-in student. Before and after sample the same tokens, which is checked. The ratio of CPU
time is that of all threads; other work on the machine changes it less. ``--quick`` takes one pair
of 8 tokens without the student in float32, and writes nothing.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import measure
import rollout

from prefix_distill.cli import quiet

STUDENT = Path(__file__).parents[2] / "prefix_distill/lab/models/choice/student"
# name, dtype, and whether it is the built-in student
MODELS = (
    ("built-in, float32", "float32", True),
    ("20 layers, bfloat16", "bfloat16", False),
    ("20 layers, float32", "float32", False),
)
PROMPT = 48  # most tokens of a prompt
UNSAMPLED = 1 << 20  # an EOS id that no vocabulary has


def take_turns(count: int, **works: Callable[[], object]) -> dict[str, list[tuple[float, float]]]:
    """Time every work ``count`` times in turn; return its (seconds, seconds of all threads)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(count):
        for name, work in works.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return times


def compare(times: dict[str, list[tuple[float, float]]], before: str = "before") -> dict:
    """Return the medians of a work before and after, and the medians of their ratios."""

    def median(name: str) -> float | None:
        if name not in times:
            return None
        return statistics.median(seconds for seconds, _ in times[name])

    rounds = list(zip(times[before], times["after"], strict=True))
    ratios = sorted(after / before for (before, _), (after, _) in rounds)
    return {
        "before_seconds": median(before),
        "after_seconds": median("after"),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "cpu_ratio": statistics.median(after / before for (_, before), (_, after) in rounds),
        "floor_seconds": median("floor"),
    }


def pairs(count: int, before: Callable[[], object], after: Callable[[], object]) -> dict:
    """Compare two works that take turns."""
    return compare(take_turns(count, before=before, after=after))


def linear(model, rows: int, count: int) -> dict:
    """Compare the linear layers of a step of the decoder with torch's."""
    import torch

    layers = [m for m in model.net.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, 1, m.in_features).to(m.weight) for m in layers}

    def before() -> None:
        with torch.inference_mode():
            for m in layers:
                torch.nn.functional.linear(inputs[m.in_features], m.weight, m.bias)

    def after() -> None:
        with torch.inference_mode():
            for m in layers:
                m(inputs[m.in_features])

    return pairs(count, before, after)


def prefill(model, prompts, count: int) -> dict:
    """Compare the output layer on a slice with gaps and on contiguous rows."""
    import torch

    ids, _ = rollout.padded(prompts)
    head = model.net.get_output_embeddings()
    with torch.inference_mode():
        hidden = model.trunk(ids)[:, -1:]
        return pairs(count, lambda: head(hidden), lambda: head(hidden.contiguous()))


def cache(model, prompts, tokens: int, count: int) -> dict:
    """Compare the KV cache of transformers with buffered layers, without a network."""
    import torch
    from transformers import DynamicCache

    from prefix_distill.engine.kv_buffer import buffer_layers

    ids, mask = rollout.padded(prompts)
    layers = model.config.num_hidden_layers
    with torch.inference_mode():
        _, held = model.trunk_cached(ids, mask)
    prompt = held.layers[0].keys
    states = prompt[..., -1:, :].clone()

    def fill(limit: int | None) -> None:
        with torch.inference_mode():
            held = DynamicCache(config=model.config)
            for i in range(layers):
                held.update(prompt, prompt, i)
            if limit is not None:
                buffer_layers(held, limit)
            for _ in range(tokens):
                for i in range(layers):
                    held.update(states, states, i)

    return pairs(count, lambda: fill(None), lambda: fill(ids.shape[1] + tokens))


def old_race(generators, support: int):
    """Return the noise as it was: one call for every row and position."""
    import torch

    from prefix_distill.engine.processors import RowProcessor

    class RowByRow(RowProcessor):
        def keep(self, rows):
            generators[:] = [generators[row] for row in rows]

        def __call__(self, input_ids, scores):
            noise = torch.empty(len(scores), support)
            for row, generator in zip(noise, generators, strict=True):
                row.uniform_(generator=generator)
            scores[:, :support] -= noise.neg_().log1p_().neg_().clamp_(min=2.0**-25).log_()
            scores[:, support:] = -torch.inf
            return scores

    return RowByRow()


def noise(rows: int, support: int, tokens: int, count: int) -> dict:
    """Compare noise and choice of ``tokens`` positions."""
    import torch

    from prefix_distill.engine.processors import Race, choose_tokens

    logits = torch.randn(rows, support, generator=torch.Generator().manual_seed(0))
    no_ids = torch.empty(rows, 0, dtype=torch.long)  # noise does not depend on them

    def make() -> list:
        return [torch.Generator().manual_seed(row) for row in range(rows)]

    def before():
        race = old_race(make(), support)
        return [race(no_ids, logits.clone()).argmax(-1) for _ in range(tokens)]

    def after():
        race = Race(make(), support, record=False)
        return [choose_tokens(race(no_ids, logits.clone())) for _ in range(tokens)]

    assert torch.equal(torch.stack(before()), torch.stack(after()))
    return pairs(count, before, after)


def ends(rows: int, tokens: int, count: int) -> dict:
    """Compare the search for EOS tokens in lists and in one tensor."""
    import torch

    from prefix_distill.engine.sampling import find_ends

    ids = torch.randint(260, (rows, tokens), generator=torch.Generator().manual_seed(0))
    eos = frozenset({257})

    def before():
        lists = ids.tolist()
        going = [row for row, tokens in enumerate(lists) if not eos.intersection(tokens)]
        for row in lists:
            for token in row:
                if token in eos:
                    break
        return going

    return pairs(count, before, lambda: find_ends(ids, eos))


def floor(model, prompts, tokens: int) -> Callable[[], None]:
    """Return a bare loop over the modules of a Llama, with greedy decoding."""
    import torch
    from transformers import DynamicCache

    from prefix_distill.engine.kv_buffer import buffer_layers
    from prefix_distill.engine.processors import choose_tokens
    from prefix_distill.engine.transformers_names import name_cache_argument

    ids, mask = rollout.padded(prompts)
    width = ids.shape[1]
    net, decoder = model.net, model.net.get_decoder()
    name = name_cache_argument(decoder.layers[0].forward)

    def decode() -> None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        visible = torch.ones(len(ids), 1, 1, width + tokens, dtype=torch.bool)
        visible[:, 0, 0, :width] = mask.bool()
        held = DynamicCache(config=model.config)
        hidden, held = model.trunk_cached(ids, mask, held)
        buffer_layers(held, width + tokens)
        position = positions[:, -1:]
        scores = net.lm_head(hidden[:, -1])
        for i in range(1, tokens):
            position = position + 1
            hidden = decoder.embed_tokens(choose_tokens(scores.float())[:, None])
            rotary = decoder.rotary_emb(hidden, position)
            for layer in decoder.layers:
                hidden = layer(
                    hidden,
                    attention_mask=visible[..., : width + i],
                    position_ids=position,
                    position_embeddings=rotary,
                    **{name: held},
                )
            scores = net.lm_head(decoder.norm(hidden))[:, -1]
        choose_tokens(scores.float())

    return torch.inference_mode()(decode)


def sample(model, prompts, tokens: int, *, old: bool, loop: str):
    """Return the responses; with ``old``, the noise and the head's input are as they were."""
    import torch

    from prefix_distill.engine import decoding_loop
    from prefix_distill.engine.sampling import Request, Sampler, generate
    from prefix_distill.maths.seeds import seed_of

    class Before(Sampler):
        def race(self, keys, device):
            seeds = [seed_of(self.seed, *key) for key in keys]
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            return old_race(generators, self.support)

    kind = Sampler
    changes = contextlib.ExitStack()
    if old:
        kind = Before
        gaps = mock.patch.object(
            decoding_loop, "contiguous_head_input", lambda _: contextlib.nullcontext()
        )
        changes.enter_context(gaps)
    sampler = kind(eos=frozenset({UNSAMPLED}), pad=2, support=model.config.vocab_size, seed=0)
    chosen = dataclasses.replace(model, decoding=dataclasses.replace(model.decoding, loop=loop))
    with changes:
        return generate(
            chosen,
            [Request(ids=ids, key=(0, i)) for i, ids in enumerate(prompts)],
            max_new_tokens=tokens,
            sampler=sampler,
        )


def whole(model, unpacked, prompts, *, tokens: int, count: int) -> dict[str, dict]:
    """Compare both loops, and everything with everything as before."""
    now = sample(model, prompts, tokens, old=False, loop="lean")
    if model.is_full_precision:  # packed weights may round bfloat16 in another way
        assert sample(unpacked, prompts, tokens, old=True, loop="plain") == now
    bare = floor(model, prompts, tokens)

    def lean():
        return sample(model, prompts, tokens, old=False, loop="lean")

    def plain():
        return sample(model, prompts, tokens, old=False, loop="plain")

    def before():
        return sample(unpacked, prompts, tokens, old=True, loop="plain")

    times = take_turns(count, plain=plain, before=before, after=lean, floor=bare)
    return {"loop": compare(times, before="plain"), "all": compare(times)}


def load(work: Path, dtype: str, built_in: bool):
    """Return (decoding model, the same without packed weights, 8 prompts of it)."""
    import torch

    from prefix_distill.engine import decoder, loading

    if built_in:
        model = loading.load_model(str(STUDENT), device=torch.device("cpu"), dtype=torch.float32)
        prompts = [tuple(5 + (i + j) % 9 for j in range(12 + i % 3)) for i in range(16)]
    else:
        model, prompts = rollout.load(work)
        prompts = [ids[-PROMPT:] for ids in prompts]
    chosen = getattr(torch, dtype)
    with mock.patch.object(decoder, "packs_weights", lambda *_: False):
        unpacked = decoder.make_decoder(model, chosen)
    return decoder.make_decoder(model, chosen), unpacked, prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one pair, 8 tokens; write nothing")
    parser.add_argument("--pairs", type=int, default=5, help="how often each arm runs (5)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, help="folder for the pair (default: a temporary one)")
    given = parser.parse_args()
    if given.quick:
        given.pairs, given.tokens = 1, 8
    quiet.quiet_libraries()
    table = []

    def add(model: str, part: str, found: dict) -> None:
        table.append({"model": model, "part": part} | found)
        low, high = found["ratio_range"]
        text = f"{model:26} {part:8} before {1e3 * found['before_seconds']:9.2f} ms, after "
        text += f"{1e3 * found['after_seconds']:9.2f} ms, ratio {found['ratio']:.2f} "
        text += f"[{low:.2f}, {high:.2f}], of CPU time {found['cpu_ratio']:.2f}"
        if found["floor_seconds"] is not None:
            text += f", floor {1e3 * found['floor_seconds']:.2f} ms"
        print(text, flush=True)

    many = 4 * given.pairs  # short works
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype, built_in in MODELS[: 2 if given.quick else None]:
            model, unpacked, prompts = load(given.work or Path(scratch), dtype, built_in)
            if not built_in:
                add(name, "linear", linear(model, len(prompts), many))
                add(name, "prefill", prefill(unpacked, prompts, given.pairs))
            add(name, "cache", cache(model, prompts, given.tokens, many))
            support = model.config.vocab_size
            add(name, "noise", noise(len(prompts), support, given.tokens, many))
            tokens = given.tokens
            if not built_in:
                tokens //= 4
            for part, found in whole(
                model, unpacked, prompts, tokens=tokens, count=given.pairs
            ).items():
                add(name, part, found)
    add("64 rows of 32 tokens", "ends", ends(64, 32, many))
    measure.record(
        "decoding",
        {"table": table, "tokens": given.tokens, "pairs": given.pairs} | measure.machine(),
        not given.quick,
    )


if __name__ == "__main__":
    quiet.calm_threads(os.environ)
    main()

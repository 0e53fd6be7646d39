"""Compare sampling with plain ``generate`` and with a bare loop of forward passes.

    python tests/benchmarks/rollout.py [--quick] [--pairs 2] [--tokens 32] [--work FOLDER]

    ours   prefix_distill.engine.sampling.generate on decoder.make_decoder: each prompt is encoded
           once for all its samples, and each row has its own random seed
    naive  transformers' generate with do_sample=True; every row has its prompt
    bare   a loop around the network's forward pass with its KV cache, softmax and
           torch.multinomial

About 5 minutes on 2 cores. The model is the 20-layer student of real_pair.py in float32; prompts
are GSM8K questions in its chat template. The end-of-sequence id is one that the student does not
sample, so all arms sample all tokens. The arms alternate in one process. At the end, a bare loop
runs the decoding network with a static cache, eager and compiled. The time of a decoding step is
measured from the first sampled token to the last. Its lower bound is the bytes of all weights over
the measured memory bandwidth. ``--quick`` runs the two smaller cases once with 16 tokens and writes
nothing. ``--work`` keeps the pair for the next call.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import measure
import real_pair
import scaling

from prefix_distill.cli import quiet
from prefix_distill.engine.meter import Meter
from prefix_distill.engine.sampling import GenerationCost

CASES = {"8 prompts × 1": (8, 1), "2 prompts × 4": (2, 4), "8 prompts × 4": (8, 4)}
UNWRITTEN = 5  # <file_sep>


def load(work: Path):
    import torch

    from prefix_distill.engine import loading
    from prefix_distill.engine.sharing import check_sharing
    from prefix_distill.prompts import templates
    from prefix_distill.prompts.load import load_evaluation_prompts
    from prefix_distill.prompts.row_format import RowFormat

    model = loading.load_model(
        str(scaling.pair(work) / "student"), device=torch.device("cpu"), dtype=torch.float32
    )
    prompts = load_evaluation_prompts(
        str(real_pair.questions()), RowFormat(prompt_column="doc.question"), limit=8
    ).prompts
    rows = [tuple(templates.render(model, p, "auto")) for p in prompts]
    model.shares_prompts = check_sharing(model, rows).is_exact
    return model, rows


def ours(model, rows, tokens, turn):
    import torch

    from prefix_distill.engine.decoder import make_decoder
    from prefix_distill.engine.device import Clock
    from prefix_distill.engine.sampling import Request, Sampler, generate

    decoding, clock = make_decoder(model, torch.float32), Clock(device=torch.device("cpu"))
    sampler = Sampler(
        eos=frozenset({UNWRITTEN}), pad=2, support=model.net.config.vocab_size, seed=turn
    )
    cost = GenerationCost(meter=Meter(clock), timed=True)
    made = generate(
        decoding,
        [Request(ids=ids, key=(0, i)) for i, ids in enumerate(rows)],
        max_new_tokens=tokens,
        sampler=sampler,
        cost=cost,
    )
    assert all(len(r.ids) == tokens for r in made)
    return clock.seconds["student_prefill"], clock.seconds["student_decode"]


def padded(rows):
    import torch

    width = max(map(len, rows))
    return (
        torch.tensor([[2] * (width - len(r)) + list(r) for r in rows]),
        torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    )


def naive(model, rows, tokens, turn):
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    from prefix_distill.engine.device import Clock
    from prefix_distill.engine.sampling import PhaseTimer
    from prefix_distill.training.run import settled

    ids, mask = padded(rows)
    torch.manual_seed(turn)
    split = PhaseTimer(Clock(device=torch.device("cpu")))
    start = time.perf_counter()
    out = model.net.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([split]),
        generation_config=GenerationConfig(
            max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=2, eos_token_id=UNWRITTEN
        ),
    )
    assert out.shape[1] == ids.shape[1] + tokens
    prefilled = settled(split.prefilled, "the end of the prefill")
    return prefilled - start, time.perf_counter() - prefilled


def bare(model, rows, tokens, turn):
    import torch

    from prefix_distill.engine.transformers_names import name_cache_argument, read_cache

    ids, mask = padded(rows)
    torch.manual_seed(turn)
    cache_name = name_cache_argument(model.net.forward)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.net(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        first = time.perf_counter()
        for _ in range(tokens - 1):
            token = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            out = model.net(
                input_ids=token,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                use_cache=True,
                **{cache_name: read_cache(out)},
            )
        torch.multinomial(out.logits[:, -1].softmax(-1), 1)
    return first - start, time.perf_counter() - first


def compiled(model, rows, tokens) -> dict:
    """Time a decoding step with a static cache, eager and under torch.compile.

    This shows whether compilation pays off within a run.
    """
    import torch
    from transformers import StaticCache

    from prefix_distill.engine.decoder import make_decoder
    from prefix_distill.engine.transformers_names import name_cache_argument

    net, found = make_decoder(model, torch.float32).net, {}
    ids, mask = padded(rows)
    width = ids.shape[1]
    for name in ("static", "compiled"):
        step, seconds = (
            net.forward if name == "static" else torch.compile(net.forward, dynamic=False),
            [],
        )
        cache = StaticCache(config=net.config, max_cache_len=width + tokens)
        cache_argument = {name_cache_argument(net.forward): cache}
        out = net(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **cache_argument,
        )
        seen = torch.cat([mask.bool(), torch.zeros(len(rows), tokens, dtype=torch.bool)], 1)[
            :, None, None
        ]
        for i in range(tokens - 1):
            start = time.perf_counter()
            seen[..., width + i] = True
            out = step(
                input_ids=torch.multinomial(out.logits[:, -1].softmax(-1), 1),
                attention_mask=seen,
                position_ids=seen.sum(-1)[:, 0] - 1,
                use_cache=True,
                **cache_argument,
            )
            seconds.append(time.perf_counter() - start)
        found[name] = {
            "first_step_seconds": seconds[0],
            "step_seconds": statistics.median(seconds[1:]),
        }
        print(
            f"8 prompts × 1  {name}: first step {seconds[0]:.1f} s, then "
            f"{1e3 * found[name]['step_seconds']:.1f} ms per step",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="two cases, one round, 16 tokens; write nothing"
    )
    parser.add_argument("--pairs", type=int, default=2, help="how often each arm runs (2)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--work", type=Path, help="folder for the pair (default: a temporary one)")
    given = parser.parse_args()
    cases = dict(CASES)
    if given.quick:
        given.pairs, given.tokens = 1, 16
        del cases["8 prompts × 4"]
    import limit
    import torch

    quiet.quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        model, prompts = load(given.work or Path(scratch))
    weights = sum(p.numel() * p.element_size() for p in model.net.parameters())
    bandwidth = limit.bandwidth()
    floor = weights / bandwidth
    arms, table = {"ours": ours, "naive": naive, "bare": bare}, []
    with torch.no_grad():
        for name, (count, samples) in cases.items():
            rows = [ids for ids in prompts[:count] for _ in range(samples)]
            turns = [
                {arm: work(model, rows, given.tokens, i) for arm, work in arms.items()}
                for i in range(given.pairs)
            ]
            for arm in arms:
                prefill, decode = (statistics.median(t[arm][k] for t in turns) for k in (0, 1))
                ratio = statistics.median(sum(t["ours"]) / sum(t[arm]) for t in turns)
                table.append(
                    {
                        "case": name,
                        "arm": arm,
                        "prefill_seconds": prefill,
                        "decode_seconds": decode,
                        "step_seconds": decode / (given.tokens - 1),
                        "ours_over_it": ratio,
                    }
                )
                print(
                    f"{name}  {arm:5}  prefill {prefill:6.2f} s, decode {decode:6.2f} s, "
                    f"{1e3 * decode / (given.tokens - 1):6.1f} ms per step (lower bound "
                    f"{1e3 * floor:.0f}); ours/{arm} in total {ratio:.2f}",
                    flush=True,
                )
        static = None if given.quick else compiled(model, prompts, given.tokens)
    measure.record(
        "rollout",
        {
            "table": table,
            "static_cache": static,
            "tokens": given.tokens,
            "pairs": given.pairs,
            "weight_bytes": weights,
            "bandwidth_bytes_per_s": bandwidth,
            "floor_step_seconds": floor,
        }
        | measure.machine(),
        not given.quick,
    )


if __name__ == "__main__":
    quiet.calm_threads(os.environ)
    main()

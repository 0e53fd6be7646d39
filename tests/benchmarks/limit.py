"""Compare scoring, training and decoding with the limits of this machine.

    python tests/benchmarks/limit.py [--quick] [--work FOLDER]

About 3 minutes on 2 cores. First the two limits are measured. The matmul rate is that of
a forward pass of every linear layer of the student on the tokens of one micro-batch. The fastest of
several passes over all layers counts. The memory bandwidth is that of reading
256 MB. Then teacher scoring, student update and decoding are timed on SmolLM2-135M-Instruct and its
20-layer student: float32, 8 GSM8K questions, 64-token responses, micro-batches of 8.

The share of the limit is the ledger's useful FLOPs per second over the matmul rate. For decoding,
it is the time to read all weights at the bandwidth over the time of a decoding step. Medians of
``--repeats`` are shown. ``--quick`` runs 2 questions once and writes nothing.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import measure

from prefix_distill.cli import quiet


def bandwidth() -> float:
    """Return bytes per second of reading memory, timed as the sum of 64 M float32 numbers."""
    import torch

    block = torch.ones(1 << 26)
    return 4 * block.numel() / measure.fastest(lambda: block.sum())


def matmul_rate(net, rows: int) -> float:
    """Return FLOPs per second of all linear layers of the decoder, run one after the other.

    ``rows``: number of float32 input tokens.
    """
    import torch

    linears = [m for m in net.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in linears}
    with torch.inference_mode():
        seconds = measure.fastest(lambda: [m(inputs[m.in_features]) for m in linears], 5.0)
    return sum(2.0 * rows * m.weight.numel() for m in linears) / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, 2 questions; write nothing"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="folder with student/ and teacher/ (default: a temporary one)"
    )
    given = parser.parse_args()
    import scaling
    import torch

    quiet.quiet_libraries()
    prompts, repeats = (2, 1) if given.quick else (8, given.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = scaling.pair(given.work or Path(scratch))
        run = scaling.prepare(folder, prefix=64, prompts=prompts, samples=1)
    turns = [scaling.update(run, step) for step in range(repeats + 1)][1:]
    tokens = max(sum(p + sum(n) - 1 for p, n in reads) for reads in turns[0]["micro_batches"])
    rate, reading = matmul_rate(run.pair.student.net, tokens), bandwidth()
    weights = sum(p.numel() * p.element_size() for p in run.pair.student.net.parameters())
    shares = {}
    for phase in ("teacher_score", "student_update", "student_prefill"):
        shares[phase] = (
            statistics.median(t["flops"][phase] / t["seconds"][phase] for t in turns) / rate
        )
        print(
            f"{phase:15} {shares[phase] * rate / 1e9:6.1f} GFLOP/s useful, {shares[phase]:.0%} of "
            f"the matmul rate ({rate / 1e9:.1f} GFLOP/s at {tokens} tokens)"
        )
    step = statistics.median(t["seconds"]["student_decode"] / (t["longest"] - 1) for t in turns)
    shares["student_decode"] = weights / reading / step
    print(
        f"student_decode  {1e3 * step:.1f} ms per step of {prompts} rows; reading the weights at "
        f"{reading / 1e9:.1f} GB/s takes {1e3 * weights / reading:.1f} ms: "
        f"{shares['student_decode']:.0%}"
    )
    floor = statistics.median(
        sum(t["flops"][p] for p in ("student_prefill", "teacher_score", "student_update")) / rate
        + (t["longest"] - 1)
        * max(weights / reading, t["flops"]["student_decode"] / (t["longest"] - 1) / rate)
        for t in turns
    )
    whole = statistics.median(sum(t["seconds"].values()) for t in turns)
    print(f"whole step      {whole:.2f} s; at these limits {floor:.2f} s")
    measure.record(
        "limit",
        {
            "share_of_limit": shares,
            "matmul_flops_per_s": rate,
            "bandwidth_bytes_per_s": reading,
            "decode_step_seconds": step,
            "update_seconds": whole,
            "floor_seconds": floor,
            "tokens": tokens,
            "repeats": repeats,
        }
        | measure.machine()
        | {"threads": torch.get_num_threads()},
        not given.quick,
    )


if __name__ == "__main__":
    quiet.calm_threads(os.environ)
    main()

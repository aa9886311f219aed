"""One GPU: a 3B teacher and a 1B student at Llama 3.2's shapes, random weights, bf16.

    python benchmarks/gpu.py                            every contender that is installed
    python benchmarks/gpu.py --length 4096 --samples 4 --contenders ds_kd plain
    python benchmarks/gpu.py --output results/gpu

Needs one GPU with 80 GB and 10 GB of disk, no download. Runs with torch 2.11 and transformers 5.17
or newer. MFU counts the products of linear layers, heads and (causal) attention, each token once,
against `--peak` TFLOP/s; recomputation does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SHAPES: dict[str, dict[str, Any]] = {
    "student": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "teacher": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28),
}
HEADS = {"student": 32, "teacher": 24}


def make(name: str, directory: Path) -> Path:
    """Save a model of random weights at the shapes of Llama 3.2, and return its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        num_attention_heads=HEADS[name],
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / name)
    return directory / name


def flops(path: Path, tokens: int, length: int, passes: int) -> float:
    """Return a model's operations on so many tokens; `passes` is 1 forward, 3 with backward."""
    import measure
    from transformers import AutoConfig

    shapes, (hidden, vocab) = measure.linear_shapes(path)
    weights = sum(i * o * count for (i, o), count in shapes.items()) + hidden * vocab
    config = AutoConfig.from_pretrained(path)
    attention = 2 * length * config.hidden_size * config.num_hidden_layers  # half of 4, causal
    return passes * tokens * (2.0 * weights + attention)


def make_steps(count: int, samples: int, length: int) -> list[list[dict[str, Any]]]:
    """Return the samples of each step: random ids, all of them supervised."""
    import torch

    generator = torch.Generator().manual_seed(0)
    steps: list[list[dict[str, Any]]] = []
    for _ in range(count):
        steps.append([])
        for k in range(samples):
            ids = torch.randint(128256, (length + 1,), generator=generator).tolist()
            steps[-1].append({"input_ids": ids[:-1], "labels": ids[1:], "sample_id": str(k)})
    return steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=2, help="per optimizer step, one a forward")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--peak", type=float, default=989.0, help="of the GPU, dense bf16 TFLOP/s")
    parser.add_argument("--contenders", nargs="+", metavar="NAME")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    return parser.parse_args()


def time_contenders(args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return a row for each contender: seconds of a step, MFU and peak memory."""
    import measure
    import torch
    from contenders import Job, available

    teacher, student = (make(name, directory) for name in ("teacher", "student"))
    torch.cuda.empty_cache()
    tokens = args.length * args.samples
    work = flops(teacher, tokens, args.length, 1) + flops(student, tokens, args.length, 3)
    job = Job(teacher, student, torch.bfloat16, micro_batch=1)
    steps = make_steps(args.rounds + 1, args.samples, args.length)

    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(make_one(job))
            for name, make_one in available(args.contenders).items()
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for samples in steps:  # A B A B
            for name, step in contenders.items():
                times[name].append(measure.seconds(lambda: step(samples)))  # noqa: B023

        # The first round is thrown away.
        for name, step in contenders.items():
            taken = statistics.median(times[name][1:])
            rows.append(
                {
                    "contender": name,
                    "step s": taken,
                    "tokens/s": tokens / taken,
                    "MFU": work / taken / (args.peak * 1e12),
                    "peak GiB": measure.peak_bytes(lambda: step(steps[-1])) / measure.GIB,  # noqa: B023
                    "device": torch.cuda.get_device_name(),
                }
            )
    return rows


def main() -> int:
    args = parse()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU; kd_step.py runs on a CPU", file=sys.stderr)
        return 2
    import measure

    from ds_kd.quiet import quiet

    quiet()
    with tempfile.TemporaryDirectory() as directory:
        rows = time_contenders(args, Path(directory))
    measure.write(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

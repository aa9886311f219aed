"""One GPU: a 3B teacher and a 1B student at Llama 3.2's shapes, random weights, bf16.

    python benchmarks/speed/gpu.py                      every contender that is installed
    python benchmarks/speed/gpu.py --length 4096 --samples 4 --contenders ds_kd plain
    python benchmarks/speed/gpu.py --output results/gpu
    python benchmarks/speed/gpu.py --length 512 --samples 32 --per-forward 16
                                                        short samples, which ds_kd packs
    python benchmarks/speed/gpu.py --contenders ds_kd --profile results/step
                                                        where the time of a step goes, by kernel
    python benchmarks/speed/gpu.py --rehearse           tiny models, on any device: does it work?

Needs one GPU with 80 GB and 10 GB of disk, no download, and about 10 minutes. Every contender is a
process of its own, one after the other: two of them do not fit into 80 GB. MFU counts the products
of linear layers, heads and (causal) attention, each token once, against `--peak` TFLOP/s;
recomputation does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import add_output, make_parser

SHAPES: dict[str, dict[str, Any]] = {
    "student": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    "teacher": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28),
}
HEADS = {"student": 32, "teacher": 24}
VOCABULARY = 128256
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8)


def make(name: str, directory: Path, is_tiny: bool) -> Path:
    """Save a model of random weights at the shapes of Llama 3.2, and return its directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks import measure

    shape = {"num_attention_heads": HEADS[name], **SHAPES[name], **(TINY if is_tiny else {})}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(0)
    with measure.device():
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / name)
    return directory / name


def flops(path: Path, tokens: int, length: int, passes: int) -> float:
    """Return a model's operations on so many tokens; `passes` is 1 forward, 3 with backward."""
    from transformers import AutoConfig

    from benchmarks import measure

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
            ids = torch.randint(VOCABULARY, (length + 1,), generator=generator).tolist()
            steps[-1].append({"input_ids": ids[:-1], "labels": ids[1:], "sample_id": str(k)})
    return steps


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=2, help="per optimizer step")
    parser.add_argument("--per-forward", type=int, default=1, help="samples; ds_kd packs several")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--peak", type=float, default=989.0, help="of the GPU, dense bf16 TFLOP/s")
    parser.add_argument("--contenders", nargs="+", metavar="NAME")
    add_output(parser)
    parser.add_argument(
        "--profile", type=Path, help="write PROFILE-CONTENDER.txt and a trace of one more step"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on any device")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def time_contender(args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of the contender `args.worker`: seconds of a step, MFU and peak memory."""
    import torch

    from benchmarks import measure
    from benchmarks.speed.contenders import CONTENDERS, Job

    teacher, student = args.models / "teacher", args.models / "student"
    tokens = args.length * args.samples
    work = flops(teacher, tokens, args.length, 1) + flops(student, tokens, args.length, 3)
    steps = make_steps(args.rounds + 1, args.samples, args.length)
    make_one, _ = CONTENDERS[args.worker]
    job = Job(
        teacher,
        student,
        torch.bfloat16,
        micro_batch=args.per_forward,
        packs=args.per_forward > 1,
        pack_size=args.length * args.per_forward,
    )
    with make_one(job) as step:
        times = [measure.seconds(lambda: step(samples)) for samples in steps]  # noqa: B023
        peak = measure.peak_bytes(lambda: step(steps[-1]))
        if args.profile is not None:
            profile(lambda: step(steps[-1]), Path(f"{args.profile}-{args.worker}"))

    taken = statistics.median(times[1:])  # the first round is thrown away
    return {
        "contender": args.worker,
        "step s": taken,
        "tokens/s": tokens / taken,
        "MFU": work / taken / (args.peak * 1e12),
        "peak GiB": peak / measure.GIB,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def profile(function: Callable[[], Any], output: Path) -> None:
    """Write the kernels of one call by their time, and its trace for chrome://tracing."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from benchmarks import measure

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with record(activities=kinds) as seen:
        measure.seconds(function)
    output.parent.mkdir(parents=True, exist_ok=True)
    by = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
    output.with_suffix(".txt").write_text(table + "\n")
    seen.export_chrome_trace(f"{output}.json.gz")


def ask_worker(name: str, models: Path) -> dict[str, Any] | None:
    """Return the row of a contender, from a process of its own; None if that failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--models", str(models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name} failed with exit code {done.returncode}, see above", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> int:
    args = parse()
    import torch

    if not (torch.cuda.is_available() or args.rehearse):
        print(
            "benchmarks/speed/gpu.py needs an NVIDIA GPU; --rehearse tries it on tiny models, and "
            "kd_step.py measures a CPU",
            file=sys.stderr,
        )
        return 2
    from benchmarks import measure
    from benchmarks.speed.contenders import available
    from ds_kd.quiet import quiet

    quiet()
    if args.worker:
        print(json.dumps(time_contender(args)))
        return 0

    with tempfile.TemporaryDirectory() as directory:
        for name in SHAPES:
            make(name, Path(directory), args.rehearse)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = [ask_worker(name, Path(directory)) for name in available(args.contenders)]
    rows = [row for row in found if row is not None]
    measure.write(rows, args.output)
    return 0 if len(rows) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())

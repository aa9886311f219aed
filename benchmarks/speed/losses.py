"""Time and peak memory of every divergence that `kd_loss_fn.name` chooses.

    python benchmarks/speed/losses.py                               # seconds of one core
    python benchmarks/speed/losses.py --tokens 1024 --vocabulary 128256 --hidden 8 --memory
    python benchmarks/speed/losses.py --tokens 4096 --vocabulary 128256 --hidden 2048 --rounds 10
                                                    # on a GPU: bf16, by kernels and without

A row is CE and the divergence of `--tokens` tokens with their gradients, from hidden states on.
On a CPU seconds are those that the process computes, so that other jobs of the machine count
little; on a GPU those of the clock, the device's work included. The losses take their turns, and
the shortest of `--rounds` is shown. `--memory` shows the peak instead, the gradients of hidden
states and head left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import measure
from benchmarks.arguments import make_parser
from ds_kd.config.names import home_of
from ds_kd.config.signatures import divergences_by_name
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.head import Head, States


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    return parser.parse_args()


def make_losses(temperature: float) -> dict[str, DistillationLoss]:
    """Return each divergence with its default arguments, by name."""
    made = {}
    for name, dotted in divergences_by_name().items():
        if name == "hidden_states":  # compares layers, not logits
            continue
        module, _, attribute = home_of(dotted).rpartition(".")
        divergence = getattr(importlib.import_module(module), attribute)(temperature=temperature)
        made[name] = DistillationLoss(MaskedCrossEntropy(), divergence, 0.5)
    return made


def make_inputs(args: argparse.Namespace) -> tuple[States, torch.Tensor, States]:
    """Return a student, labels, and a teacher that is near the student."""
    torch.manual_seed(0)
    there = measure.device()
    dtype = torch.float32 if there.type == "cpu" else torch.bfloat16
    hidden = torch.randn(args.tokens, args.hidden).to(there, dtype)
    weight = (torch.randn(args.vocabulary, args.hidden) * 3 / args.hidden**0.5).to(there, dtype)
    teacher = States(hidden + 0.3 * torch.randn_like(hidden), Head(weight.clone()))
    student = States(hidden.requires_grad_(), Head(weight.requires_grad_()))
    return student, torch.randint(args.vocabulary, (args.tokens,)).to(there), teacher


def time_once(function: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    if torch.cuda.is_available():
        return measure.seconds(function)
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    student, labels, teacher = make_inputs(args)
    losses = make_losses(args.temperature)
    if torch.cuda.is_available():
        for name, loss in [*make_losses(args.temperature).items()]:
            loss.is_fused = lambda *_: False  # type: ignore[method-assign]
            losses[f"{name}, plain"] = loss
    found: dict[str, float] = {}

    def run(loss: Any) -> None:
        loss(student, labels, teacher)

    for _ in range(1 if args.memory else args.rounds):
        for name, loss in losses.items():
            if args.memory:
                found[name] = measure.peak_bytes(lambda: run(loss)) / measure.GIB  # noqa: B023
                found[name] -= (student.hidden.nbytes + student.head.weight.nbytes) / measure.GIB
            else:
                taken = time_once(lambda: run(loss))  # noqa: B023
                found[name] = min(found.get(name, taken), taken)
            loss._kept = None  # the next one begins without its buffers

    unit, first = "GiB" if args.memory else "s", found["forward_kl"]
    print(f"| name | {unit} | against forward_kl |\n|---|---|---|")
    for name, value in found.items():
        print(f"| `{name}` | {value:.4g} | {value / first:.2f} |")


if __name__ == "__main__":
    main()

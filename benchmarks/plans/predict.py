"""Predict the time of a step of named Llama pairs from what `cost.py` counts: its operations and
bytes at a GPU's rates, and the exchange of ZeRO-3 between ranks.

The assumptions are in `ASSUMED` and printed with each prediction; docs/performance.md compares one
with a measurement.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.plans.cost import Cost, count, make_model, make_step
from ds_kd.plan.hardware import Gpu
from ds_kd.plan.shapes import Shape, Work, shape_of
from ds_kd.plan.step.cluster import OF_LINK, Cluster
from ds_kd.plan.step.operations import count_operations
from ds_kd.plan.step.time import OF_PEAK, Phase, estimate_phases
from ds_kd.plan.step.traffic import Exchange, count_exchanges

#: Arguments of `LlamaConfig`, as in the models' public config.json: Llama 3.2 1B and 3B, Llama 3.1
#: 8B and 70B.
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128_256,
        tie_word_embeddings=is_tied, max_position_embeddings=131_072,
    )
    for name, (hidden, inner, layers, heads, is_tied) in {
        "1B": (2048, 8192, 16, 32, True),
        "3B": (3072, 8192, 28, 24, True),
        "8B": (4096, 14336, 32, 32, False),
        "70B": (8192, 28672, 80, 64, False),
    }.items()
}  # fmt: skip
PAIRS = ("3B-1B", "70B-8B")
PER_NODE = 8
#: Shares of a GPU's peaks that attention and pointwise kernels reach, and seconds of the host for a
#: launch: 0.35 s for 8,400 in a step of 3B → 1B under DeepSpeed's hooks, beside an H100.
OF_PEAK_IN_ATTENTION, OF_BANDWIDTH, LAUNCH = 0.35, 0.87, 42e-6
ASSUMED = (
    f"assumed: products at {OF_PEAK:.0%} of the peak, attention at {OF_PEAK_IN_ATTENTION:.0%}, "
    f"memory at {OF_BANDWIDTH:.0%}, links at {OF_LINK:.0%}; exchanges behind the products of their "
    f"phase; {LAUNCH * 1e6:.0f} µs of the host for a launch"
)


@dataclass(frozen=True)
class Run:
    """A layout of a step.

    Args:
        gpu: its GPUs, eight of a node.
        ranks: their number.
        micro_batches: of a rank in a step.
        window: micro-batches that the teacher takes in one pass.
        copies: ranks that hold a copy of both models' weights together and gather from it.
        network: bytes per second that a GPU receives from other nodes; None takes its own card's.
    """

    gpu: Gpu
    ranks: int = 1
    micro_batches: int = 1
    window: int = 1
    copies: int = 1
    network: float | None = None

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.gpu, self.ranks, min(PER_NODE, self.ranks), self.network)

    def work(self, lengths: list[int]) -> Work:
        """Return it in the words of the plan."""
        longest = sum(n * n for n in lengths) // sum(lengths)
        return Work(
            sum(lengths), longest, micro_batches=self.micro_batches, window=self.window,
            hpz=self.copies, student_hpz=self.copies,
        )  # fmt: skip


def make_loss(name: str = "forward_kl", temperature: float = 1.0) -> Any:
    """Return the loss ½·CE + ½·T²·D with the divergence of that name."""
    from ds_kd.config.names import home_of
    from ds_kd.config.signatures import divergences_by_name
    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy

    module, _, attribute = home_of(divergences_by_name()[name]).rpartition(".")
    divergence = getattr(importlib.import_module(module), attribute)(temperature=temperature)
    return DistillationLoss(MaskedCrossEntropy(), divergence, 0.5)


def count_pair(pair: str, lengths: list[int], loss: Any) -> Cost:
    """Return the cost of a micro-batch of a pair in bf16."""
    teacher, student = pair.split("-")
    step = make_step(SHAPES[student], SHAPES[teacher], loss, lengths, torch.bfloat16)
    return count(step, SHAPES[student]["vocab_size"], lengths)


@functools.cache
def find_shape(name: str) -> Shape:
    """Return the sizes of a named model in bf16."""
    return shape_of(make_model(SHAPES[name], torch.bfloat16), 2)


def exchanges_of(pair: str, lengths: list[int], run: Run) -> list[Exchange]:
    """Return what the ranks exchange in a step."""
    teacher, student = map(find_shape, pair.split("-"))
    return count_exchanges(student, teacher, run.work(lengths), run.ranks)


def predict(pair: str, cost: Cost, lengths: list[int], run: Run, joined: bool) -> list[Phase]:
    """Return the phases of a step, their products and memory as counted.

    Args:
        joined: a compiler has joined operations between products.
    """
    teacher, student = map(find_shape, pair.split("-"))
    phases = []
    for phase in estimate_phases(student, teacher, run.work(lengths), run.cluster):
        memory = phase.memory / OF_BANDWIDTH
        if phase.name in cost.by_phase:
            # The loss's kernel is among the counted bytes.
            found = cost.by_phase[phase.name]
            products = found.tflop / OF_PEAK + found.attention / OF_PEAK_IN_ATTENTION
            moved = found.joined if joined else found.rest
            phase = replace(phase, products=run.micro_batches * products / run.gpu.tflops)
            memory = run.micro_batches * moved / (OF_BANDWIDTH * run.gpu.bandwidth)
        phases.append(replace(phase, memory=memory))
    return phases


def rate(pair: str, cost: Cost, lengths: list[int], run: Run, joined: bool) -> tuple[float, float]:
    """Return the seconds of a step and its MFU: operations of linear layers, heads and causal
    attention, each token once, over the peak."""
    teacher, student = map(find_shape, pair.split("-"))
    phases = predict(pair, cost, lengths, run, joined)
    seconds = max(sum(phase.seconds for phase in phases), find_host_time(cost, run, joined))
    done = count_operations(student, teacher, run.work(lengths))
    return seconds, done / seconds / (run.gpu.tflops * 1e12)


def find_host_time(cost: Cost, run: Run, joined: bool) -> float:
    """Return the seconds that the host takes to launch a step's operations."""
    parts = cost.by_phase.values()
    launches = sum(part.groups if joined else part.launches for part in parts)
    return run.micro_batches * launches * LAUNCH


def describe_time(pair: str, cost: Cost, lengths: list[int], run: Run) -> list[str]:
    """Return lines on the exchange and the predicted time of a step."""
    lines = [
        f"{pair}, {run.ranks} × {run.gpu.name}, {run.micro_batches} micro-batch(es) of "
        f"{sum(lengths):,} tokens a rank, teacher's window {run.window}, copies over {run.copies}"
    ]
    for each in exchanges_of(pair, lengths, run):
        lines.append(
            f"    {each.name:31} {each.received / 1e9:8.2f} GB received by a rank, {each.kind}"
        )
    for joined in (False, True):
        seconds, mfu = rate(pair, cost, lengths, run, joined)
        how = "operations joined between products" if joined else "operations one by one"
        lines.append(f"{how}: {seconds:.3g} s a step, MFU {mfu:.0%}")
        for phase in predict(pair, cost, lengths, run, joined):
            lines.append(
                f"    {phase.name:10} {phase.seconds:7.3f} s: products {phase.products:.3f}, "
                f"memory {phase.memory:.3f}, exchange {phase.exchange:.3f}"
            )
        lines.append(f"    the host meanwhile: {find_host_time(cost, run, joined):.3f} s")
    return [*lines, ASSUMED]


def list_runs(gpu: Gpu) -> Iterator[tuple[str, Run]]:
    """Yield (pair, layout) of the named shapes."""
    yield "3B-1B", Run(gpu)
    for ranks in (8, 64):
        yield "70B-8B", Run(gpu, ranks)
        yield "70B-8B", Run(gpu, ranks, 8)
        yield "70B-8B", Run(gpu, ranks, 8, window=8)
        if ranks > PER_NODE:
            yield "70B-8B", Run(gpu, ranks, 8, copies=PER_NODE)
            yield "70B-8B", Run(gpu, ranks, 8, window=8, copies=PER_NODE)


def make_table(gpu: Gpu) -> list[str]:
    """Return the table of the named shapes at 4,096 tokens in a micro-batch, in Markdown."""
    costs = {pair: count_pair(pair, [4096], make_loss()) for pair in PAIRS}
    lines = [
        "| pair, ranks | micro-batches, window, copies | GB received: teacher, student, gradients "
        "| exchange | step, MFU | joined | joined, a card for eight |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair, run in list_runs(gpu):
        lines.append(_make_row(pair, costs[pair], run))
    return [*lines, "", ASSUMED]


def _make_row(pair: str, cost: Cost, run: Run) -> str:
    """Return a line of the table. Its last cell has one network card for a node's eight GPUs."""
    lengths = [4096]
    found = exchanges_of(pair, lengths, run)
    sizes = [
        sum(each.received for each in found if each.name.startswith(start)) / 1e9
        for start in ("teacher", "student", "gradients")
    ]
    narrow = replace(run, network=run.gpu.network / PER_NODE)
    seconds = [sum(map(each.cluster.seconds, found)) for each in (run, narrow)]
    told = [
        "{:.3g} s, {:.0%}".format(*rate(pair, cost, lengths, each, joined))
        for each, joined in ((run, False), (run, True), (narrow, True))
    ]
    cells = [
        f"{pair}, {run.ranks}",
        f"{run.micro_batches}, {run.window}, {run.copies}",
        ", ".join(f"{size:.0f}" for size in sizes),
        " or ".join(f"{each:.2g} s" for each in seconds) if run.ranks > 1 else "",
        *told[:2],
        told[2] if run.ranks > PER_NODE else "",
    ]
    return f"| {' | '.join(cells)} |"

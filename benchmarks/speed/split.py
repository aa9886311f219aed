"""Measure what splitting one long sample over gloo ranks saves, and what it sends.

    python benchmarks/speed/split.py                 2,048 tokens, on 1, 2 and 4 ranks
    python benchmarks/speed/split.py --tokens 8192 --ranks 1 4

For each number of ranks it prints, of the first rank: what forward keeps for backward beside the
weights, how far the memory's peak in a step is above its rest, the numbers that it sends to others
around attention, and the loss, which must not change.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser

LAYERS, HIDDEN, HEADS, SHARED, VOCAB = 4, 512, 8, 4, 8192


def run_step(rank: int, size: int, tokens: int, port: int, out: Path) -> None:
    """Take one step on this rank, and write what it cost."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    import psutil
    import torch

    from ds_kd.parallel import sequence, world

    torch.set_num_threads(1)
    here = world.divide(world.start("gloo"), timeout_minutes=10, sequence=size)
    student, batch = make_student(here), make_batch(tokens, here)
    sent = [0]
    plain = sequence._send

    def count(parts: Any, sizes: list[int], received: list[int], group: Any) -> Any:
        sent[0] += sum(sizes) - sizes[rank]
        return plain(parts, sizes, received, group)

    sequence._send = count
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # The first step shows the peak, as hooks cost memory too; weights are no activations.
    rest = psutil.Process().memory_info().rss
    loss, _ = student(batch)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = sent[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        again, _ = student(batch)
    for weight in student.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    total = world.sum_over([float(loss)], here.everyone)[0] / tokens
    del again
    if rank == 0:
        mib = 2**20
        out.write_text(
            f"{size} rank(s): kept {sum(kept.values()) / mib:7.1f} MiB, peak above rest "
            f"{(peak - rest) / mib:7.1f} MiB, sent {numbers:12,} numbers, loss {total:.6f}"
        )
    world.stop()


def make_student(here: Any) -> Any:
    """Return a student of plain modules; a step of it needs no engine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy
    from ds_kd.losses.divergences import KDLoss
    from ds_kd.models.attention import attend_by_sample
    from ds_kd.models.causal_lm import Student
    from ds_kd.parallel.sequence import Exchange

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=SHARED,
        max_position_embeddings=1 << 20,
    ))  # fmt: skip
    attend_by_sample(model)
    student = Student(model, DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.0))
    student.exchange = Exchange(here.sequence)
    return student


def make_batch(tokens: int, here: Any) -> Any:
    """Return this rank's part of one sample, every token of which is supervised."""
    import torch

    from ds_kd.data.collate import default_collater
    from ds_kd.train.parts import take_part

    ids = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = default_collater([{"input_ids": ids, "labels": ids[1:] + ids[:1]}])
    return take_part(batch, here.sequence.rank, here.sequence.size)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    from ds_kd.parallel.rendezvous import free_port

    context = multiprocessing.get_context("spawn")
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            out, port = Path(folder, "out"), free_port()
            arguments = [(rank, size, options.tokens, port, out) for rank in range(size)]
            ranks = [context.Process(target=run_step, args=each) for each in arguments]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                raise SystemExit(f"{size} rank(s): a rank has failed")
            print(out.read_text(), flush=True)


if __name__ == "__main__":
    main()

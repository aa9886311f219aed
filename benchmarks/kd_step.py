"""One optimizer step of ds_kd against the field's, on the same samples, interleaved.

    python benchmarks/kd_step.py                              a cell per axis, 15 minutes on 2 cores
    python benchmarks/kd_step.py --cells squad text-512       some of them
    python benchmarks/kd_step.py --full --output results/kd   the whole matrix; writes .json and .md

Teacher and student are the quickstart's (bash launch/quickstart.sh makes them). Every cell is a
process of its own; in it every contender takes the same steps in turn (A B A B …), the first round
is thrown away, and medians are shown. `efficiency` is the time of the matrix products that cannot
be avoided, measured in the same process at the same shapes, over the step's time.
`peak` is memory above what is there between steps (weights, optimizer).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SQUAD = ROOT.parent / "shared" / "data" / "squad_train.jsonl"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        name: how `--cells` calls it.
        kind: `text` (pieces of one length), `squad` (real rows, ds_kd packs them) or `workspace`
            (the loss alone, from hidden states).
        length: tokens of a text sample.
        masked: share of a text sample that is not supervised.
        samples: per optimizer step.
        micro_batch: samples per forward.
        vocab: rows of both heads; 0 takes the models'.
        ranks: processes, with all cores between them.
    """

    name: str
    kind: str = "text"
    length: int = 512
    masked: float = 0.0
    samples: int = 2
    micro_batch: int = 2
    vocab: int = 0
    dtype: str = "fp32"
    ranks: int = 1


BASE = Cell("text-512")
DEFAULT = [
    BASE,
    replace(BASE, name="text-512-half", masked=0.5),
    replace(BASE, name="text-512-5pc", masked=0.95),
    replace(BASE, name="text-2048", length=2048, samples=1, micro_batch=1),
    replace(BASE, name="vocab-128k", vocab=128256),
    replace(BASE, name="vocab-152k", vocab=151936),
    Cell("squad", "squad", samples=8, micro_batch=8),
    replace(BASE, name="bf16", dtype="bf16"),
    Cell("squad-bf16", "squad", samples=8, micro_batch=8, dtype="bf16"),
    replace(BASE, name="2-ranks", ranks=2),
    Cell("workspace", "workspace", vocab=128256, length=4096),
]


def full() -> list[Cell]:
    """Every mask × length × vocabulary × dtype."""
    cells = [
        Cell(
            f"{length}-{masked:.0%}-{vocab // 1000}k-{dtype}",
            length=length,
            masked=masked,
            vocab=vocab,
            dtype=dtype,
            samples=max(1, 2048 // length),
            micro_batch=max(1, 1024 // length),
        )
        for length, masked, vocab, dtype in itertools.product(
            (512, 1024, 2048, 4096), (0.0, 0.5, 0.95), (49152, 128256, 151936), DTYPES
        )
    ]
    return [*DEFAULT, *cells]


def rows_of(cell: Cell, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Measure one cell in this process (one rank of `cell.ranks`)."""
    import measure
    import torch
    from contenders import Job, available

    from ds_kd.quiet import quiet

    quiet()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cell.ranks))
    dtype = getattr(torch, DTYPES[cell.dtype])
    if cell.kind == "workspace":
        return workspace(cell)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    rounds = args.rounds + 1  # the first is thrown away
    if cell.kind == "squad":
        rows = measure.squad_samples(tokenizer, args.squad, cell.samples * rounds)
    else:
        rows = measure.text_samples(tokenizer, cell.samples * rounds, cell.length, cell.masked)
    steps = [rows[k : k + cell.samples] for k in range(0, len(rows), cell.samples)][:rounds]
    paths = [
        measure.with_vocabulary(p, cell.vocab, directory) if cell.vocab else p
        for p in (args.teacher, args.student)
    ]
    job = Job(*paths, dtype, cell.micro_batch, cell.kind == "squad", pack_size=2048)
    wanted = ["ds_kd"] if cell.ranks > 1 else args.contenders
    with contextlib.ExitStack() as stack:
        contenders = {n: stack.enter_context(make(job)) for n, make in available(wanted).items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        losses = {}
        for samples in steps:
            for name, step in contenders.items():
                times[name].append(measure.seconds(lambda: losses.update({name: step(samples)})))  # noqa: B023
        peaks = {
            name: measure.peak_bytes(lambda: step(steps[-1]))  # noqa: B023
            for name, step in contenders.items()
        }
        # Only ds_kd shards its states; the others' are the models' sizes.
        states = {n: getattr(s, "state_bytes", 0) / measure.GIB for n, s in contenders.items()}
    tokens, labels = (
        statistics.median(column) for column in zip(*map(measure.tokens_in, steps[1:]), strict=True)
    )
    middle = min(steps[1:], key=lambda step: abs(measure.tokens_in(step)[0] - tokens))
    lengths = [len(sample["input_ids"]) for sample in middle]
    micro_batches = 1 if cell.kind == "squad" else cell.samples // cell.micro_batch
    # ds_kd is compared with the products of the tokens it is given, whatever others pad.
    ideal = measure.Ideal(*paths, dtype).seconds(lengths, int(labels), micro_batches)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    made = []
    for name, taken in medians.items():
        row = {"cell": cell.name, "contender": name, "step s": taken, "tokens/s": tokens / taken}
        if "plain" in medians:
            row["× plain"] = medians["plain"] / taken
        row |= {"efficiency": ideal / taken, "peak GiB": peaks[name] / measure.GIB}
        made.append({**row, "states GiB": states[name], "loss": losses[name]})
    return made


def workspace(cell: Cell) -> list[dict[str, Any]]:
    """Peak memory of the loss alone, its gradients of hidden states and head left out."""
    import measure
    import torch

    from ds_kd.distillation import DistillationLoss, Head
    from ds_kd.losses import KDLoss, MaskedCrossEntropy

    made = []
    hidden, dtype = 576, getattr(torch, DTYPES[cell.dtype])
    for tokens in (cell.length // 4, cell.length // 2, cell.length):
        torch.manual_seed(0)
        h_s, h_t = (torch.randn(tokens, hidden, dtype=dtype) for _ in range(2))
        w_s, w_t = (torch.randn(cell.vocab, hidden, dtype=dtype) for _ in range(2))
        labels = torch.randint(cell.vocab, (tokens,))
        row: dict[str, Any] = {"cell": cell.name, "tokens": tokens, "vocabulary": cell.vocab}
        for name, chunk in (("plain", 0), ("ds_kd", None)):
            loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=chunk), 0.5)
            leaf = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()

            def run(loss=loss, leaf=leaf):
                loss(leaf[0], Head(leaf[1]), labels, h_t, Head(w_t))[0].backward()  # noqa: B023

            # What stays is the gradients; they are no workspace.
            kept = sum(t.nbytes for t in leaf)
            row[f"{name} GiB"] = (measure.peak_bytes(run) - kept) / measure.GIB
        row["share"] = row["ds_kd GiB"] / row["plain GiB"]
        made.append(row)
    return made


def run_cell(cell: Cell, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """`rows_of` in fresh processes."""
    result = directory / "rows.json"
    result.unlink(missing_ok=True)
    command = [sys.executable]
    if cell.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command.append(str(cell.ranks))
    command += [__file__, "--child", json.dumps(asdict(cell)), "--directory", str(directory)]
    for name in ("teacher", "student", "squad", "rounds"):
        command += [f"--{name}", str(getattr(args, name))]
    if args.contenders:
        command += ["--contenders", *args.contenders]
    threads = max(1, (os.cpu_count() or 1) // cell.ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    if _has_gpu():
        environment.pop("DS_ACCELERATOR")
    code = subprocess.call(command, env=environment)
    if code != 0 or not result.is_file():
        return [{"cell": cell.name, "contender": f"failed with exit code {code}"}]
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quickstart = ROOT / "quickstart"
    parser.add_argument("--teacher", type=Path, default=quickstart / "teacher")
    parser.add_argument("--student", type=Path, default=quickstart / "student")
    parser.add_argument("--squad", type=Path, default=SQUAD, help="rows in SQuAD's schema")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="default: a line per axis")
    parser.add_argument("--full", action="store_true", help="the whole matrix; hours on a CPU")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="default: all installed")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each contender")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for path in (args.teacher, args.student):
        if not (path / "config.json").is_file():
            parser.error(f"no model in {path}; bash launch/quickstart.sh makes it")
    return args


def main() -> int:
    args = parse()
    if args.child:
        rows = rows_of(Cell(**json.loads(args.child)), args, args.directory)
        if os.environ.get("RANK", "0") == "0":
            (args.directory / "rows.json").write_text(json.dumps(rows))
        return 0
    import measure

    cells = full() if args.full else DEFAULT
    if args.cells:
        known = {cell.name: cell for cell in full()}
        unknown = [name for name in args.cells if name not in known]
        if unknown:
            print(f"no cell {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
            return 2
        cells = [known[name] for name in args.cells]
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for cell in cells:
            if cell.kind == "squad" and not args.squad.is_file():
                print(f"{cell.name}: skipped, no {args.squad}; give --squad FILE", flush=True)
                continue
            rows = run_cell(cell, args, Path(directory))
            print(measure.markdown(rows), "\n", flush=True)
            made += rows
    measure.write(made, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

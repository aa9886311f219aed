"""One optimizer step of ds_kd against the field's, on the same samples, interleaved.

    python benchmarks/speed/kd_step.py                        a cell per axis, 15 minutes, 2 cores
    python benchmarks/speed/kd_step.py --cells squad text-512                 some of them
    python benchmarks/speed/kd_step.py --full --output results/kd             the whole matrix

Teacher and student are the quickstart's (bash launch/quickstart.sh makes them). Every contender is
a process of its own, as a user would start it; they take the same steps in turn (A B A B …), all
but one waiting, the first round is thrown away, and medians are shown. `efficiency` is the time of
the matrix products that cannot be avoided, measured in the same process at the same shapes after
each step, over that step's time. `peak` is memory above what is there between steps (weights,
optimizer).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import SQUAD, add_output, add_pair, check_pair, make_parser
from benchmarks.speed.cells import DEFAULT, DTYPES, Cell, full


class Worker:
    """One contender of one cell, in processes of its own, waiting for orders; its name is
    `PLACE-CONTENDER`.

    Orders and answers are JSON lines in two named pipes, which also reach a rank that a launcher
    started.
    """

    def __init__(self, name: str, cell: Cell, args: argparse.Namespace, directory: Path):
        self.name = name
        pipes = [directory / f"{name}.{end}" for end in ("orders", "answers")]
        for pipe in pipes:
            pipe.unlink(missing_ok=True)
            os.mkfifo(pipe)
        command = [sys.executable]
        if cell.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command.append(str(cell.ranks))
        command += [__file__, "--worker", name, "--cell", json.dumps(asdict(cell))]
        for option in ("teacher", "student", "squad", "rounds"):
            command += [f"--{option}", str(getattr(args, option))]
        threads = max(1, (os.cpu_count() or 1) // cell.ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, "--directory", str(directory)], env=environment, stdout=sys.stderr
        )
        self._orders = self._open(pipes[0], os.O_WRONLY, "w")
        self._answers = self._open(pipes[1], os.O_RDONLY, "r")

    def _open(self, pipe: Path, flag: int, mode: str) -> Any:
        """Open a pipe, which waits for the other end; a worker that died never opens its own."""
        while True:
            try:
                # A reader may open early; the first line then has to be waited for anyway.
                return os.fdopen(os.open(pipe, flag | (os.O_NONBLOCK if mode == "w" else 0)), mode)
            except OSError:
                if self.process.poll() is not None:
                    raise WorkerError(self.name, self.process.returncode) from None
                time.sleep(0.2)

    def ask(self, order: str, step: int = 0) -> Any:
        """Return the answer to an order: seconds and loss of a `step`, those of its products in an
        `ideal` one, bytes of its `peak`, or those of the `states` between steps."""
        self._orders.write(json.dumps([order, step]) + "\n")
        self._orders.flush()
        answer = self._answers.readline()
        if not answer:
            raise WorkerError(self.name, self.process.wait())
        return json.loads(answer)

    def close(self) -> None:
        self._orders.close()
        self._answers.close()
        self.process.wait()


class WorkerError(Exception):
    """A contender that could not go on."""

    def __init__(self, name: str, code: int):
        super().__init__(f"{name} ended with exit code {code}")


def work(args: argparse.Namespace) -> None:
    """Answer the orders of a `Worker`: this process is one rank of it."""
    import torch
    import torch.distributed as dist

    from benchmarks.speed.contenders import CONTENDERS
    from ds_kd.quiet import quiet

    quiet()
    orders = answers = None
    if int(os.environ.get("RANK", "0")) == 0:
        orders = (args.directory / f"{args.worker}.orders").open()
        answers = (args.directory / f"{args.worker}.answers").open("w", buffering=1)
    cell = Cell(**json.loads(args.cell))
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job, steps = _make_job(cell, args)

    # Rank 0 reads an order, and all ranks take the step.
    with CONTENDERS[args.worker.partition("-")[2]][0](job) as step:
        while True:
            box = [json.loads(line) if orders and (line := orders.readline()) else None]
            if cell.ranks > 1:
                dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                return
            order, k = box[0]
            answer = _carry_out(order, step, steps[k], cell, job)
            if answers:
                answers.write(json.dumps(answer) + "\n")


def _make_job(cell: Cell, args: argparse.Namespace) -> tuple[Any, list[list[dict[str, Any]]]]:
    """Return the job of a cell's contenders, and the samples of each step."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks import measure
    from benchmarks.speed.contenders import Job

    steps = steps_of(cell, args, AutoTokenizer.from_pretrained(args.teacher))
    paths = [
        measure.with_vocabulary(p, cell.vocab, args.directory) if cell.vocab else p
        for p in (args.teacher, args.student)
    ]
    dtype = getattr(torch, DTYPES[cell.dtype])
    shares = args.worker.endswith("_shared")
    return Job(*paths, dtype, cell.micro_batch, cell.packs, shares, pack_size=2048), steps


def _carry_out(order: str, step: Any, samples: list[dict[str, Any]], cell: Cell, job: Any) -> Any:
    """Return the answer to an order, as `Worker.ask` describes it."""
    from benchmarks import measure

    if order == "step":
        losses: list[float] = []
        taken = measure.seconds(lambda: losses.append(step(samples)))
        return [taken, losses[0]]
    if order == "peak":
        return measure.peak_bytes(lambda: step(samples))
    if order == "states":
        return getattr(step, "state_bytes", 0)
    lengths = measure.lengths_in(samples, job.shares)
    _, labels = measure.tokens_in(samples)
    micro = cell.samples // cell.micro_batch
    if cell.packs:
        micro = -(-sum(lengths) // job.pack_size)
    return measure.Ideal(job.teacher, job.student, job.dtype).seconds(lengths, labels, micro)


def steps_of(cell: Cell, args: argparse.Namespace, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Return the samples of each step; the first step is thrown away."""
    from benchmarks import measure

    count = cell.samples * (args.rounds + 1)
    if cell.kind == "squad":
        rows = measure.squad_samples(tokenizer, args.squad, count)
    elif cell.kind == "chat":
        rows = measure.chat_samples(tokenizer, count)
    else:
        rows = measure.text_samples(tokenizer, count, cell.length, cell.masked)
    return [rows[k : k + cell.samples] for k in range(0, count, cell.samples)]


def rows_of(cell: Cell, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return a row for each contender of a cell; they take their steps in turn."""
    from benchmarks.speed.contenders import available

    wanted = ["ds_kd"] if cell.ranks > 1 else args.contenders
    if cell.shares and wanted is None:
        wanted = ["ds_kd_shared", "ds_kd", "plain"]
    names = [name for name in available(wanted) if cell.shares or not name.endswith("_shared")]
    rows = in_turn([(cell, name, args) for name in names], directory)
    plain = next((row["step s"] for row in rows if row["contender"] == "plain"), None)
    if plain is not None:
        for row in rows:
            row["× plain"] = plain / row["step s"]
    return rows


def in_turn(
    entries: list[tuple[Cell, str, argparse.Namespace]], directory: Path
) -> list[dict[str, Any]]:
    """Return a row for each (cell, contender, arguments): one step of each, then the next of each,
    so that a slow minute of the machine meets all."""
    from transformers import AutoTokenizer

    from benchmarks import measure

    rows = []
    with contextlib.ExitStack() as stack:
        # One after the other, so that they do not fight for the cores while they load.
        workers = []
        for place, (cell, name, args) in enumerate(entries):
            worker = Worker(f"{place}-{name}", cell, args, directory)
            stack.callback(worker.close)
            worker.ask("step", 0)
            steps = steps_of(cell, args, AutoTokenizer.from_pretrained(args.teacher))
            workers.append((worker, [measure.tokens_in(step)[0] for step in steps]))
        answers: list[list[list[float]]] = [[] for _ in workers]
        for k in range(1, max(len(counted) for _, counted in workers)):
            for (worker, _), taken in zip(workers, answers, strict=True):
                seconds, loss = worker.ask("step", k)
                taken.append([seconds, loss, worker.ask("ideal", k) / seconds])
        for (worker, counted), taken, (cell, name, _) in zip(
            workers, answers, entries, strict=True
        ):
            tokens = statistics.median(counted[1:])
            peak, states = worker.ask("peak", 1), worker.ask("states")
            median = statistics.median(seconds for seconds, *_ in taken)
            row = {"cell": cell.name, "contender": name, "step s": median}
            row["tokens/s"] = tokens / median
            row["efficiency"] = statistics.median(share for *_, share in taken)
            row["peak GiB"] = peak / measure.GIB
            row["states GiB"] = states / measure.GIB
            rows.append({**row, "loss": taken[-1][1]})
    return rows


def workspace(cell: Cell) -> list[dict[str, Any]]:
    """Return the peak memory of the loss alone, without its gradients of hidden states and head."""
    import torch

    from benchmarks import measure
    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy
    from ds_kd.losses.divergences import KDLoss
    from ds_kd.losses.head import Head, States

    made = []
    hidden, dtype = 576, getattr(torch, DTYPES[cell.dtype])
    for tokens in (cell.length // 4, cell.length // 2, cell.length):
        torch.manual_seed(0)
        h_s, h_t = (torch.randn(tokens, hidden, dtype=dtype) for _ in range(2))
        w_s, w_t = (torch.randn(cell.vocab, hidden, dtype=dtype) for _ in range(2))
        labels = torch.randint(cell.vocab, (tokens,))
        row: dict[str, Any] = {"cell": cell.name, "tokens": tokens, "vocabulary": cell.vocab}
        ce, kd = MaskedCrossEntropy(), KDLoss()

        def whole(student: States, labels: Any, teacher: States) -> tuple[Any, None]:
            z_s, z_t = (part.head.logits(part.hidden) for part in (student, teacher))
            return 0.5 * ce(z_s, labels) + 0.5 * kd(z_s, z_t, labels), None  # noqa: B023

        for name, loss in (("plain", whole), ("ds_kd", DistillationLoss(ce, kd, 0.5))):
            leaf = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()

            def run(loss=loss, leaf=leaf):
                student, teacher = States(leaf[0], Head(leaf[1])), States(h_t, Head(w_t))  # noqa: B023
                loss(student, labels, teacher)[0].backward()  # noqa: B023

            # The gradients stay; they are no workspace.
            kept = sum(t.nbytes for t in leaf)
            row[f"{name} GiB"] = (measure.peak_bytes(run) - kept) / measure.GIB
        row["share"] = row["ds_kd GiB"] / row["plain GiB"]
        made.append(row)
    return made


def run_cell(cell: Cell, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a cell, or one that says why there are none."""
    if cell.kind == "workspace":
        return workspace(cell)
    try:
        return rows_of(cell, args, directory)
    except WorkerError as error:
        return [{"cell": cell.name, "contender": str(error)}]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_pair(parser, rounds=4)
    parser.add_argument("--squad", type=Path, default=SQUAD, help="rows in SQuAD's schema")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="default: a line per axis")
    parser.add_argument("--full", action="store_true", help="the whole matrix; hours on a CPU")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="default: all installed")
    add_output(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_pair(parser, args)
    return args


def main() -> int:
    args = parse()
    if args.worker:
        work(args)
        return 0
    from benchmarks import measure

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

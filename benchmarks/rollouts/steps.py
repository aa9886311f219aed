"""One on-policy optimizer step of ds_kd against others' own trainers, on the same prompts.

    python benchmarks/rollouts/steps.py --data quickstart/data/train.jsonl
                                              the quickstart's pair, about 15 minutes on 2 cores
    python benchmarks/rollouts/steps.py --data … --opsd DeepSpeedExamples/training/opsd
                                              with DeepSpeedExamples' trainer, from a checkout
    python benchmarks/rollouts/steps.py --made --dtype bf16 --samples 32 --new-tokens 256
                                              one GPU of 80 GB: 3 B and 1 B of random weights
    python benchmarks/rollouts/steps.py --rehearse              tiny models, anywhere: does it work?

Every contender is a process of its own that runs its own trainer's loop: the student writes an
answer to each prompt at T = 1, then trains on it by the reverse KL under the teacher. The first
step is thrown away, medians are shown. On a CPU the contenders take their steps in turn (A B A B
…); on a GPU they come one after the other, as their models do not fit together. `loss` and
`gradient` are the relative differences of the first step's from their definition in `--reference`,
on the texts that this contender wrote (`reference.py`); `rounded` are those of the same plain
computation in `--dtype`, which are the rounding's. `halves` is the number of texts that come
again when each half of the prompts is written by itself, as on two ranks.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import add_output, add_pair, check_pair, make_parser
from benchmarks.speed.cells import DTYPES


class Worker:
    """A contender in a process of its own, waiting for orders; see `gate.Gate`."""

    def __init__(self, name: str, args: argparse.Namespace, directory: Path):
        self.name = name
        reads, writes = os.pipe()
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        command += ["--directory", str(directory), "--answers", str(writes)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if args.threads:
            environment["OMP_NUM_THREADS"] = str(args.threads)
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[writes], stdin=subprocess.PIPE, text=True,
            stdout=sys.stderr,
        )  # fmt: skip
        os.close(writes)
        self._answers = os.fdopen(reads)

    def ask(self, order: str) -> Any:
        """Return the answer to an order, or None if the contender has failed."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
        answer = self._answers.readline()
        return json.loads(answer) if answer else None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def work(args: argparse.Namespace) -> None:
    """Run the contender `args.worker` until no more steps are wanted."""
    from benchmarks.rollouts.gate import Done, Gate
    from benchmarks.rollouts.inputs import Job
    from benchmarks.rollouts.trainers import CONTENDERS
    from ds_kd.quiet import quiet

    quiet()
    place = args.directory / args.worker
    place.mkdir()
    given = json.loads((args.directory / "job.json").read_text("utf-8"))
    for name in ("teacher", "student", "rows", "opsd"):
        given[name] = given[name] and Path(given[name])
    job = Job(**given, place=place)
    with contextlib.suppress(Done), os.fdopen(args.answers, "w") as answers:
        gate = Gate(sys.stdin, answers, place / "gradient.safetensors")
        CONTENDERS[args.worker][0](job, gate)


def make_job(args: argparse.Namespace, directory: Path) -> None:
    """Write the job of all contenders and its rows."""
    from transformers import AutoTokenizer

    from benchmarks.rollouts import inputs

    count = args.samples * (args.rounds + 2)
    teacher, student = args.teacher.resolve(), args.student.resolve()
    if args.rehearse or args.made:
        teacher, student = inputs.make_models(directory, args.rehearse)
        rows = inputs.make_rows(count, args.prompt_tokens)
    else:
        tokenizer = AutoTokenizer.from_pretrained(student)
        rows = inputs.read_rows(args.data, count, args.prompt_tokens, tokenizer)
    if args.cut:
        teacher, student = (inputs.cut(path, args.cut, directory) for path in (teacher, student))
    if args.endless:
        teacher, student = (inputs.without_end(p, directory) for p in (teacher, student))
    file = directory / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    content = {
        "teacher": str(teacher), "student": str(student), "rows": str(file),
        "samples": args.samples, "micro_batch": args.micro_batch or args.samples,
        "new_tokens": args.new_tokens, "dtype": args.dtype,
        "opsd": str(args.opsd.resolve()) if args.opsd else None,
    }  # fmt: skip
    (directory / "job.json").write_text(json.dumps(content), "utf-8")


def run_group(names: list[str], args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return the lines of contenders that take their steps in turn.

    Raises:
        SystemExit: they were not asked the same.
    """
    steps: dict[str, list[Any]] = {name: [] for name in names}
    halves: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:  # one after the other, so that they do not disturb each other
            workers.append(Worker(name, args, directory))
            stack.callback(workers[-1].close)
            steps[name].append(workers[-1].ask("step"))
        for _ in range(args.rounds):
            for worker in workers:
                steps[worker.name].append(worker.ask("step"))
                show_progress(worker.name, steps[worker.name][-1])
        for worker in workers if args.reference != "none" else ():
            halves[worker.name] = worker.ask("halves")
    whole = [name for name in names if None not in (*steps[name], halves.get(name, ""))]
    check_prompts({name: steps[name] for name in whole}, directory)
    return [
        make_row(name, steps[name], halves.get(name), args, directory)
        if name in whole
        else {"contender": f"{name} failed, see above"}
        for name in names
    ]


def show_progress(name: str, step: dict[str, Any] | None) -> None:
    """Tell what a step took, so that a long measurement that is broken off has told something."""
    if step is not None:
        took = ", ".join(f"{key} {step[key]:.3g}" for key in step if key.endswith(" s"))
        print(f"{name}: {took}", file=sys.stderr, flush=True)


def make_row(
    name: str, steps: list[Any], halves: list[int] | None, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Return a contender's line of the table."""
    from benchmarks import measure

    timed = steps[1:] or steps
    row: dict[str, Any] = {"contender": name}
    for unit in ("s", "CPU s"):
        totals = [step[f"total {unit}"] for step in timed]
        writing = [step[f"writing {unit}"] for step in timed]
        training = [a - b for a, b in zip(totals, writing, strict=True)]
        for part, values in (("step", totals), ("writing", writing), ("training", training)):
            row[f"{part} {unit}"] = statistics.median(values)
    written = [sum(map(len, step["texts"])) for step in steps]
    row["tokens"] = statistics.median(written[1:] or written)
    row["peak GiB"] = max(step["peak"] for step in timed) / measure.GIB
    row["supervised"] = f"{steps[0]['supervised']} of {written[0]}"
    if halves is not None:
        row |= compare(steps[0], name, args, directory)
        row["halves"] = "{} of {}".format(*halves)
    return row


def compare(
    step: dict[str, Any], name: str, args: argparse.Namespace, directory: Path
) -> dict[str, float]:
    """Return how far a contender's first step is from the definition, and remove its gradient."""
    import torch

    from benchmarks.rollouts import reference

    job = json.loads((directory / "job.json").read_text("utf-8"))
    gradient = directory / name / "gradient.safetensors"
    dtypes = getattr(torch, args.reference), getattr(torch, DTYPES[args.dtype])
    found = reference.compare(job["student"], job["teacher"], step, gradient, *dtypes)
    gradient.unlink()
    return found


def check_prompts(found: dict[str, list[Any]], directory: Path) -> None:
    """Refuse contenders that were not asked what the first one was, in this group or before."""
    file = directory / "asked.json"
    for name, steps in found.items():
        asked = json.dumps([sorted(step["prompts"]) for step in steps])
        if not file.exists():
            file.write_text(asked, "utf-8")
        elif file.read_text("utf-8") != asked:
            raise SystemExit(f"{name} was asked other prompts than the first contender")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_pair(parser, rounds=3)
    option = parser.add_argument
    option("--data", type=Path, help="JSON lines with messages; the first answer is replaced")
    option("--samples", type=int, default=8, help="prompts of a step, with one answer each")
    option("--micro-batch", type=int, help="samples of a forward pass; default: all of a step")
    option("--new-tokens", type=int, default=48, help="the limit of an answer")
    option("--prompt-tokens", type=int, default=512, help="the most; with --made, all have these")
    option("--dtype", choices=tuple(DTYPES), default="fp32")
    option("--reference", choices=("float32", "float64", "none"), default="float64",
           help="of the definition; none times alone")  # fmt: skip
    option("--threads", type=int, default=0, help="of each contender; default: OMP_NUM_THREADS")
    option("--cut", type=int, help="keep so many layers of both models")
    option("--endless", action="store_true", help="all answers have --new-tokens: no EOS is known")
    option("--made", action="store_true", help="3 B and 1 B of random weights, no --data")
    option("--rehearse", action="store_true", help="tiny models, no --data")
    option("--opsd", type=Path, help="the folder training/opsd of a checkout of DeepSpeedExamples")
    option("--contenders", nargs="+", metavar="NAME", help="default: all that are there")
    add_output(parser)
    for hidden, kind in (("--worker", str), ("--directory", Path), ("--answers", int)):
        option(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from benchmarks.rollouts.trainers import CONTENDERS

    if wrong := {*(args.contenders or ())} - {*CONTENDERS}:
        parser.error(
            f"--contenders: {', '.join(sorted(wrong))}: expected some of {', '.join(CONTENDERS)}"
        )
    if args.rehearse:
        args.samples, args.new_tokens, args.prompt_tokens = 4, 6, 12
    elif not args.made:
        check_pair(parser, args)
        if args.data is None or not args.data.is_file():
            parser.error("--data: name a file of JSON lines with messages, or give --rehearse")
    if args.opsd is not None and not (args.opsd / "trainer.py").is_file():
        parser.error(f"--opsd: no trainer.py in {args.opsd}")
    return args


def main() -> int:
    args = parse()
    if args.worker:
        work(args)
        return 0
    import torch

    from benchmarks import measure
    from benchmarks.rollouts.trainers import available
    from ds_kd.quiet import quiet

    quiet()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_job(args, directory)
        names = [*available(args.contenders, args.dtype, args.opsd)]
        rows: list[dict[str, Any]] = []
        for group in [[name] for name in names] if torch.cuda.is_available() else [names]:
            rows += run_group(group, args, directory)
            measure.write(rows, args.output)
    return 0 if rows and all(len(row) > 1 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

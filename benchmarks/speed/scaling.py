"""Measure how the cost of a step of ds_kd grows with tokens, vocabulary, teacher and ranks.

    python benchmarks/speed/scaling.py                         all axes, about 10 minutes on 2 cores
    python benchmarks/speed/scaling.py --axes ranks tokens     some of them
    python benchmarks/speed/scaling.py --output results/scaling

The slope under each table is that of the logarithms: 1 means that twice as much costs twice as
much. On the axis of ranks it is that of the bytes a rank keeps between steps (weights, optimizer,
teacher), which must fall as 1/ranks: slope -1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import ROOT, SQUAD, add_output, add_pair, check_pair, make_parser
from benchmarks.speed.cells import BASE, Cell
from benchmarks.speed.kd_step import WorkerError, in_turn

TOKENS = (256, 512, 1024, 2048)
VOCABULARIES = (49152, 98304, 151936)
TEACHER_LAYERS = (6, 12, 30)
RANKS = (1, 2, 4)


def cells(axis: str, teacher: Path, directory: Path) -> Iterator[tuple[float, Cell, Path]]:
    """Yield (x, the cell to measure, its teacher) for each point of an axis."""
    one = replace(BASE, samples=1, micro_batch=1)
    if axis == "tokens":
        for tokens in TOKENS:
            yield tokens, replace(one, name=axis, length=tokens), teacher
    elif axis == "vocabulary":
        for vocab in VOCABULARIES:
            yield vocab, replace(one, name=axis, vocab=vocab), teacher
    elif axis == "ranks":
        for ranks in RANKS:
            yield ranks, replace(BASE, name=axis, ranks=ranks, samples=4, micro_batch=1), teacher
    else:
        for layers in TEACHER_LAYERS:
            out = directory / f"teacher-{layers}"
            command = [sys.executable, str(ROOT / "launch" / "prune.py"), "--teacher", str(teacher)]
            command += ["--keep-layers", str(layers), "--output", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            yield layers, replace(one, name=axis), out


def main() -> int:
    axes = ("tokens", "vocabulary", "teacher", "ranks")
    parser = make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    add_pair(parser, rounds=3)
    add_output(parser)
    args = parser.parse_args()
    check_pair(parser, args)
    args.squad = SQUAD
    from benchmarks import measure

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for axis in args.axes:
            points = [*cells(axis, args.teacher, Path(directory))]
            entries = [
                (cell, "ds_kd", argparse.Namespace(**{**vars(args), "teacher": teacher}))
                for _, cell, teacher in points
            ]
            try:
                found = in_turn(entries, Path(directory))
            except WorkerError as error:
                print(f"{axis}: {error}", file=sys.stderr)
                return 1
            of_axis = [
                {"axis": axis, "x": point[0], **row}
                for point, row in zip(points, found, strict=True)
            ]
            column = "states GiB" if axis == "ranks" else "step s"
            fitted = measure.slope([r["x"] for r in of_axis], [r[column] for r in of_axis])
            for row in of_axis:
                row |= {"slope of": column, "slope": fitted}
            print(measure.markdown(of_axis), "\n", flush=True)
            rows += of_axis
    measure.write(rows, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

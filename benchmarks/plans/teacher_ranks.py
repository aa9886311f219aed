"""Compute what a teacher on ranks of its own could gain: the table of docs/scaling.md.

    python benchmarks/plans/teacher_ranks.py --output plans

It needs no GPU and no network; pairs, GPUs and lengths are those of `clusters.py`, and a mixture of
experts as the teacher comes to them. The shared layout is the one that `launch/new_config.py`
chooses. Apart is the shortest step over all numbers of teacher
ranks, with everything for the best: the teacher scores the next step while the student trains on
this one, each group is as long as its own phases, takes its tokens in as few passes as the shared
layout has micro-batches, whatever memory that needs, and hidden rows are sent in no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser
from benchmarks.plans import clusters

#: Samples of a step at least (None: one sample on each GPU), and Gbit/s of a GPU between nodes.
WORK = ((512, 400), (None, 400), (None, 100), (512, 100))
#: A teacher with the sizes of Qwen3's largest mixture (of 235 billion parameters a token meets 22),
#: and Llama's vocabulary.
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096,
    "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 12_288, "moe_intermediate_size": 1536, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
    "max_position_embeddings": clusters.LONG, "torch_dtype": "bfloat16",
}  # fmt: skip
OF_EXPERTS = ("235B of experts", "8B")


def write_models(root: Path) -> None:
    """Write the models of all pairs."""
    from tests import tiny

    clusters.write_models(root)
    place = root / OF_EXPERTS[0]
    place.mkdir(exist_ok=True)
    tiny.tokenizer(place)
    tiny.weightless(place, json.dumps(MIXTURE))


def time_apart(chooser: Any, work: Any, ranks: int) -> tuple[float, float]:
    """Return the seconds of a step of the teacher's group and of the student's.

    Args:
        work: a rank's step in the shared layout.
        ranks: of the teacher; the others are the student's.
    """
    from ds_kd.plan.step.time import estimate_phases

    found = []
    for size, of_teacher in ((ranks, True), (chooser.cluster.world - ranks, False)):
        tokens = round(work.tokens * chooser.cluster.world / size)
        cluster = replace(chooser.cluster, world=size)
        own = replace(work, tokens=tokens)
        # A copy belongs to the ranks of a node, and fewer ranks have none.
        if size < cluster.per_node:
            own = replace(own, hpz=1, student_hpz=1)
        teacher = chooser.teacher if of_teacher else None
        phases = estimate_phases(chooser.student, teacher, own, cluster)
        found.append(sum(each.seconds for each in phases if (each.name == "teacher") == of_teacher))
    return found[0], found[1]


def compare(chooser: Any) -> dict[str, Any]:
    """Return the cells of a pair on a cluster."""
    from ds_kd.plan.memory import estimate_bytes, is_on_device, is_state
    from ds_kd.plan.step.operations import count_by_phase

    shared, world = chooser.choose(), chooser.cluster.world
    if shared is None:
        return {"shared": "nothing fits"}
    work, student, teacher = shared.layout.work, chooser.student, chooser.teacher
    done = count_by_phase(student, teacher, work)

    # Groups are whole nodes where there are several, and whole samples in one.
    per_node = chooser.cluster.per_node
    unit = per_node if world > per_node else shared.layout.shared
    times = {n: time_apart(chooser, work, n) for n in range(unit, world, unit)}
    ranks = min(times, key=lambda n: max(times[n]))
    apart = max(times[ranks])

    def states(teacher: Any, world: int) -> float:
        parts = estimate_bytes(student, teacher, work, world)
        return sum(v for k, v in parts.items() if is_state(k) and is_on_device(k)) / 2**30

    passes = work.micro_batches / work.window
    gathered = 0.0 if work.teacher_is_whole else teacher.width * teacher.parameters * passes
    return {
        "teacher's operations": f"{done['teacher'] / sum(done.values()):.0%}",
        "shared": f"{shared.seconds:.2f} s",
        "teacher ranks": ranks,
        "apart": f"{apart:.2f} s",
        "gain": f"{shared.seconds / apart - 1:+.0%}",
        "idle": f"{1 - min(times[ranks]) / apart:.0%}",
        "states of a GPU": f"{states(teacher, world):.1f}",
        "of a student's": f"{states(None, world - ranks):.1f}",
        "of a teacher's": f"{teacher.width * teacher.parameters / ranks / 2**30:.1f}",
        "kB sent": f"{teacher.width * teacher.hidden / 1e3:.0f}",
        "kB gathered": f"{gathered / work.tokens / work.micro_batches / 1e3:.0f}",
    }


def make_row(
    root: Path, pair: tuple[str, str], gpus: int, length: int, batch: int | None, gbit: int
) -> Any:
    """Return a row of the table: a pair, a cluster, the batch, and what comes of it."""
    from ds_kd.plan.dry_run import work_of
    from ds_kd.plan.memory import Machine
    from ds_kd.plan.new_config.starter import make_chooser
    from ds_kd.plan.step.cluster import bytes_of, make_cluster

    values = {**clusters.PLAIN, "gpus": gpus, "batch": gpus}
    cfg = clusters.load_pair(root, pair, length, values)
    cluster = make_cluster(clusters.GPU, gpus, clusters.PER_NODE, str(gbit))
    memory = bytes_of(clusters.GPU_MEMORY), bytes_of(clusters.HOST_MEMORY)
    machine = Machine(*memory, clusters.PER_NODE)
    work = work_of(cfg, gpus, length, 1.0)
    widest = None if batch else gpus
    chooser = make_chooser(cfg, work, machine, cluster, widest, batch or gpus)
    head = {
        "pair": " → ".join(pair), "GPUs": gpus, "tokens": length, "samples": batch or gpus,
        "Gbit/s": gbit,
    }  # fmt: skip
    return head | compare(chooser)


def list_shapes() -> Iterator[tuple[tuple[str, str], int, int, int | None, int]]:
    """Yield the arguments of each row: pair, GPUs, tokens of a sample, samples and network."""
    for batch, gbit in WORK:
        for pair in (*clusters.PAIRS, OF_EXPERTS):
            for gpus in clusters.GPUS:
                # One node has no network, and 512 samples are one on each of 512 GPUs.
                is_told = gpus == 512 and (batch is None) == (gbit == 400)
                if not is_told and not (gpus == 8 and gbit == 100):
                    yield pair, gpus, clusters.LENGTH, batch, gbit
    for pair in (*clusters.PAIRS, OF_EXPERTS):
        yield pair, clusters.GPUS[0], clusters.LONG, *WORK[0]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a directory to write into")
    args = parser.parse_args()
    from benchmarks import measure

    root = args.output.resolve()
    write_models(root)
    rows = [make_row(root, *shape) for shape in list_shapes()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = measure.markdown([dict.fromkeys(names, "–") | row for row in rows])
    (root / "teacher_ranks.md").write_text(f"{table}\n")
    print(table)


if __name__ == "__main__":
    main()

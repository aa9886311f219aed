"""Plan Llama pairs on clusters: the table of docs/scaling.md, and a YAML for each of its rows.

    python benchmarks/plans/clusters.py --output plans      # plans/*.yaml, plans/table.md

It needs no GPU and no network: the models are the published shapes of Llama 3.1 and 3.2 as
config.json files without weights, the samples texts of one length. Each row is what
`launch/new_config.py` chooses for that pair on so many H100, and its YAML passes
`launch/kd.py --check`. Where nothing fits, the row says what is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.arguments import make_parser

#: hidden size, width of the MLP, layers, heads, numbers of a head, whether the head is tied.
SHAPES = {
    "1B": (2048, 8192, 16, 32, 64, True),
    "3B": (3072, 8192, 28, 24, 128, True),
    "8B": (4096, 14336, 32, 32, 128, False),
    "70B": (8192, 28672, 80, 64, 128, False),
    "405B": (16384, 53248, 126, 128, 128, False),
}
PAIRS = (("3B", "1B"), ("8B", "1B"), ("70B", "8B"), ("405B", "70B"))
GPUS = (8, 64, 512)
PER_NODE, LENGTH, LONG, ROWS = 8, 4096, 131_072, 64
GPU, GPU_MEMORY, HOST_MEMORY = "h100", "80GB", "2TB"
BATCH = 512  # samples of a step, at least
COLUMNS = (
    "pair", "GPUs", "tokens", "teacher", "offloaded", "again", "tp", "cp", "samples",
    "GiB of a GPU", "states", "GiB of a node", "GB received", "step", "tokens/s of a GPU",
    "of the peak",
)  # fmt: skip
PLAIN = {
    "local": 1, "split": 1, "cut": 1, "checkpointing": "false", "why": "", "place": "",
    "zero": "null", "teacher_zero": "null",
}  # fmt: skip
TEMPLATE = """\
# {gpus} GPUs
{why}model: {{pretrained_model_name_or_path: {student}, torch_dtype: bf16}}
teacher_model: {{pretrained_model_name_or_path: {teacher}, torch_dtype: bf16}}
{place}dataset: {{_target_: ds_kd.data.text.make_text_dataset, dataset_name: {rows}}}
optimizer: {{_target_: torch.optim.AdamW, lr: 1.0e-5}}
step_scheduler: {{global_batch_size: {batch}, local_batch_size: {local}, max_steps: 1000}}
distributed: {{activation_checkpointing: {checkpointing}, cp_size: {split}, tp_size: {cut}}}
deepspeed: {{student: {zero}, teacher: {teacher_zero}}}
"""


def write_models(root: Path) -> None:
    """Write each model as a directory without weights, and two files of rows."""
    from tests import tiny

    for name, (hidden, inner, layers, heads, head_dim, tied) in SHAPES.items():
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "head_dim": head_dim, "vocab_size": 128_256,
            "max_position_embeddings": LONG, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
            "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        tiny.tokenizer(place)
        tiny.weightless(place, json.dumps(config))
    for length in (LENGTH, LONG):
        row = json.dumps({"text": "w1 " * (length - 1)})
        (root / f"{length}.jsonl").write_text(f"{row}\n" * ROWS)


def load_pair(root: Path, pair: tuple[str, str], length: int, values: dict[str, Any]) -> Any:
    """Write and load the YAML of a row, `root/PAIR.yaml`.

    Args:
        values: from `ds_kd.plan.new_config.starter.write_layout`.
    """
    from ds_kd.config.load import load

    teacher, student = (root / name for name in pair)
    path = root / f"{teacher.name}-{student.name}-{values['gpus']}-{length}.yaml"
    path.write_text(
        TEMPLATE.format(teacher=teacher, student=student, rows=root / f"{length}.jsonl", **values)
    )
    return load(path)


def plan_row(root: Path, pair: tuple[str, str], gpus: int, length: int) -> dict[str, Any]:
    """Write the YAML of a row that passes `--check`, and return the row's cells."""
    from ds_kd.config.components import ConfigError
    from ds_kd.config.load import check_world
    from ds_kd.plan.dry_run import work_of
    from ds_kd.plan.memory import Machine
    from ds_kd.plan.new_config.starter import make_chooser, write_layout
    from ds_kd.plan.step.cluster import bytes_of, make_cluster

    cells: dict[str, Any] = {"pair": " → ".join(pair), "GPUs": gpus, "tokens": length}
    cluster = make_cluster(GPU, gpus, PER_NODE)
    machine = Machine(bytes_of(GPU_MEMORY), bytes_of(HOST_MEMORY), PER_NODE)
    values = {**PLAIN, "gpus": gpus, "batch": gpus}
    cfg = load_pair(root, pair, length, values)
    chooser = make_chooser(cfg, work_of(cfg, gpus, length, 1.0), machine, cluster, None, BATCH)
    try:
        values |= write_layout(chooser)
    except ConfigError as error:
        (root / f"{pair[0]}-{pair[1]}-{gpus}-{length}.yaml").unlink()
        missing = error.problems[0].partition(": ")[2].partition(";")[0]
        return cells | dict.fromkeys(COLUMNS[3:], "–") | {"teacher": f"nothing fits: {missing}"}
    check_world(load_pair(root, pair, length, values), gpus)
    return cells | describe_choice(chooser)


def describe_choice(chooser: Any) -> dict[str, Any]:
    """Return the cells of what a chooser chooses."""
    from ds_kd.plan import memory
    from ds_kd.plan.step.operations import count_operations
    from ds_kd.plan.step.traffic import count_exchanges

    found, world = chooser.choose(), chooser.cluster.world
    work, parts = found.layout.work, found.parts
    moved = "weights, optimizer" if work.offload_weights else "optimizer"
    states = sum(s for n, s in parts.items() if memory.is_state(n) and memory.is_on_device(n))
    tokens = work.tokens * work.micro_batches / found.layout.shared
    done = count_operations(chooser.student, chooser.teacher, work)
    received = sum(
        each.received for each in count_exchanges(chooser.student, chooser.teacher, work, world)
    )
    return {
        "teacher": found.layout.place.replace("without a copy in each node", "(no copies)"),
        "offloaded": moved if work.offload_optimizer else "–",
        "again": "yes" if work.checkpointing else "–",
        "tp": work.tensor,
        "cp": work.sequence,
        "samples": f"{found.layout.local} × {work.micro_batches}",
        "GiB of a GPU": f"{memory.on_device(parts) / 2**30:.0f}",
        "states": f"{states / 2**30:.1f}",
        "GiB of a node": f"{chooser.machine.of_node(parts, world) / 2**30:.0f}",
        "GB received": f"{received / 1e9:.0f}",
        "step": f"{found.seconds:.2f} s",
        "tokens/s of a GPU": f"{tokens / found.seconds:,.0f}",
        "of the peak": f"{done / found.seconds / chooser.cluster.gpu.tflops / 1e12:.0%}",
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a directory to write into")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    args = parser.parse_args()
    from benchmarks import measure

    root = args.output.resolve()
    write_models(root)
    rows = [plan_row(root, pair, gpus, LENGTH) for pair in PAIRS for gpus in args.gpus]
    rows += [plan_row(root, pair, args.gpus[0], LONG) for pair in PAIRS]
    table = measure.markdown(rows)
    (root / "table.md").write_text(f"{table}\n")
    print(table)


if __name__ == "__main__":
    main()

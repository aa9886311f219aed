"""Compare the plan of a run with the run: memory of a rank, and bytes that it exchanges in a step.

    python benchmarks/plans/layouts.py                  each layout on 1, 2, 4 and 8 gloo ranks
    python benchmarks/plans/layouts.py --ranks 2 --layouts plain hpz
    python benchmarks/plans/layouts.py --size 2         a pair of half the layers, widths and words
    python benchmarks/plans/layouts.py --output results/layouts

Every layout is a YAML, trained for three steps of two micro-batches by the code that trains any
run, in processes of its own. States are the bytes of all tensors that live after the last step; the
peak is what the system counts for a process above what it had before the models were loaded;
exchange is the bytes that a rank receives from others in the last step; `loss` is the workspace of
logits. All are compared with what `launch/plan.py` says for the same YAML.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arguments import add_output, make_parser

LENGTH, SAMPLES, VOCAB = 128, 2, 16_000
STEPS, MICRO = 3, 2
#: Options of the C library's `mallopt`, and the bytes of memory that it may keep to itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _SMALL = -1, -3, 2**16
_OFFLOADED = "{stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}}"
_BF16 = ("model.torch_dtype=bf16", "teacher_model.torch_dtype=bf16")
_FEW_KEPT = (
    "deepspeed.student={zero_optimization: "
    "{stage: 3, stage3_max_reuse_distance: 0, stage3_max_live_parameters: 0}}"
)
_HPZ = "deepspeed.teacher={zero_optimization: {stage: 3, zero_hpz_partition_size: 2}}"
#: Overrides of the YAML of each layout.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bf16": (*_BF16, "distributed.activation_checkpointing=true"),
    "no teacher": ("kd_ratio=0",),
    "replicate": ("teacher.placement=replicate",),
    "cpu": ("teacher.placement=cpu",),
    "hpz": (_HPZ,),
    "offload": (f"deepspeed.student={{zero_optimization: {_OFFLOADED}}}",),
    "let go": (_FEW_KEPT, *_BF16),
    "let go, again": (_FEW_KEPT, "distributed.activation_checkpointing=true"),
    "lora": ("peft={dim: 8}",),
    "sgd, T=1": ("optimizer={_target_: torch.optim.SGD, lr: 0.1}", "kd_loss_fn.temperature=1"),
    "packed": ("packed_sequence.packed_sequence_size=256", *_BF16),
    "experts": ("teacher_model.pretrained_model_name_or_path={experts}",),
    "tp 2": ("distributed.tp_size=2",),
    "tp 2, one norm": (
        "distributed.tp_size=2",
        "model.pretrained_model_name_or_path={one_norm}",
    ),
    "tp 2, whole teacher": ("distributed.tp_size=2", "teacher_distributed.tp_size=1"),
    "cp 2": ("distributed.cp_size=2",),
}
#: Layouts of pairs of ranks → the sizes of `world.divide`.
PAIRS: dict[str, dict[str, int]] = {
    "hpz": {}, "tp 2": {"tensor": 2}, "tp 2, one norm": {"tensor": 2},
    "tp 2, whole teacher": {"tensor": 2}, "cp 2": {"sequence": 2},
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank receives from others in collectives, `received`."""

    def __init__(self) -> None:
        super().__init__()
        self.received = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            groups = [each for each in args if isinstance(each, torch.ScriptObject)]
            ranks = max((_count_ranks(each) for each in groups), default=1)
            whole = max(map(_count_bytes, args), default=0)
            self.received += whole * (ranks - 1) / ranks * (2 if "allreduce" in name else 1)
        return func(*args, **(kwargs or {}))


def _count_ranks(group: Any) -> int:
    """Return the ranks of a boxed process group; 1 for another object."""
    try:
        return int(torch.distributed.ProcessGroup.unbox(group).size())
    except RuntimeError:
        return 1


def _count_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_count_bytes, value)) if isinstance(value, (list, tuple)) else 0


def give_back_at_once() -> None:
    """Make the C library give freed memory back to the system at once. It would keep what loading
    has freed, and the peak of a process would count it."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(option, _SMALL)
    libc.malloc_trim(0)


def read_status(name: str) -> int:
    """Return a size that the system tells of this process, such as VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def live_storages() -> dict[int, int]:
    """Return the bytes of every tensor's memory that Python can reach, by address."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


@contextmanager
def count_steps(trainer: Any) -> Iterator[list[float]]:
    """Count the collectives of each step of a trainer into a list."""
    steps: list[float] = []
    plain = trainer._step

    def step(*args: Any) -> None:
        with Traffic() as traffic:
            plain(*args)
        steps.append(traffic.received)

    trainer._step = step
    yield steps
    trainer._step = plain


def write_models(root: Path, size: int = 1) -> dict[str, str]:
    """Write two models of random weights, two tiny ones and rows; return their paths.

    Args:
        size: by what layers, widths and words are divided.
    """
    from tests import tiny

    # ZeRO-3 keeps matrices of fewer than 100,000 numbers whole on every rank.
    given: dict[str, Any] = {"vocab": VOCAB // size, "heads": (4, min(4, 2 * size))}
    made = {
        "student": tiny.llama(root / "student", layers=4 // size, hidden=640 // size, **given),
        "teacher": tiny.llama(
            root / "teacher", layers=6 // size, hidden=768 // size, tie=False, **given
        ),
        "small": tiny.llama(root / "small"),
        "experts": write_mixture(root / "experts", size),
        "one_norm": write_one_norm(root / "one_norm", size),
    }
    text = " ".join(f"w{k % 90}" for k in range(LENGTH + 20))
    rows = root / "rows.jsonl"
    rows.write_text(f'{{"text": "{text}"}}\n' * 128)
    return {name: str(path) for name, path in {**made, "rows": rows}.items()}


def write_mixture(path: Path, size: int) -> Path:
    """Write a Mixtral of random weights with four experts, two of which a token meets."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests import tiny

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB // size, hidden_size=512 // size, intermediate_size=768 // size,
        num_hidden_layers=4 // size, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=LENGTH, pad_token_id=2, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    tiny.tokenizer(path)
    return path


def write_one_norm(path: Path, size: int) -> Path:
    """Write a Phi of random weights, in whose layers attention and MLP read the same norm."""
    from transformers import PhiConfig, PhiForCausalLM

    from tests import tiny

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB // size, hidden_size=640 // size, intermediate_size=1280 // size,
        num_hidden_layers=4 // size, num_attention_heads=4, max_position_embeddings=LENGTH,
        pad_token_id=2, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(path)
    tiny.tokenizer(path)
    return path


def load_layout(paths: dict[str, str], groups: int, directory: Path, overrides: Any) -> Any:
    """Return the config of a layout, for a number of ranks, or groups of ranks, that see samples of
    their own."""
    from ds_kd.config.load import load

    content = {
        "model": {"pretrained_model_name_or_path": paths["student"], "torch_dtype": "fp32"},
        "teacher_model": {"pretrained_model_name_or_path": paths["teacher"], "torch_dtype": "fp32"},
        "dataset": {
            "_target_": "ds_kd.data.text.make_text_dataset", "dataset_name": paths["rows"],
            "seq_length": LENGTH, "truncation": True,
        },
        "kd_loss_fn": {"temperature": 2.0},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4, "fused": True},
        "step_scheduler": {
            "global_batch_size": SAMPLES * MICRO * groups, "local_batch_size": SAMPLES,
            "max_steps": STEPS,
        },
        "dist_env": {"backend": "gloo"},
        "checkpoint": {"enabled": False, "checkpoint_dir": str(directory)},
        "tensorboard": {"enabled": False},
    }  # fmt: skip
    named = [name for name in ("experts", "one_norm") if name in paths]
    for name in named:
        overrides = [each.replace(f"{{{name}}}", paths[name]) for each in overrides]
    return load(content, [*overrides])


def plan_layout(cfg: Any, ranks: int) -> dict[str, Any]:
    """Return what `launch/plan.py` says of a config: bytes of states and peak, and of a step's
    collectives."""
    from ds_kd.plan import memory
    from ds_kd.plan.dry_run import model_shape, work_of
    from ds_kd.plan.samples import data_of
    from ds_kd.plan.step.traffic import count_exchanges
    from ds_kd.plan.step.tuning import tune_work

    student = model_shape(cfg.model, cfg)
    teacher = model_shape(cfg.teacher_model) if cfg.loads_teacher else None
    _, tokens, supervised, _ = data_of(cfg)
    host = psutil.virtual_memory().total // ranks
    work = work_of(cfg, ranks, tokens, supervised)
    work = tune_work(cfg, work, student, teacher, memory.Machine(host, None, ranks, True), ranks)
    parts = memory.estimate_bytes(student, teacher, work, ranks)
    states = sum(size for name, size in parts.items() if memory.is_state(name))
    exchange = sum(each.received for each in count_exchanges(student, teacher, work, ranks))
    return {"states": states, "peak": sum(parts.values()), "exchange": exchange, "parts": parts}


def run_layout(
    world: Any, directory: Path, paths: dict[str, str], overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Train a layout on the ranks that call this; return the bytes of states, peak and the last
    step's collectives, and the plan's."""
    from ds_kd.recipe.build import build

    gc.collect()
    give_back_at_once()
    before, there = read_status("VmRSS"), live_storages()

    cfg = load_layout(paths, world.data.size, directory, overrides)
    trainer = build(cfg, world)
    Path("/proc/self/clear_refs").write_text("5")
    with count_steps(trainer) as steps:
        trainer.train()
    peak = read_status("VmHWM") - before
    gc.collect()
    held = {place: size for place, size in live_storages().items() if place not in there}
    workspace = count_workspace(trainer.student)
    states = sum(held.values()) - workspace - count_bucket(trainer.student)
    found = {"states": states, "peak": peak, "exchange": steps[-1]}
    found["workspace"] = workspace
    return {"run": found, "plan": plan_layout(cfg, world.size)}


def warm_up(world: Any, directory: Path, paths: dict[str, str], overrides: Any) -> None:
    """Train tiny models, so that memory of the libraries' own is there before a run is measured."""
    from ds_kd.recipe.build import build

    small = {**paths, "student": paths["small"], "teacher": paths["small"]}
    shared = [each for each in overrides if "distributed." in each]
    build(load_layout(small, world.data.size, directory, shared), world).train()


def run_alone(
    world: Any, directory: Path, paths: dict[str, str], overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Return what `run_layout` does, in processes that have run nothing before."""
    warm_up(world, directory, paths, overrides)
    return run_layout(world, directory, paths, overrides)


def count_workspace(student: Any) -> int:
    """Return the bytes of the loss's buffers, which a CPU keeps from step to step."""
    kept = student.module.loss._kept
    some = [] if kept is None else [kept, *kept._smaller.values()]
    return sum(each.nbytes for buffers in some for each in buffers._made.values())


def count_bucket(student: Any) -> int:
    """Return the bytes of the bucket of gradients, of which a CPU holds the written pages alone."""
    buffers = [bucket.buffer for bucket in student.optimizer.ipg_buckets.values()]
    return sum(each.untyped_storage().nbytes() for each in buffers if each is not None)


def make_row(name: str, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table: MiB of the run, and the plan's over them."""
    row: dict[str, Any] = {"layout": name, "ranks": ranks}
    for part in ("states", "peak", "exchange"):
        run, plan = (found[side][part] for side in ("run", "plan"))
        row[f"{part} MiB"] = round(run / 2**20, 1)
        row[f"{part}, plan / run"] = round(plan / run, 3) if run else "-"
    row["loss MiB"] = round(found["run"]["workspace"] / 2**20, 1)
    return row


def fit_slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return for each layout that ran on several numbers of ranks the slope of the logarithm of its
    states over that of the ranks; -1 where a rank keeps its share alone."""
    from benchmarks.measure import slope

    points: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        points.setdefault(row["layout"], []).append(row)
    return {
        name: round(slope([r["ranks"] for r in some], [r["states MiB"] for r in some]), 3)
        for name, some in points.items()
        if len(some) > 1
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--size", type=int, default=1, help="divides layers, widths and words")
    add_output(parser)
    args = parser.parse_args()
    from benchmarks import measure
    from tests.ranks import run_ranks

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        paths = write_models(Path(directory), args.size)
        for name in args.layouts:
            for ranks in args.ranks:
                if name in PAIRS and ranks % 2:
                    continue
                place = Path(directory) / f"{len(rows)}"
                place.mkdir()
                given, shared = (paths, LAYOUTS[name]), PAIRS.get(name, {})
                found = run_ranks(run_alone, ranks, place, *given, seconds=300, **shared)[0]
                rows.append(make_row(name, ranks, found))
                print(json.dumps(rows[-1]), flush=True)
    print(measure.markdown(rows))
    print(f"slope of the states over the ranks: {fit_slopes(rows)}")
    measure.write(rows, args.output)


if __name__ == "__main__":
    main()

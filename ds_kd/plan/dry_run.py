"""Describe the plan of a run, from its config, the models' config.json and the lengths of a few
samples. No weights are loaded."""

from __future__ import annotations

from typing import Any

from ds_kd.config.checks.zero_file import load_zero_config, place_teacher
from ds_kd.config.components import Component, ConfigError, config_error
from ds_kd.config.load import check_world
from ds_kd.config.methods.check_placement import is_unplaced
from ds_kd.config.names import AUTO, INT8, OF_DIVERGENCE, REPLICATE, home_of
from ds_kd.config.schema import SHARED_BASE, RunConfig
from ds_kd.losses.chunked import default_chunk
from ds_kd.models.files.damage import name_damage
from ds_kd.parallel.engines import optimizer_numbers
from ds_kd.plan import memory
from ds_kd.plan.cache import count_head_bytes, describe_cache, find_record
from ds_kd.plan.rollouts import add_answers, describe_writing, plan_writing
from ds_kd.plan.samples import data_of, describe_sharing
from ds_kd.plan.shapes import format_count, format_size, read_sizes, shape_of
from ds_kd.plan.step.cluster import Cluster, bytes_of, divide_over_nodes, make_cluster
from ds_kd.plan.step.operations import count_operations
from ds_kd.plan.step.passes import inspect_loss
from ds_kd.plan.step.ranks import Tune, smallest_fit
from ds_kd.plan.step.time import describe_time
from ds_kd.plan.step.traffic import describe_traffic
from ds_kd.plan.step.tuning import tune_work
from ds_kd.recipe.build import adapter_of
from ds_kd.recipe.data import hold_out
from ds_kd.recipe.models import config_of, name_of, training_dtype


def plan_of(
    cfg: RunConfig,
    ranks: int | None = None,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    ranks_per_node: int | None = None,
    length: int | None = None,
    mfu: float = 0.4,
    tflops: float = 989.0,
    gpu: str | None = None,
    nodes: int | None = None,
    network: str | None = None,
) -> str:
    """Return the plan of a run as text, given sizes in the user's notation.

    Args:
        ranks: number of ranks; None reads the config.
        gpu_memory, host_memory: memory of an accelerator and of a node (`80GB`); None does not
            compare with it.
        ranks_per_node: ranks that share a node's memory; None reads the config.
        length: tokens of a sample; None measures the data.
        mfu: share of an accelerator's peak that a step reaches.
        tflops: that peak, in 10¹² operations per second (an H100's in bf16).
        gpu: name of the accelerators; None takes this machine's if they have one.
        nodes: machines that the ranks are divided over, in place of `ranks_per_node`.
        network: of each accelerator between nodes, a name or Gbit/s.

    Raises:
        ConfigError: a size cannot be read, batch sizes do not fit, a model or an accelerator of
            this name does not exist, or ranks cannot be divided over nodes so.
    """
    rooms = (("--gpu-memory", gpu_memory), ("--host-memory", host_memory))
    sizes = [None if given is None else bytes_of(given, option) for option, given in rooms]
    ranks = ranks or (cfg.distributed.dp_size or 1) * cfg.distributed.ranks_per_sample
    check_world(cfg, ranks)
    together = ranks_per_node or (cfg.slurm.ntasks_per_node if cfg.slurm is not None else 8)
    if nodes is not None:
        together = divide_over_nodes(ranks, nodes, ranks_per_node)
    cluster = make_cluster(gpu, ranks, together, network)
    if gpu is not None and cluster is not None and sizes[0] is None:
        sizes[0] = cluster.gpu.memory
    machine = memory.Machine(sizes[0], sizes[1], together)
    return describe(cfg, ranks, machine, mfu, tflops, length, cluster)


def describe(
    cfg: RunConfig,
    world: int,
    machine: memory.Machine,
    mfu: float,
    tflops: float,
    length: int | None = None,
    cluster: Cluster | None = None,
) -> str:
    """Return the plan of a run as text.

    Args:
        world: number of ranks.
        machine: the memory of a rank and its node.
        length: tokens of a sample; None measures the data.
        mfu: share of an accelerator's peak that a step reaches.
        tflops: that peak, in 10¹² operations per second.
        cluster: named accelerators, to estimate the time of a step on; None if there are none.

    Raises:
        ConfigError: a model's config.json cannot be read.
    """
    student = model_shape(cfg.model, cfg)
    teacher = model_shape(cfg.teacher_model) if cfg.loads_teacher and cfg.teacher_model else None
    rows, tokens, supervised, told = data_of(cfg, length)
    steps = cfg.step_scheduler
    writing = plan_writing(cfg, tokens // steps.local_batch_size, supervised)
    work = add_answers(cfg, work_of(cfg, world, tokens, supervised), writing, world)
    plain, placed = _settle_placement(cfg, student, teacher, work, machine, world)

    def tune(work: memory.Work, ranks: int) -> memory.Work:
        return tune_work(cfg, work, student, teacher, machine, ranks)

    work = tune(plain, world)
    lines = [cfg.text.rstrip(), "", f"plan for {world} rank(s)"]
    lines += _describe_models(student, teacher) + placed
    lines.append(_describe_step(cfg, work, told))
    lines += _describe_steps(cfg, rows) + describe_sharing(cfg) + describe_cache(cfg, rows)

    # Memory on this number of ranks by part, then in one line each for other numbers.
    parts = memory.estimate_bytes(student, teacher, work, world)
    lines += _describe_memory(parts)
    lines += _describe_worlds(student, teacher, plain, machine, tune)
    lines += _describe_cost(student, teacher, work, world, mfu, tflops, cluster)
    lines += describe_writing(
        config_of(cfg.model), student, parts, work, writing, machine, world, cluster
    )
    return "\n".join(lines)


def _describe_cost(
    student: memory.Shape,
    teacher: memory.Shape | None,
    work: memory.Work,
    world: int,
    mfu: float,
    tflops: float,
    cluster: Cluster | None,
) -> list[str]:
    """Return lines on a step's operations, what ranks exchange in it, and its time on GPUs."""
    asked = student if work.teacher_is_base else teacher
    operations = count_operations(student, asked, work)
    told = f"{operations / (mfu * tflops * 1e12):.3g} s at {mfu:.0%} of {tflops:g} TFLOP/s"
    lines = [f"  a step: {operations / 1e12:.3g} TFLOP on each rank, {told}"]
    lines += describe_traffic(student, teacher, work, world)
    if cluster is not None:
        lines += describe_time(student, asked, work, cluster)
    return lines


def _describe_step(cfg: RunConfig, work: memory.Work, told: str) -> str:
    steps = cfg.step_scheduler
    return (
        f"  step: {steps.global_batch_size} samples in {work.micro_batches} micro-batch(es) of "
        f"{steps.local_batch_size} on each rank, about {work.tokens:,} tokens each ({told})"
    )


def _settle_placement(
    cfg: RunConfig,
    student: memory.Shape,
    teacher: memory.Shape | None,
    work: memory.Work,
    machine: memory.Machine,
    world: int,
) -> tuple[memory.Work, list[str]]:
    """Return the work with the place that a run takes on this machine, if the config names `auto`
    or none, and a line about it."""
    is_free, told = is_unplaced(cfg), "auto, here as zero3; --gpu-memory SIZE chooses"
    if teacher is None or not (is_free or cfg.teacher.placement == AUTO):
        return work, []
    if machine.room is None:
        return work, [] if is_free else [f"  teacher.placement: {told}"]
    chosen, why = memory.choose_placement(student, teacher, work, machine, world)
    if is_free and chosen != REPLICATE:
        return work, []
    return memory.place(work, chosen), [f"  teacher.placement: {chosen}, {why}"]


def _describe_models(student: memory.Shape, teacher: memory.Shape | None) -> list[str]:
    """Return a line on each model's parameters."""
    trained = f"{format_count(student.parameters)} parameters, {format_count(student.trained)}"
    lines = [f"  student: {trained} trained"]
    if teacher is not None:
        lines.append(f"  teacher: {format_count(teacher.parameters)} parameters")
    return lines


def _describe_memory(parts: dict[str, int]) -> list[str]:
    """Return lines on the memory of one rank, by part and in sum."""
    device, host = memory.on_device(parts), memory.on_host(parts)
    sums = {"on the accelerator, together": device, "in the host memory, together": host}
    sizes = [(name, size) for name, size in {**parts, **sums}.items() if size]
    lines = [f"    {name:<38}{format_size(size):>11}" for name, size in sizes]
    return ["  memory of a rank, estimated:", *lines]


def _describe_worlds(
    student: memory.Shape,
    teacher: memory.Shape | None,
    work: memory.Work,
    machine: memory.Machine,
    tune: Tune,
) -> list[str]:
    """Return lines on the memory with 1 to 128 ranks, and on the smallest number that fits.

    Args:
        tune: settles what a run decides on so many ranks.
    """
    lines = ["  on other numbers of ranks (the same micro-batch):"]
    for ranks in work.worlds:
        parts = memory.estimate_bytes(student, teacher, tune(work, ranks), ranks)
        here = {name: size for name, size in parts.items() if memory.is_on_device(name)}
        states = sum(size for name, size in here.items() if memory.is_state(name))
        whole = format_size(sum(here.values()))
        line = f"    {ranks:>4}: {whole} of which states {format_size(states)}"
        if of_node := machine.of_node(parts, ranks):
            line += f"; host memory of a node {format_size(of_node)}"
        lines.append(line + _judge(machine, machine.lacks(parts, ranks), bool(of_node)))
    if machine.room is not None:
        lines.append(f"  {_advise(student, teacher, work, machine, tune)}")
    return lines


def _judge(machine: memory.Machine, lacking: list[str], uses_host: bool) -> str:
    """Return the end of a line of the table, which says whether the run fits on these ranks."""
    if lacking:
        return ", too much" + (" for the host" if lacking == ["host"] else "")
    if machine.room is None:
        return ""
    known = machine.host_room is not None or not uses_host
    return ", fits" if known else ", fits the accelerator (--host-memory checks the host)"


def _describe_steps(cfg: RunConfig, rows: int | None) -> list[str]:
    """Return a line on the number of steps, if the data or `max_steps` tell it."""
    steps = cfg.step_scheduler
    if rows is None:
        return [f"  steps: at most {steps.max_steps:,}"] if steps.max_steps else []

    # The samples are divided as the run divides them, so that it has the same steps.
    if (share := cfg.validation_share) is not None:
        with config_error("validation_share", share, "a share of two samples or more"):
            rows = len(hold_out(range(rows), share, cfg.rng.seed)[0])
    of_epoch = -(-rows // steps.global_batch_size)
    if cfg.dataloader.kwargs.get("drop_last"):
        of_epoch = rows // steps.global_batch_size
    if of_epoch == 0:
        raise ConfigError(
            [f"dataloader.drop_last: {rows} samples make no global batch of "
             f"{steps.global_batch_size}; write false, or a smaller one"]
        )  # fmt: skip
    if cfg.rollouts is not None and cfg.rolls_out:
        of_epoch *= cfg.rollouts.reuse
    of_data = of_epoch * steps.num_epochs
    total = min(of_data, steps.max_steps or of_data)
    packs = cfg.packed_sequence.packed_sequence_size
    note = ", fewer as samples are packed" if packs and not cfg.rolls_out else ""
    left = " (validation_share holds the others out)" if share is not None else ""
    return [f"  steps: {total:,} from {rows:,} samples{left}{note}"]


def _advise(
    student: memory.Shape,
    teacher: memory.Shape | None,
    work: memory.Work,
    machine: memory.Machine,
    tune: Tune,
) -> str:
    """Return a sentence on the smallest number of ranks that fits, and the keys that it needs."""
    assert machine.room is not None
    room = format_size(machine.room)
    if machine.host_room is not None:
        room += f" and a host of {format_size(machine.host_room)}"
    found = smallest_fit(student, teacher, work, machine, tune)
    if found is None:
        return (
            f"nothing fits into {room}: write distributed.activation_checkpointing: true, or "
            f"a smaller step_scheduler.local_batch_size"
        )

    # Only the keys that the config does not set yet are proposed.
    ranks, offer = found
    moves = [
        text
        for name, text in (
            ("offload_teacher", "offload_teacher_model: true"),
            ("offload_optimizer", "deepspeed.student: ds_configs/zero/student_zero3_offload.json"),
            ("offload_weights", "deepspeed.student: ds_configs/zero/student_zero3_offload.json"),
        )
        if getattr(offer, name) and not getattr(work, name)
    ]
    moves = [*dict.fromkeys(moves)]
    needs = machine.of_node(memory.estimate_bytes(student, teacher, offer, ranks), ranks)
    host = f", {format_size(needs)} of host memory in a node" if needs else ""
    return f"smallest that fits into {room}: {ranks} rank(s)" + (
        f" with {' and '.join(moves)}{host}" if moves else f" as written{host}"
    )


def model_shape(component: Component, cfg: RunConfig | None = None) -> memory.Shape:
    """Return the sizes of a model by its config.json, with the adapters of `cfg` if it is given."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(component)
    dtype = training_dtype(component)
    with torch.device("meta"):
        trusts = bool(component.kwargs.get("trust_remote_code", False))
        key = f"{component.key}.pretrained_model_name_or_path"
        expected = "a Hugging Face causal language model"
        with config_error(key, name_of(component), expected), name_damage(name_of(component)):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts)
        if cfg is not None and (adapt := adapter_of(cfg)) is not None:
            adapt(model)
    return shape_of(model, dtype.itemsize)


def work_of(cfg: RunConfig, world: int, tokens: int, supervised: float) -> memory.Work:
    """Return the work of a step.

    Args:
        world: number of ranks.
        tokens: tokens of a micro-batch on one rank.
        supervised: share of these that are supervised.
    """
    import torch

    steps, zero = cfg.step_scheduler, _read_zero_files(cfg)

    # In a pack, attention sees the whole micro-batch as one sequence.
    local, shared = steps.local_batch_size, cfg.distributed.ranks_per_sample
    tokens = local * cfg.packed_sequence.packed_sequence_size or tokens
    cuda = torch.cuda.is_available() or cfg.dist_env.backend == "nccl"
    given = [n for loss in cfg.kd_losses if (n := loss.kwargs.get("chunk_size")) is not None]
    chunk = given[0] if given else default_chunk("cuda" if cuda else "cpu")  # 0 is all at once
    passes, is_fused = inspect_loss(cfg)
    values: dict[str, Any] = {
        "tokens": tokens,
        "length": max(1, tokens // local),
        "supervised": supervised,
        "micro_batches": max(1, steps.global_batch_size * shared // (local * world)),
        "tensor": cfg.distributed.tp_size or 1,
        "teacher_is_uncut": cfg.teacher_tp_size == 1,
        "sequence": cfg.distributed.cp_size or 1,
        "chunk": chunk or tokens,
        "shares_softmax": _shares_softmax(cfg.kd_loss_fn),
        "passes": passes,
        "is_fused": cuda and is_fused,
        "is_on_cpu": not cuda,
        "optimizer_numbers": optimizer_numbers(
            cfg.optimizer.name.rpartition(".")[2], cfg.optimizer.kwargs
        ),
        "checkpointing": cfg.distributed.activation_checkpointing,
        "offload_weights": _is_offloaded(zero["student"], "offload_param"),
        "offload_optimizer": _is_offloaded(zero["student"], "offload_optimizer"),
        "offload_teacher": _is_offloaded(zero["teacher"], "offload_param"),
        "teacher_is_whole": zero["teacher"].get("stage") == 0,
        "teacher_is_on_disk": (zero["teacher"].get("offload_param") or {}).get("device") == "nvme",
        "teacher_is_rounded": cfg.teacher.placement == INT8,
        "asks_teacher": cfg.asks_teacher,
        "teacher_is_base": cfg.asks_teacher and cfg.teacher.kind == SHARED_BASE,
        "cached_head": count_head_bytes(find_record(cfg)),
    }
    return memory.Work(**(values | read_sizes(zero)))


def _read_zero_files(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Return `zero_optimization` of `student` and `teacher`."""
    placed = cfg.teacher.placement, cfg.offload_teacher_model
    files = {
        "student": load_zero_config(cfg.deepspeed.student, "deepspeed.student", (0, 3)),
        "teacher": place_teacher(cfg.deepspeed.teacher, *placed),
    }
    return {name: config["zero_optimization"] for name, config in files.items()}


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    return (zero.get(part) or {}).get("device") in ("cpu", "nvme")


def _shares_softmax(loss: Component) -> bool:
    """Return whether CE and the distillation loss read one softmax."""
    is_forward_kl = home_of(loss.name) == home_of(OF_DIVERGENCE.calls)
    return is_forward_kl and loss.kwargs.get("temperature", 1.0) == 1.0

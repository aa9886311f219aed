"""Estimate the memory of a rank from the shapes of a run's models alone.

With ZeRO-3 a rank keeps 1/world of the weights, fp32 master weights, optimizer states and
gradients, and all of the small parameters. A step adds gathered layers, activations, gradients on
their way and one chunk of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_kd.config.names import CPU, REPLICATE, ZERO3
from ds_kd.parallel.accumulation import BYTES_OF_SUM

_PERSISTS_BELOW = 100_000  # elements: DeepSpeed's stage3_param_persistence_threshold
_BUCKET = 500_000_000  # elements: its reduce_bucket_size
_SURE = 0.75  # share of a memory that a plan may fill, as peaks are planned within 30 %
_GROUP = 64  # numbers of a weight in 8 bits that share a scale and a smallest value
_PREFETCH = 50_000_000  # elements: its stage3_prefetch_bucket_size
REUSE = 1_000_000_000  # elements: its stage3_max_reuse_distance and stage3_max_live_parameters
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model, in parameters.

    Args:
        parameters: number of parameters.
        trained: number of parameters with a gradient.
        small: number of those in tensors that ZeRO-3 keeps whole on every rank.
        layers: number of layers.
        layer: parameters of the largest layer.
        vocabulary, hidden: shape of the head, `[vocabulary, hidden]`.
        saved: numbers that a layer saves per token for backward, without checkpointing.
        head_trained: whether the head's weight has a gradient.
        width: bytes of a weight.
        inner: width of the MLP.
        heads, kv: numbers of a token's queries, and of its keys or values, in a layer.
        is_tied: the head is the embedding.
        used: share of a layer's parameters that a token meets; below 1 with experts.
        cuts: a layer's inputs of maps that `distributed.tp_size` cuts by their outputs, and its
            maps that are cut by their inputs.
    """

    parameters: int
    trained: int
    small: int
    layers: int
    layer: int
    vocabulary: int
    hidden: int
    saved: int
    head_trained: bool
    width: int
    inner: int = 0
    heads: int = 0
    kv: int = 0
    is_tied: bool = False
    used: float = 1.0
    cuts: tuple[int, int] = (2, 2)

    @property
    def outer(self) -> int:
        """Return the parameters of embedding and head."""
        return (1 if self.is_tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Work:
    """The work of a step, apart from the sizes of its models.

    Args:
        tokens: tokens of one micro-batch on one rank.
        length: tokens of its longest sample, for attention.
        supervised: share of its tokens that are supervised.
        micro_batches: micro-batches of one rank in a step.
        chunk: tokens whose logits exist at one time.
        shares_softmax: CE and the distillation loss read one softmax, as with forward KL at T = 1;
            a chunk needs one buffer less.
        passes: over `[tokens, vocabulary]` in fp32 that the loss makes on a GPU; see
            `ds_kd.plan.step.passes`.
        optimizer_numbers: fp32 numbers that the optimizer keeps for every weight.
        checkpointing: activations are computed again in backward.
        offload_weights, offload_optimizer, offload_teacher: kept in the host's memory.
        teacher_is_whole: every rank has the whole teacher (stage 0).
        teacher_is_on_disk: an offloaded teacher is on an NVMe disk, and not in the host's memory.
        teacher_is_rounded: the teacher's weights are kept in 8 bits.
        cached_head: bytes of the head of a teacher that is read from a cache.
        bucket: DeepSpeed's reduce_bucket_size, elements.
        reuse: its stage3_max_reuse_distance, or stage3_max_live_parameters if that is more, up to
            which it fetches ahead; elements.
        hpz, student_hpz: ranks that hold a second whole copy of the teacher or the student
            together, and gather it from each other (zero_hpz_partition_size); 1 for none, 0 where
            the run decides.
        window: micro-batches that the teacher runs on between two gatherings of its weights.
        reduces_once: a rank adds up the gradients of a step before they are exchanged.
        tensor, sequence: ranks that share a layer's weights, or a sample's tokens; 1 for none.
        teacher_is_uncut: the ranks that share the student's layers compute whole ones of the
            teacher each.
    """

    tokens: int
    length: int
    supervised: float = 1.0
    micro_batches: int = 1
    chunk: int = 2048
    shares_softmax: bool = True
    passes: float = 2.5
    optimizer_numbers: int = 2
    checkpointing: bool = False
    offload_weights: bool = False
    offload_optimizer: bool = False
    offload_teacher: bool = False
    teacher_is_whole: bool = False
    teacher_is_on_disk: bool = False
    teacher_is_rounded: bool = False
    cached_head: int = 0
    bucket: int = _BUCKET
    reuse: int = REUSE
    hpz: int = 0
    student_hpz: int = 0
    window: int = 1
    reduces_once: bool = False
    tensor: int = 1
    sequence: int = 1
    teacher_is_uncut: bool = False

    @property
    def teacher_tensor(self) -> int:
        """Return the ranks that share a layer of the teacher."""
        return 1 if self.teacher_is_uncut else self.tensor

    @property
    def worlds(self) -> list[int]:
        """Return the numbers of ranks that a plan tells of."""
        return [ranks for ranks in WORLDS if ranks % (self.tensor * self.sequence) == 0]


def shape_of(model: Any, width: int) -> Shape:
    """Return the sizes of a Hugging Face model, which may be on the meta device.

    Args:
        width: bytes of a weight.
    """
    config = model.config.get_text_config()
    kinds = getattr(model, "_no_split_modules", None) or ()
    layers = [part for part in model.modules() if type(part).__name__ in kinds]
    sizes = [sum(p.numel() for p in part.parameters()) for part in layers] or [0]
    head = model.get_output_embeddings().weight
    hidden = head.shape[1]
    count = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or hidden // count
    kv = (getattr(config, "num_key_value_heads", None) or count) * head_dim
    heads, inner = count * head_dim, getattr(config, "intermediate_size", None) or 4 * hidden

    # Saved per token: inputs and outputs of two norms, q, attention's result twice, k and v, and
    # four times the MLP's width. Norms in bf16 keep fp32 copies too.
    saved = 7 * hidden + 2 * heads + 2 * kv + 4 * inner
    saved += 4 * hidden if width == 2 else 0

    parameters = [*model.parameters()]
    return Shape(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters if p.numel() <= _PERSISTS_BELOW),
        len(layers) or getattr(config, "num_hidden_layers", 1),
        max(sizes),
        head.shape[0],
        hidden,
        saved,
        bool(head.requires_grad),
        width,
        inner,
        heads,
        kv,
        head is model.get_input_embeddings().weight,
        _share_used(layers, config),
        _count_cuts(config),
    )


def _count_cuts(config: Any) -> tuple[int, int]:
    """Return `cuts` by transformers' plan for the architecture, or those of a Llama's layer."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    of_layer = {name: style for name, style in plan.items() if name.startswith("layers.")}
    # The maps of a module, such as q, k and v, read the same.
    by_outputs = [name.rpartition(".")[0] for name, style in of_layer.items() if style == "colwise"]
    found = len({*by_outputs}), [*of_layer.values()].count("rowwise")
    return found if all(found) else Shape.cuts


def _share_used(layers: list[Any], config: Any) -> float:
    """Return the share of the layers' parameters that a token meets: all, but of a mixture's
    experts only those to which it is sent."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    sizes = [(name, p.numel()) for part in layers for name, p in part.named_parameters()]
    of_experts = sum(size for name, size in sizes if ".experts." in name)
    if not (experts and of_experts):
        return 1.0
    left_out = of_experts * (1 - getattr(config, "num_experts_per_tok", experts) / experts)
    return 1 - left_out / sum(size for _, size in sizes)


def estimate_bytes(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, int]:
    """Estimate the bytes of one rank by purpose; those named `host …` are in the host's memory, and
    those named `disk …` on a disk.

    Returns:
        First the states, which stay, then the additions of a step at its peak.
    """
    trained = 4 * student.trained // world

    # Ranks that share a layer have parts of its weights, and ZeRO shards these over the others.
    def shard(shape: Shape, width: float) -> int:
        return round(width * (shape.parameters // world + shape.small))

    where = "host " if work.offload_weights else ""
    out = {f"{where}student weights": shard(student, student.width)}
    where = "host " if work.offload_optimizer else ""
    out[f"{where}fp32 weights"] = trained
    out[f"{where}optimizer"] = work.optimizer_numbers * trained
    out[f"{where}gradients"] = trained * (2 if work.offload_optimizer else 1)  # and the optimizer's
    if teacher is not None:
        where = "host " if work.offload_teacher else ""
        where = "disk " if work.teacher_is_on_disk else where
        whole = teacher.parameters * teacher.width // work.teacher_tensor
        rounded = shard(teacher, width_at_rest(teacher, work))
        out[f"{where}teacher weights"] = whole if work.teacher_is_whole else rounded
        if work.hpz > 1:
            out["teacher weights, once more"] = whole // work.hpz
    if work.student_hpz > 1:
        out["student weights, once more"] = student.parameters * student.width // work.student_hpz
    if work.cached_head:
        out["teacher's head"] = work.cached_head
    if work.reduces_once:
        out["gradients, summed"] = bytes_of_sums(student) // work.tensor
    return out | _estimate_step(student, teacher, work, world)


def _estimate_step(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, int]:
    """Estimate what a step adds at its peak, in the accelerator's memory."""
    in_transit = 2 if world > 1 else 1  # what is gathered, and the buffer that it is gathered into
    heads = student.vocabulary * student.hidden * student.width
    live, buffers = _count_live(student) * student.width // work.tensor, 2
    if teacher is not None and not work.teacher_is_whole:
        # The head of a rounded teacher becomes numbers of its dtype to be read.
        width = width_at_rest(teacher, work) + work.teacher_is_rounded * teacher.width
        heads += round(teacher.vocabulary * teacher.hidden * width)
        live = max(live, _count_live(teacher) * teacher.width // work.teacher_tensor)
    # Layers that wait for backward are not in transit. A single rank has its own weights in place.
    kept = count_kept(student, work) * student.layer * student.width // work.tensor
    is_kept = world > 1 or work.offload_weights
    layers = max(in_transit * live, (in_transit - 1) * live + kept * is_kept)
    if teacher is not None or work.cached_head:
        buffers = 3 if work.shares_softmax else 4

    # Gradients wait in a bucket, and are copied once more in the order of the ranks; a rank's part
    # of 16 bits comes back in fp32. The head's is summed in fp32 and rounded; where it is the
    # embedding too, the embedding's is added.
    head = student.vocabulary * student.hidden * (4 + 2 * student.width)
    gradients = head if student.head_trained else 0
    bucket = min(work.bucket, student.trained)
    gradients += 2 * student.width * bucket + (4 * bucket // world if student.width == 2 else 0)

    tokens = -(-work.tokens // work.sequence)
    rows = max(1, min(work.chunk, round(tokens * work.supervised / work.tensor)))
    own, repeated = _count_saved(student, work), 1 if work.checkpointing else student.layers
    activations = tokens * own * repeated * student.width
    if work.checkpointing:
        activations += tokens * student.hidden * student.layers * student.width
    if teacher is not None:  # its layers run before the student's, and keep nothing
        passing = 4 * teacher.hidden + 3 * teacher.inner // work.teacher_tensor
        passing += 3 * teacher.hidden * (work.window - 1)
        activations = max(activations, tokens * passing * teacher.width)
    return {
        "gathered layers and heads": layers + heads * in_transit,
        "gradients before they are shared out": gradients,
        "logits workspace": buffers * 4 * rows * student.vocabulary,
        "activations": activations,
    }


def width_at_rest(teacher: Shape, work: Work) -> float:
    """Return the bytes that keep a weight of the teacher between its forwards."""
    return 1 + 2 * teacher.width / _GROUP if work.teacher_is_rounded else teacher.width


def bytes_of_sums(student: Shape) -> int:
    """Return the bytes of whole gradients that are added up on a rank in fp32, and of those that
    come from backward beside them in bf16."""
    return student.trained * BYTES_OF_SUM[student.width]


def _count_live(shape: Shape) -> int:
    """Return the parameters of layers that are gathered at a time: a layer, and those that are
    prefetched."""
    body = shape.layer * shape.layers
    return min(body, shape.layer + max(shape.layer, _PREFETCH))


def count_kept(student: Shape, work: Work) -> int:
    """Return the number of the student's layers that stay whole from forward to backward: the last
    ones, with fewer than `reuse` parameters between their forward and the end of it."""
    after = work.reuse - student.vocabulary * student.hidden
    return min(student.layers, max(0, -(-after * work.tensor // max(1, student.layer))))


def _count_saved(shape: Shape, work: Work) -> int:
    """Return the numbers that a layer saves for a token on one rank; ranks that share the layer
    save the inputs of norms and residuals each."""
    whole = 7 * shape.hidden + (4 * shape.hidden if shape.width == 2 else 0)
    return whole + (shape.saved - whole) // work.tensor


def is_state(name: str) -> bool:
    """Return whether a part of `estimate_bytes` stays between steps."""
    return name.removeprefix("host ").removeprefix("disk ") in {
        "student weights", "fp32 weights", "optimizer", "gradients", "teacher weights",
        "teacher weights, once more", "student weights, once more", "teacher's head",
        "gradients, summed",
    }  # fmt: skip


def is_on_device(name: str) -> bool:
    """Return whether a part of `estimate_bytes` is in the accelerator's memory."""
    return not name.startswith(("host ", "disk "))


def on_device(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if is_on_device(name))


def on_host(parts: dict[str, int]) -> int:
    """Return the bytes that one rank keeps in its node's memory."""
    return sum(size for name, size in parts.items() if name.startswith("host "))


@dataclass(frozen=True)
class Machine:
    """The memory of a rank and its node.

    Args:
        room: bytes of an accelerator, or None if unknown.
        host_room: bytes of a node's memory, or None if unknown.
        ranks_per_node: ranks that share a node's memory.
        is_one: a rank computes in its node's memory, of which `room` is its part.
    """

    room: int | None = None
    host_room: int | None = None
    ranks_per_node: int = 8
    is_one: bool = False

    def of_node(self, parts: dict[str, int], world: int) -> int:
        """Return the bytes of a node's memory that its ranks need together."""
        return on_host(parts) * min(world, self.ranks_per_node)

    def lacks(self, parts: dict[str, int], world: int) -> list[str]:
        """Return `accelerator` and `host` if their memory is too small for these parts."""
        too_small = []
        used = sum(parts.values()) if self.is_one else on_device(parts)
        if self.room is not None and used > self.room:
            too_small.append("accelerator")
        if self.host_room is not None and self.of_node(parts, world) > self.host_room:
            too_small.append("host")
        return too_small


def place(work: Work, placement: str) -> Work:
    """Return the work with the teacher in a place of `teacher.placement`."""
    return replace(
        work, teacher_is_whole=placement == REPLICATE, offload_teacher=placement == CPU
    )  # fmt: skip


def choose_placement(
    student: Shape, teacher: Shape, work: Work, machine: Machine, world: int
) -> tuple[str, str]:
    """Return the first of replicate, zero3 and cpu for which a machine has the memory, and the
    reason in words. Each needs less of the accelerator than the one before, and takes longer."""
    assert machine.room is not None
    sure = replace(machine, room=round(_SURE * machine.room))
    places = (REPLICATE, ZERO3) if machine.is_one else (REPLICATE, ZERO3, CPU)
    for placement in places:
        parts = estimate_bytes(student, teacher, place(work, placement), world)
        used = sum(parts.values()) if machine.is_one else on_device(parts)
        sizes = f"{used / 2**30:.1f} of {machine.room / 2**30:.1f} GiB of a rank are planned"
        if not sure.lacks(parts, world):
            return placement, sizes
    return places[-1], f"which needs least, and {sizes}"

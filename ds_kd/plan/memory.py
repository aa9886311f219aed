"""Estimate a run from the shapes of its models alone: bytes per rank, operations per step.

With ZeRO-3 a rank keeps 1/world of the weights, fp32 master weights, optimizer states and
gradients, and all of the small parameters. A step adds gathered layers, activations and one chunk
of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_kd.config.names import CPU, REPLICATE, ZERO3

_PERSISTS_BELOW = 100_000  # elements: DeepSpeed's stage3_param_persistence_threshold
_BUCKET = 500_000_000  # elements: its reduce_bucket_size
_SURE = 0.75  # share of a memory that a plan may fill, as peaks are planned within 30 %
_GROUP = 64  # numbers of a weight in 8 bits that share a scale and a smallest value
_REUSE = 1_000_000_000  # elements: its stage3_max_reuse_distance
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
        optimizer_numbers: fp32 numbers that the optimizer keeps for every weight.
        checkpointing: activations are computed again in backward.
        offload_weights, offload_optimizer, offload_teacher: kept in the host's memory.
        teacher_is_whole: every rank has the whole teacher (stage 0).
        teacher_is_rounded: the teacher's weights are kept in 8 bits.
        cached_head: bytes of the head of a teacher that is read from a cache.
        bucket, reuse: DeepSpeed's reduce_bucket_size and stage3_max_reuse_distance, elements.
    """

    tokens: int
    length: int
    supervised: float = 1.0
    micro_batches: int = 1
    chunk: int = 2048
    shares_softmax: bool = True
    optimizer_numbers: int = 2
    checkpointing: bool = False
    offload_weights: bool = False
    offload_optimizer: bool = False
    offload_teacher: bool = False
    teacher_is_whole: bool = False
    teacher_is_rounded: bool = False
    cached_head: int = 0
    bucket: int = _BUCKET
    reuse: int = _REUSE


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
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * hidden

    # Saved per token: inputs and outputs of two norms, q, attention's result twice, k and v, and
    # four times the MLP's width. Norms in bf16 keep fp32 copies too.
    saved = 7 * hidden + 2 * heads * head_dim + 2 * kv + 4 * inner
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
    )


def estimate_bytes(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, int]:
    """Estimate the bytes of one rank by purpose; those named `host …` are in the host's memory.

    Returns:
        First the states, which stay, then the additions of a step at its peak.
    """
    trained = 4 * student.trained // world

    def shard(shape: Shape, width: float) -> int:
        return round(width * (shape.parameters // world + shape.small))

    # The student's states; DeepSpeed keeps gathered weights that it will need again soon.
    where = "host " if work.offload_weights else ""
    out = {f"{where}student weights": shard(student, student.width)}
    where = "host " if work.offload_optimizer else ""
    out[f"{where}fp32 weights"] = trained
    out[f"{where}optimizer"] = work.optimizer_numbers * trained
    out[f"{where}gradients"] = trained
    if world > 1:
        kept = min(student.parameters, work.reuse)
        out["student weights, gathered"] = kept * student.width

    # A layer and the next one, which is prefetched, and both heads are gathered at the peak.
    live = 2 * student.layer * student.width
    heads = student.vocabulary * student.hidden * student.width
    buffers = 2
    if teacher is not None:
        where = "host " if work.offload_teacher else ""
        # The head of a rounded teacher becomes numbers of its dtype to be read.
        rounded, head = work.teacher_is_rounded, teacher.vocabulary * teacher.hidden
        width = 1 + 2 * teacher.width / _GROUP if rounded else teacher.width
        whole = teacher.parameters * teacher.width
        out[f"{where}teacher weights"] = whole if work.teacher_is_whole else shard(teacher, width)
        live = max(live, 2 * teacher.layer * teacher.width)
        heads += 0 if work.teacher_is_whole else round(head * (width + rounded * teacher.width))
        buffers = 3 if work.shares_softmax else 4

    if work.cached_head:
        out["teacher's head"] = work.cached_head
        buffers = 3 if work.shares_softmax else 4

    rows = max(1, min(work.chunk, round(work.tokens * work.supervised)))
    out["gathered layers and heads"] = (live + heads) * (2 if world > 1 else 1)  # and in transit
    gradient = 4 * student.vocabulary * student.hidden if student.head_trained else 0
    out["gradients before they are shared out"] = gradient + 4 * min(work.bucket, student.trained)
    out["logits workspace"] = buffers * 4 * rows * student.vocabulary
    layers = 1 if work.checkpointing else student.layers
    kept = student.saved * layers + (student.hidden * student.layers if work.checkpointing else 0)
    out["activations"] = work.tokens * kept * student.width
    return out


def is_state(name: str) -> bool:
    """Return whether a part of `estimate_bytes` stays between steps."""
    return name.removeprefix("host ") in {
        "student weights", "student weights, gathered", "fp32 weights", "optimizer", "gradients",
        "teacher weights", "teacher's head",
    }  # fmt: skip


def on_device(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if not name.startswith("host "))


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


def smallest_fit(
    student: Shape, teacher: Shape | None, work: Work, machine: Machine
) -> tuple[int, Work] | None:
    """Return (ranks, work) of the smallest number of ranks that fits, or None.

    The work is tried as it is, then with the teacher, the optimizer and the weights moved to the
    host's memory, one after the other.
    """
    offers = [work, replace(work, offload_teacher=True)] if teacher is not None else [work]
    offers.append(replace(offers[-1], offload_optimizer=True))
    offers.append(replace(offers[-1], offload_weights=True))
    for offer in offers:
        for world in WORLDS:
            if not machine.lacks(estimate_bytes(student, teacher, offer, world), world):
                return world, offer
    return None


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


def count_operations(student: Shape, teacher: Shape | None, work: Work) -> float:
    """Count the floating-point operations of one rank's step.

    Forward takes two for each weight and token, and attention over half of a sample. Backward takes
    twice as many, or as many as forward if the weights are frozen.
    """

    def forward(shape: Shape) -> float:
        body = shape.layer * shape.layers
        attention = 2 * shape.layers * work.length * shape.hidden
        head = shape.vocabulary * shape.hidden * work.supervised
        return work.tokens * (2 * body + attention + 2 * head)

    backward = 2.0 if student.trained * 2 > student.parameters else 1.0
    again = 1.0 if work.checkpointing else 0.0
    total = forward(student) * (1 + backward + again)
    total += forward(teacher) if teacher is not None else 0.0
    return total * work.micro_batches

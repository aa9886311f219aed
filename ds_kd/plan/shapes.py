"""The sizes of models and the work of a step, from which memory, exchange and time are planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PERSISTS_BELOW = 100_000  # elements: DeepSpeed's stage3_param_persistence_threshold
REUSE = 1_000_000_000  # elements: its stage3_max_reuse_distance and stage3_max_live_parameters
_SUB_GROUP = 1_000_000_000  # elements: its sub_group_size
_GROUP = 64  # numbers of a weight in 8 bits that share a scale and a smallest value
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
        cuts: a layer's inputs that maps read which `distributed.tp_size` cuts by their outputs,
            and its maps that are cut by their inputs.
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
        asks_teacher: the loss compares the student with a teacher, of whatever kind.
        teacher_is_base: the teacher is the student's base, with the student's weights.
        cached_head: bytes of the head of a teacher that is read from a cache.
        is_fused: one kernel computes both losses of a chunk.
        is_on_cpu: ranks are CPUs, where the loss keeps its buffers from step to step, and what is
            reduced is copied once more.
        bucket: DeepSpeed's reduce_bucket_size, elements; 0 takes that of a run
            (`ds_kd.parallel.engines.size_bucket`).
        sub_group: its sub_group_size, elements whose gradients the optimizer takes at a time.
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
    asks_teacher: bool = True
    teacher_is_base: bool = False
    cached_head: int = 0
    is_fused: bool = False
    is_on_cpu: bool = False
    bucket: int = 0
    sub_group: int = _SUB_GROUP
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
        _count_cuts(config, layers),
    )


def _count_cuts(config: Any, layers: list[Any]) -> tuple[int, int]:
    """Return `cuts` by transformers' plan for the architecture, or those of a Llama's layer."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    of_layer = {name: style for name, style in plan.items() if name.startswith("layers.")}
    # The maps of a module, such as q, k and v, read the same.
    by_outputs = [name.rpartition(".")[0] for name, style in of_layer.items() if style == "colwise"]
    modules, by_inputs = len({*by_outputs}), [*of_layer.values()].count("rowwise")
    if not (modules and by_inputs):
        return Shape.cuts

    # Behind the only norm of a layer, attention and MLP read the same (Cohere, Phi).
    children = [name for name, _ in layers[0].named_children()] if layers else []
    norms = sum("norm" in name for name in children)
    return min(modules, norms or modules), by_inputs


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


def width_at_rest(teacher: Shape, work: Work) -> float:
    """Return the bytes that keep a weight of the teacher between its forwards."""
    return 1 + 2 * teacher.width / _GROUP if work.teacher_is_rounded else teacher.width


def count_kept(student: Shape, work: Work) -> int:
    """Return the number of the student's layers that stay whole from forward to backward: the last
    ones, with fewer than `reuse` parameters between their forward and the end of it."""
    after = work.reuse - student.vocabulary * student.hidden
    return min(student.layers, max(0, -(-after * work.tensor // max(1, student.layer))))


#: Sizes of a `Work` → the model whose ZeRO file names it, and the key.
_SIZES = (
    ("bucket", "student", "reduce_bucket_size"),
    ("sub_group", "student", "sub_group_size"),
    ("student_hpz", "student", "zero_hpz_partition_size"),
    ("hpz", "teacher", "zero_hpz_partition_size"),
)


def read_sizes(zero: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the sizes of a `Work` that ZeRO files name."""
    found = {name: zero[m][key] for name, m, key in _SIZES if key in zero[m]}
    sizes = {name: int(float(value)) for name, value in found.items()}
    return sizes | {"reuse": max(_read_distances(zero["student"]))}


def _read_distances(zero: dict[str, Any]) -> list[int]:
    """Return how far ahead ZeRO-3 looks for another use of a weight, and for weights to fetch."""
    found = []
    for key in ("max_reuse_distance", "max_live_parameters"):
        value = zero.get(f"stage3_{key}", zero.get(key))
        found.append(REUSE if value is None else int(float(value)))
    return found


def format_size(size: int) -> str:
    """Return a number of bytes as a text."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def format_count(number: int) -> str:
    """Return a number of parameters as a text."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"

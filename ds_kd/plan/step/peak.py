"""Estimate what a step adds to the memory of a rank that its states take.

The phases of a step come one after the other: the teacher's layers run and keep nothing; the
student's forward keeps its activations and ends in the loss, beside both heads; backward uses the
activations up while gradients fill a bucket; the optimizer takes the sums of the gradients. Memory
of one phase is free again in the next, so that the peak is that of the phase which needs most.
"""

from __future__ import annotations

from ds_kd.losses.pair import OF_BLOCK, OF_BLOCK_ON_GPU
from ds_kd.parallel.engines import REDUCE_BUCKET
from ds_kd.plan.shapes import Shape, Work, count_kept, width_at_rest

_PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size
_BLOCKS = 2  # buffers that the loss keeps for a block of logits, in which it measures what it logs

_GATHERED = "gathered layers and heads"
_GRADIENTS = "gradients before they are shared out"
_LOGITS = "logits workspace"
_ACTIVATIONS = "activations"


def estimate_step(student: Shape, teacher: Shape | None, work: Work, world: int) -> dict[str, int]:
    """Return the bytes that the largest phase of a step adds, in the accelerator's memory."""
    phases = split_step(student, teacher, work, world)
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def split_step(
    student: Shape, teacher: Shape | None, work: Work, world: int
) -> dict[str, dict[str, int]]:
    """Return the bytes that each phase of a step adds, by purpose: `teacher`, `loss` (the end of
    the student's forward), `backward` (its beginning), `exchange` (the first full bucket of
    gradients) and `optimizer`."""
    width, logits = student.width, _count_logits(student, work)
    on_cpu = logits if work.is_on_cpu else 0
    kept, fetched, heads = _count_gathered(student, work, world)

    # DeepSpeed holds the whole bucket all the time. What is in it is copied in the order of the
    # ranks to be exchanged, once more by a CPU's collective, and a rank's part of 16 bits comes
    # back in fp32. The head's gradient is summed in fp32 and then rounded; that of an embedding
    # which is the head comes last.
    bucket = count_bucket(student, work)
    uncut = min(student.outer, student.trained) if student.head_trained else 0
    own = uncut + (student.trained - uncut) // work.tensor
    filled = min(bucket, own)
    copied = width * filled * (2 if work.is_on_cpu else 1)
    copied += 4 * filled // world if width == 2 else 0
    head = student.vocabulary * student.hidden if student.head_trained else 0
    waiting = width * head if student.is_tied and filled < own else 0
    left = 1 - filled / max(1, own)
    saved = _count_activations(student, work)
    taken = 0 if work.offload_optimizer else 4 * min(work.sub_group, student.trained // world)

    def phase(gathered: float, gradients: int, logits: int, activations: float) -> dict[str, int]:
        return {
            _GATHERED: int(gathered), _GRADIENTS: width * bucket + gradients, _LOGITS: logits,
            _ACTIVATIONS: int(activations),
        }  # fmt: skip

    whole = kept + fetched + heads
    with_both = whole + (0 if teacher is None else _count_head(teacher, work, world))
    phases = {
        "loss": phase(with_both, 4 * head, logits, saved),
        "backward": phase(whole, (4 + (2 if width == 2 else 0)) * head, on_cpu, saved),
        "exchange": phase(left * kept + fetched + heads, copied + waiting, on_cpu, left * saved),
        "optimizer": phase(0, taken, on_cpu, 0),
    }
    if teacher is not None:
        gathered = _count_transit(teacher, work, world)
        phases["teacher"] = phase(gathered, 0, on_cpu, _count_passing(teacher, work))
    elif work.teacher_is_base:  # it has the student's weights, gathered as for a forward of its own
        phases["teacher"] = phase(whole, 0, on_cpu, _count_passing(student, work))
    return phases


def count_bucket(student: Shape, work: Work) -> int:
    """Return the numbers of the bucket for gradients, which DeepSpeed holds all the time."""
    return work.bucket or min(REDUCE_BUCKET, student.trained)


def _count_logits(student: Shape, work: Work) -> int:
    """Return the bytes of the loss's buffers for a chunk of logits."""
    tokens = -(-work.tokens // work.sequence)
    rows = max(1, min(work.chunk, round(tokens * work.supervised / work.tensor)))
    numbers = rows * student.vocabulary
    if not work.asks_teacher:
        return 4 * 2 * numbers
    if work.is_fused:  # both products as they are, and the gradient over one of them
        return 2 * student.width * numbers

    # Products of 16 bits become numbers of fp32 in buffers of their own.
    buffers = 4 * (3 if work.shares_softmax else 5) + (student.width if student.width == 2 else 0)
    block = OF_BLOCK if work.is_on_cpu else OF_BLOCK_ON_GPU
    block = max(student.vocabulary, block)
    return buffers * numbers + (0 if work.shares_softmax else 4 * _BLOCKS * block)


def _count_gathered(student: Shape, work: Work, world: int) -> tuple[int, int, int]:
    """Return the bytes of the student's gathered weights between forward and backward: of layers
    that stay, of layers that are fetched, and of embedding and head."""
    if world == 1 and not work.offload_weights:  # a single rank has its own weights in place
        return 0, 0, 0
    width, body = student.width / work.tensor, student.layer * student.layers
    kept = count_kept(student, work) * student.layer
    fetched = min(_count_live(student), body - kept)
    return int(width * kept), int(width * fetched), student.width * student.outer


def _count_head(teacher: Shape, work: Work, world: int) -> int:
    """Return the bytes of the teacher's head in the loss, beside the shards of it."""
    if work.teacher_is_whole:
        return 0
    # A single rank has it in place. The head of a rounded teacher becomes numbers of its dtype.
    is_there = world == 1 and not work.offload_teacher
    width = 0 if is_there else width_at_rest(teacher, work)
    width += work.teacher_is_rounded * teacher.width
    return round(teacher.vocabulary * teacher.hidden * width)


def _count_transit(teacher: Shape, work: Work, world: int) -> int:
    """Return the bytes of the teacher's layers that are gathered at a time: what is gathered, and
    the buffer that it is gathered into."""
    if work.teacher_is_whole or (world == 1 and not work.offload_teacher):
        return 0
    live = _count_live(teacher) // work.teacher_tensor
    return 2 * max(live, teacher.vocabulary * teacher.hidden) * teacher.width


def _count_live(shape: Shape) -> int:
    """Return the parameters of layers that are fetched at a time: a layer, and those that are
    prefetched."""
    return min(shape.layer * shape.layers, shape.layer + max(shape.layer, _PREFETCH))


def _count_activations(student: Shape, work: Work) -> int:
    """Return the bytes that the student's layers save for backward. Ranks that share a layer save
    the inputs of norms and residuals each."""
    tokens = -(-work.tokens // work.sequence)
    whole = 7 * student.hidden + (4 * student.hidden if student.width == 2 else 0)
    own = whole + (student.saved - whole) // work.tensor
    if not work.checkpointing:
        return tokens * own * student.layers * student.width
    return tokens * (own + student.hidden * student.layers) * student.width


def _count_passing(teacher: Shape, work: Work) -> int:
    """Return the bytes of the teacher's activations, of one layer, and of the hidden states of a
    window's other micro-batches."""
    tokens = -(-work.tokens // work.sequence)
    passing = 4 * teacher.hidden + 3 * teacher.inner // work.teacher_tensor
    passing += 3 * teacher.hidden * (work.window - 1)
    return tokens * passing * teacher.width

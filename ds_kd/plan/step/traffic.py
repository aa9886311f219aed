"""Count the bytes that the ranks of a run exchange in one optimizer step.

ZeRO-3 gathers every layer of the student for forward, and again for backward, except those that it
keeps between the two: the head, and the last layers. Where nodes hold copies, all but the first
forward stay inside them. The teacher's layers are gathered once, its head once more where it is the
embedding too. Gradients are reduced and scattered after each micro-batch. Small parameters are
whole on every rank, and gathered once after the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_kd.plan.shapes import Shape, Work, count_kept, width_at_rest


@dataclass(frozen=True)
class Exchange:
    """Tensors that one kind of collective moves in a step.

    Args:
        name: what is moved.
        kind: `all_gather`, `reduce_scatter`, `all_reduce` or `all_to_all`.
        size: bytes of the whole tensors, together.
        ranks: ranks of the group that takes part.
        when: `teacher`, `student` (forward), `backward` or `optimizer`, the phase that waits.
        stride: from a rank of the group to the next; the group's ranks are neighbours at 1.
    """

    name: str
    kind: str
    size: float
    ranks: int
    when: str
    stride: int = 1

    @property
    def received(self) -> float:
        """Return the bytes that a rank receives from others."""
        return self.size * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


def count_exchanges(
    student: Shape, teacher: Shape | None, work: Work, world: int
) -> list[Exchange]:
    """Return the exchanges of one step.

    Args:
        world: number of ranks.
    """
    made: list[Exchange] = []

    def add(name: str, kind: str, size: float, ranks: int, when: str, stride: int = 1) -> None:
        if size and ranks > 1:
            made.append(Exchange(name, kind, size, ranks, when, stride))

    # A tensor-parallel rank has its part of every layer, which ZeRO shards over the ranks that have
    # the same; embedding and head are not cut.
    def add_weights(name: str, kind: str, size: float, outer: float, ranks: int, when: str) -> None:
        tensor = work.teacher_tensor if when == "teacher" else work.tensor
        if tensor == 1:
            add(name, kind, size, ranks, when)
            return
        add(name, kind, (size - outer) / tensor, world // tensor, when, tensor)
        add(f"{name}, uncut", kind, outer, world, when)

    times, width = float(work.micro_batches), float(student.width)
    gathered, outer = student.parameters - student.small, student.outer
    forward, outer_again = times * width * gathered, _count_outer_again(student, work)
    again = times * width * (_count_again(student, work) + outer_again)
    near = work.student_hpz if work.student_hpz > 1 else world
    kind, first = "all_gather", "student's weights for forward"
    # The first forward after an update goes to all ranks, and leaves each node its copy.
    far = forward / times if work.tensor == 1 and near < world else forward
    add_weights(first, kind, far, times * width * outer, world, "student")
    add("student's weights from copies", kind, forward - far, near, "student")
    uncut = times * width * outer_again
    add_weights("student's weights for backward", kind, again, uncut, near, "backward")
    times = 1.0 if work.reduces_once else times
    uncut = times * width * outer if student.head_trained else 0.0
    sums = times * width * student.trained
    add_weights("gradients", "reduce_scatter", sums, uncut, world, "backward")
    add("small weights", kind, width * student.small, world, "optimizer")

    if teacher is not None and not work.teacher_is_whole:
        width = width_at_rest(teacher, work) * work.micro_batches / work.window
        near = work.hpz if work.hpz > 1 else world
        size = width * (teacher.parameters - teacher.small)
        add_weights("teacher's weights", kind, size, width * teacher.outer, near, "teacher")
        head = teacher.vocabulary * teacher.hidden if teacher.is_tied else 0
        add("teacher's head", kind, width * head, near, "student")
    return made + _count_activations(student, teacher, work)


def _count_again(student: Shape, work: Work) -> float:
    """Return the parameters of layers that are gathered again for backward."""
    body = max(0, student.parameters - student.small - student.outer)
    return body * (1 - count_kept(student, work) / max(1, student.layers))


def _count_outer_again(student: Shape, work: Work) -> int:
    """Return the parameters of embedding and head that are gathered again for backward. A head is
    not, as its backward comes next; an embedding of its own is if the head between is large."""
    if work.reuse == 0:
        return student.outer
    head = student.vocabulary * student.hidden
    return 0 if student.is_tied or 2 * head < work.reuse else student.outer - head


def _count_activations(student: Shape, teacher: Shape | None, work: Work) -> list[Exchange]:
    """Return the exchanges of tensor and sequence parallelism.

    A tensor-parallel layer sums the results of the maps that are cut by their inputs, again where
    it is computed again, and in backward what the maps that are cut by their outputs have of their
    inputs' gradients. Ulysses exchanges queries, keys, values and results of attention in forward,
    and their gradients in backward. Ranks that share out the loss's tokens sum the gradients of
    hidden states.
    """
    made = []
    if work.tensor > 1:
        rows = work.micro_batches * work.tokens * work.supervised / work.sequence
        size = rows * student.width * student.hidden
        made.append(Exchange("loss's gradients", "all_reduce", size, work.tensor, "backward"))

    # A teacher may be whole where the student is cut.
    again = 2 if work.checkpointing else 1
    for name, shape, forward, backward, tensor in (
        ("student", student, again, 1, work.tensor),
        ("teacher", teacher, 1, 0, work.teacher_tensor),
    ):
        if shape is None:
            continue
        rows = work.micro_batches * work.tokens / work.sequence * shape.width * shape.layers
        when = "backward" if name == "student" else "teacher"
        if tensor > 1:
            by_outputs, by_inputs = shape.cuts
            size = (forward * by_inputs + backward * by_outputs) * rows * shape.hidden
            made.append(Exchange(f"{name}'s sums", "all_reduce", size, tensor, when))
        if work.sequence > 1:
            size = (forward + backward) * rows * (2 * shape.heads + 2 * shape.kv)
            group = work.sequence, when, work.tensor
            made.append(Exchange(f"{name}'s attention", "all_to_all", size, *group))
    return made


def describe_traffic(student: Shape, teacher: Shape | None, work: Work, world: int) -> list[str]:
    """Return lines on the bytes that a rank receives in a step; none for one rank."""
    exchanges = count_exchanges(student, teacher, work, world)
    if not exchanges:
        return []
    total = sum(each.received for each in exchanges)
    lines = [f"  a rank receives in a step {total / 1e9:.3g} GB:"]
    for each in exchanges:
        ranks = f"{each.ranks} ranks"
        lines.append(f"    {each.name:<32}{each.received / 1e9:9.3g} GB  {each.kind}, {ranks}")
    return lines

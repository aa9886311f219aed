"""Count the operations of a step from the shapes of its models."""

from __future__ import annotations

from ds_kd.plan.shapes import Shape, Work


def count_operations(student: Shape, teacher: Shape | None, work: Work) -> float:
    """Count the floating-point operations of one rank's step."""
    return sum(count_by_phase(student, teacher, work).values())


def count_by_phase(student: Shape, teacher: Shape | None, work: Work) -> dict[str, float]:
    """Count the floating-point operations of one rank's step by phase: `teacher`, `student` (its
    forward) and `backward`.

    Forward takes two for each weight and token, and attention over half of a sample. Backward takes
    twice as many, or as many as forward if the weights are frozen. Ranks that share a layer or a
    sample share its operations, and those of the heads.
    """

    def forward(shape: Shape, tensor: int) -> float:
        body = shape.layer * shape.layers * shape.used
        attention = 2 * shape.layers * work.length * (shape.heads or shape.hidden)
        head = shape.vocabulary * shape.hidden * work.supervised / work.tensor
        tokens = work.tokens * work.micro_batches / work.sequence
        return tokens * ((2 * body + attention) / tensor + 2 * head)

    trained = forward(student, work.tensor)
    backward = 2.0 if student.trained * 2 > student.parameters else 1.0
    again = 1.0 if work.checkpointing else 0.0
    return {
        "teacher": forward(teacher, work.teacher_tensor) if teacher is not None else 0.0,
        "student": trained,
        "backward": trained * (backward + again),
    }

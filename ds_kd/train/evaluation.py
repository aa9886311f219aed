"""The evaluation of a student while it trains, on its sharded engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ds_kd.evaluate.run import Items, run_task_together
from ds_kd.evaluate.statistics import Estimate, estimate
from ds_kd.evaluate.subject import Subject, can_branch
from ds_kd.evaluate.tasks.kinds import Task
from ds_kd.models import attention
from ds_kd.parallel.world import World
from ds_kd.teachers.base import Teacher


@dataclass
class Evaluation:
    """The tasks of a run, and when they are put to the student.

    Args:
        tasks: each with its samples, tokenised.
        every: steps from one evaluation to the next; None evaluates after the last step only.
        tokenizer: the student's.
        vocab: number of ids that student and teacher share.
        world: the ranks of the job.
    """

    tasks: list[tuple[Task, Items]]
    every: int | None
    tokenizer: Any
    vocab: int
    world: World

    def is_due(self, step: int, is_last: bool) -> bool:
        """Return whether the student is evaluated after a step."""
        return is_last or (self.every is not None and step > 0 and step % self.every == 0)

    def run(
        self, student: Any, teacher: Teacher | None, should_stop: Callable[[], bool]
    ) -> dict[str, dict[str, Estimate]] | None:
        """Return the metrics of each task by its name, with intervals; a collective. No weight, no
        generator of random numbers and no setting of the student is changed.

        Args:
            student: DeepSpeed engine of a `models.causal_lm.Student`.
            teacher: for tasks that compare with it.
            should_stop: asked before every batch; True ends with None.
        """
        subject = Subject(
            engine=student,
            tokenizer=self.tokenizer,
            device=self.world.device,
            teacher=teacher,
            vocab=self.vocab,
            is_sharded=self.world.size > 1,
        )
        found = {}

        # A test finds out anew if branches may share their context, as it costs little.
        with _in_plain_attention(student):
            subject.shares_prefix = can_branch(subject)
            for task, items in self.tasks:
                made = run_task_together(task, subject, items.items, self.world, should_stop)
                if made is None:
                    return None
                records = items.merge(made)
                found[task.name] = {m.name: estimate(m, records) for m in task.metrics}
        return found


@contextmanager
def _in_plain_attention(student: Any) -> Iterator[None]:
    """Evaluate without dropout and with transformers' own attention: branches of a text and padding
    on the left need a mask, which the attention of packs has not."""
    model, is_training = student.module.model, student.training
    is_by_sample = attention.is_by_sample(model)
    student.eval()
    attention.attend_by_sample(model, False)
    try:
        yield
    finally:
        attention.attend_by_sample(model, is_by_sample)
        student.train(is_training)

"""The training algorithm: one optimizer step, and the loop around it.

Per step, over all micro-batches and data ranks,

    n    = number of supervised tokens
    loss = ( (1 - α)·Σ CE  +  α·T²·Σ D(teacher, student) ) / n

The student's loss (`DistillationLoss`) holds α, T and the divergence D and returns the weighted sum
over a micro-batch; the trainer divides by n.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_kd.checkpoint.checkpointer import Checkpointer
from ds_kd.checkpoint.state import TrainState
from ds_kd.errors import TrainingError
from ds_kd.models.operations import Operations
from ds_kd.parallel.accumulation import Once, accumulate
from ds_kd.parallel.engines import read_gradient_norm
from ds_kd.parallel.world import World, describe_lost, lost_ranks, sum_by_name, sum_over
from ds_kd.teachers.base import Teacher, TeacherOutput, ask
from ds_kd.train.batches import Batch, Batches, add_up, list_samples, move_batch
from ds_kd.train.clock import Clock, Counts
from ds_kd.train.evaluation import Evaluation
from ds_kd.train.metrics import Metrics, memory_gib
from ds_kd.train.schedule import Schedule, Summary
from ds_kd.train.validation import Validation


@dataclass
class Trainer:
    """The training loop of a run, with all parts that it needs.

    Args:
        student: DeepSpeed engine of a `models.causal_lm.Student`.
        teacher: the teacher to train with, or None.
        batches: the micro-batches of each step, of this rank.
        validation: held-out data, and the teacher that the student is compared with.
        schedule: the steps at which to validate, save and stop.
        metrics: destinations of the metrics; None on ranks that do not log.
        checkpointer: saves and restores; None saves nothing.
        state: counters, restored on resume.
        world: the ranks of the job.
        validate_first: validate before the first step of a fresh run.
        asked_to_stop: returns whether this rank was asked to stop; one such rank stops all.
        max_skipped: number of steps that may be skipped because loss or gradient is not finite.
        save_every_seconds: save when the last save is this old; None does not save by time.
        operations: of both models, to log the rate of; None if they cannot be counted.
        evaluation: tasks that are put to the student, or None.
        reduce_once: the choice whether gradients of a step's micro-batches are exchanged once.
        held: resources that `close` releases.
    """

    student: Any
    teacher: Teacher | None
    batches: Batches
    validation: Validation
    schedule: Schedule
    metrics: Metrics | None
    checkpointer: Checkpointer | None
    state: TrainState
    world: World
    validate_first: bool = False
    asked_to_stop: Callable[[], bool] = lambda: False
    max_skipped: int = 0
    save_every_seconds: float | None = None
    operations: Operations | None = None
    evaluation: Evaluation | None = None
    reduce_once: Once = field(default_factory=Once)
    held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.held.__exit__(*error)

    def close(self) -> None:
        """Close the log; release the checkpoint directory and the process group (a collective)."""
        self.__exit__(None, None, None)

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()
        self._clock = Clock(self.world.device)
        self._trained: dict[str, float] = {}
        self._validated: dict[str, float] = {}

    def train(self) -> Summary:
        """Run the schedule from the present state to its end, or to the end of the step in which a
        rank is asked to stop. The last step is saved in both cases.

        Raises:
            TrainingError: no supervised token, a loss or gradient that is not finite, a lost rank.
        """
        try:
            stops = self._validate_first()
            batches = self.batches.after(self.state.step)
            while not (stops or self.is_done):
                # The time of a step includes loading its data, but not validation and checkpoints.
                started = time.perf_counter()
                with self._clock.wait("data"):
                    micro_batches = next(batches)
                self._step(micro_batches, started)
                stops = self._validate_and_save()

            owes = self.state.step and (self._owes_validation() or self._owes_evaluation())
            finished = bool(self.is_done and not owes)
            if self.checkpointer is not None and self.schedule.total_steps:
                self.checkpointer.mark(self.state.step, finished)
            return self._summarise(finished)
        except RuntimeError as error:
            lost = lost_ranks(error, self.world)
            if lost is None:
                raise
            raise self._name_lost(lost) from error

    def _summarise(self, finished: bool) -> Summary:
        kept = None if self.checkpointer is None else self.checkpointer.newest()
        return Summary(
            finished, self.state.step, self.schedule.total_steps, self._trained, self._validated,
            self.state.lowest_loss, kept,
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        """Return whether no step is left: the last is done, or `patience` has ended the run."""
        return self.schedule.is_last(self.state.step) or self._ends_early

    @property
    def _ends_early(self) -> bool:
        return self.schedule.has_no_patience(self.state.not_lower)

    def _owes_validation(self) -> bool:
        """Return whether a validation is still to be made after the present step: the one at the
        start of a fresh run, or one that a signal interrupted."""
        step = self.state.step
        is_due = self.schedule.validates(step) if step else self.validate_first
        return is_due and self.state.validated < step and bool(self.validation.loaders)

    def _owes_evaluation(self) -> bool:
        """Return whether an evaluation is still to be made after the present step."""
        step = self.state.step
        is_due = self.evaluation is not None and self.evaluation.is_due(step, self.is_done)
        return is_due and self.state.evaluated < step

    def _evaluate(self) -> bool:
        """Evaluate if that is due, and return False if a rank was asked to stop meanwhile."""
        if self.evaluation is None or not self._owes_evaluation():
            return True
        found = self.evaluation.run(
            self.student, self.validation.teacher, lambda: self._should_stop_or_save()[0]
        )
        if found is None:
            return False
        self.state.evaluated = self.state.step
        if self.metrics is not None:
            self.metrics.evaluation(self.state.step, found)
        return True

    def _validate_first(self) -> bool:
        """Validate and evaluate before the first step if that is due, and return whether the run
        stops here."""
        only_validates = self.schedule.only_validates
        if not (self._owes_validation() or only_validates):
            return not self._evaluate()
        validated = self.validate()
        if only_validates:  # what it finds is nothing of the run whose checkpoint it looks at
            self._evaluate()
            return True
        if validated is not None and self.checkpointer is not None:
            self.checkpointer.note_validation(self.state.step, validated["loss"])
        if self._ends_early:  # its last checkpoint was saved as one of many
            self._say_that_it_ends()
            if self.checkpointer is not None:
                self.checkpointer.export_final(self.student)
        if not self._evaluate():
            return True
        # Nothing is lost by stopping at a step that a checkpoint holds.
        return validated is None and self.state.step > 0 and self._should_stop_or_save()[0]

    def _say_that_it_ends(self) -> None:
        lowest, best = self.state.lowest_loss, ""
        if self.checkpointer is not None:
            best = "; BEST names the checkpoint of the lowest one"
        self._say(
            f"ends here: the last {self.state.not_lower} validations have not lowered the "
            f"validation loss of {'nan' if lowest is None else f'{lowest:.4f}'} "
            f"(step_scheduler.patience){best}"
        )

    def _step(self, micro_batches: list[Batch], started: float) -> None:
        """Take one optimizer step and log it."""
        counts, clock = self._count(micro_batches), self._clock
        sums: dict[str, torch.Tensor] = {}
        once = self.reduce_once.decide(counts.memory)
        with accumulate(self.student, once) as backward:
            for batch, teacher_output in self._ask_teacher(micro_batches, counts):
                with clock.part("student_forward"):
                    loss, parts = self.student(batch, teacher_output)
                del teacher_output
                add_up(sums, {"loss": loss.detach(), **parts})
                # A loss that is not finite makes the gradient NaN, so that DeepSpeed skips the step
                # on every rank.
                loss = loss * (1.0 + 0.0 * loss.detach())
                # ZeRO averages gradients over the ranks that see different tokens. Multiplying by
                # their number undoes this, and dividing by n gives the mean over all tokens of the
                # step.
                weight = self.world.tokens.size / counts.labels
                with clock.part("backward"):
                    backward(loss * weight)

        # Only now does the host wait for the device, which has the optimizer step to do meanwhile.
        lr = self.student.get_lr()[0]
        with clock.part("optimizer"):
            self.student.step()
        totals = sum_by_name(sums, self.world.tokens)
        means = {name: total / counts.labels for name, total in totals.items()}
        norm = read_gradient_norm(self.student)
        skipped = self._is_skipped(means["loss"], norm, micro_batches)
        self.state.advance(counts.labels, counts.tokens)
        seconds, times = time.perf_counter() - started, clock.read()
        if skipped:
            return
        values = {"train_loss": means.pop("loss"), **means}
        values |= {"learning_rate": lr, "grad_norm": norm}
        self._trained = values
        if self.metrics is not None:
            seen = {"seen/tokens": self.state.tokens, "seen/supervised": self.state.labels}
            values = values | seen
            values |= counts.describe(seconds, times, self.operations) | self.batches.describe()
            self.metrics.train(self.state.step, values | {"memory": memory_gib(self.world.device)})

    def _ask_teacher(
        self, micro_batches: list[Batch], counts: Counts
    ) -> Iterator[tuple[Batch, TeacherOutput | None]]:
        """Return the micro-batches of a step on the device, each with the teacher's output.

        The teacher goes first, so that its activations and the student's graph, which lives until
        backward, are never in memory together.
        """
        batches = [move_batch(batch, self.world.device) for batch in micro_batches]
        if self.teacher is None:
            yield from ((batch, None) for batch in batches)
            return
        slots = counts.slots / len(batches) / self.world.tokens.size
        outputs = ask(self.teacher, batches, slots)

        def take() -> TeacherOutput:
            with self._clock.part("teacher"):
                return next(outputs)

        # No name here keeps an output, which the student's backward pass does not need.
        for batch in batches:
            yield batch, take()
        next(outputs, None)  # what the teacher holds for a step it lets go of after the last one

    def _validate_and_save(self) -> bool:
        """Validate and save if either is due, and return whether the run stops here."""
        is_last = self.schedule.is_last(self.state.step)
        stops, saves = (False, False) if is_last else self._should_stop_or_save()
        validated = None
        if self.schedule.validates(self.state.step) and not stops:
            with self._clock.wait("validation"):
                validated = self.validate()
            if validated is None and not is_last:  # a signal may have broken it off
                stops, _ = self._should_stop_or_save()

        # The last step, or the last one before a signal ends the run, is always saved.
        if self._ends_early and not is_last:
            is_last = True
            self._say_that_it_ends()
        stops = stops or not self._evaluate()
        # With patience the best weights are those of an earlier validation: they are kept too.
        is_best = validated is not None and self.state.not_lower == 0
        saves = saves or (is_best and self.schedule.patience is not None)
        saves = saves or stops or is_last or self.schedule.saves(self.state.step)
        if self.checkpointer is not None and saves:
            loss = None if validated is None else validated["loss"]
            with self._clock.wait("checkpoint"):
                self.checkpointer.save(self.student, self.state, is_last, loss, must=stops)
            self._saved_at = time.monotonic()
        return stops

    def _name_lost(self, lost: list[int]) -> TrainingError:
        return TrainingError(
            f"{describe_lost(lost)} does not answer in step {self.state.step + 1} (killed, out of "
            f"memory, hung or cut off); {self._describe_resumption()}"
        )

    def _describe_resumption(self) -> str:
        last = None if self.checkpointer is None else self.checkpointer.newest()
        if last is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {last}, from which the same command goes on"

    def validate(self) -> dict[str, float] | None:
        """Log and return the means over all supervised tokens of all validation sets and ranks.

        Returns:
            Means by name; None without such data, or if a rank was asked to stop meanwhile.

        Raises:
            TrainingError: no token is supervised.
        """
        if not self.validation.loaders:
            return None
        found = self.validation.measure(self.student, lambda: self._should_stop_or_save()[0])
        if found is None:
            return None
        self.state.note_validation(found.means["loss"])
        self._validated = found.means
        if self.metrics is not None:
            self.metrics.validation(self.state.step, found.means, found.each, found.texts)
        return found.means

    def _count(self, micro_batches: list[Batch]) -> Counts:
        """Return what a step works on, over all ranks.

        Raises:
            TrainingError: no token is supervised.
        """
        counts = Counts.of(micro_batches, self.world, memory_gib(self.world.device))
        if counts.labels == 0:
            raise TrainingError(
                f"step {self.state.step + 1} has no supervised token on any rank (samples here: "
                f"{list_samples(micro_batches)}); look at seq_length, truncation and the answers "
                f"of these samples"
            )
        return counts

    def _should_stop_or_save(self) -> tuple[bool, bool]:
        """Return whether a rank was asked to stop, and whether a save is due by rank 0's clock;
        the same on all ranks."""
        waited = time.monotonic() - self._saved_at
        is_time = self.save_every_seconds is not None and waited >= self.save_every_seconds
        here = [float(self.asked_to_stop()), float(is_time and self.world.is_main)]
        stops, saves = sum_over(here, self.world.everyone).tolist()
        return stops > 0, saves > 0

    def _check_finite(self, value: float, what: str, micro_batches: list[Batch]) -> None:
        # The value is a sum over ranks, so every rank sees the same one and raises together.
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} of step {self.state.step + 1} is {value}; no weight was changed by "
                f"this step. Samples here: {list_samples(micro_batches)}. Lower optimizer.lr, set "
                f"clip_grad_norm, or look at these samples."
            )

    def _is_skipped(self, loss: float, norm: float, micro_batches: list[Batch]) -> bool:
        """Return whether DeepSpeed skipped this step because its gradient is not finite, and
        the run allows it.

        Raises:
            TrainingError: loss or gradient is not finite, and no more steps may be skipped.
        """
        if math.isnan(norm) and self.state.skipped < self.max_skipped:
            self.state.skipped += 1
            self._say(
                f"step {self.state.step + 1} left out, number {self.state.skipped} of "
                f"{self.max_skipped} allowed: loss {loss}, gradient not finite; samples here: "
                f"{list_samples(micro_batches)}"
            )
            return True
        self._check_finite(loss, "loss", micro_batches)
        self._check_finite(norm, "gradient norm", micro_batches)
        return False

    def _say(self, text: str) -> None:
        if self.metrics is not None:
            self.metrics.say(text)

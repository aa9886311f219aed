"""Choose layout, offload and batch of a run for a machine: of all that fit its memory the one whose
step takes least time for a token, and say why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ds_kd.config.methods.check_sequence import check_sequence
from ds_kd.config.methods.check_tensor import check_tensor
from ds_kd.config.names import CPU, REPLICATE, ZERO3
from ds_kd.config.schema import RunConfig
from ds_kd.plan import memory
from ds_kd.plan.step.cluster import Cluster
from ds_kd.plan.step.time import estimate_phases
from ds_kd.plan.step.tuning import tune_work

_LOCAL_SIZES = (16, 8, 4, 2, 1)
_SHARED = (1, 2, 4, 8)  # ranks that share a sample: its tokens, or each layer's weights
_ROOM = 0.8  # share of an accelerator that may be planned, as its allocator takes some too
_ONCE = "zero3 without a copy in each node"
_ALIKE = 0.03  # layouts whose times differ by less are alike, and the simpler one is taken


@dataclass(frozen=True)
class Layout:
    """A layout of a run.

    Args:
        local: samples of a micro-batch.
        work: a step of `micro_batches` of these.
        copies: each node may have a copy of the teacher of its own to gather layers from.
    """

    local: int
    work: memory.Work
    copies: bool = True

    @property
    def shared(self) -> int:
        """Return the ranks that share a sample."""
        return self.work.tensor * self.work.sequence

    @property
    def placement(self) -> str:
        """Return where the teacher lies, as `teacher.placement`."""
        if self.work.teacher_is_whole:
            return REPLICATE
        return CPU if self.work.offload_teacher else ZERO3

    @property
    def place(self) -> str:
        """Return where the teacher lies, and whether without copies in nodes."""
        return self.placement if self.copies else _ONCE


@dataclass(frozen=True)
class Choice:
    """A layout, its memory, its time and the reasons for it.

    Args:
        parts: memory of a rank, from `memory.estimate_bytes`.
        seconds: of a step at best.
        reasons: a sentence for each part of the layout.
    """

    layout: Layout
    parts: dict[str, int]
    seconds: float
    reasons: list[str]


@dataclass(frozen=True)
class Chooser:
    """Chooses the layout of two models on a machine.

    Args:
        cfg: of the run.
        student, teacher: their sizes.
        plain: a micro-batch of one sample, without offload or recomputation.
        machine: the memory of a rank and its node.
        cluster: the GPUs that times are estimated for.
        wanted: samples of a step.
        widest: samples that a step may have at most; None does not limit it.
    """

    cfg: RunConfig
    student: memory.Shape
    teacher: memory.Shape
    plain: memory.Work
    machine: memory.Machine
    cluster: Cluster
    wanted: int
    widest: int | None

    def choose(self) -> Choice | None:
        """Return the best layout that fits, or None. Ranks share samples only where none fits
        otherwise."""
        fitting: list[Layout] = []
        for ranks in _SHARED:
            fitting = [one for one in self.list_layouts(ranks) if not self.lacks(one)]
            if fitting:
                break
        else:
            return None
        best = min(map(self.time_of_token, fitting))
        alike = [one for one in fitting if self.time_of_token(one) <= best * (1 + _ALIKE)]
        layout = min(alike, key=lambda one: (_count_moves(one), -one.local))
        return Choice(layout, self.parts(layout), self.seconds(layout), self._explain(layout))

    def least(self) -> Layout:
        """Return the layout that needs least of the accelerators' memory."""
        layouts = [one for ranks in _SHARED for one in self.list_layouts(ranks)]
        return min(layouts, key=lambda one: memory.on_device(self.parts(one)))

    def batch(self, layout: Layout) -> int:
        """Return the samples of a step."""
        width = layout.local * self.cluster.world // layout.shared
        wanted = max(self.wanted, width)
        if self.widest is not None:
            wanted = min(wanted, self.widest)
        return max(1, wanted // width) * width

    def parts(self, layout: Layout) -> dict[str, int]:
        """Return the memory of a rank by purpose."""
        world = self.cluster.world
        return memory.estimate_bytes(self.student, self.teacher, layout.work, world)

    def lacks(self, layout: Layout) -> list[str]:
        """Return what is too small for a layout, as `Machine.lacks`, with room to spare."""
        room = None if self.machine.room is None else int(_ROOM * self.machine.room)
        spare = replace(self.machine, room=room)
        return spare.lacks(self.parts(layout), self.cluster.world)

    def seconds(self, layout: Layout) -> float:
        """Return the time of a step at best."""
        phases = estimate_phases(self.student, self.teacher, layout.work, self.cluster)
        return sum(phase.seconds for phase in phases)

    def time_of_token(self, layout: Layout) -> float:
        """Return the seconds of a step for each token of a rank."""
        work = layout.work
        return self.seconds(layout) * layout.shared / (work.tokens * work.micro_batches)

    def _can_share(self, tensor: int, sequence: int) -> bool:
        """Return whether ranks of one node may share these models' layers and samples so."""
        ranks = tensor * sequence
        if self.cluster.per_node % ranks or self.cluster.world % ranks:
            return False
        sizes = replace(self.cfg.distributed, tp_size=tensor, cp_size=sequence)
        problems: list[str] = []
        for check in (check_tensor, check_sequence):
            check(replace(self.cfg, distributed=sizes), problems)
        return not problems

    def list_layouts(self, ranks: int) -> Iterator[Layout]:
        """Yield the layouts in which so many ranks share a sample."""
        for tensor in (n for n in _SHARED if ranks % n == 0):
            if self._can_share(tensor, ranks // tensor):
                yield from self._list_sizes(tensor, ranks // tensor)

    def _list_sizes(self, tensor: int, sequence: int) -> Iterator[Layout]:
        """Yield the layouts in which so many ranks share layers, and samples."""
        world = self.cluster.world // (tensor * sequence)
        sizes = [n for n in _LOCAL_SIZES if self.widest is None or n * world <= self.widest]
        switches = (False, True)

        # The student's weights leave the GPU last, after its optimizer.
        moves = [(False, False), (True, False), (True, True)]
        for again, (optimizer, weights), local in itertools.product(switches, moves, sizes or [1]):
            work = replace(
                self.plain,
                checkpointing=again,
                offload_optimizer=optimizer,
                offload_weights=weights,
                tensor=tensor,
                sequence=sequence,
            )
            for layout in self._list_places(Layout(local, work)).values():
                yield self._widen(layout, local)

    def _list_places(self, layout: Layout) -> dict[str, Layout]:
        """Return a layout with the teacher in each place where it may lie, by the place's name."""
        work = replace(layout.work, teacher_is_whole=False, offload_teacher=False)
        places = {
            ZERO3: Layout(layout.local, work),
            REPLICATE: Layout(layout.local, replace(work, teacher_is_whole=True)),
            CPU: Layout(layout.local, replace(work, offload_teacher=True)),
        }
        if self.cluster.world > self.cluster.per_node > 1 and work.tensor == 1:
            places[_ONCE] = Layout(layout.local, work, copies=False)
        return places

    def _widen(self, layout: Layout, local: int) -> Layout:
        """Return a layout with micro-batches of so many samples."""
        layout = replace(layout, local=local)
        width = local * self.cluster.world // layout.shared
        tokens, count = self.plain.tokens * local, self.batch(layout) // width
        work = replace(layout.work, tokens=tokens, micro_batches=count)
        return self._settle(replace(layout, work=work))

    def _settle(self, layout: Layout) -> Layout:
        """Return a layout with what a run of it decides by itself on this machine."""
        given = self.plain.hpz if layout.copies else 1
        plain = replace(layout.work, hpz=given, student_hpz=self.plain.student_hpz)
        sizes = self.student, self.teacher, self.machine, self.cluster.world
        return replace(layout, work=tune_work(self.cfg, plain, *sizes))

    def _explain(self, layout: Layout) -> list[str]:
        """Return a sentence for each part of a layout: what would be lost without it."""
        work = layout.work

        def compare(**changes: Any) -> str:
            other = replace(layout, work=replace(work, **changes))
            return self._compare(self._settle(other), layout)

        reasons = []
        larger = [n for n in _LOCAL_SIZES if n > layout.local]
        if larger:
            told = self._compare(self._widen(layout, larger[-1]), layout)
            if (
                self.widest is not None
                and larger[-1] * self.cluster.world // layout.shared > self.widest
            ):
                told = "leaves few steps of an epoch"
            reasons.append(f"local_batch_size {layout.local}: {larger[-1]} {told}")
        if layout.shared > 1:
            reasons.append(self._explain_sharing(layout))
        without = compare(checkpointing=not work.checkpointing)
        told = "without it a step" if work.checkpointing else "none, as with it a step"
        reasons.append(f"activation_checkpointing: {told} {without}")

        # A part that is in the host's memory is there because something else would not fit.
        if work.offload_weights:
            without = compare(offload_weights=False)
            reasons.append(f"weights and optimizer offloaded: without the weights a step {without}")
        elif work.offload_optimizer:
            reasons.append(f"optimizer offloaded: else a step {compare(offload_optimizer=False)}")
        others = [
            f"{name} {self._compare(self._settle(other), layout)}"
            for name, other in self._list_places(layout).items()
            if name != layout.place
        ]
        return [*reasons, f"teacher {layout.place}: {'; '.join(others)}"]

    def _explain_sharing(self, layout: Layout) -> str:
        """Return a sentence on the ranks that share a sample."""
        tensor, sequence = layout.work.tensor, layout.work.sequence
        told = f"{_name_sizes(tensor, sequence)}: no layout of {layout.shared // 2} fits"
        if tensor == sequence or not self._can_share(sequence, tensor):
            return told
        other = replace(layout, work=replace(layout.work, tensor=sequence, sequence=tensor))
        compared = self._compare(self._settle(other), layout)
        return f"{told}, and {_name_sizes(sequence, tensor)} {compared}"

    def _compare(self, other: Layout, chosen: Layout) -> str:
        """Return what another layout would need or take."""
        lacking = self.lacks(other)
        if "accelerator" in lacking:
            return f"needs {_gib(memory.on_device(self.parts(other)))} on each GPU"
        if lacking:
            needed = self.machine.of_node(self.parts(other), self.cluster.world)
            return f"needs {_gib(needed)} of a node's memory"
        ratio = self.time_of_token(other) / self.time_of_token(chosen)
        if math.isclose(ratio, 1, abs_tol=0.005):
            return "takes the same time"
        return f"takes {ratio:.2f} × the time"


def describe_choice(chooser: Chooser, choice: Choice) -> list[str]:
    """Return lines on a choice: what it needs and takes, then why."""
    parts, cluster = choice.parts, chooser.cluster
    states = sum(size for name, size in parts.items() if memory.is_state(name))
    node = chooser.machine.of_node(parts, cluster.world)
    host = f", {_gib(node)} of a node's memory" if node else ""
    nodes = -(-cluster.world // cluster.per_node)
    return [
        f"Planned: {_gib(memory.on_device(parts))} on each rank{host}, of all that states "
        f"{_gib(states)};",
        f"a step at best {choice.seconds:.3g} s on {cluster.world} × {cluster.gpu.name} in {nodes} "
        f"node(s). Why this layout (times at best):",
        *(f"  {reason}" for reason in choice.reasons),
    ]


def _name_sizes(tensor: int, sequence: int) -> str:
    """Return the keys of ranks that share a sample, with their values."""
    sizes = {"tp_size": tensor, "cp_size": sequence}
    return " with ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def _count_moves(layout: Layout) -> tuple[int, int, int]:
    """Return a layout's distance from the plainest: what is computed again or moved, whether layers
    are cut, and where the teacher is."""
    work = layout.work
    moves = 2 * work.offload_weights + 2 * work.offload_optimizer + work.checkpointing
    return moves, work.tensor, (ZERO3, _ONCE, REPLICATE, CPU).index(layout.place)


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB" if size >= 10 * 2**30 else f"{size / 2**30:.1f} GiB"

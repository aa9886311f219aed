"""Write the files of one checkpoint, on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_kd.checkpoint import manifest
from ds_kd.checkpoint.engine import files as engine_files
from ds_kd.checkpoint.export import export_adapter, export_student
from ds_kd.checkpoint.manifest import (
    ADAPTER,
    CARD,
    CONFIG,
    ENGINE,
    MODEL,
    ROLLOUTS,
    STATE,
    error_of,
)
from ds_kd.checkpoint.state import Buffer, TrainState, rng_state
from ds_kd.errors import first_line
from ds_kd.models import lora
from ds_kd.models.files.file_names import write_config, write_tokenizer
from ds_kd.parallel.tensor import count_numbers
from ds_kd.parallel.world import World, on_rank0, sum_over


@dataclass
class Writer:
    """Writes the files of one checkpoint into a directory.

    After each part an error of one rank is raised on all ranks, so that none waits in vain.

    Args:
        world: the ranks; all methods are collective.
        tokenizer: saved with the model.
        config_text: the run's YAML.
        card: returns the student's model card, given the counters; None writes none.
        buffer: what else outlives a step; None if nothing does.
        write_first: called on every rank before a checkpoint is written; writes what steps up to it
            made and later ones rely on, such as the rows of a cache.
    """

    world: World
    tokenizer: Any
    config_text: str = ""
    card: Callable[[TrainState], str] | None = None
    buffer: Buffer | None = None
    write_first: Callable[[], None] = lambda: None

    def write(
        self,
        engine: Any,
        state: TrainState,
        saved: dict[str, Any],
        directory: Path,
        consolidate: bool,
    ) -> dict[str, Any]:
        """Write all files but the manifest, and return its entries: size and hash of each file.

        Args:
            saved: what state.json holds beside the counters and the ranks.
            directory: has an empty directory `MODEL`.
            consolidate: the student's weights are written there too.

        Raises:
            OSError: on every rank, if one cannot write.
        """
        self._raise_everywhere(error_of(self.write_first))
        self._raise_everywhere(engine_files.save_engine(engine, directory, ENGINE))
        rng = directory / f"rng_rank{self.world.rank}.pt"
        self._raise_everywhere(error_of(lambda: torch.save(rng_state(), rng)))
        on_rank0(lambda: self._write_small(engine, state, saved, directory), self.world)

        if lora.has_adapter(engine.module.model):
            export_adapter(engine, directory / ADAPTER, self.world)
        if consolidate:
            export_student(engine, directory / MODEL, self.world)
        return self._describe_files(directory)

    def estimate_bytes(self, engine: Any, consolidate: bool) -> int:
        """Return the bytes of a checkpoint, over all ranks."""
        total = int(sum_over([engine_files.count_written_bytes(engine)], self.world.everyone)[0])
        if consolidate:
            parameters = engine.module.model.parameters()
            total += sum(count_numbers(p) * p.element_size() for p in parameters)
        return total

    def _raise_everywhere(self, error: Exception | None) -> None:
        """Raise the error of any rank on every rank."""
        texts: list[Any] = [None] * self.world.size
        text = None if error is None else first_line(error)
        dist.all_gather_object(texts, text, group=self.world.host_group)
        for rank, text in enumerate(texts):
            if text is not None:
                raise OSError(f"rank {rank}: {text}")

    def _write_small(
        self, engine: Any, state: TrainState, saved: dict[str, Any], directory: Path
    ) -> None:
        saved = saved | {
            "train_state": state.state_dict(),
            "world_size": self.world.size,
            "tensor_size": self.world.tensor.size,
        }
        (directory / STATE).write_text(json.dumps(saved), "utf-8")
        (directory / CONFIG).write_text(self.config_text, "utf-8")
        if self.buffer is not None and (kept := self.buffer.state_dict(state.step)) is not None:
            (directory / ROLLOUTS).write_text(json.dumps(kept), "utf-8")

        # The student's other files are in every checkpoint, so that each can be exported.
        model = engine.module.model
        write_config(model.config, directory / MODEL)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory / MODEL)
        write_tokenizer(self.tokenizer, directory / MODEL)
        if self.card is not None:
            (directory / MODEL / CARD).write_text(self.card(state), encoding="utf-8")

    def _describe_files(self, directory: Path) -> dict[str, Any]:
        """Return size and hash of every file; the ranks share the work."""
        mine = manifest.files_of(directory)[self.world.rank :: self.world.size]
        part: dict[str, Any] = {}

        def add_up() -> None:  # on a full disk syncing may be the first call that fails
            part.update({str(p.relative_to(directory)): manifest.digest(p) for p in mine})

        self._raise_everywhere(error_of(add_up))
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, part, group=self.world.host_group)
        return {name: digest for part in parts for name, digest in part.items()}

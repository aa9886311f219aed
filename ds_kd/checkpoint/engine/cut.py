"""Whole weights and optimizer states from the files of an engine, whose matrices may be cut.

With `distributed.tp_size` a file belongs to a place (data rank, tensor rank). In it lie flat groups
of parameters: those that are not cut are sharded over all ranks, the others over the ranks that
have the same part. DeepSpeed's own converter takes all for sharded in the second way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Kept of a weight: itself, in fp32, and Adam's two means.
STATES = ("fp32", "exp_avg", "exp_avg_sq")
_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")
_FIRST = "zero_pp_rank_0_mp_rank_00_model_states.pt"
_INFO = "universal_checkpoint_info"
_BY_INPUTS = "parameter_with_row_parallelism_patterns"
_WHOLE = "tp_replicated_parameter_patterns"

Place = tuple[int, int]


def count_parts(directory: Path) -> int:
    """Return over how many ranks the matrices were cut, 1 for none."""
    places = [match for path in directory.iterdir() if (match := _FILE.fullmatch(path.name))]
    return max((int(match[2]) for match in places), default=0) + 1


@dataclass(frozen=True)
class _Spot:
    """A parameter's place in the files of each rank.

    Args:
        group: number of its flat group.
        start: of this rank's shard in the flat group.
        shape: of this rank's part before it was sharded.
        ranks: number of ranks over which the part is sharded.
        dim: dimension in which it is cut; None if each tensor rank has all of it.
    """

    group: int
    start: int
    shape: tuple[int, ...]
    ranks: int
    dim: int | None


class CutFiles:
    """The files of an engine in a checkpoint; tensors stay on the disk until they are asked for.

    Args:
        directory: that of the engine.

    Raises:
        ValueError: the sizes in the files do not fit each other.
    """

    def __init__(self, directory: Path):
        self._models: dict[Place, dict[str, Any]] = {}
        self._optimizers: dict[Place, dict[str, Any]] = {}
        for path in sorted(directory.iterdir()):
            if (match := _FILE.fullmatch(path.name)) is None:
                continue
            place = int(match[1]), int(match[2])
            loaded = torch.load(path, map_location="cpu", mmap=True)
            if match[3] == "model":
                self._models[place] = loaded
            else:
                self._optimizers[place] = loaded["optimizer_state_dict"]
        self.data = 1 + max(data for data, _ in self._models)
        self.tensor = 1 + max(part for _, part in self._models)
        self._spots = dict(self._find_spots())

    @property
    def names(self) -> list[str]:
        """Return the names of the trained parameters."""
        return [*self._spots]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Return the tensors that are kept and not trained."""
        return {name: self.model["module"][name] for name in self.model["buffer_names"]}

    @property
    def model(self) -> dict[str, Any]:
        """Return what the first rank kept beside its optimizer."""
        return self._models[0, 0]

    @property
    def optimizer(self) -> dict[str, Any]:
        """Return what the first rank kept of its optimizer."""
        return self._optimizers[0, 0]

    def read(self, name: str, state: str) -> Tensor:
        """Return one of `STATES` of a parameter, whole."""
        spot = self._spots[name]
        if spot.ranks == self.data * self.tensor:
            places = [(d, t) for d in range(self.data) for t in range(self.tensor)]
            return self._join(places, spot, state)
        parts = range(self.tensor if spot.dim is not None else 1)
        whole = [self._join([(d, t) for d in range(self.data)], spot, state) for t in parts]
        return whole[0] if spot.dim is None else torch.cat(whole, spot.dim)

    def _join(self, places: list[Place], spot: _Spot, state: str) -> Tensor:
        """Return a part that lies in shards in the files of these places, in their order."""
        numel = prod(spot.shape)
        size = ceil(numel / spot.ranks)
        shards = [self._flat(place, spot.group, state)[spot.start :][:size] for place in places]
        return torch.cat(shards)[:numel].view(spot.shape)

    def _flat(self, place: Place, group: int, state: str) -> Tensor:
        kept = self._optimizers[place]
        if state == "fp32":
            return kept["fp32_flat_groups"][group]
        found: Tensor = kept["optimizer_state_dict"]["state"][group][state]
        return found

    def _find_spots(self) -> Iterator[tuple[str, _Spot]]:
        info = self.model.get(_INFO) or {}
        by_inputs, whole = info.get(_BY_INPUTS, ()), info.get(_WHOLE, ())
        for number, shapes in enumerate(self.model["param_shapes"]):
            ranks = self._count_ranks(number, shapes)
            start = 0
            for name, shape in shapes.items():
                dim = 1 if _matches(name, by_inputs) else 0
                is_whole = self.tensor == 1 or _matches(name, whole)
                yield name, _Spot(number, start, tuple(shape), ranks, None if is_whole else dim)
                start += ceil(prod(shape) / ranks)

    def _count_ranks(self, number: int, shapes: dict[str, Any]) -> int:
        """Return the number of ranks over which a flat group is sharded."""
        size = self._flat((0, 0), number, "fp32").numel()
        for ranks in (self.data, self.data * self.tensor):
            if sum(ceil(prod(shape) / ranks) for shape in shapes.values()) == size:
                return ranks
        raise ValueError(f"the flat group {number} has {size} numbers, which fit no layout")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def write_universal(directory: Path, out: Path) -> None:
    """Write the files of an engine as DeepSpeed's universal checkpoint, from which every rank takes
    its part, cut or not.

    Raises:
        KeyError: the optimizer has other states than Adam's.
    """
    files = CutFiles(directory)
    for name in files.names:
        (out / "zero" / name).mkdir(parents=True)
        for state in STATES:
            torch.save({"param": files.read(name, state)}, out / "zero" / name / f"{state}.pt")
    kept = {**files.optimizer, "fp32_flat_groups": []}
    states = kept["optimizer_state_dict"]
    # DeepSpeed's Adam for the host counts steps in a plain number; a tensor is read from the disk.
    step = {0: {"step": deepcopy(states["state"][0]["step"])}}
    kept["optimizer_state_dict"] = {**states, "state": step}
    torch.save(kept | {"param_groups": states["param_groups"]}, out / "zero" / "optimizer_state.pt")

    # From here DeepSpeed reads counters, and no weights.
    torch.save({**files.model, "mp_world_size": 1}, out / _FIRST)

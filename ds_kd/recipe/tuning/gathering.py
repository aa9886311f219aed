"""The keys of a ZeRO file that follow from the sizes of a model and from the machines of a job.

ZeRO-3 gathers each layer over all ranks. DeepSpeed's defaults fetch the beginning of the next layer
while one is computed, up to 5e7 weights, and the rest when it is needed; and they know no
machines, so that with several of them every layer crosses the network in every pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_kd.config.components import Component
from ds_kd.models.files.weight_files import empty_model
from ds_kd.recipe.models import config_of, select_trust, training_dtype
from ds_kd.recipe.tuning.machine import Machine

_PREFETCH, _LIVE = 50_000_000, 1_000_000_000  # DeepSpeed's defaults, in weights
_LARGEST_PREFETCH = 1_000_000_000  # weights; layers with many experts are larger
#: Share of a rank's memory that the models' states and the copies inside machines may take: steps
#: need the rest.
_SHARE_OF_MODELS = 0.5
_TRAINED = 16  # bytes of a trained weight beside itself: fp32 weight, gradient, Adam's two numbers
_GIB = 2**30


@dataclass(frozen=True)
class Size:
    """The numbers of weights of a model and of its largest layer, and the bytes of a weight."""

    weights: int
    layer: int
    width: int


def measure(component: Component) -> Size | None:
    """Return the size of a model, or None if its configuration alone does not tell."""
    try:
        model = empty_model(config_of(component), **select_trust(component))
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError):
        return None  # a class of the user's, say; what is wrong is told when it is loaded
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [part for part in model.modules() if type(part).__name__ in names]
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    return Size(
        count(model), max(map(count, layers), default=0), training_dtype(component).itemsize
    )


def count_states(student: Size | None, teacher: Size | None, machine: Machine) -> int:
    """Return the bytes of a rank that the models' shards take at most, before any copy."""
    trained = 0 if student is None else student.weights * (student.width + _TRAINED)
    frozen = 0 if teacher is None else teacher.weights * teacher.width
    return (trained + frozen) // machine.ranks


def count_copy(size: Size | None, machine: Machine) -> int:
    """Return the bytes of a rank for a copy of a model in shards over the ranks of each machine."""
    return 0 if size is None else size.weights * size.width // (machine.ranks_per_node or 1)


def tune(
    zero: dict[str, Any],
    size: Size | None,
    machine: Machine,
    taken: int = 0,
    is_updated_each_pass: bool = False,
) -> tuple[dict[str, Any], str]:
    """Return a ZeRO configuration with what its file leaves open, and a sentence about it if there
    are several machines to gather layers inside of.

    Args:
        zero: the checked content of a ZeRO file.
        size: of the model, or None.
        taken: bytes of a rank that both models take, with the copy of the other one.
        is_updated_each_pass: whether weights change after every pass, so that a copy, for whose
            making DeepSpeed waits for the device, would be gathered from once.
    """
    given = zero["zero_optimization"]
    if size is None or given["stage"] != 3 or machine.ranks == 1:
        return zero, ""
    added = _choose_buckets(given, size.layer)

    # A second copy of the weights, in shards over the ranks of each machine, is gathered from.
    said, ranks = "", machine.ranks_per_node
    copy = count_copy(size, machine)
    is_plain = not _offloads_weights(given) and "weight_quantization" not in zero
    is_open = is_plain and "zero_hpz_partition_size" not in given and not is_updated_each_pass
    if is_open and ranks is not None and 1 < ranks < machine.ranks:
        if taken + copy <= _SHARE_OF_MODELS * machine.memory:
            added["zero_hpz_partition_size"] = ranks
            said = (
                f"layers are gathered among the {ranks} ranks of each machine, from a copy of "
                f"{copy / _GIB:.2g} GiB a rank (zero_hpz_partition_size; write 1 for none)"
            )
        else:
            said = (
                f"layers are gathered over all machines, as a copy of {copy / _GIB:.2g} GiB a rank "
                f"would leave less than half of its memory for steps (zero_hpz_partition_size)"
            )
    return {**zero, "zero_optimization": {**given, **added}}, said


def _choose_buckets(given: dict[str, Any], layer: int) -> dict[str, Any]:
    """Return the keys that let DeepSpeed fetch a whole layer while the one before is computed."""
    prefetch = min(layer, _LARGEST_PREFETCH)
    if prefetch <= _PREFETCH or _has(given, "prefetch_bucket_size"):
        return {}
    added = {"stage3_prefetch_bucket_size": prefetch}
    # The layer that is computed and the next one are whole at the same time.
    if layer + prefetch > _LIVE and not _has(given, "max_live_parameters"):
        added["stage3_max_live_parameters"] = layer + prefetch
    return added


def _has(given: dict[str, Any], name: str) -> bool:
    """Return whether a key is given by one of its two names."""
    return name in given or f"stage3_{name}" in given


def _offloads_weights(given: dict[str, Any]) -> bool:
    return (given.get("offload_param") or {}).get("device", "none") != "none"

"""Tensor parallelism: the matrices of a model's layers, cut over neighbouring ranks.

DeepSpeed's AutoTP cuts them when an engine is built, by the plan that transformers has for the
architecture: the first maps of attention and MLP by their outputs, the last ones by their inputs.
Each rank of a tensor group computes its part for the same tokens, and an all-reduce after the last
map gives every rank the whole result. ZeRO-3 shards the parts over the ranks that have the same
one, and everything that is not cut, embeddings and heads among it, over all ranks.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_kd.parallel.linear import linear

_WITH_SUM = "replicated_with_grad_allreduce"
#: A style of transformers' plans → how DeepSpeed cuts such a map. A map that only sees a part of
#: the heads, and is whole on each rank, has the sum of the ranks' gradients.
_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    _WITH_SUM: {"partition_type": "skip", "grad_allreduce": True},
}
#: A style → the part of an adapter, B·A, that is cut with the map: B by its outputs, or A by its
#: inputs. The other one is whole on each rank.
_CUT_OF_ADAPTER = {"colwise": "B", "rowwise": "A"}
_SECTION = "tensor_parallel"


def cut_layers(model_config: Any, size: int, trains: bool) -> dict[str, Any]:
    """Return the part of an engine's configuration that cuts a model over `size` ranks.

    Args:
        model_config: the model's Hugging Face configuration.
        trains: whether the model's own weights are trained.

    Raises:
        ValueError: transformers has no plan for this architecture, or one that cannot be followed.
    """
    if size == 1:
        return {}
    text = model_config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    unknown = sorted({*plan.values()} - {*_STYLES})
    if unknown or not plan:
        told = f"with {', '.join(unknown)}" if unknown else "none"
        raise ValueError(f"transformers' plan for {text.model_type} is one {told}")
    rules = [
        {"patterns": _list_patterns(name, _CUT_OF_ADAPTER.get(style)), **_STYLES[style]}
        for name, style in plan.items()
        if trains or style != _WITH_SUM  # a frozen weight has no gradient to sum
    ]
    cut = {"use_default_specs": False, "layer_specs": rules}
    # The loss reads whole heads.
    return {
        _SECTION: {"autotp_size": size, "vocab_parallel_lm_head": False, "partition_config": cut}
    }


def _list_patterns(name: str, of_adapter: str | None) -> list[str]:
    """Return patterns of the weights that are cut for a name such as `layers.*.mlp.up_proj`: of the
    map, and of its adapter if it has one.

    Args:
        of_adapter: the part of an adapter that is cut, A or B.
    """
    start = rf".*\.{re.escape(name)}".replace(r"\*", r"\d+")
    adapter = [rf"{start}\.lora_{of_adapter}\.\w+\.weight$"] if of_adapter else []
    return [rf"{start}(\.base_layer)?\.weight$", *adapter]


@contextmanager
def show_maps() -> Iterator[None]:
    """Let AutoTP find the maps inside adapters: it would take a wrapper of peft, which shows the
    weight that it wraps, for a map, and put another in the place of map and adapter."""
    wrapper: Any = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if wrapper is None:
        yield
        return
    shown = wrapper.weight
    del wrapper.weight
    try:
        yield
    finally:
        wrapper.weight = shown


@contextmanager
def hide_groups(config: dict[str, Any]) -> Iterator[None]:
    """Build a model that is not cut as if there were no other: DeepSpeed takes the groups of an
    engine that was built before, and is cut, for those of every engine."""
    from deepspeed.utils import groups

    if _SECTION in config:
        yield
        return
    kept, groups.mpu = groups.mpu, None
    try:
        yield
    finally:
        groups.mpu = kept


def forget_groups(config: dict[str, Any]) -> None:
    """Forget the groups of an earlier run of this process for a student that is not cut: DeepSpeed
    would take them for its own, in its steps too."""
    from deepspeed.utils import groups

    if _SECTION not in config:
        groups.mpu = None


def without_cuts(config: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's configuration for loading a model, which is cut afterwards."""
    return {name: value for name, value in config.items() if name != _SECTION}


def prepare(engine: Any) -> None:
    """Make an engine whose layers are cut ready to run.

    DeepSpeed would compare the first inputs among tensor ranks, and send a teacher's output with
    the teacher in it; the ranks have one sampler. And the graph of its cut maps would keep whole
    weights until backward.
    """
    if (check := getattr(engine, "first_dataloader_check", None)) is not None:
        check.remove()
    inputs = _Inputs()
    for module in engine.module.modules():
        if type(module).__name__ in _FORWARDS:
            forward = functools.partial(_FORWARDS[type(module).__name__], inputs)
            module.forward = types.MethodType(forward, module)


class _Inputs:
    """Marks the inputs of maps that are cut by their outputs: ranks sum their gradients.

    Maps that read the same tensor, such as q, k and v, share its mark. So each rank adds up the
    gradients of its parts first, and they are summed over ranks twice in a Llama's layer and not
    five times.
    """

    def __init__(self) -> None:
        self._hidden: Tensor | None = None
        self._marked: Tensor | None = None

    def mark(self, hidden: Tensor, group: Any) -> Tensor:
        """Return the same numbers, with a gradient that is summed over the ranks of a group."""
        from deepspeed.module_inject.layers import ColumnParallel

        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return hidden
        if self._marked is not None and hidden is self._hidden:
            return self._marked
        marked: Tensor = ColumnParallel.apply(group, hidden)
        marked.register_hook(self._forget)
        self._hidden, self._marked = hidden, marked
        return marked

    def _forget(self, _: Tensor) -> None:
        """Let go of the last input of a pass, and of the graph before it, in the backward pass."""
        self._hidden = self._marked = None


def _by_outputs(inputs: _Inputs, layer: Any, hidden: Tensor) -> Tensor:
    """Compute a map that is cut by its outputs; the gradient of the input is summed over ranks."""
    return linear(inputs.mark(hidden, layer.mp_group), layer.weight, layer.bias)


def _by_inputs(_: _Inputs, layer: Any, hidden: Tensor) -> Tensor:
    """Compute a map that is cut by its inputs; its output is summed over ranks."""
    from deepspeed.module_inject.layers import RowParallel

    out = RowParallel.apply(layer.mp_group, linear(hidden, layer.weight, None), False)
    return out if layer.bias is None else out + layer.bias


#: AutoTP's classes of maps → how they are computed here.
_FORWARDS: dict[str, Callable[[_Inputs, Any, Tensor], Tensor]] = {
    "LinearLayer": _by_outputs,
    "LinearAllreduce": _by_inputs,
}


@contextmanager
def join(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give cut parameters their whole values (a collective of the tensor group). ZeRO-3 has
    gathered this rank's parts before."""
    cut = [(layer, [p]) for p in parameters if (layer := _find_layer(p)) is not None]
    for layer, part in cut:
        layer.gather_params(part)
    try:
        yield
    finally:
        for layer, part in cut:
            layer._tp_partition(part)


def count_numbers(parameter: nn.Parameter) -> int:
    """Return the numbers of a parameter, those of the whole one if it is cut or sharded."""
    here = int(getattr(parameter, "ds_numel", parameter.numel()))
    layer = _find_layer(parameter)
    return here if layer is None else here * layer.tp_world_size


def _find_layer(parameter: nn.Parameter) -> Any | None:
    """Return AutoTP's layer that cut a parameter, or None."""
    return getattr(getattr(parameter, "gather_params", None), "__self__", None)

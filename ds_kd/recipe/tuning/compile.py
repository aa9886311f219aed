"""Compile the layers of a model where that is wanted and works."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ds_kd.config.sections import Compile
from ds_kd.errors import first_line
from ds_kd.models.causal_lm import compile_layers
from ds_kd.parallel.world import World, sum_over


def compile_model(wanted: Compile, is_auto: bool, model: Any, world: World) -> None:
    """Compile the layers of an HF model, unless they are not to be (a collective).

    Args:
        wanted: the section `compile`.
        is_auto: whether this run compiles on accelerators by itself, where its section is `auto`.
    """
    options: dict[str, Any] = {
        "mode": wanted.mode,
        "dynamic": wanted.dynamic,
        "backend": wanted.backend,
    }
    if wanted.enabled == "true":
        compile_layers(model, **options)
    elif wanted.enabled == "auto" and is_auto and _may_compile(world):
        fault = _find_fault(world.device, **options)
        # All ranks do the same, so that they round alike.
        if sum_over([float(bool(fault))], world.everyone)[0] == 0:
            compile_layers(model, guard=Fallback().guard, **options)
        elif fault:
            print(f"layers are not compiled, as torch.compile fails here: {fault}", file=sys.stderr)


def _may_compile(world: World) -> bool:
    """Return whether it is worth a trial; cut layers exchange in the middle."""
    return world.device.type != "cpu" and world.tensor.size == 1


@functools.cache
def _find_fault(device: torch.device, **options: Any) -> str:
    """Return what goes wrong when a small function is compiled and run on a device, or an empty
    text."""

    def example(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * x.float().square().mean(-1, keepdim=True)

    found = []
    try:
        for function in (example, torch.compile(example, **options)):
            x = torch.linspace(-1, 1, 4096, device=device).view(8, -1).requires_grad_()
            out = function(x)
            out.sum().backward()
            found.append((out.detach(), x.grad))
    except Exception as error:  # of the compiler, of a driver, of a build of torch
        return _describe(error)
    (out, slope), (same, same_slope) = found
    assert slope is not None and same_slope is not None
    is_right = torch.allclose(out, same, atol=1e-5) and torch.allclose(slope, same_slope, atol=1e-5)
    return "" if is_right else "its numbers are wrong"


def _describe(error: Exception) -> str:
    """Return what went wrong, where torch.compile only tells which of its parts failed."""
    return first_line(getattr(error, "inner_exception", error))


class Fallback:
    """Lets the layers of a model run as they are once one of them cannot be compiled.

    From the first one made on, torch compiles a layer's backward pass of this process together with
    its forward, where the layer can still be replaced, and not when backward needs it.
    """

    def __init__(self) -> None:
        self._has_failed = False
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def guard(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's forward: the compiled one, or the plain one after a failure."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._has_failed:
                try:
                    return compiled(*args, **kwargs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self._has_failed = True
                    print(
                        f"layers are not compiled, as this model's fail: {_describe(error)}; "
                        f"compile: false leaves out the attempt",
                        file=sys.stderr,
                    )
            return plain(*args, **kwargs)

        return forward

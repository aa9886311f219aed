"""LoRA: adapters on the student's linear maps, by Hugging Face's peft.

The adapter is injected into the HF model and does not wrap it: for the rest of the package it is a
model with some frozen parameters. The maps are chosen by NeMo-AutoModel's keys. A second, frozen
adapter may lie beside it, under which the same base is a teacher.
"""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_kd.files import give_usual_mode

ADAPTER = "default"  # peft's name of the adapter that is trained
TEACHER = "teacher"  # that of a frozen one, under which the base teaches
_BASE = ".base_layer."


def find_linear_maps(
    model: Any,
    target_modules: list[str],
    exclude_modules: list[str],
    match_all_linear: bool = False,
) -> list[str]:
    """Return the names of the linear maps that get an adapter. The language-model head never gets
    one, as the loss calls it itself.

    Args:
        model: an HF causal language model.
        target_modules: full names or last parts of names, in which `*` stands for any text;
            `*_proj` if none of the three arguments is given.
        exclude_modules: the same for maps that get no adapter, while all others get one.
        match_all_linear: give one to every linear map.

    Raises:
        ValueError: a pattern matches no linear map; names those that exist.
    """
    head = model.get_output_embeddings()
    maps = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not (match_all_linear or target_modules or exclude_modules):
        target_modules = ["*_proj"]

    # An exclusion may match the head, and a pattern with `*` may match nothing in this model.
    others = [name for name, _ in model.named_modules()]
    for pattern in (*target_modules, *exclude_modules):
        is_exclusion = pattern in exclude_modules
        if is_exclusion and ("*" in pattern or any(_matches(pattern, name) for name in others)):
            continue
        if not any(_matches(pattern, name) for name in maps):
            if any(m is head and _matches(pattern, n) for n, m in model.named_modules()):
                raise ValueError(f"{pattern}: the language-model head never gets an adapter")
            kinds = sorted({name.rpartition(".")[2] for name in maps})
            near = difflib.get_close_matches(pattern, kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no linear map is called {pattern}; there are {kinds}{hint}")
    chosen = [
        name
        for name in maps
        if (not target_modules or any(_matches(p, name) for p in target_modules))
        and not any(_matches(p, name) for p in exclude_modules)
    ]
    if not chosen:
        raise ValueError("exclude_modules leaves no linear map")
    return chosen


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern is the last part of a name or matches the whole of it."""
    if pattern == name.rpartition(".")[2]:
        return True
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None


def add_adapter(
    model: Any,
    names: list[str],
    dim: int,
    alpha: float,
    dropout: float,
    use_dora: bool,
    init: str,
    seed: int,
    base: str,
    revision: str | None = None,
) -> None:
    """Freeze `model` and put a trainable adapter beside each of its maps `names`.

    Call it inside the `engines.zero3_init` in which the model was loaded, as DoRA reads the norms
    of the weights. The adapter starts as zero and is the same on every rank.

    Args:
        dim, alpha: rank and scale of W + alpha/dim · B·A, with A `[dim, in]` and B `[out, dim]` (Hu
            et al. 2021).
        dropout: probability of dropout on the adapter's input.
        use_dora: also train the length of each output's weight vector (Liu et al. 2024).
        init: initialisation of A, `xavier` (normal) or `uniform` (Kaiming's).
        seed: seed of that initialisation.
        base, revision: name or path of the model, written into the adapter's config.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_dora=use_dora,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
        if init == "xavier":
            for layer in _layers(model).values():
                nn.init.xavier_normal_(layer.lora_A[ADAPTER].weight)

    # ZeRO-3 releases a layer in backward once its input has a gradient, so the first layer's input
    # needs one although the embedding is frozen.
    model.enable_input_require_grads()


def add_frozen_adapter(model: Any, directory: str) -> None:
    """Put the adapter of a directory beside the one that is trained, for `switch_to_teacher`.

    Call it after `add_adapter`, where that is called. No weight is trained that was not before.

    Raises:
        ValueError: the directory holds no LoRA adapter of linear maps of this model, or none of its
            head; says what is wrong.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    trained = {id(p) for p in model.parameters() if p.requires_grad}
    config = PeftConfig.from_pretrained(directory)
    weights = load_file(Path(directory) / "adapter_model.safetensors")
    # peft draws weights, which those of the file replace, and warns of a second adapter.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inject_adapter_in_model(config, model, TEACHER)
    try:
        told: Any = set_peft_model_state_dict(model, weights, TEACHER)
    except RuntimeError as error:  # the first line says no more than that
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"its weights do not fit this model: {reason}") from error
    if odd := told.unexpected_keys:
        raise ValueError(f"its weights hold {odd[0]}, which its config gives no place here")
    if lacking := [name for name in told.missing_keys if TEACHER in name.split(".")]:
        raise ValueError(f"its weights lack {lacking[0].replace(f'.{TEACHER}', '')}")

    # peft has made the last adapter the one that is used and trained.
    layers = _layers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for name, layer in layers.items():
        layer._active_adapter = [ADAPTER]
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise ValueError(f"it changes {name}, which is no linear map")
    if model.get_output_embeddings() in layers.values():
        raise ValueError("it changes the language-model head, which the loss reads as it is")


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def _layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def switch_to_teacher(model: Any) -> Iterator[None]:
    """Let the model compute as its base, under the frozen adapter where there is one.

    peft's own switch freezes the adapter and thaws it again, under the optimizer's eyes.
    """
    layers = [*_layers(model).values()]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [TEACHER]
        layer._disable_adapters = TEACHER not in layer.lora_A
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, False


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: Any, weights: dict[str, Tensor], directory: Path) -> None:
    """Write whole adapter weights for `PeftModel.from_pretrained(base, directory)`.

    Args:
        weights: the adapter's weights by the model's parameter names.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    named = get_peft_model_state_dict(model, weights, ADAPTER, save_embedding_layers=False)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()},
        directory / "adapter_model.safetensors",
        {"format": "pt"},
    )
    give_usual_mode(directory)
    model.peft_config[ADAPTER].save_pretrained(directory)


def plain_weights(
    model: Any,
) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """Iterate over the parameters that the model has once its adapters are merged.

    Yields:
        A name, the parameters to gather for it, and a function that returns its value while they
            are gathered.
    """
    layers = _layers(model) if has_adapter(model) else {}
    for name, parameter in model.named_parameters():
        owner, is_base, rest = name.partition(_BASE)
        if is_base and rest == "weight":
            layer = layers[owner]
            used = [p for n, p in layer.named_parameters() if TEACHER not in n.split(".")]
            yield f"{owner}.weight", used, functools.partial(_merge, layer)
        elif is_base:
            yield f"{owner}.{rest}", [parameter], parameter.detach
        elif not any(name.startswith(f"{owner}.") for owner in layers):
            yield name, [parameter], parameter.detach


@torch.no_grad()
def _merge(layer: Any) -> Tensor:
    """Return W + alpha/dim · B·A, for DoRA with its trained lengths; computed in fp32 and rounded
    once."""
    weight = layer.get_base_layer().weight
    if ADAPTER not in layer.lora_A:  # a map that only the frozen adapter changes
        return weight.detach()
    low, high = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    merged = weight.float() + layer.scaling[ADAPTER] * (high @ low)
    if layer.use_dora[ADAPTER]:
        lengths = layer.lora_magnitude_vector[ADAPTER].weight.float()
        merged *= (lengths / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)

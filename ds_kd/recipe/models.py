"""Load the tokenizer, the configuration and the sharded model of a model section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ds_kd.config.components import Component, config_error, instantiate
from ds_kd.config.names import MODEL
from ds_kd.config.permissions import Permitted
from ds_kd.config.schema import RunConfig
from ds_kd.errors import first_line
from ds_kd.hub import expect_hub
from ds_kd.models import causal_lm, probes
from ds_kd.models.attention import attend_by_sample, is_by_sample, refuse_packs
from ds_kd.models.files.damage import name_damage
from ds_kd.models.files.model_files import explain_no_tokenizer
from ds_kd.models.files.weight_files import (
    WeightFiles,
    check_shapes,
    empty_model,
    find_differing_ties,
)
from ds_kd.parallel import engines
from ds_kd.parallel.world import World, rank0_first

_NETWORK = "a network (HF_HUB_OFFLINE=1 takes what was downloaded before)"


def name_of(component: Component) -> str:
    """Return the directory or hub id of a model."""
    return str(component.kwargs["pretrained_model_name_or_path"])


def select_location(component: Component) -> dict[str, Any]:
    """Return the arguments that choose the files, for the config and tokenizer of a model too."""
    names = ("revision", "trust_remote_code", "cache_dir", "gguf_file", "subfolder", "token")
    return {name: component.kwargs[name] for name in names if name in component.kwargs}


def select_trust(component: Component) -> dict[str, Any]:
    """Return the argument that lets a model's own code run, for a model made of its config."""
    return {n: v for n, v in component.kwargs.items() if n == "trust_remote_code"}


def tokenizer_of(component: Component, world: World) -> Any:
    """Return the model's tokenizer, which pads on the right; rank 0 loads it first.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    kwargs = select_location(component)
    key = f"{component.key}.pretrained_model_name_or_path"
    expected = "a Hugging Face model with its tokenizer: a directory, or a hub id and " + _NETWORK
    expect_hub(name_of(component))
    with config_error(key, name_of(component), expected):
        try:
            with name_damage(name_of(component)):
                tokenizer = rank0_first(
                    lambda: AutoTokenizer.from_pretrained(name_of(component), **kwargs), world
                )
        except (ValueError, OSError, ImportError) as error:
            # transformers lists what it has tried, and takes a path for a name on the hub.
            told = "" if kwargs.get("subfolder") else explain_no_tokenizer(name_of(component))
            if told:
                raise ValueError(told) from error
            raise
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    component: Component,
    zero: dict[str, Any],
    by_sample: bool,
    adapt: Callable[[Any], None] | None = None,
) -> Any:
    """Return the Hugging Face model, sharded while it loads.

    Args:
        zero: the engine's DeepSpeed configuration.
        by_sample: compute attention by `attention.sdpa_by_sample`, which keeps the samples of a
            pack apart and joins tokens that are split over ranks.
        adapt: called with the model before it is returned.

    Raises:
        ConfigError: it cannot be loaded, or its files lack weights.
    """
    ours = ("torch_dtype", "dtype", "use_liger_kernel")
    kwargs = {n: v for n, v in component.kwargs.items() if n not in ours}
    extra: dict[str, Any] = {"dtype": training_dtype(component)}
    if component.name == MODEL:
        extra["output_loading_info"] = True
        if "gguf_file" not in kwargs:
            extra["use_safetensors"] = True
    component = replace(component, kwargs=kwargs)

    def load_or_refuse(load: Callable[[], Any]) -> Any:
        expected = "a Hugging Face causal language model: a directory, or a hub id and " + _NETWORK
        key = f"{component.key}.pretrained_model_name_or_path"
        with config_error(key, name_of(component), expected):
            return refuse_damage(load)

    load_or_refuse(lambda: refuse_quantised(component))
    # transformers would tie weights for which the files hold different values.
    ties = load_or_refuse(lambda: check_files(component)) if extra.get("use_safetensors") else []
    if ties:
        extra["tie_word_embeddings"] = False
    with engines.zero3_init(zero):
        model = load_or_refuse(lambda: check_whole(instantiate(component, **extra), ties))
        if adapt is not None:
            adapt(model)
    if by_sample:
        attend_by_sample(model)
    return model


def refuse_damage(load: Callable[[], Any]) -> Any:
    """Return `load()`.

    Raises:
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError

    with name_damage():
        try:
            return load()
        except SafetensorError as error:
            raise ValueError(f"a file of its weights is damaged: {first_line(error)}") from error


def check_whole(loaded: Any, ties: list[tuple[str, str]]) -> Any:
    """Return the model if its files held all weights, as transformers would initialise missing
    ones.

    Args:
        loaded: the result of `from_pretrained`, with or without its report.
        ties: pairs of parameters that must not be tied.

    Raises:
        ValueError: weights are missing, have other shapes, or are tied.
    """
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    missing = sorted({*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])})
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise ValueError(f"its files lack weights, or hold them in other shapes: {names}")
    for one, other in ties:
        if model.get_parameter(one) is model.get_parameter(other):
            raise ValueError(
                f"its files hold {one} and {other} with different values, and "
                f"{type(model).__name__} makes them one"
            )
    return model


def check_files(component: Component) -> list[tuple[str, str]]:
    """Compare the files with the configuration, alike on every rank, and return the pairs of
    weights that the configuration ties although the files hold different values."""
    from transformers import AutoConfig

    config, _ = AutoConfig.from_pretrained(
        name_of(component),
        return_unused_kwargs=True,
        **{n: v for n, v in component.kwargs.items() if n != "pretrained_model_name_or_path"},
    )
    files = WeightFiles(name_of(component), select_location(component))
    check_rope(config)
    model = empty_model(config, **select_trust(component))
    if not component.kwargs.get("ignore_mismatched_sizes"):
        check_shapes(files, model)
    return find_differing_ties(files, model)


def refuse_quantised(component: Component) -> None:
    """Refuse a model of the hub whose weights are quantised; `--check` does so for a directory.

    Raises:
        ValueError: says what to name instead.
    """
    how = getattr(config_of(component), "quantization_config", None)
    if how:
        kind = how.get("quant_method") if isinstance(how, dict) else how
        raise ValueError(f"its weights are quantised ({kind}); name one of bf16 or fp32 weights")


def check_rope(config: Any) -> None:
    """Refuse rotary positions whose frequencies depend on the longest sample of a batch.

    The gradient would depend on how a batch is cut, and a resumed run would differ.

    Raises:
        ValueError: the type is `dynamic`; says what to write.
    """
    for rope in _find_ropes(config):
        if "dynamic" in str(rope.get("rope_type", "")):
            raise ValueError(
                "its rotary positions are of type dynamic, so that gradients depend on how a batch "
                "is cut: write rope_type: default (or linear, yarn) with its rope_theta into "
                "rope_parameters of its config.json"
            )


def fix_rope(model: Any) -> str:
    """Fix the frequencies of a model of type `longrope` to those of its original length, and return
    a sentence about it, or an empty text for other models."""
    fixed = [rope for rope in _find_ropes(model.config) if rope.get("rope_type") == "longrope"]
    if not fixed:
        return ""
    for module in model.modules():
        for name in [n for n in vars(module).keys() | module._buffers if n.endswith("inv_freq")]:
            if name.endswith("original_inv_freq"):
                long = f"{name.removesuffix('original_inv_freq')}long_inv_freq"
                setattr(module, long, getattr(module, name))
    return (
        f"{model.config.name_or_path}: longrope keeps its table for up to "
        f"{find_longrope_length(model.config)} tokens in the whole run"
    )


def find_longrope_length(config: Any) -> int | None:
    """Return the number of tokens up to which a model of type `longrope` uses the table that a run
    keeps, or None for other models."""
    ropes = [rope for rope in _find_ropes(config) if rope.get("rope_type") == "longrope"]
    return int(ropes[0]["original_max_position_embeddings"]) if ropes else None


def check_model(cfg: RunConfig, component: Component, engine: Any, world: World) -> None:
    """Check the head, and packing, on the loaded model, and print what `fix_rope` changed."""
    if (said := fix_rope(engine.module.model)) and world.is_main:
        print(f"{component.key}: {said}", flush=True)
    packs = cfg.packed_sequence.packed_sequence_size > 0
    if not packs:
        _settle_attention(engine, world, component.key, may_have_packs(cfg))
    checks = [(probes.check_head, "a linear head")]
    if isinstance(engine.module, causal_lm.Student):
        checks.append((probes.check_layers, "a model that runs each layer once"))
    if packs:
        checks.append((probes.check_packing, "a model that keeps packed samples apart"))
    if packs and cfg.packed_sequence.share_prefixes:
        checks.append((probes.check_sharing, "a model whose attention is plain SDPA"))
    if world.sequence.size > 1:
        check_parts = partial(probes.check_parts, everyone=world.everyone)
        checks.append((check_parts, "a model whose attention is plain SDPA"))
    for check, expected in checks:
        with config_error(component.key, name_of(component), expected):
            check(engine, world.device, component.key)


def may_have_packs(cfg: RunConfig) -> bool:
    """Return whether code of the user's own makes samples or micro-batches, and so perhaps packs
    (`segment_lengths`), which are known when a step meets them."""
    data = [cfg.dataset, *cfg.validation_dataset.values()]
    loaders = (cfg.dataloader, cfg.validation_dataloader)
    return any(not each.name.startswith("ds_kd.data.") for each in data) or any(
        isinstance(each.kwargs.get("collate_fn"), Permitted) for each in loaders
    )


def _settle_attention(engine: Any, world: World, name: str, has_packs: bool) -> None:
    """Give a model that would compute samples wrongly by `attention.sdpa_by_sample` transformers'
    attention back, which serves where nothing is packed (a collective).

    Args:
        name: the model's name in messages.
        has_packs: whether there may be packs of the user's own, which a model that does not keep
            them apart then refuses.
    """
    model, is_split = engine.module.model, world.sequence.size > 1
    by_sample = is_by_sample(model)
    if not (has_packs or (by_sample and not is_split)):
        return
    remedy = "Return texts one by one, without segment_lengths"
    try:
        probes.check_packing(engine, world.device, name, remedy)
    except ValueError as error:
        attend_by_sample(model, False)
        refuse_packs(model, str(error))

    # Tokens that are split over ranks need our attention, and what it computes is probed later.
    if is_split and by_sample and not is_by_sample(model):
        attend_by_sample(model)
        kind = type(model).__name__
        refuse_packs(model, f"{name}: {kind} cannot keep packs apart over ranks. {remedy}.")


def has_rope(config: Any) -> bool:
    """Return whether a model computes rotary positions by settings of its configuration."""
    return any(_find_ropes(config))


def _find_ropes(config: Any) -> list[dict[str, Any]]:
    """Return the settings of rotary positions: one, or one for every kind of layer."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [ropes, *(part for part in ropes.values() if isinstance(part, dict))]


def training_dtype(component: Component) -> torch.dtype:
    """Return the dtype in which a model is loaded, trained and saved: that of the YAML, or of its
    config.json. A float16 model is trained in float32."""
    if (named := dtype_of(component)) is not None:
        return named
    config = config_of(component)
    kept = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return torch.bfloat16 if kept == torch.bfloat16 else torch.float32


def dtype_of(component: Component) -> torch.dtype | None:
    """Return the dtype that the YAML names, or None for `auto`."""
    name = str(component.kwargs.get("torch_dtype", component.kwargs.get("dtype", "auto")))
    return causal_lm.DTYPES.get(name.removeprefix("torch."))


def config_of(component: Component) -> Any:
    """Return the model's Hugging Face configuration.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig

    key = f"{component.key}.pretrained_model_name_or_path"
    expected = "a Hugging Face model with its config.json: a directory, or a hub id and " + _NETWORK
    expect_hub(name_of(component))
    with config_error(key, name_of(component), expected), name_damage(name_of(component)):
        return AutoConfig.from_pretrained(name_of(component), **select_location(component))

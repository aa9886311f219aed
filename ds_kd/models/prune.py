"""Depth pruning: make a student from some of a model's layers and all of its other weights.

All layers of a transformer read and write the same residual stream, so a model without some of them
still computes something, though badly. It starts far closer to the teacher than random weights:
embeddings, head and final norm fit at once, and the remaining layers only have to bridge the gaps.

Layers are chosen in one of two ways. Evenly spaced layers need no data; the first and the last are
kept, as they do what no other layer does (lift embeddings into the stream, prepare it for the
head). With calibration rows, `divergences_without` leaves out one layer at a time and measures the
change of the predictions, and the layers with the least effect are dropped. Block influence (Men et
al. 2024, arXiv:2403.03853), the angle by which a layer turns the stream, is cheaper to measure but
ranks worse: a later layer may depend on a small turn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import UserError, first_line
from ds_kd.files import give_usual_mode
from ds_kd.hub import expect_hub
from ds_kd.models.files.damage import name_damage
from ds_kd.models.files.file_names import write_config, write_tokenizer
from ds_kd.writing import write_directory

#: Rows that `divergences_without` uses. Each costs half a forward for every layer of the model.
CALIBRATION_SAMPLES = 3
#: Settings that list numbers of layers. Those with one value for each layer are found by their
#: length.
LISTS_OF_LAYERS = ("mlp_only_layers",)


class PruneError(UserError):
    """The command cannot be carried out; the message is for the user."""

    exit_code = 2


def space_evenly(keep: int, total: int) -> list[int]:
    """Return `keep` of `total` layers, first and last included: 6 of 30 → 0, 6, 12, 17, 23, 29."""
    if keep == 1:
        return [0]
    # round() takes halves to the even neighbour; adding 1/2 in integers always rounds them up.
    return [(2 * i * (total - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def choose_layers(text: str, total: int) -> list[int]:
    """Return the numbers of the layers that `--keep-layers` chooses among `total` layers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise PruneError(
            f"--keep-layers {text}: give a count such as 6, or layer numbers such as 0,5,11"
        ) from None
    if len(numbers) == 1:
        if not 1 <= numbers[0] <= total:
            raise PruneError(
                f"--keep-layers {text}: the model has {total} layers; give 1 to {total}"
            )
        return space_evenly(numbers[0], total)
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= total:
        raise PruneError(
            f"--keep-layers {text}: numbers must rise and lie between 0 and {total - 1}"
        )
    return numbers


def calibration_samples(source: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the first `CALIBRATION_SAMPLES` rows of a data file, tokenised.

    Raises:
        PruneError: no data set reads them, or no token of them is supervised.
    """
    from ds_kd.data.rows.detect import samples_of

    try:
        samples = list(samples_of(str(source), tokenizer, CALIBRATION_SAMPLES))
    except ValueError as error:
        raise PruneError(f"--calibration {source}: {first_line(error)}") from error
    if all(label == IGNORE_INDEX for sample in samples for label in sample["labels"]):
        raise PruneError(f"--calibration {source}: no token of its first rows is supervised")
    return samples


def divergences_without(model: Any, samples: list[dict[str, list[int]]]) -> list[float]:
    """Measure the effect of each layer on the predictions of supervised tokens.

    Args:
        model: a Hugging Face causal language model in eval mode.
        samples: `input_ids` and shifted `labels`, as the data sets give them.

    Returns:
        For each layer KL(model ‖ model without that layer) in nats, the mean over supervised
        tokens.
    """
    import torch

    total = model.config.get_text_config().num_hidden_layers
    parent, attribute = find_layers(model, total)
    layers = getattr(parent, attribute)
    sums, count = [0.0] * total, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        rows = [i for i, label in enumerate(sample["labels"]) if label != IGNORE_INDEX]
        with torch.no_grad(), _record_stream(layers) as seen:
            whole = _predictions(model, ids, rows)
        for left_out in range(total):
            with torch.no_grad(), _skip_layer(layers, left_out, seen[left_out]):
                q = _predictions(model, ids, rows)
            sums[left_out] += float((whole.exp() * (whole - q)).sum())
        count += len(rows)
    return [value / count for value in sums]


def _predictions(model: Any, ids: Any, rows: list[int]) -> Any:
    """Return log-probabilities `[rows, vocabulary]` at some positions of one sample."""
    import torch

    logits = model(input_ids=ids, use_cache=False).logits[0, rows]
    return torch.log_softmax(logits.float(), -1)


@contextmanager
def _record_stream(layers: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Record input and output of every layer, in their order."""
    seen: list[tuple[Any, Any]] = []

    def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output))

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _skip_layer(layers: Any, left_out: int, seen: tuple[Any, Any]) -> Iterator[None]:
    """Run the model without one layer, whose recorded input takes the place of its output. The
    layers before it need not run again."""
    stream, output = seen
    if isinstance(output, tuple):  # layers of some classes return more than the stream
        stream = (stream, *output[1:])
    idle = list(layers)[: left_out + 1]
    plain = [layer.forward for layer in idle]
    for layer in idle:
        layer.forward = lambda *args, **kwargs: stream
    try:
        yield
    finally:
        for layer, forward in zip(idle, plain, strict=True):
            layer.forward = forward


def choose_most_needed(divergences: list[float], keep: int) -> list[int]:
    """Return the numbers of the first, the last and the most needed layers, rising."""
    last = len(divergences) - 1
    ranked = sorted(range(last + 1), key=lambda i: (i not in (0, last), -divergences[i]))
    return sorted(ranked[:keep])


def _choose_by(samples: list[dict[str, list[int]]], model: Any, keep: int) -> list[int]:
    """Return `choose_most_needed` for these samples. The model is measured in float32, as many CPUs
    are slow in other dtypes, and gets its dtypes back."""
    import torch

    dtypes = [parameter.dtype for parameter in model.parameters()]
    for parameter in model.parameters():  # not its buffers: RoPE's would come back rounded
        parameter.data = parameter.data.to(torch.float32)
    layers = choose_most_needed(divergences_without(model, samples), keep)
    for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)
    return layers


def find_layers(model: Any, total: int) -> tuple[Any, str]:
    """Return the module that holds the list of layers, and the name of the list's attribute."""
    from torch.nn import ModuleList

    names = [n for n, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == total]
    # A mixture with as many experts as layers has lists of that length inside each layer.
    outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    if len(outermost) != 1:
        raise PruneError(
            f"{type(model).__name__}: expected one ModuleList of {total} layers, found "
            f"{outermost or 'none'}; only decoder-only models can be pruned"
        )
    parent, _, attribute = outermost[0].rpartition(".")
    return model.get_submodule(parent), attribute


def prune_config(config: Any, keep: list[int]) -> None:
    """Change `config` to describe the kept layers: their number and every setting given per
    layer."""
    total = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if key in LISTS_OF_LAYERS and value:
            setattr(config, key, [keep.index(layer) for layer in value if layer in keep])
        elif isinstance(value, (list, tuple)) and len(value) == total and "layer" in key:
            setattr(config, key, [value[layer] for layer in keep])
    config.num_hidden_layers = len(keep)


def prune(model: Any, keep: list[int]) -> None:
    """Drop all layers of `model` but `keep`, in place."""
    from torch.nn import ModuleList

    config = model.config.get_text_config()
    parent, attribute = find_layers(model, config.num_hidden_layers)
    layers = getattr(parent, attribute)
    setattr(parent, attribute, ModuleList(layers[i] for i in keep))
    for position, layer in enumerate(getattr(parent, attribute)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the key-value cache is addressed by it
                module.layer_idx = position
    prune_config(config, keep)


def load(source: str, dtype: str) -> tuple[Any, Any]:
    """Load the model and tokenizer of a directory or hub id.

    Raises:
        PruneError: they cannot be loaded, or the files lack weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    is_hub_id = source.count("/") <= 1 and not source.startswith(("/", "."))
    if not path.is_dir() and not is_hub_id:
        raise PruneError(f"--teacher {source}: no such directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PruneError(f"--teacher {source}: no config.json there; give a Hugging Face model")

    # A name that is no directory may be a hub id.
    expect_hub(source)
    try:
        with name_damage(source):
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "there" if path.is_dir() else "(no such directory, so the hub was asked)"
        reason = first_line(error)
        raise PruneError(
            f"--teacher {source}: no model with a tokenizer {where}: {reason}"
        ) from error
    try:
        with name_damage():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise PruneError(f"--teacher {source}: {first_line(error)}") from error

    model, found = loaded
    # transformers initialises what the files lack, and the student would be random there.
    if missing := sorted(found["missing_keys"]):
        raise PruneError(
            f"--teacher {source}: its files lack {len(missing)} weights of "
            f"{type(model).__name__}, such as {missing[0]}; give a whole causal language model"
        )
    return model.eval(), tokenizer


def logits(model: Any) -> Any:
    """Return the logits `[1, 16, vocabulary]` for fixed random tokens."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, size, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def verify(directory: Path, expected: Any) -> None:
    """Load the written model as a user would, and compare its logits with the pruned model's.

    They are equal if the same kernels are used, and differ by rounding otherwise. A lost or
    misplaced layer changes logits by their own size.

    Raises:
        PruneError: they differ by more than rounding.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    difference = (logits(model) - expected).abs().max().item()
    if not difference <= 1e-2 * expected.abs().max().item():
        raise PruneError(
            f"the written model differs from the pruned one by {difference:.3g} in logits: this "
            "architecture has settings per layer which prune.py does not know"
        )


def write_pruned(
    source: str,
    keep_layers: str,
    output: Path,
    dtype: str = "auto",
    calibration: Path | None = None,
) -> str:
    """Write a pruned model, verify it, and return a text that describes it.

    Args:
        source: directory or hub id of the model to prune.
        keep_layers: the number of layers to keep, or their numbers (`0,5,11`).
        output: directory to write; it appears whole or not at all.
        dtype: dtype of the weights, as `from_pretrained` takes it.
        calibration: a file of rows; if given, a number of layers keeps the most needed ones.

    Raises:
        PruneError: the model, the layers, the file or the output do not fit.
    """
    taken = f"--output {output} exists; remove it or give another name"
    if os.path.lexists(output):
        raise PruneError(taken)
    with ExitStack() as held:
        with _name_output(output, taken):
            unfinished = held.enter_context(write_directory(output))
        described = _prune_into(unfinished, source, keep_layers, dtype, calibration)
        with _name_output(output, taken):
            held.close()  # only a verified student gets the final name
    return described


@contextmanager
def _name_output(output: Path, taken: str) -> Iterator[None]:
    """Name the output in errors of this block; those of the teacher's files name themselves."""
    try:
        yield
    except FileExistsError as error:  # another process has written it meanwhile
        raise PruneError(taken) from error
    except OSError as error:
        raise PruneError(f"--output {output}: cannot be written ({error.strerror})") from error


def _prune_into(
    directory: Path, source: str, keep_layers: str, dtype: str, calibration: Path | None
) -> str:
    model, tokenizer = load(source, dtype)
    total, before = model.config.get_text_config().num_hidden_layers, model.num_parameters()
    keep = choose_layers(keep_layers, total)
    if calibration is not None and "," not in keep_layers:
        keep = _choose_by(calibration_samples(calibration, tokenizer), model, len(keep))
    prune(model, keep)

    model.save_pretrained(directory)
    give_usual_mode(directory)
    write_config(model.config, directory)
    write_tokenizer(tokenizer, directory)
    verify(directory, logits(model))
    after = model.num_parameters()
    return (
        f"kept layers {', '.join(map(str, keep))} of {total}\n"
        f"parameters: {before / 1e6:.1f} M → {after / 1e6:.1f} M ({after / before - 1:+.0%})"
    )

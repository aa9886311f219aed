"""Make a student by depth pruning: keep some of a model's layers and everything else.

    python launch/prune.py --teacher DIR_OR_HUB_ID --keep-layers 6 --output DIR
        six layers, evenly spaced, first and last included
    python launch/prune.py --teacher DIR_OR_HUB_ID --keep-layers 0,5,11 --output DIR
        these, counted from 0

A transformer's layers all read and write the same residual stream, so a model with some of them
missing still computes something, badly. It starts far nearer to the teacher than random weights do:
embeddings, head and final norm fit at once, and the kept layers have only to learn to bridge the
gaps. First and last layer do what no other does (lift embeddings into the stream, prepare it for
the head), hence the default spacing.

Works on any decoder-only model of transformers that keeps its layers in one ModuleList. The result
is loaded again and must give the pruned model's logits. Exit code 2 for a user's mistake.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.errors import first_line
from ds_kd.quiet import quiet

DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Settings that list layer numbers; those that list one value per layer are found by their length.
LISTS_OF_LAYERS = ("mlp_only_layers",)


class PruneError(Exception):
    """The command cannot be carried out; the message is for the user."""


def evenly_spaced(keep: int, total: int) -> list[int]:
    """`keep` of `total` layers, first and last included: 6 of 30 → 0, 6, 12, 17, 23, 29."""
    if keep == 1:
        return [0]
    # round() would send halves to the even neighbour; adding 1/2 in integers sends them all up.
    return [(2 * i * (total - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def choose_layers(text: str, total: int) -> list[int]:
    """Which layers `--keep-layers` means in a model of `total` layers."""
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
        return evenly_spaced(numbers[0], total)
    if numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= total:
        raise PruneError(
            f"--keep-layers {text}: numbers must rise and lie between 0 and {total - 1}"
        )
    return numbers


def find_layers(model: Any, total: int) -> tuple[Any, str]:
    """The module that holds the model's layers, and its attribute name there."""
    from torch.nn import ModuleList

    names = [n for n, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == total]
    # A mixture of experts with as many experts as layers has such lists inside the one meant.
    outermost = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    if len(outermost) != 1:
        raise PruneError(
            f"{type(model).__name__}: expected one ModuleList of {total} layers, found "
            f"{outermost or 'none'}; only decoder-only models can be pruned"
        )
    parent, _, attribute = outermost[0].rpartition(".")
    return model.get_submodule(parent), attribute


def prune_config(config: Any, keep: list[int]) -> None:
    """Make `config` describe the kept layers: their number and every setting given per layer."""
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    is_hub_id = source.count("/") <= 1 and not source.startswith(("/", "."))
    if not path.is_dir() and not is_hub_id:
        raise PruneError(f"--teacher {source}: no such directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PruneError(f"--teacher {source}: no config.json there; give a Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        where = "there" if path.is_dir() else "(no such directory, so the hub was asked)"
        reason = first_line(error)
        raise PruneError(
            f"--teacher {source}: no model with a tokenizer {where}: {reason}"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise PruneError(f"--teacher {source}: {first_line(error)}") from error
    return model.eval(), tokenizer


def logits(model: Any) -> Any:
    """`[1, 16, vocabulary]` for fixed random tokens."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, size, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def verify(directory: Path, expected: Any) -> None:
    """Load the result as a user would and compare.

    Same weights, same operations: the difference is 0 wherever loading picked the same kernels, and
    rounding otherwise. A lost or misplaced layer changes logits by their own size.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    difference = (logits(model) - expected).abs().max().item()
    if not difference <= 1e-2 * expected.abs().max().item():
        raise PruneError(
            f"the written model differs from the pruned one by {difference:.3g} in logits: this "
            "architecture has settings per layer which prune.py does not know"
        )


def run(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise PruneError(f"--output {args.output} exists; remove it or give another name")
    partial = args.output.with_name(args.output.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise PruneError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    try:
        _prune_into(partial, args)
        partial.rename(args.output)  # only a whole and checked student ever carries the final name
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {args.output}")


def _prune_into(directory: Path, args: argparse.Namespace) -> None:
    quiet()
    model, tokenizer = load(args.teacher, DTYPES[args.dtype])
    total, before = model.config.get_text_config().num_hidden_layers, model.num_parameters()
    keep = choose_layers(args.keep_layers, total)
    prune(model, keep)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    verify(directory, logits(model))
    print(f"kept layers {', '.join(map(str, keep))} of {total}")
    after = model.num_parameters()
    print(f"parameters: {before / 1e6:.1f} M → {after / 1e6:.1f} M")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="prune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="Hugging Face model: directory or hub id")
    parser.add_argument(
        "--keep-layers", required=True, metavar="N|A,B,…", help="how many layers, or which"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto keeps the teacher's"
    )
    try:
        run(parser.parse_args(argv))
    except PruneError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

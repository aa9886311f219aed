"""Measure a benchmark: seconds, peak memory, the matrix products that cannot be avoided,
models of other sizes, samples of real text."""

from __future__ import annotations

import functools
import itertools
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def device() -> torch.device:
    """Return the accelerator, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], Any]) -> float:
    """Return the seconds of one call, the accelerator's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the highest memory while `function` runs, above that before: the allocator's on a GPU,
    the process's resident set on a CPU."""
    reset_peak()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")
    function()
    return max(0, read_peak() - before)


def reset_peak() -> None:
    """Make the highest memory start again from the present."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def read_peak() -> int:
    """Return the highest memory since `reset_peak`, in bytes: what the allocator gave out on a GPU,
    the process's resident set on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    """Return a size that the kernel tells of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- the ideal -----------------------------------------------------------------------------------


@functools.cache
def linear_shapes(path: Path) -> tuple[Counter, tuple[int, int]]:
    """Return ((in, out) of each linear layer but the head → their number, (hidden, vocabulary))."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = model.get_output_embeddings()
    shapes = Counter(
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return shapes, (head.in_features, head.out_features)


class Ideal:
    """Seconds of a step's matrix products alone.

    Those of linear layers and heads are measured here, at the models' shapes; attention's own are
    counted (half of length², as it is causal) and take the best rate among those measured. Every
    pointwise operation and the optimizer are left out, so that nothing reaches an efficiency of 1.
    Each call measures anew, as the rate of a shared machine changes from minute to minute.
    """

    def __init__(self, teacher: Path, student: Path, dtype: torch.dtype):
        self.teacher, self.student, self.dtype = teacher, student, dtype
        self._measured: dict[tuple[int, int, int, str], float] = {}

    def seconds(self, lengths: list[int], rows: int, micro_batches: int) -> float:
        """Return the seconds of a step on samples of these lengths, with so many supervised tokens
        and micro-batches."""
        total, tokens = 0.0, sum(lengths)
        self._measured.clear()
        for path, kinds in ((self.teacher, ("forward",)), (self.student, _STUDENT)):
            shapes, (hidden, vocab) = linear_shapes(path)
            each = max(1, tokens // micro_batches)
            for (n_in, n_out), count in shapes.items():
                total += sum(
                    count * micro_batches * self._product(each, n_in, n_out, k) for k in kinds
                )
            chunk = min(rows, 512) if device().type == "cpu" else min(rows, 4096)
            total += sum(rows / chunk * self._product(chunk, hidden, vocab, k) for k in kinds)
            config = _config(path)
            width = config.num_attention_heads * (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            # Scores and their product with the values; both twice again backward.
            products = 2 * sum(n * n for n in lengths) * width * config.num_hidden_layers
            total += products * (3 if len(kinds) > 1 else 1) / self._best_rate()
        return total

    def _best_rate(self) -> float:
        """Return the most floating-point operations per second among those measured."""
        return max(2 * m * i * o / taken for (m, i, o, _), taken in self._measured.items())

    def _product(self, rows: int, n_in: int, n_out: int, kind: str) -> float:
        """Return the seconds of one product, measured once in a call for each shape and kind."""
        key = (rows, n_in, n_out, kind)
        if key not in self._measured:
            x = torch.randn(rows, n_in, dtype=self.dtype, device=device())
            w = torch.randn(n_out, n_in, dtype=self.dtype, device=device())
            y = torch.randn(rows, n_out, dtype=self.dtype, device=device())
            # Without a graph, into what is there already: the product and nothing else.
            run = {
                "forward": lambda: torch.mm(x, w.t(), out=y),
                "input": lambda: torch.mm(y, w, out=x),
                "weight": lambda: torch.mm(y.t(), x, out=w),
            }[kind]
            seconds(run)
            self._measured[key] = min(seconds(run) for _ in range(3))
        return self._measured[key]


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path).get_text_config()


_STUDENT = ("forward", "input", "weight")


# ---- models and text -----------------------------------------------------------------------------


def with_vocabulary(path: Path, vocab: int, directory: Path) -> Path:
    """Save the model with a head and embedding of another size, and return its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if AutoConfig.from_pretrained(path).vocab_size == vocab:
        return path
    out = directory / f"{path.name}-{vocab}"
    if not (out / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(vocab, mean_resizing=False)
        model.save_pretrained(out)
    return out


def text_samples(tokenizer: Any, count: int, length: int, masked: float) -> list[dict[str, Any]]:
    """Return consecutive pieces of Python's own documentation; the first part of each is not
    supervised."""
    ids: list[int] = tokenizer(" ".join(topics_of_python().values()))["input_ids"]
    made = []
    for k in range(count):
        start = k * length % (len(ids) - length - 1)
        labels = ids[start + 1 : start + length + 1]
        prompt = round(masked * length)
        made.append(
            {
                "input_ids": ids[start : start + length],
                "labels": [-100] * prompt + labels[prompt:],
                "sample_id": str(k),
            }
        )
    return made


def squad_samples(tokenizer: Any, file: Path, count: int) -> list[dict[str, Any]]:
    """Return samples of real rows, in the file's order."""
    from ds_kd.data.squad import make_squad_dataset

    rows = make_squad_dataset(tokenizer, dataset_name=str(file), limit_dataset_samples=count)
    return [dict(rows[k]) for k in range(len(rows))]


def chat_samples(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Questions and answers of some 60 tokens behind one system prompt of 400."""
    from ds_kd.data.labels import shift

    names = list(topics_of_python())
    rules = tokenizer(" ".join(topics_of_python().values())[:4000])["input_ids"][:400]
    made = []
    for k in range(count):
        name = names[k % len(names)]
        text = " ".join(topics_of_python()[name].split()[:40])
        asked = tokenizer(f"\nQuestion {k}: what is said about {name}?\n")["input_ids"]
        answer = [*tokenizer(text)["input_ids"][:48], tokenizer.eos_token_id]
        mask = [False] * (len(rules) + len(asked)) + [True] * len(answer)
        made.append({**shift(rules + asked + answer, mask), "sample_id": str(k)})
    return made


def topics_of_python() -> dict[str, str]:
    """Python's own documentation by topic."""
    from pydoc_data import topics

    return dict(topics.topics)


def lengths_in(samples: list[dict[str, Any]], shares: bool) -> list[int]:
    """Return the tokens of each sample; with `shares` of each part that is computed once."""
    if not shares:
        return [len(sample["input_ids"]) for sample in samples]
    import numpy as np

    from ds_kd.data.prefixes import lay_out

    return lay_out([np.array(sample["input_ids"]) for sample in samples]).lengths


def tokens_in(samples: list[dict[str, Any]]) -> tuple[int, int]:
    """Return (tokens, supervised tokens)."""
    return (
        sum(len(s["input_ids"]) for s in samples),
        sum(label != -100 for s in samples for label in s["labels"]),
    )


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the logarithms, by least squares."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    return sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True)) / sum(
        (x - mx) ** 2 for x in lx
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return tables, one for each sequence of rows that have the same keys."""
    tables = []
    for names, same in itertools.groupby(rows, key=list):
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(_shown(row[name]) for name in names) + " |" for row in same]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Print the table; with `output` keep it as .json and .md too."""
    table = markdown(rows)
    print(table, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        output.with_suffix(".md").write_text(table + "\n")

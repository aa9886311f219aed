"""The work of the on-policy step: what every contender is given, and models and rows, given or
made."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.gpu import VOCABULARY, make

LEARNING_RATE = 1e-6
ENDLESS = 1_000_000  # steps; the gate ends the loop
#: Words stand for the turns' headers.
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w0 {{ m['content'] }} <eos> "
    "{% else %}w1 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w0 {% endif %}"
)


@dataclass(frozen=True)
class Job:
    """The work of every contender.

    Args:
        teacher, student: Hugging Face directories.
        rows: JSON lines with `messages`, whose last one is an answer.
        samples: prompts of an optimizer step.
        micro_batch: samples of a forward pass.
        new_tokens: the limit of an answer.
        dtype: `fp32` or `bf16`.
        place: a directory of this contender's own.
        opsd: the folder of DeepSpeedExamples' trainer.
    """

    teacher: Path
    student: Path
    rows: Path
    samples: int
    micro_batch: int
    new_tokens: int
    dtype: str
    place: Path
    opsd: Path | None = None

    @property
    def micro_batches(self) -> int:
        return self.samples // self.micro_batch


def read(job: Job) -> list[dict[str, Any]]:
    """Return the job's rows."""
    return [json.loads(line) for line in job.rows.read_text("utf-8").splitlines()]


def pad_left(prompts: Sequence[list[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return (tokens, attention mask)."""
    length = max(map(len, prompts))
    ids = [[padding] * (length - len(p)) + p for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def take(rows: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row that its mask holds."""
    return [row[kept.bool()].tolist() for row, kept in zip(rows, mask, strict=True)]


def make_models(directory: Path, is_tiny: bool) -> tuple[Path, Path]:
    """Save a teacher and a student of random weights with a tokenizer, and return their
    directories: of 3 B and 1 B at the shapes of Llama 3.2, or tiny ones."""
    from tests import tiny

    if is_tiny:
        paths = [
            tiny.llama(directory / name, layers, hidden=32, seed=layers)
            for name, layers in (("teacher", 3), ("student", 2))
        ]
    else:
        paths = [make(name, directory, False) for name in ("teacher", "student")]
    for path in paths:
        tokenizer = tiny.tokenizer(path, tiny.VOCAB if is_tiny else VOCABULARY)
        tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(path)
        _set(path, eos_token_id=1, pad_token_id=2, bos_token_id=None)
    return paths[0], paths[1]


def _set(path: Path, **values: int | None) -> None:
    """Write values into a model's two files of settings, if they are there."""
    for file in (path / "config.json", path / "generation_config.json"):
        if file.is_file():
            text = json.dumps({**json.loads(file.read_text("utf-8")), **values})
            file.unlink()  # it may be a link
            file.write_text(text, "utf-8")


def make_rows(count: int, words: int) -> list[dict[str, Any]]:
    """Return conversations of random words: questions of this length, and short answers."""
    drawn = random.Random(0)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(drawn.choices(_words(), k=words))},
                {"role": "assistant", "content": "w2 w3"},
            ]
        }
        for _ in range(count)
    ]


def _words() -> list[str]:
    return [f"w{k}" for k in range(2, 90)]


def read_rows(file: Path, count: int, longest: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first conversations whose question has at most so many tokens, each up to its
    first answer; again from the beginning if there are too few.

    Raises:
        ValueError: there is none.
    """
    rows = []
    for line in file.read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        first = next((k for k, m in enumerate(messages) if m["role"] == "assistant"), 0)
        asked = tokenizer.apply_chat_template(
            messages[:first], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        if first and len(asked["input_ids"]) <= longest:
            rows.append({"messages": messages[: first + 1]})
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{file}: no row whose first question has at most {longest} tokens")
    return [rows[k % len(rows)] for k in range(count)]


def cut(path: Path, layers: int, directory: Path) -> Path:
    """Save a model's first layers with its embeddings, head and tokenizer, and return their
    directory."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    out = directory / f"{path.name}-{layers}"
    AutoModelForCausalLM.from_pretrained(path, config=config).save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return out


def without_end(path: Path, directory: Path) -> Path:
    """Return a directory with the same model, in which the last of the tokenizer's added tokens
    ends a text: one that a model hardly ever writes, so that every text has the same length."""
    from transformers import AutoTokenizer

    out = directory / f"{path.name}-endless"
    out.mkdir()
    for file in path.iterdir():
        (out / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(path)
    number, token = max(tokenizer.added_tokens_decoder.items())
    tokenizer.eos_token = tokenizer.pad_token = str(token)
    for file in out.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(out)
    _set(out, eos_token_id=number, pad_token_id=number)
    return out

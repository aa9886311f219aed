"""Tiny real models, tokenizers and samples, made on the spot: no network, no files kept."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB = 96


def tokenizer(path: Path, size: int = VOCAB, words: list[str] | None = None):
    """A word-level tokenizer with eos and pad, saved at `path`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = words or ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(size - 3))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.save_pretrained(path)
    return fast


def llama(
    path: Path,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = VOCAB,
    tie: bool = True,
    seed: int = 0,
    heads: tuple[int, int] = (4, 2),
) -> Path:
    """A random Llama and the tokenizer above, saved at `path`; `heads` are those of queries, and of
    keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        initializer_range=0.2,  # wide enough that models differ clearly
        pad_token_id=2,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer(path)
    return path


def weightless(path: Path, config: str = "{}") -> None:
    """A config.json, and a file of weights that is whole and holds none, at `path`."""
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def squad_rows(count: int) -> str:
    """JSON lines in SQuAD's schema, of the tokenizer's words."""
    rows = [
        {"context": f"w{i} w5 w9", "question": "w7 w8", "answers": {"text": [f"w{i} w3"]}}
        for i in range(count)
    ]
    return "\n".join(json.dumps(row) for row in rows)


def count_up(row: dict, index: int) -> dict:
    """A sample of a row, as a function of a module makes it."""
    return {"input_ids": [row["n"]]}


def samples(count: int, seed: int = 0, masked: tuple[int, ...] = ()) -> list[dict]:
    """Random token samples of unequal lengths and label counts; those in `masked` have no label at
    all."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(5, 14, (1,), generator=generator))
        ids = torch.randint(3, VOCAB, (length + 1,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        labels = [-100] * prompt + ids[1 + prompt :]
        if i in masked:
            labels = [-100] * length
        made.append({"input_ids": ids[:-1], "labels": labels, "sample_id": f"s{i}"})
    return made


def branches(rows: list[dict]) -> list[dict]:
    """The samples behind common beginnings: one of all, one of every three, and one sample twice.

    The beginning that three have in common is supervised in two of them.
    """
    made = []
    for k, row in enumerate(rows):
        near = rows[k - k % 3]
        begin = rows[0]["input_ids"][:3] + near["input_ids"][:4]
        ids = begin + row["input_ids"]
        labels = [-100] * 4 + ids[5 : len(begin) + 1] + row["labels"]
        if k % 3 == 1 or all(label == -100 for label in row["labels"]):
            labels = [-100] * len(begin) + row["labels"]
        made.append({"input_ids": ids, "labels": labels, "sample_id": row["sample_id"]})
    return [*made[:-1], {**made[0], "sample_id": made[-1]["sample_id"]}]


def reference_means(student, teacher, rows: list[dict], alpha: float, temperature: float):
    """The step's loss as the formula says it, one sample at a time, full logits, plain PyTorch.

    Returns (weighted loss, CE, KD), each the mean over all valid tokens.
    """
    ce = kd = 0.0
    n = sum(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        z_s = student(input_ids=ids, use_cache=False).logits[0].float()
        with torch.no_grad():
            z_t = teacher(input_ids=ids, use_cache=False).logits[0].float()
        for i in (labels != -100).nonzero().flatten().tolist():
            ce = ce - torch.log_softmax(z_s[i], -1)[labels[i]]
            log_p, log_q = (torch.log_softmax(z[i] / temperature, -1) for z in (z_t, z_s))
            kd = kd + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    return ((1 - alpha) * ce + alpha * kd) / n, ce / n, kd / n

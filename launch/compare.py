"""Say what a distillation run achieved: its log's numbers, and a question put to both models.

    python launch/compare.py --teacher DIR --before DIR --student DIR \\
        --data validation.jsonl --metrics metrics.jsonl

`--before` is the student the run started from, `--student` the one it wrote. Exit code 2 where a
file is missing or holds no validation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.quiet import quiet

NEW_TOKENS = 40
SHOWN = (
    ("val_ce_loss", "CE, nats per token"),
    ("val_kd_loss", "KD, nats per token"),
    ("val_kl_at_t1", "KL at T = 1, nats"),
    ("val_top1_agreement", "top-1 agreement"),
)


class CompareError(Exception):
    """Something to compare is missing; the message is for the user."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CompareError(f"{path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise CompareError(f"{path}, line {number}: not JSON: {error.msg}") from error
    return records


def summary(records: list[dict[str, Any]]) -> list[str]:
    """Validation before → after, and speed, as lines to print."""
    validations = [record for record in records if "val_loss" in record]
    if len(validations) < 2:
        raise CompareError("the log holds fewer than two validations; nothing to compare")
    first, last = validations[0], validations[-1]
    lines = [f"validation                before  →  after (step {first['step']} → {last['step']})"]
    for key, label in SHOWN:
        if key in first and key in last:
            was, now = first[key], last[key]
            is_loss = key != "val_top1_agreement" and was
            fell = f"   {100 * (now / was - 1):+.0f} %" if is_loss else ""
            lines.append(f"  {label:<20} {was:9.4f}  → {now:8.4f}{fell}")
    speeds = [record["tokens_per_sec"] for record in records if "tokens_per_sec" in record]
    if speeds:
        median = statistics.median(speeds)
        lines.append(f"speed: {median:.0f} tokens/s (median of {len(speeds)} steps)")
    return lines


def answer(directory: Path, row: dict[str, Any]) -> str:
    """The model's greedy answer to `row`, asked as in training (`ds_kd/data/squad.py`)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = f"Context: {row['context']} Question: {row['question']} Answer: "
    if tokenizer.chat_template is None:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        turn = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def show(label: str, text: str) -> None:
    first, rest = f"  {label:<16}", " " * 18
    print(textwrap.fill(text or "(nothing)", 110, initial_indent=first, subsequent_indent=rest))


def run(args: argparse.Namespace) -> None:
    models = {"teacher": args.teacher, "student before": args.before, "student after": args.student}
    for directory in filter(None, models.values()):
        if not (directory / "config.json").is_file():
            raise CompareError(f"{directory}: no Hugging Face model there")
    rows = read_lines(args.data)
    if not 0 <= args.row < len(rows):
        raise CompareError(f"--row {args.row}: {args.data} has {len(rows)} rows")
    row = rows[args.row]
    try:
        expected = next(iter(row["answers"]["text"]), "")
        question, _ = row["question"], row["context"]
    except (KeyError, TypeError):
        raise CompareError(
            f"--data {args.data}, row {args.row}: expected SQuAD's columns context, question and "
            f"answers.text; found {', '.join(row)}"
        ) from None
    print("\n".join(summary(read_lines(args.metrics))))
    print(f"student: {args.student}\n")
    print(f"a held-out question, answered greedily in at most {NEW_TOKENS} tokens")
    quiet()
    show("question", question)
    show("expected", expected)
    for label, directory in models.items():
        if directory is not None:
            show(label, answer(directory, row))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True, help="the distilled model")
    parser.add_argument("--before", type=Path, help="the model distillation started from")
    parser.add_argument("--data", type=Path, required=True, help="held-out rows, SQuAD's schema")
    parser.add_argument("--metrics", type=Path, required=True, help="the run's metrics.jsonl")
    parser.add_argument("--row", type=int, default=0, help="of --data, to ask about; from 0")
    try:
        run(parser.parse_args(argv))
    except CompareError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

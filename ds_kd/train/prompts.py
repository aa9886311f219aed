"""The prompt of a sample: what stands before the answer that a student is to write itself."""

from __future__ import annotations

from typing import Any

from ds_kd.data.labels import IGNORE_INDEX, IS_PROMPT


def prompt_of(sample: dict[str, Any], opening: list[int]) -> list[int] | None:
    """Return the tokens after which the answer of a sample begins, or None if there is no answer.

    This is what precedes its last run of supervised tokens: in a conversation all but the last turn
    of the assistant. If the header of that turn is supervised, it belongs to the prompt.

    Args:
        sample: `input_ids` and shifted `labels`, or a prompt alone.
        opening: the result of `find_opening`.
    """
    length = int(sample.get("num_tokens", len(sample["input_ids"])))
    ids, labels = list(sample["input_ids"][:length]), list(sample["labels"][:length])
    if sample.get(IS_PROMPT):
        return ids
    end = next((k for k in range(length, 0, -1) if labels[k - 1] != IGNORE_INDEX), 0)
    if end == 0:
        return None
    start = next((k for k in range(end, 0, -1) if labels[k - 1] == IGNORE_INDEX), 0)
    begins = labels[start : start + len(opening)] == opening
    return ids[: start + 1] + (opening if begins else [])


def find_opening(tokenizer: Any) -> list[int]:
    """Return the tokens with which the chat template opens a turn of the assistant, none without a
    template or if it has no such tokens."""
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    turn = [{"role": "user", "content": "a"}]
    try:
        short, long = (
            list(
                tokenizer.apply_chat_template(
                    turn, add_generation_prompt=opens, tokenize=True, return_dict=True
                )["input_ids"]
            )
            for opens in (False, True)
        )
    except Exception:  # jinja's errors, and any that a template raises
        return []
    return long[len(short) :] if long[: len(short)] == short else []


def join_rollout(prompt: list[int], tokens: list[int], name: str) -> dict[str, Any]:
    """Return the sample of a prompt and what the student wrote after it, all of it supervised.

    The token that ends a text is among its tokens, so that it is learnt even if it also pads; a
    text that was cut has none. Nothing of an empty text is supervised, so one token is enough.
    """
    if not tokens:
        return {"input_ids": prompt[:1], "labels": [IGNORE_INDEX], "sample_id": name}
    labels = [IGNORE_INDEX] * (len(prompt) - 1) + tokens
    return {"input_ids": prompt + tokens[:-1], "labels": labels, "sample_id": name}

"""The tasks that need no file of the user's: HellaSwag, SQuAD, perplexity and the distance to a
teacher."""

from __future__ import annotations

import re
from typing import Any

from ds_kd.data.hellaswag import label_of
from ds_kd.data.rows.source import text_of
from ds_kd.data.squad import answers_of, prompt_of
from ds_kd.evaluate.tasks.kinds import Distances, Generation, MultipleChoice, Perplexity, Task

_ARTEFACTS = re.compile(r"\[.*?\]")  # of WikiHow, such as [header]


def _read_hellaswag(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Return context, endings and label in the wording of lm-evaluation-harness."""
    right = label_of(row)
    context = text_of(row, "ctx")
    if all(isinstance(row.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [text_of({"an ending": ending}, "an ending") for ending in row["endings"]]
    return _clean(context), [_clean(ending) for ending in endings], right


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return _ARTEFACTS.sub("", text).replace("  ", " ")


def _read_squad(row: dict[str, Any]) -> tuple[str, list[str]]:
    prompt = prompt_of(text_of(row, "context"), text_of(row, "question"))
    return prompt, answers_of(row)


_TASKS: tuple[Task, ...] = (
    MultipleChoice("hellaswag", ("ctx", "endings", "label"), _read_hellaswag),
    Generation("squad", ("context", "question", "answers"), _read_squad, asks_for_none=True),
    Perplexity("perplexity"),
    Distances("kl"),
)
BUILTIN: dict[str, Task] = {task.name: task for task in _TASKS}

#: Plain text is predicted from its first token to its last, in windows.
PLAIN_TEXT = Perplexity("perplexity", ("text",), lambda row: ("", text_of(row, "text")))

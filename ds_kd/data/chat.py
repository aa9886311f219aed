"""Tokenise text, and mark the supervised tokens.

In plain form the tokens of the answer and EOS after them are supervised. In chat form all tokens
that an assistant turn adds to the rendered conversation are (header and closing tokens included),
or those that the template marks with `{% generation %}`. No token of an empty answer or turn is.
This module imports no torch, as the check of a config imports it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_kd.data.labels import shift
from ds_kd.data.rows.declaration import data_set
from ds_kd.data.rows.source import make_samples

#: Roles that templates know; any other one needs `chat_template`.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_OTHER_WORDS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenize_prompt_answer(
    tokenizer: Any, prompt: str, answer: str
) -> tuple[list[int], list[bool]]:
    """Tokenise running text; all tokens that hold some of the answer are supervised, and EOS.

    The text is tokenised once, as the model will read it. If a BPE merges the prompt's last space
    into the answer's first token, that token belongs to the answer. EOS ends the answer, so that
    the student learns to stop. No token of an empty answer is supervised.

    Args:
        tokenizer: the offsets of a fast one tell which characters each token holds. With a slow
            one, the answer begins after the tokens that the text and its prompt alone share.
        prompt, answer: texts, joined unchanged.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt + answer, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        # Special tokens in front end at 0. A tokenizer that trims offsets gives one of spaces alone
        # no width, but its end.
        mask = [end > len(prompt) for _, end in offsets]
    else:
        ids = list(tokenizer(prompt + answer)["input_ids"])
        alone = tokenizer(prompt.rstrip())["input_ids"]
        same = [one == other for one, other in zip(ids, alone, strict=False)]
        start = [*same, False].index(False)
        mask = [i >= start for i in range(len(ids))]

    # EOS may be there already, or the tokenizer may have none.
    if not answer.strip():
        return ids, [False] * len(ids)
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids, mask
    if ids[-1] == eos:
        return ids, [*mask[:-1], True]
    return [*ids, eos], [*mask, True]


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of running text that goes on: without an EOS that the tokenizer appends."""
    ids, eos = list(tokenizer(prompt)["input_ids"]), tokenizer.eos_token
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id  # one alone may begin the text, too
    return ids[:-1] if ends and not prompt.endswith(eos) else ids


def conversation_of(
    row: dict[str, Any],
    any_role: bool = False,
    column: str = "messages",
    needs_answer: bool = True,
) -> tuple[list[dict], list | None]:
    """Return a row's messages and its tools, or None in place of tools.

    Content parts of text are joined. Null values are dropped, as a table fills absent keys with
    them. JSON texts of messages, tools and a call's arguments are decoded. The text of a `system`
    column becomes the first turn of a conversation that has no system turn.

    Args:
        row: has `messages`, perhaps `tools` and `system`.
        column: the column of the messages.
        any_role: accept roles that `ROLES` does not list.
        needs_answer: refuse a conversation without an assistant turn.

    Raises:
        ValueError: it is no conversation, or has no assistant turn.
    """
    given = _decode_json(row[column])  # in CSV it is a text
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
        raise ValueError(f"{column} is {given!r:.80}, expected a list of {{role, content}}")
    messages = [_read_message(message, any_role) for message in given]
    system = row.get("system")  # a column of its own in ShareGPT's data
    has_turn = any(message["role"] == "system" for message in messages)
    if isinstance(system, str) and system.strip() and not has_turn:
        messages.insert(0, {"role": "system", "content": system})
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            "a conversation without an assistant turn has nothing to learn; for a student that "
            "writes the answers (rollouts) ds_kd.data.text.make_prompt_dataset with column: "
            f"{column} reads it"
        )
    tools = _decode_json(_drop_nulls(row.get("tools")))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {tools!r:.80}, expected a list of mappings")
    return messages, tools or None


def _read_message(given: dict[str, Any], any_role: bool) -> dict[str, Any]:
    message = _drop_nulls(given)
    if "from" in message and "value" in message and "role" not in message:  # ShareGPT's words
        role, content = message["from"], message["value"]
        message = {"role": _OTHER_WORDS.get(role, role), "content": content}
    role, calls = message.get("role"), message.get("tool_calls")
    if not isinstance(role, str) or not (calls or "content" in message):
        raise ValueError(f"every message needs a `role` and a `content`, one is {given!r:.80}")
    if role not in ROLES and not any_role:
        other = _OTHER_WORDS.get(role.lower(), role.lower() if role.lower() in ROLES else None)
        hint = f"write {other}" if other else "give chat_template: one that knows it"
        raise ValueError(f"role is {role!r}, expected {', '.join(ROLES)}; {hint}")
    message["content"] = _join_text(message.get("content", ""))
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"tool_calls is {calls!r:.80}, expected a list of mappings")
        message["tool_calls"] = [_decode_call(call) for call in calls]
    return message


def _join_text(content: Any) -> str:
    """Return the content of a message as text, the texts of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content is {content!r:.80}, expected text or parts of text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise ValueError(f"a content part is {part!r:.80}, expected {{type: text, text: …}}")
        texts.append(text)
    return "".join(texts)


def _decode_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, which templates then write as JSON."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _decode_call(inner)}
    return {**call, "arguments": _decode_json(call["arguments"])} if "arguments" in call else call


def _decode_json(value: Any) -> Any:
    """Return the mapping or list of a JSON text, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, (dict, list)) else value


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _drop_nulls(v) for name, v in value.items() if v is not None}
    return [_drop_nulls(v) for v in value] if isinstance(value, list) else value


def tokenize_chat(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict] | None = None
) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation by the chat template; the assistant's turns are supervised.

    Args:
        messages, tools: the result of `conversation_of`.

    Raises:
        ValueError: the template refuses the conversation, leaves tool calls out, or rewrites
            earlier turns so that their tokens cannot be found.
    """
    template = tokenizer.get_chat_template(tools=tools)
    if any(m.get("tool_calls") for m in messages) and "tool_calls" not in template:
        raise ValueError(
            "the chat template leaves tool_calls out, so the turn would be learnt empty; give "
            "chat_template: one that renders them"
        )
    if _GENERATION.search(template):
        return _tokenize_marked(tokenizer, messages, tools, template)
    ids = list(_render(tokenizer, messages, tools)["input_ids"])
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and _has_content(message):
            start, end = (
                _count_prefix(tokenizer, messages[:k], tools, ids) for k in (turn, turn + 1)
            )
            mask[start:end] = [True] * (end - start)
    return ids, mask


def _tokenize_marked(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict] | None, template: str
) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation by a template with `{% generation %}`; tokens that hold some of what
    is marked are supervised.

    transformers' own mask asks for the tokens of the first and the last character alone. Where one
    of them has none, as a space may if offsets are trimmed, it leaves out this turn and all that
    follow, or supervises everything up to the end.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # which is said to return one text
    with _explain_refusal():
        (text,), (spans,) = render(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    # Turns are known by their order; a template may mark some of them alone.
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(turns) == len(spans):
        spans = [span for span, turn in zip(spans, turns, strict=True) if _has_content(turn)]
    marked = bytearray(len(text))
    for first, last in spans:
        marked[first:last] = b"\1" * (last - first)

    # A token whose spaces were trimmed away has no width, and stands at their end.
    mask = [1 in marked[min(start, end - 1) : end] for start, end in out["offset_mapping"]]
    return list(out["input_ids"]), mask


def cut_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation up to where the assistant's next turn begins: without its last turn if
    that is the assistant's.

    Raises:
        ValueError: nothing precedes that turn.
    """
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not before:
        raise ValueError("nothing precedes the assistant's turn, so there is no prompt")
    return before


def _has_content(message: dict[str, Any]) -> bool:
    """Return whether a turn has anything to learn: a text, a call, or another field."""
    return any(
        value.strip() if isinstance(value, str) else value
        for name, value in message.items()
        if name not in ("role", "name")
    )


def _render(tokenizer: Any, messages: list[dict], tools: list[dict] | None, **kwargs: Any) -> Any:
    with _explain_refusal():
        return tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **kwargs)


@contextmanager
def _explain_refusal() -> Iterator[None]:
    """Turn any error of a chat template in this block into a ValueError."""
    try:
        yield
    # Some templates refuse a system turn or two user turns in a row; others fail on absent values,
    # or are no templates at all.
    except Exception as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def tokenize_open_turn(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict] | None = None
) -> list[int]:
    """Return the tokens of a conversation up to where the assistant's next turn begins.

    Raises:
        ValueError: the template refuses the conversation.
    """
    return list(_render(tokenizer, messages, tools, add_generation_prompt=True)["input_ids"])


def _count_prefix(
    tokenizer: Any, messages: list[dict], tools: list[dict] | None, ids: list[int]
) -> int:
    """Return the number of tokens that the first messages take in the whole conversation."""
    if not messages:
        return 0
    part = list(_render(tokenizer, messages, tools)["input_ids"])
    # A template may close a conversation with a token that a further message replaces.
    if part and part[-1] == tokenizer.eos_token_id and ids[: len(part)] != part:
        part = part[:-1]
    if ids[: len(part)] != part:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} renders the first {len(messages)} "
            "messages differently inside the whole conversation, so the assistant's tokens cannot "
            "be found; use a template with {% generation %} marks"
        )
    return len(part)


def with_template(tokenizer: Any, chat_template: str | None) -> Any:
    """Return the tokenizer with another chat template, as a copy: other data sets have it too.

    Args:
        chat_template: Jinja text, or the path of a file that holds it; None keeps the tokenizer's.

    Raises:
        ValueError: it is neither.
    """
    if chat_template is None:
        return tokenizer
    is_text = "{" in chat_template
    if not is_text and not Path(chat_template).is_file():
        # A mistyped path is valid Jinja, and would render every conversation to itself.
        raise ValueError(f"chat_template {chat_template!r} is neither a file nor Jinja text")
    changed = copy.copy(tokenizer)
    changed.chat_template = chat_template if is_text else Path(chat_template).read_text("utf-8")
    return changed


def cut_length(seq_length: int | None, truncation: bool | str | None) -> int | None:
    """Return `seq_length` if truncation is on (True or a Hugging Face strategy name), else None."""
    return None if truncation in (False, None, "do_not_truncate") else seq_length


def read_conversation(row: dict[str, Any], arguments: dict[str, Any]) -> tuple[list[dict], Any]:
    """Return the messages and tools of a row, as `ChatDataset` with these arguments reads it."""
    any_role = arguments.get("chat_template") is not None
    return conversation_of(row, any_role, arguments.get("column", "messages"))


@data_set("path_or_dataset_id", ("messages",), read_conversation, columns_from="column")
def ChatDataset(  # a class in NeMo-AutoModel, hence the name
    path_or_dataset_id: str | list,
    tokenizer: Any,
    split: str | None = "train",
    seq_length: int | None = None,
    truncation: bool | str = False,
    limit_dataset_samples: int | None = None,
    chat_template: str | None = None,
    column: str = "messages",
) -> Any:
    """Return samples of conversations, whose assistant turns are supervised, `tool_calls` included.

    Rows have a column `messages` (or `column`), a list of `{role, content}` or of ShareGPT's
    `{from, value}`. A column `tools` is passed to the template.

    Raises:
        ValueError: no rows, a row without an assistant turn, or a tokenizer without a chat
            template.
    """
    tokenizer = with_template(tokenizer, chat_template)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template; give chat_template: a Jinja file or "
            f"text"
        )
    length = cut_length(seq_length, truncation)

    def sample(row: dict[str, Any]) -> dict[str, list[int]]:
        talk, tools = conversation_of(row, chat_template is not None, column)
        return shift(*tokenize_chat(tokenizer, talk, tools), length)

    return make_samples(path_or_dataset_id, split, (column,), limit_dataset_samples, sample)

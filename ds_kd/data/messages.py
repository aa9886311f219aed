"""Conversations as rows hold them → as a chat template takes them. Imports no torch: a config is
checked with it."""

from __future__ import annotations

import json
from typing import Any

#: Roles that templates know; any other needs a template given with the data.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_OTHER_WORDS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def conversation_of(
    row: dict[str, Any], any_role: bool = False, column: str = "messages"
) -> tuple[list[dict], list | None]:
    """Return a row's messages and its tools, which are None where there are none.

    Content parts of text are joined, null values dropped (a table fills absent keys with them),
    JSON texts of tools and of a call's arguments decoded.

    Args:
        row: with `messages`, perhaps with `tools`.
        column: in place of `messages`.
        any_role: leave it to the template which roles there are.

    Raises:
        ValueError: not a conversation, or one without an assistant turn.
    """
    given = row[column]
    if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
        raise ValueError(f"{column} is {given!r:.80}, expected a list of {{role, content}}")
    messages = [_message(message, any_role) for message in given]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("a conversation without an assistant turn has nothing to learn")
    tools = _decoded(_without_nulls(row.get("tools")))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is {tools!r:.80}, expected a list of mappings")
    return messages, tools or None


def _message(given: dict[str, Any], any_role: bool) -> dict[str, Any]:
    message = _without_nulls(given)
    if "from" in message and "value" in message and "role" not in message:  # ShareGPT's words
        role, content = message["from"], message["value"]
        message = {"role": _OTHER_WORDS.get(role, role), "content": content}
    role, calls = message.get("role"), message.get("tool_calls")
    if not isinstance(role, str) or not (calls or "content" in message):
        raise ValueError(f"every message needs a `role` and a `content`, one is {given!r:.80}")
    if role not in ROLES and not any_role:
        other = _OTHER_WORDS.get(role)
        hint = f"write {other}" if other else "give chat_template: one that knows it"
        raise ValueError(f"role is {role!r}, expected {', '.join(ROLES)}; {hint}")
    message["content"] = _text(message.get("content", ""))
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"tool_calls is {calls!r:.80}, expected a list of mappings")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _text(content: Any) -> str:
    """Text, or the texts of its parts joined."""
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


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments are a mapping, which is what templates write as JSON themselves."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _call(inner)}
    return {**call, "arguments": _decoded(call["arguments"])} if "arguments" in call else call


def _decoded(value: Any) -> Any:
    """The mapping or list of a JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, (dict, list)) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value

"""Recognise tokens, keys and passwords by the name of a key or variable or by their form, and blank
them in everything that is shown, logged or saved.

The value of every secret key and variable is remembered for the life of the process, so that it is
blanked again in another library's error message or in a list. All regular expressions take time
linear in the text, as a config may be hostile.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from typing import Any

BLANK = "***"
#: A word that makes a name secret wherever it stands in it.
_ALWAYS = {
    "password", "passwords", "passwd", "pwd", "passphrase", "passcode", "secret", "secrets",
    "credential", "credentials", "cred", "creds", "auth", "oauth", "authorization", "bearer",
    "apikey", "apikeys", "jwt", "cookie", "cookies", "otp",
}  # fmt: skip
#: A word that makes a name secret as its last word.
_LAST = {"pass", "pat"}
#: A word that makes a name secret together with a `key` or `token` behind it.
_OWNERS = {
    "access", "api", "auth", "encryption", "hf", "hub", "private", "refresh", "secret", "session",
    "signing", "ssh",
}  # fmt: skip
#: The end of a name written in one piece, such as accesstoken.
_ENDS = (
    "token", "apikey", "secret", "password", "passwd", "accesskey", "secretkey", "privatekey",
    "sshkey",
)  # fmt: skip
#: Words that may follow the one that makes a name secret.
_AFTER = {"value", "str", "string"}
#: Words before `token` that mean a token of a vocabulary.
_OF_A_VOCABULARY = {
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "image", "video", "audio", "stop", "end",
    "start", "special", "new", "next", "first", "last", "per", "begin", "eot", "eom", "think",
    "text", "prompt", "newline",
}  # fmt: skip
#: Words before `key` that mean the name of a column or of an order.
_OF_DATA = {
    "sort", "group", "primary", "foreign", "cache", "column", "dataset", "data", "row", "field",
    "answer", "answers", "question", "context", "prompt", "response", "completion", "instruction",
    "input", "output", "text", "label", "labels", "message", "messages", "content", "role", "tools",
    "conversation", "conversations", "chat", "image", "chosen", "rejected", "target", "source",
}  # fmt: skip
_DIRECTORIES = {"PWD", "OLDPWD"}  # variables of every shell
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NAME = re.compile(r"""(?<![\w-])(--?)?([A-Za-z_][\w-]*)(?:["']?\s*[=:]\s*|(?(1)[ \t]+|(?!)))""")
_VALUE = re.compile(r"""\*{3}|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\n]|'')*'?|[^\n]*""")
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|eyJ)[\w.-]{16,}"
    r"|(?<=://)[^/\s@]+(?=@)|(?<=\bbearer )\S+",
    re.IGNORECASE,
)
_SHORTEST, _MOST = 6, 500  # characters of a remembered text, number of texts
_known: dict[str, None] = {}


def is_secret(name: str) -> bool:
    """Return whether a key or variable of this name holds a token, key or password.

    Names are split at capitals, dashes and underscores: `accessToken`, `x-api-key`, `HF_TOKEN`.
    """
    if name in _DIRECTORIES:
        return False
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    words = [word.lower() for word in _WORD.findall(plain)]
    while len(words) > 1 and words[-1] in _AFTER:
        words.pop()
    if not words:
        return False

    # Words that are clear by themselves come first, then pairs such as api_key, then a last word
    # whose meaning depends on the one before it.
    if _ALWAYS & set(words) or words[-1] in _LAST or words == ["tokens"]:
        return True
    if ("pass", "word") in itertools.pairwise(words):
        return True
    owned = ("key", "keys", "token", "tokens")
    if any(a in _OWNERS and b in owned for a, b in itertools.pairwise(words)):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "key":
        return before not in _OF_DATA
    if words[-1] == "token":
        return before not in _OF_A_VOCABULARY
    owner = words[-1].removesuffix("token")
    return words[-1].endswith(_ENDS) and owner not in _OF_A_VOCABULARY


def is_under_secret(key: str) -> bool:
    """Return whether any part of a dotted key names a secret."""
    return any(is_secret(part) for part in key.split("."))


def remember(value: Any) -> None:
    """Blank this text in all later output; a very short one is not remembered, as it would blank
    harmless text too."""
    text = "" if isinstance(value, (bool, type(None))) else str(value)
    if len(_known) > _MOST:
        return
    for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1]):
        if len(form) >= _SHORTEST:
            _known[form] = None


def blank_known_secrets(text: str) -> str:
    """Return the text with remembered secrets, and anything of their form, blanked."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, BLANK)
    return _LOOKS_SECRET.sub(BLANK, text)


def blank_secrets(value: Any) -> Any:
    """Return the same value with tokens, keys and passwords in it blanked."""
    if isinstance(value, dict):
        return {n: BLANK if is_secret(str(n)) else blank_secrets(v) for n, v in value.items()}
    if isinstance(value, list):
        flags = ["", *value][: len(value)]  # `[--token, x]`, as words of a command
        return [
            BLANK if is_secret_flag(flag) else blank_secrets(inner)
            for flag, inner in zip(flags, value, strict=True)
        ]
    return _blank_named(blank_known_secrets(value)) if isinstance(value, str) else value


def is_secret_flag(word: Any) -> bool:
    """Return whether a word of a command says that the next one is secret, such as `--token`."""
    return isinstance(word, str) and word.startswith("-") and is_secret(word.strip("-"))


def _blank_named(text: str) -> str:
    """Return a text with the value behind `token:` or `"api_key" = ` blanked: a quoted one, or the
    rest of the line."""
    parts, done = [], 0
    for match in _NAME.finditer(text):
        if match.start() < done or not is_secret(match[2]):
            continue
        found = _VALUE.match(text, match.end())
        if found is not None and found[0]:
            parts += [text[done : match.end()], BLANK]
            done = found.end()
    return "".join([*parts, text[done:]])

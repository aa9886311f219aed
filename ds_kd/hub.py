"""Find what a hub id names, and find out within seconds that the hub cannot be reached.

Hugging Face's client asks for every file five times, half a minute in all, before it looks at what
was downloaded earlier. A mistyped path, which may as well be a hub id, takes as long to be told.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ds_kd.errors import first_line

_ATTEMPTS, _PAUSE, _TIMEOUT = 2, 1.0, 3.0  # the last two in seconds
#: The files of a model and its tokenizer; many repositories hold the weights twice.
_OF_A_MODEL = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def expect_hub(name: str) -> None:
    """Let a name that is no local path be looked for among earlier downloads alone, as with
    HF_HUB_OFFLINE=1, if the hub cannot be reached."""
    import huggingface_hub

    if os.path.exists(name) or huggingface_hub.constants.HF_HUB_OFFLINE or is_reachable():
        return
    # The libraries read the variable when they are imported, which they may have been before.
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def may_be_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, and not that of a path alone."""
    return not (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1)


def find_directory(name: str, options: dict[str, Any]) -> Path:
    """Return the directory with a model's files; for a hub id that of its download, which is
    fetched first where it is missing.

    Args:
        name: a directory or a hub id.
        options: `revision`, `cache_dir`, `token` and `subfolder` of from_pretrained, if given.

    Raises:
        ValueError: neither this machine nor the hub has it; names the model.
    """
    from huggingface_hub import snapshot_download

    directory = Path(name)
    if not directory.is_dir() and may_be_hub_id(name):
        expect_hub(name)
        known = {k: options[k] for k in ("revision", "cache_dir", "token") if k in options}
        try:
            directory = Path(snapshot_download(name, allow_patterns=_OF_A_MODEL, **known))
        except Exception as error:  # of many kinds, by the client and its transport
            told = "no directory, and the hub does not give such a model"
            raise ValueError(f"{name}: {told}: {first_line(error)}") from error
    return directory / options.get("subfolder", "")


@functools.cache
def is_reachable() -> bool:
    """Return whether the hub's machine takes a connection; asked once in a process. Behind a proxy
    only the libraries themselves can tell."""
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return True
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE if attempt else 0.0)
        try:
            _connect(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"))
        except (OSError, ValueError):  # no address, no such name, no way there, nobody listens
            continue
        return True
    return False


def _connect(endpoint: SplitResult) -> None:
    """Connect to the first address of each family, until one answers.

    Raises:
        OSError: none does.
        ValueError: it is no address.
    """
    if not endpoint.hostname:
        raise ValueError("no host")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    found = socket.getaddrinfo(endpoint.hostname, port, type=socket.SOCK_STREAM)
    first = {family: str(place[0]) for family, *_, place in reversed(found)}
    for number, address in enumerate(first.values(), 1):
        try:
            return socket.create_connection((address, port), timeout=_TIMEOUT).close()
        except OSError:
            if number == len(first):
                raise

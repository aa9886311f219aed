"""Find out within seconds that Hugging Face's hub cannot be reached.

Its client asks for every file five times, half a minute in all, before it looks at what was
downloaded earlier. A mistyped path, which may as well be a hub id, takes as long to be told.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
import urllib.request
from urllib.parse import SplitResult, urlsplit

_ATTEMPTS, _PAUSE, _TIMEOUT = 2, 1.0, 3.0  # the last two in seconds


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

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
from urllib.parse import urlsplit

_ATTEMPTS, _PAUSE, _TIMEOUT = 2, 1.0, 5.0  # the last two in seconds


def expect_hub(name: str) -> None:
    """Let a name that is no local path be looked for among earlier downloads alone, as with
    HF_HUB_OFFLINE=1, if the hub cannot be reached."""
    if os.path.exists(name) or is_reachable():
        return
    import huggingface_hub

    # The libraries read the variable when they are imported, which they may have been before.
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@functools.cache
def is_reachable() -> bool:
    """Return whether the hub's machine takes a connection; asked once in a process. Behind a proxy
    only the libraries themselves can tell."""
    if urllib.request.getproxies():
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    address = endpoint.hostname or "", endpoint.port or (80 if endpoint.scheme == "http" else 443)
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE if attempt else 0.0)
        try:
            socket.create_connection(address, timeout=_TIMEOUT).close()
        except (OSError, UnicodeError):  # no such name, no way there, nobody listens
            continue
        return True
    return False

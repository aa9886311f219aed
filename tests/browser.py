"""Chromium without a screen, told what to do over two pipes: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

#: Text of a page in its order, also inside custom elements, whose content `textContent` leaves out.
_READ = """(() => {
  const skipped = new Set(['STYLE', 'SCRIPT', 'TEMPLATE', 'NOSCRIPT']);
  const walk = (node) => [...node.childNodes].map((each) =>
    each.nodeType === 3 ? each.data :
    each.nodeType !== 1 || skipped.has(each.tagName) ? '' :
    (each.shadowRoot ? walk(each.shadowRoot) : '') + ' ' + walk(each)).join(' ');
  return walk(document.body).replace(/\\s+/g, ' ');
})()"""


def find() -> str | None:
    """Return the browser's program, or None."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a browser.

    Args:
        directory: for its profile.
        size: of the window, in pixels.
    """

    def __init__(self, directory: Path, size: tuple[int, int] = (1400, 900)):
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        words = [
            str(find()), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            f"--user-data-dir={directory}", f"--window-size={size[0]},{size[1]}", "about:blank",
        ]  # fmt: skip
        # It reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{asked} 4>&{answered}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "_", *words], pass_fds=(asked, answered),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asked)
        os.close(answered)
        self._number, self._session, self._rest = 0, "", b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        made = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = made["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ask)
        os.close(self._answers)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def wait_for(self, *texts: str, seconds: float = 120) -> str:
        """Return the page's text when it holds all of these; on a busy machine that takes long."""
        end = time.monotonic() + seconds
        while True:
            shown = str(self.evaluate(_READ))
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < end, f"the page does not show {missing}: {shown[:4000]}"
            time.sleep(0.3)

    def take_picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        text, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(text))

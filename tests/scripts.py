"""The scripts of launch/, as modules and as processes."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from types import ModuleType

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heed_signals() -> None:
    """Undo what a shell in the background or nohup has had every process below it ignore."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

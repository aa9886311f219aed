"""Distil a student under a teacher, as one YAML describes it; see `ds_kd/__main__.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.__main__ import OF_PLAN, main, parse

__all__ = ["OF_PLAN", "main", "parse"]

if __name__ == "__main__":
    sys.exit(main())

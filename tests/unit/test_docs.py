"""What README and docs say comes from the code, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

from ds_kd.config.reference.keys import key_table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_keys_is_the_schemas():
    assert key_table() in (ROOT / "docs" / "config.md").read_text(), (
        "run python -m ds_kd.config.reference.keys and paste its output into docs/config.md"
    )


def test_every_file_that_a_page_names_exists():
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(
            r"\b(?:launch|ds_kd|ds_configs|tests|benchmarks)/[\w/]+\.(?:py|sh|yaml|json)\b",
            page.read_text(),
        )
        if not (ROOT / name).is_file()
    ]
    assert not missing


def test_every_link_between_pages_leads_somewhere():
    missing = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not missing

"""Numbers in documents: `<!-- metric: DESCRIPTION -->1.46<!-- /metric -->`, where `query` understands the description.

`make report` rewrites what stands between the two comments; `tests/test_report.py` fails where it would.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.records import Record

from reporting.query import lookup

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(r"<!-- metric: (?P<what>.*?) -->(?P<number>[^<\n]*)<!-- /metric -->")
_ANY = re.compile(r"<!-- /?metric")


def documents(root: Path = ROOT) -> list[Path]:
    """README.md and every Markdown file below docs/ and benchmarks/nsight_profiles/."""
    found = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("benchmarks/nsight_profiles/*.md")]
    return sorted(path for path in found if path.exists())


def refresh(text: str, records: Sequence[Record]) -> tuple[str, list[str]]:
    """The text with its numbers from `records`, and a sentence for every number that was not, or cannot be, right."""
    complaints = []
    if len(_ANY.findall(text)) != 2 * len(MARKER.findall(text)):
        complaints.append("a metric marker is not closed, or holds a line break or another marker")

    def replaced(match: re.Match[str]) -> str:
        try:
            number = lookup(match["what"], records)
        except ValueError as error:
            complaints.append(str(error))
            return match[0]
        if number != match["number"]:
            complaints.append(f"says {match['number']!r} where metrics.csv gives {number!r} for {match['what']}")
        return f"<!-- metric: {match['what']} -->{number}<!-- /metric -->"

    return MARKER.sub(replaced, text), complaints

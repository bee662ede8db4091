"""Numbers by description: `test=decode metric=ms_per_token model=Qwen3-0.6B batch=1` finds one value in metrics.csv.

Words are `field=pattern` over the fields of `Record`; patterns may hold * and ?, values with spaces are quoted.
`engine` is nanovllm unless given. Besides, `fmt` formats (default .3g), `scale` multiplies and `agg` (geomean, min,
max, count) makes one number of several rows. Two descriptions with " / " between them are a quotient.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from fnmatch import fnmatchcase

from harness.records import Record

FIELDS = {f.name for f in fields(Record)} - {"value"}
_EXTRA = {"fmt", "scale", "agg"}
_AGGREGATES = {
    "geomean": lambda values: math.exp(sum(map(math.log, values)) / len(values)),
    "min": min,
    "max": max,
    "count": len,
}


def lookup(description: str, records: Sequence[Record]) -> str:
    """The formatted number of a description. ValueError when it finds nothing, too much, or is not well formed."""
    parts = [_parse(part) for part in description.split(" / ")]
    if len(parts) > 2:
        raise ValueError(f"{description!r}: a quotient has two parts")
    extra = {name: word for part in parts for name, word in part.items() if name in ("fmt", "scale")}
    values = [_value(part, records) for part in parts]
    value = values[0] / values[1] if len(values) == 2 else values[0]
    try:
        return format(value * float(extra.get("scale", "1")), extra.get("fmt", ".3g"))
    except ValueError as error:
        raise ValueError(f"{description!r}: {error}") from error


def _parse(part: str) -> dict[str, str]:
    words = dict(word.partition("=")[::2] for word in shlex.split(part))
    unknown = set(words) - FIELDS - _EXTRA
    if unknown or "test" not in words or "metric" not in words:
        why = f"unknown {', '.join(sorted(unknown))}" if unknown else "test= and metric= are needed"
        raise ValueError(f"{part!r}: {why}; the fields are {', '.join(sorted(FIELDS | _EXTRA))}")
    return {"engine": "nanovllm", **words}


def _value(words: dict[str, str], records: Sequence[Record]) -> float:
    found = select(records, **{name: word for name, word in words.items() if name in FIELDS})
    wanted = " ".join(f"{name}={word}" for name, word in words.items() if name in FIELDS)
    if not found:
        raise ValueError(f"no row of metrics.csv has {wanted}")
    if "agg" in words:
        if words["agg"] not in _AGGREGATES:
            raise ValueError(f"agg must be one of {', '.join(_AGGREGATES)}, got {words['agg']!r}")
        return float(_AGGREGATES[words["agg"]]([r.value for r in found]))
    if len(found) > 1:
        differing = [n for n in sorted(FIELDS) if len({asdict(r)[n] for r in found}) > 1]
        raise ValueError(f"{len(found)} rows have {wanted}: say more about {', '.join(differing)}, or use agg=")
    return found[0].value


def select(records: Sequence[Record], **patterns: str) -> list[Record]:
    """The rows whose fields match all patterns."""
    return [r for r in records if all(fnmatchcase(getattr(r, name), p) for name, p in patterns.items())]

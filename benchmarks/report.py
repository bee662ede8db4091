"""Plots, tables and the numbers that documents quote, from `bench_results/metrics.csv` alone.

    python benchmarks/report.py            rewrite bench_results/plots/, bench_results/tables.md and the documents
    python benchmarks/report.py --check    rewrite nothing; status 1 and one sentence for everything out of date
    python benchmarks/report.py --merge ROWS.csv    first take over rows that were measured on another machine

Plots need matplotlib (requirements-dev.txt). The form of a quoted number: reporting/docs.py and reporting/query.py.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.records import METRICS, Record, read, write
from reporting.docs import ROOT, documents, refresh
from reporting.series import gpus, slug
from reporting.tables import tables

from nanovllm.profiling.files import write_whole

RESULTS = METRICS.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check; complaints go to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="rewrite nothing")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="CSVs whose rows replace those of equal keys")
    args = parser.parse_args(argv)
    try:
        if missing := [str(path) for path in args.merge if not path.exists()]:
            raise FileNotFoundError(f"{', '.join(missing)} does not exist: nothing was merged")
        if args.merge:
            write([row for path in args.merge for row in read(path)])
        records = read()
        if not records:
            raise ValueError(f"{METRICS} has no rows: run a benchmark first")
        complaints = check(records) if args.check else rewrite(records)
    except (OSError, ValueError, ImportError) as error:
        complaints = [str(error)]
    for complaint in complaints:
        print(f"report: {complaint}", file=sys.stderr)
    return int(bool(complaints))


def check(records: Sequence[Record], root: Path = ROOT) -> list[str]:
    """A sentence for each number of a document, and for the tables, that differ from the rows."""
    found = []
    for path in documents(root):
        _, complaints = refresh(path.read_text(encoding="utf-8"), records)
        found += [f"{path.relative_to(root)}: {complaint}" for complaint in complaints]
    path = root / "benchmarks" / "bench_results" / "tables.md"
    if not path.exists() or path.read_text(encoding="utf-8") != tables(records):
        found.append(f"{path.relative_to(root)} is not what metrics.csv gives: run `make report`")
    return found


def rewrite(records: Sequence[Record], root: Path = ROOT) -> list[str]:
    """Bring everything up to date; returns what cannot be (a description without a row, say)."""
    results = root / "benchmarks" / "bench_results"
    write_whole(results / "tables.md", tables(records))
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        new, _ = refresh(text, records)
        if new != text:
            write_whole(path, new)
            print(f"numbers in {path.relative_to(root)}")
    for name in draw(records, results / "plots"):
        print(f"plots/{name}")
    return check(records, root)


def draw(records: Sequence[Record], folder: Path) -> list[str]:
    """Every plot that has rows, a file a device; the names written. Plots that lost their rows are removed."""
    import matplotlib.pyplot as plt
    from reporting.plots import FIGURES

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device in gpus(records):
        own = [r for r in records if r.device == device]
        for name, make in FIGURES.items():
            fig = make(own)
            if fig is None:
                continue
            picture = io.BytesIO()
            fig.savefig(picture, format="png", dpi=150, metadata={"Software": None})
            plt.close(fig)
            target = folder / f"{name}_{slug(device)}.png"
            partial = target.with_suffix(".partial")
            try:
                partial.write_bytes(picture.getvalue())
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            written.append(target.name)
    for old in folder.glob("*.png"):
        if old.name not in written:
            old.unlink()
    return written


if __name__ == "__main__":
    sys.exit(main())

"""The whole suite: the scenarios of the plan, fused and unfused, on any CUDA machine, in one command.

    python benchmarks/suite.py                                      all scenarios, Qwen3-0.6B, fused and unfused
    python benchmarks/suite.py --scenarios grid --limit 240         decode only: batches 1-16 by contexts 128-4,096
    python benchmarks/suite.py --resume                             go on where a run was interrupted
    python benchmarks/suite.py --engines nanovllm vllm --fusion auto --scenarios batches lengths throughput
    python benchmarks/suite.py --quick --device cpu                 every path on a tiny model, in seconds, no GPU

Each engine runs in a process of its own on the same weights, is started once, and takes turns with the others.
Another engine's interpreter or wrapper: --command 'vllm=bash wrapper.sh python3'. Rows go to
bench_results/metrics.csv as they are measured, or to --csv; those of --quick only to --csv. Then: `make report`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from harness.cells import SCENARIOS, plan, quick
from harness.models import SHAPES, SMOKE
from harness.options import add_run_options, entrants, plan_options, run
from harness.records import METRICS
from harness.session import Plan, last_run


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, measure, complain; 1 when anything that was asked for is missing."""
    args = parser().parse_args(argv)
    models = args.model or ([SMOKE] if args.quick else ["Qwen3-0.6B"])
    return run("suite", models, lambda: make_plan(args))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scenarios = "\n".join(f"{name}: {text}" for name, (text, _) in SCENARIOS.items())
    found.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), help=scenarios)
    found.add_argument("--model", nargs="+", help=f"{', '.join(SHAPES)} (random weights) or directories")
    found.add_argument("--long", action="store_true", help="also decode at batch 1 over 32,768 tokens")
    found.add_argument("--quick", action="store_true", help="a tiny cell of each kind, on a tiny model")
    add_run_options(found)
    found.add_argument("--resume", action="store_true", help="go on with the newest run of this commit in the CSV")
    return found


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of a command line; ValueError for one that cannot be made or resumed."""
    cells = quick() if args.quick else plan(args.scenarios, long=args.long)
    csv = args.csv or (Path(tempfile.mkdtemp()) / "quick.csv" if args.quick else METRICS)
    run_id = {}
    if args.resume:
        if (last := last_run(csv)) is None:
            raise ValueError(f"{csv} has no run of this commit to go on with: leave out --resume")
        run_id = {"run": last}
    start = args.quick or "latency" in args.scenarios
    return Plan(entrants(args), cells, start=start, csv=csv, **run_id, **plan_options(args))


if __name__ == "__main__":
    sys.exit(main())

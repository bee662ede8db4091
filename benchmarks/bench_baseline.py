"""The engine end to end, one test at a time: decode, prefill, nano-vLLM's workload; and the CPU against Hugging Face.

    python benchmarks/bench_baseline.py decode   --model Qwen3-0.6B --batch 1 4 16 --fusion auto off
    python benchmarks/bench_baseline.py prefill  --model Qwen3-0.6B --prompt 128 1024
    python benchmarks/bench_baseline.py workload --model Qwen3-0.6B
    python benchmarks/bench_baseline.py cpu      (SmolLM2 in fp32 against Hugging Face's generate)

Models are named shapes with seeded random weights, or directories with config.json. What is timed is a call of the
public API, so host time is included. How it is measured: harness/measure.py; all scenarios in one run: suite.py. Rows
go to bench_results/metrics.csv, or to --csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from harness.cells import Cell, Decode, Prefill, Workload
from harness.models import SHAPES
from harness.options import add_run_options, entrants, plan_options, run
from harness.records import METRICS, write
from harness.session import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure; 1 when anything that was asked for is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", nargs="+", choices=["decode", "prefill", "workload", "cpu"])
    parser.add_argument("--model", default="Qwen3-0.6B", help=f"{', '.join(SHAPES)} (random weights) or a directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--context", type=int, nargs="+", default=[128], help="prompt lengths of the decode test")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-async-scheduling", action="store_true")
    add_run_options(parser)
    parser.set_defaults(fusion=["auto"])
    args = parser.parse_args(argv)
    csv = args.csv or METRICS
    if "cpu" in args.test:
        from harness.cpu_vs_hf import measure_cpu

        records = measure_cpu()
        for r in records:
            print(f"{r.engine:24} {r.model:22} batch {r.batch:>3} prompt {r.prompt:>8} {r.metric:>13} {r.value:8.4g}")
        write(records, csv)
    if not (cells := wanted_cells(args)):
        return 0
    extra = {"enforce_eager": True} if args.enforce_eager else {}
    extra |= {"async_scheduling": False} if args.no_async_scheduling else {}
    remarks = " ".join(["enforce_eager"] * args.enforce_eager + ["async_scheduling=False"] * args.no_async_scheduling)
    fields = dict(csv=csv, **plan_options(args))
    return run("bench_baseline", [args.model], lambda: Plan(entrants(args, extra, remarks), cells, **fields))


def wanted_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells of the tests that were asked for."""
    cells: list[Cell] = []
    if "decode" in args.test:
        cells += [Decode(batch, context) for context in args.context for batch in args.batch]
    if "prefill" in args.test:
        cells += [Prefill(prompt=length) for length in args.prompt]
    return cells + [Workload()] * ("workload" in args.test)


if __name__ == "__main__":
    sys.exit(main())

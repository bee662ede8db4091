"""RMSNorm+Linear fused against compiled RMSNorm + cuBLAS, our norm + cuBLAS, and the GEMM alone. One CUDA GPU.

    python benchmarks/bench_fusion_operator.py                        all models, 1 to 64 rows
    python benchmarks/bench_fusion_operator.py --models Qwen3-0.6B --rows 1 4
    python benchmarks/bench_fusion_operator.py --table                also writes kernels/tuned/ for this GPU

Prints wins and losses and the worst case; rows go to bench_results/metrics.csv, or to --csv. Kernels are compiled in
--jobs processes beforehand. What is measured and how: harness/fusion_operator.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.fusion_operator import Case, Operands, Result, candidates, cases, measure, read_bandwidth, table
from harness.models import SHAPES
from harness.records import METRICS, Record, provenance, write

from nanovllm import __version__
from nanovllm.kernels.fusion_config import TABLES, table_name


def main() -> None:
    """Compile, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compile-only", type=int, metavar="JOB", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case is begun")
    parser.add_argument("--table", nargs="?", type=Path, const=TABLES, help="folder for the tuned table")
    parser.add_argument("--csv", type=Path, default=METRICS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    device = torch.device("cuda")
    chosen = sorted(cases(args.models, args.rows, args.dtype), key=lambda case: args.rows.index(case.problem.m))
    if args.compile_only is not None:
        compile_share(chosen[args.compile_only :: args.jobs], device)
        return
    compile_in_parallel(args.jobs)
    started, results = time.monotonic(), []
    bandwidth = read_bandwidth(device)
    for case in chosen:
        if time.monotonic() - started < args.limit:
            results.append(measure(case, device))
            print(line(results[-1], bandwidth), flush=True)
    summarise(results, len(chosen))
    origin = provenance("cuda")
    write([record for result in results for record in records(result, origin)], args.csv)
    if args.table:
        path = args.table / table_name(origin["device"])
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(table(results, origin, "python " + " ".join(sys.argv)), indent=1)
        path.write_text(text.replace("\n   ", " ").replace("\n  }", " }") + "\n")  # one row a line


def compile_in_parallel(jobs: int) -> None:
    """Fill the compilers' caches from `jobs` processes; their failures show again when the case is measured."""
    shares = range(jobs) if jobs > 1 else ()
    children = [subprocess.Popen([sys.executable, *sys.argv, "--compile-only", str(job)]) for job in shares]
    for child in children:
        child.wait()


def compile_share(share: list[Case], device: torch.device) -> None:
    """Call everything once that `measure` will time."""
    for case in share:
        operands = Operands(case.problem, device, rotate_bytes=0)
        for call in (*map(operands.fused, candidates(case.problem, device)), *operands.baselines().values()):
            call(operands.weights[0])
    torch.cuda.synchronize()


def line(result: Result, bandwidth: float) -> str:
    """One case in one line of text."""
    problem, best = result.case.problem, result.best()
    share = problem.bytes_moved() / (result.times[best][0] * 1e-6) / bandwidth
    times = "  ".join(f"{name} {result.us(name):7.2f}" for name in ("fused", "compiled", "unfused", "gemm"))
    speedup = result.us("compiled") / result.us("fused")
    refused = f"  REFUSED {result.refused}" if result.refused else ""
    return (
        f"{result.case.model:13} {result.case.layer:15} M {problem.m:3}  {times} us  x{speedup:.2f}  "
        f"best {best} {result.times[best][0]:.2f} us, {share:.0%} of read bandwidth{refused}"
    )


def summarise(results: list[Result], wanted: int) -> None:
    """Geometric means by rows, wins and losses, the worst case."""
    speedups = {id(r): r.us("compiled") / r.us("fused") for r in results}
    print(f"\n{len(results)} of {wanted} cases; speed-up over compiled norm + cuBLAS (geometric mean; worst)")
    groups = {"all": results} | {
        f"M={m}": [r for r in results if r.case.problem.m == m] for m in (1, 2, 4, 8, 16, 32, 64)
    }
    groups |= {layer: [r for r in results if r.case.layer == layer] for layer in ("qkv", "gate_up", "gate_up+swiglu")}
    for name, group in groups.items():
        if group:
            values = [speedups[id(r)] for r in group]
            print(f"  {name:15} {statistics.geometric_mean(values):.3f}; {min(values):.3f}")
    losses = [r for r in results if speedups[id(r)] < 0.98]
    unfused = [r for r in results if r.choice() == "unfused"]
    print(f"  {len(losses)} below 0.98; {len(unfused)} cases stay unfused")
    for r in losses:
        print(f"  LOSS {r.case} {speedups[id(r)]:.3f}")


def records(result: Result, origin: dict[str, str]) -> list[Record]:
    """Rows for metrics.csv: the time of each form, and the speed-up."""
    case, choice = result.case, result.choice()
    shared = dict(
        version=__version__, model=case.model, dtype=case.problem.dtype, weights="random", batch=str(case.problem.m)
    )

    def row(metric: str, value: float, form: str) -> Record:
        note = choice if form == "fused" else ""
        return Record("fusion_operator", metric, value, options=f"{case.layer} {form}", note=note, **shared, **origin)

    times = [row("us", result.us(form), form) for form in ("fused", "compiled", "unfused", "gemm")]
    return [*times, row("speedup", result.us("compiled") / result.us("fused"), "fused")]


if __name__ == "__main__":
    main()

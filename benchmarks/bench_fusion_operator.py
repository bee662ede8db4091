"""RMSNorm+Linear fused against compiled RMSNorm + cuBLAS, our norm + cuBLAS, PyTorch eager, and the GEMM alone.

    python benchmarks/bench_fusion_operator.py                              all models, 1 to 64 rows
    python benchmarks/bench_fusion_operator.py --models Qwen3-0.6B --rows 1 4
    python benchmarks/bench_fusion_operator.py --table                      also writes kernels/tuned/ for this GPU
    python benchmarks/bench_fusion_operator.py --rows 128 256 1024 2048 8192    prefill: norm and cuBLAS, kernels to 128
    python benchmarks/bench_fusion_operator.py --folded --rows 64 1024 8192     gamma is part of the weight

One CUDA GPU. On Hopper each case is measured twice: by kernels that start when the one in front has ended ("fused"),
and by kernels launched as dependents, as the engine's are ("dependent": `weights_ready=True`). Prints wins and losses
and the worst case; rows go to bench_results/metrics.csv, or to --csv, and the table to --table: both while the run goes
on, so that SIGTERM or Ctrl-C loses nothing. How it measures: nanovllm/tuning/measure.py; against what:
harness/fusion_operator.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.fusion_operator import BASELINES, Report, distinct
from harness.records import METRICS, provenance, write
from harness.roofs import read_bandwidth

from nanovllm.kernels.fusion_config import ELEMENT_SIZES
from nanovllm.kernels.fusion_table import OPERATOR, TABLES
from nanovllm.kernels.jit import gpu_of
from nanovllm.tuning import table
from nanovllm.tuning.cases import LAYERS, ROWS, SHAPES, cases
from nanovllm.tuning.compilers import default_jobs
from nanovllm.tuning.measure import rotate_bytes
from nanovllm.tuning.search import plan, search
from nanovllm.utils.progress import progress_bar

SAVE_SECONDS = 10.0


def main() -> None:
    """Compile, measure, print, write."""
    args = parse()
    device = torch.device("cuda")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers compile; a pool of Inductor's would disturb
    shapes = {name: SHAPES[name] for name in args.models}
    wanted = distinct(cases(shapes, args.rows, args.dtype, args.layers, folded=args.folded))
    stages = plan(wanted, gpu_of(device))
    jobs = args.jobs or default_jobs(torch.cuda.mem_get_info(device)[0])
    origin, report = provenance("cuda"), Report(wanted, [], read_bandwidth(device))
    writer = None
    if args.table:
        run = {**table.provenance(rotate_bytes(device)), "commit": origin["commit"]}
        writer = table.TableWriter(args.table / OPERATOR, origin["device"], run)
    print(f"{len(wanted)} cases on {origin['device']}, read bandwidth {report.bandwidth / 1e12:.3f} TB/s, {jobs} jobs")
    found = search(stages, device, jobs=jobs, time_limit=args.limit, extra=BASELINES)
    started = saved = time.monotonic()
    try:
        with progress_bar(len(wanted), "measure", unit="case", enabled=sys.stderr.isatty()) as bar:
            for result in found:
                report.results.append(result)
                bar.write(f"{time.monotonic() - started:6.1f} s  {report.line(result)}", file=sys.stdout)
                bar.update()
                sys.stdout.flush()
                if writer is not None:
                    writer.add(result)
                if time.monotonic() - saved > SAVE_SECONDS:
                    write(report.records(origin), args.csv)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured")
    finally:
        write(report.records(origin), args.csv)
        print(
            f"\n{len(report.results)} of {len(wanted)} cases in {time.monotonic() - started:.0f} s; {report.summary()}"
        )


def parse() -> argparse.Namespace:
    """The command line; ends here where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", nargs="+", default=["qkv", "gate_up", "gate_up+swiglu"], choices=LAYERS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", default="bfloat16", choices=list(ELEMENT_SIZES))
    parser.add_argument("--jobs", type=int, help="processes that compile; default: by cores and memory")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new case is begun")
    parser.add_argument("--folded", action="store_true", help="weights with gamma in them; no fused kernel is tried")
    parser.add_argument("--table", nargs="?", type=Path, const=TABLES.parent, help=f"folder for {OPERATOR}/DEVICE.json")
    parser.add_argument("--csv", type=Path, default=METRICS)
    args = parser.parse_args()
    if args.folded and args.table:
        parser.error("--table takes no --folded: a table does not tell folded weights from others")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    return args


if __name__ == "__main__":
    main()

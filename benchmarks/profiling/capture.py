"""Profile the named cases, fused and unfused, and keep what is small: one folder a case, rows for `metrics.csv`.

    python benchmarks/profiling/capture.py --case decode-b1 decode-b16 prefill-2048 workload
    python benchmarks/profiling/capture.py --case decode-b1 --ncu --keep-raw /tmp/raw

It records with `nanovllm.profiling`, which `nanovllm profile` uses too; here the model is a named shape with seeded
random weights. A case that fails is named at the end (status 1) and the others are kept.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.models import SHAPES, write_config
from harness.records import METRICS, Record, git_commit, write

from nanovllm.profiling import capture
from nanovllm.profiling.facts import CASES
from profiling.rows import profile_rows, today

PROFILES = Path(__file__).resolve().parents[1] / "nsight_profiles"


def main() -> int:
    """Parse, record, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", choices=list(SHAPES), default="Qwen3-0.6B")
    parser.add_argument("--fusion", choices=list(capture.FUSIONS), default="both")
    parser.add_argument("--profiler", choices=["auto", "nsys", "torch"], default="auto")
    parser.add_argument("--ncu", action="store_true")
    parser.add_argument("--out", type=Path, default=PROFILES)
    parser.add_argument("--csv", type=Path, default=METRICS)
    parser.add_argument("--keep-raw", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    failed = []
    for case in args.case:
        try:
            record_case(args, case)
        except (OSError, ValueError) as error:
            print(f"{case}: {error}", file=sys.stderr, flush=True)
            failed.append(case)
        except KeyboardInterrupt:
            print(f"interrupted in {case}: the cases before it are kept, of this one nothing", file=sys.stderr)
            return 130
    if failed:
        print(f"not recorded: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def record_case(args: argparse.Namespace, case: str) -> None:
    """Profile one case and write its folder and its rows."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(write_config(args.model, Path(directory)))
        options = {"load_format": "dummy"}
        request = capture.Request(
            path, case, capture.FUSIONS[args.fusion], args.profiler, args.model, options, args.ncu, args.keep_raw
        )
        profiles, counters = capture.profile(request, say=lambda text: print(text, flush=True))
    command = ["python", "benchmarks/profiling/capture.py", "--model", args.model, "--case", case]
    command += ["--fusion", args.fusion] + (["--ncu"] if args.ncu else [])
    capture.write(args.out / case, profiles, counters, command)
    rows: list[Record] = [row for p in profiles for row in profile_rows(p, date=today(), commit=git_commit())]
    write(rows, args.csv)
    for p in profiles:
        print(f"{case} fusion {p.facts.fusion}: {p.period_us:.1f} us a step, idle {p.idle_share:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`nanovllm profile MODEL --case decode-b1`: where a step's time goes, fused and unfused side by side."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from nanovllm.profiling.facts import CASES


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("profile", help="record a case with Nsight Systems, or PyTorch's profiler without it")
    parser.add_argument("model", help="directory, .gguf file or hub id")
    parser.add_argument(
        "--case", nargs="+", choices=list(CASES), default=["decode-b1"], help="what to run (default: decode-b1)"
    )
    parser.add_argument(
        "--fusion",
        choices=["both", "off", "on", "auto"],
        default="both",
        help="both (default): unfused, and what the engine chooses by itself",
    )
    parser.add_argument("--profiler", choices=["auto", "nsys", "torch"], default="auto", help="auto: nsys if found")
    parser.add_argument("--ncu", action="store_true", help="count DRAM traffic and occupancy with Nsight Compute too")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs: every launch by itself")
    parser.add_argument("--name", default="", help="what the report calls the model (default: MODEL)")
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder for results (default: ./profile)")
    parser.add_argument("--keep-raw", type=Path, metavar="DIR", help="keep the profiler's own files there")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record, distil, write, and say where."""
    from nanovllm.profiling import capture

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    options = {"load_format": args.load_format, "dtype": args.dtype, "enforce_eager": args.enforce_eager}
    request = capture.Request(
        args.model, tuple(args.case), capture.FUSIONS[args.fusion], args.profiler, args.name, options, args.keep_raw
    )
    capture.require_gpu()
    with tempfile.TemporaryDirectory(prefix="nanovllm-recordings-") as folder:
        missing = capture.record(request, Path(folder), say)
        if args.ncu:
            capture.count(request, Path(folder), say)
        published = capture.publish(Path(folder), args.out, lambda profiles: command(args, profiles[0].facts.case))
    for case, profiles in published.items():
        for p in profiles:
            print(f"{case}, fusion {p.facts.fusion:5} {p.period_us:10.1f} us a step, {p.kernels_per_step:.0f} kernels, "
                  f"GPU idle {p.idle_share:.1%}")  # fmt: skip
        print(args.out / case / "timeline.html")
    return int(bool(missing))


def command(args: argparse.Namespace, case: str) -> list[str]:
    """The command that does one case again, without what is the default."""
    words = ["nanovllm", "profile", args.name or args.model, "--case", case, "--fusion", args.fusion]
    words += [flag for flag, given in (("--ncu", args.ncu), ("--enforce-eager", args.enforce_eager)) if given]
    for flag, value, default in (
        ("--profiler", args.profiler, "auto"),
        ("--load-format", args.load_format, "auto"),
        ("--dtype", args.dtype, "auto"),
    ):
        words += [flag, value] if value != default else []
    return words

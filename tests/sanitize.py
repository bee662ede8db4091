"""Every kernel of the package under compute-sanitizer, on a CUDA GPU: `make sanitize GPU_PYTHON=python3`.

    python tests/sanitize.py                      memcheck and racecheck
    python tests/sanitize.py --tools memcheck --logs logs --limit 120

memcheck sees accesses outside an allocation, racecheck hazards in shared memory. Exits with 1 if a tool reports
anything, if it is blind (a planted fault must be reported), or if a case did not launch its kernel. First everything is
compiled by several processes, for a sanitizer would also slow that down; then the tools run side by side, each on
parts of the cases. What still runs at the limit is ended and counts as a failure.
The cases: `sanitize_cases.py`; that they cover every kernel: `test_sanitize.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

CLEAN = {
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)",
}
DONE = "all cases ran"
REPORTED = 86  # exit status of a sanitizer that has something to report
LIMIT_S = 240.0
WATCHED_PARTS = 3  # of the cases, under each tool at a time


def verdict(tool: str, log: str, status: int) -> str | None:
    """Why a run under `tool` does not count as clean; None if it does."""
    if DONE not in log:
        return f"the cases did not run to their end (exit status {status})"
    if status:
        return f"{tool} ended with status {status}"
    summaries = re.findall(r"=+ (.*SUMMARY.*)", log)
    if not summaries or not all(re.fullmatch(CLEAN[tool], line.strip()) for line in summaries):
        return f"{tool} says: {'; '.join(summaries) or 'nothing'}"
    return None


def blind(tool: str, log: str) -> str | None:
    """Why `tool`, having watched a planted fault, cannot be trusted; None if it reported it."""
    summaries = re.findall(r"SUMMARY: (\d+) (?:errors?|hazards?)", log)
    return None if any(int(count) for count in summaries) else f"{tool} did not report a planted fault"


def run_cases(part: int, parts: int) -> None:
    """Every `parts`-th case, from `part` on, in this process; one that fails does not keep the others from running."""
    import torch
    from sanitize_cases import distinct_cases, record

    launched = record(setattr, forward=True)
    failed = 0
    for kernels, case in distinct_cases()[part::parts]:
        launched.clear()
        try:
            case.run("cuda", torch.bfloat16)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"a case of {', '.join(sorted(kernels))} failed: {error}")
            failed += 1
        else:
            if missing := kernels - set(launched):
                print(f"a case of {', '.join(sorted(missing))} launched {launched}")
                failed += 1
    if failed:
        raise SystemExit(f"error: {failed} cases failed")
    print(DONE)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    # Without its cache the allocator hands out memory of exactly the size that was asked for.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes], deadline: float) -> int:
    """Its exit status; 124 after killing it, and what it watches, at the deadline (of `time.monotonic`)."""
    try:
        return process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def sanitizer() -> str:
    """Path of compute-sanitizer; ends the program where there is none."""
    places = [os.path.join(os.environ.get(name, ""), "bin") for name in ("CUDA_HOME", "CUDA_PATH")]
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *places, "/usr/local/cuda/bin"]))
    if path is None:
        raise SystemExit("error: compute-sanitizer is not on PATH: install the CUDA toolkit, or set CUDA_HOME")
    return path


def check(tools: list[str], logs: Path, limit: float = LIMIT_S) -> int:
    """Compile, run under every tool, print what was found; the exit status."""
    began = time.monotonic()
    deadline, me, watch = began + limit, [sys.executable, str(Path(__file__).resolve())], sanitizer()
    parts = max(1, min(8, (os.cpu_count() or 2) // 2))
    compiling = [start([*me, "--part", f"{i}/{parts}"], logs / f"compile{i}.log") for i in range(parts)]
    compiling += [start([*me, "--planted", tool], logs / f"planted-{tool}-alone.log") for tool in tools]
    failed = [i for i, process in enumerate(compiling) if finish(process, deadline) and i < parts]
    faults = [f"{len(failed)} of {parts} parts fail without a tool too"] * bool(failed)
    for i in failed:
        print((logs / f"compile{i}.log").read_text(errors="replace")[-3_000:])
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    options = ["--error-exitcode", str(REPORTED), "--target-processes", "application-only"]
    running = {
        (tool, name): start([watch, "--tool", tool, *options, *me, *arguments], logs / f"{name}-{tool}.log")
        for tool in tools
        for name, arguments in [
            ("planted", ["--planted", tool]),
            *((f"kernels{i}", ["--part", f"{i}/{WATCHED_PARTS}"]) for i in range(WATCHED_PARTS)),
        ]
    }
    for (tool, name), process in running.items():
        status = finish(process, deadline)
        log = (logs / f"{name}-{tool}.log").read_text(errors="replace")
        fault = blind(tool, log) if name == "planted" else verdict(tool, log, status)
        if fault is not None:
            print(log[-3_000:])
            faults.append(fault)
        print(f"{tool:10} {name:8} {fault or 'as it should be'}", flush=True)
    print(f"{time.monotonic() - began:.0f} s; {'; '.join(faults) or 'no report'}")
    return 1 if faults else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(CLEAN), choices=list(CLEAN))
    parser.add_argument("--logs", type=Path, help="folder for the logs; default: a temporary one")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help="seconds for everything (%(default)s)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # "i/n": run these cases, no sanitizer
    parser.add_argument("--planted", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part, parts = map(int, args.part.split("/"))
        run_cases(part, parts)
        return 0
    if args.planted:
        import planted_faults

        planted_faults.run(args.planted)
        return 0
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
        return check(args.tools, args.logs, args.limit)
    with tempfile.TemporaryDirectory() as folder:
        return check(args.tools, Path(folder), args.limit)


if __name__ == "__main__":
    raise SystemExit(main())

"""Profile the named cases, fused and unfused, and keep what is small: one folder a case, rows for `metrics.csv`.

    python benchmarks/profiling/capture.py --ncu                        all cases, on one CUDA GPU
    python benchmarks/profiling/capture.py --ncu --pack DIR --limit 500 recorded into DIR/profiles.tar.gz, no more
    python benchmarks/profiling/capture.py --unpack DIR/profiles.tar.gz published from there, without a GPU

It records with `nanovllm.profiling`, which `nanovllm profile` uses too; here the model is a named shape with seeded
random weights. The fused engine goes first, ncu last. What was recorded before a failure, an interrupt or the limit is
published or packed; --case and --fusion record the rest, and --unpack takes several archives.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.models import SHAPES, write_config
from harness.records import METRICS, Record, git_commit, write

from nanovllm.profiling import capture
from nanovllm.profiling.distil import Profile
from nanovllm.profiling.facts import CASES
from nanovllm.profiling.recording import SUFFIX
from profiling.rows import profile_rows, today

PROFILES = Path(__file__).resolve().parents[1] / "nsight_profiles"
ARCHIVE = "profiles.tar.gz"


def main(argv: list[str] | None = None) -> int:
    """Parse, record, publish; status 1 and a sentence when something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", choices=list(SHAPES), default="Qwen3-0.6B")
    parser.add_argument("--fusion", choices=list(capture.FUSIONS), default="both")
    parser.add_argument("--profiler", choices=["auto", "nsys", "torch"], default="auto")
    parser.add_argument("--ncu", action="store_true", help="hardware counters too")
    parser.add_argument("--out", type=Path, default=PROFILES, help="where the cases' folders go")
    parser.add_argument("--csv", type=Path, default=METRICS, help="where the rows go")
    parser.add_argument("--pack", type=Path, metavar="DIR", help=f"publish nothing, write DIR/{ARCHIVE}")
    parser.add_argument(
        "--unpack", type=Path, nargs="+", metavar="FILE", help="record nothing, publish what --pack has written"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="S", help="what runs after S s is ended")
    parser.add_argument("--keep-raw", type=Path, metavar="DIR", help="keep the profilers' own files there")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="nanovllm-recordings-") as folder:
        recordings = Path(folder) / "recordings"
        recordings.mkdir()
        try:
            if args.unpack:
                unpack(args.unpack, recordings)
                publish(args, recordings)
                missing = []
            else:
                missing = record(args, recordings)
        except (OSError, ValueError) as error:
            missing = [str(error)]
        except KeyboardInterrupt:
            print("interrupted: what had been published is kept", file=sys.stderr, flush=True)
            return 130
    for sentence in missing:
        print(f"not complete: {sentence}", file=sys.stderr, flush=True)
    return int(bool(missing))


def record(args: argparse.Namespace, recordings: Path) -> list[str]:
    """Record all cases, then count; each fusion is published before the next begins. What is missing, as sentences."""
    capture.require_gpu()
    missing: list[str] = []
    origin = {"date": today(), "commit": git_commit()}
    with tempfile.TemporaryDirectory(prefix="nanovllm-model-") as directory:
        request = capture.Request(
            str(write_config(args.model, Path(directory))), tuple(args.case), capture.FUSIONS[args.fusion],
            args.profiler, args.model, {"load_format": "dummy"}, args.keep_raw, origin=origin,
            deadline=time.monotonic() + args.limit,
        )  # fmt: skip
        for step in (capture.record, capture.count)[: 1 + args.ncu]:
            for fusion in reversed(request.fusions):
                try:
                    missing += step(replace(request, fusions=(fusion,)), recordings, say)
                except (OSError, ValueError) as error:
                    missing.append(f"fusion {fusion}: {error}")
                    say(missing[-1])
                publish(args, recordings)
    return missing


def publish(args: argparse.Namespace, recordings: Path) -> None:
    """Folders and rows, or an archive of recordings, which nothing has looked into."""
    if args.pack:
        pack(args.pack, recordings)
        return
    published = capture.publish(recordings, args.out, command)
    rows: list[Record] = [row for profiles in published.values() for p in profiles for row in profile_rows(p)]
    write(rows, args.csv)
    for case, profiles in published.items():
        for p in profiles:
            say(f"{case} fusion {p.facts.fusion}: {p.period_us:.1f} us a step, idle {p.idle_share:.1%}; "
                f"unrecorded {p.facts.free_step_us:.1f} us, graph alone {p.facts.free_graph_us:.1f}")  # fmt: skip


def command(profiles: Sequence[Profile]) -> list[str]:
    """What records these profiles again."""
    facts = profiles[0].facts
    words = ["python", "benchmarks/profiling/capture.py", "--model", facts.model, "--case", facts.case]
    words += ["--fusion", "both" if len(profiles) > 1 else facts.fusion]
    return words + ["--ncu"] * any(p.counted or p.why_not_counted for p in profiles)


def pack(folder: Path, recordings: Path) -> None:
    """Write the archive, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{ARCHIVE}.partial"
    try:
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(recordings, "recordings")
        shutil.move(partial, folder / ARCHIVE)
    except OSError as error:
        raise OSError(f"cannot write {folder / ARCHIVE} ({error.strerror or error}): free some space") from error
    finally:
        partial.unlink(missing_ok=True)


def unpack(files: Sequence[Path], recordings: Path) -> None:
    """Take the recordings out of archives, of a case in several the last one. ValueError when one holds none."""
    for file in files:
        count = 0
        try:
            with tarfile.open(file) as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.name.endswith(SUFFIX) else None
                    if content is not None:
                        (recordings / Path(member.name).name).write_bytes(content.read())
                        count += 1
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no archive of profiles: {error}") from error
        if not count:
            raise ValueError(f"{file} holds no recordings: make it with --pack")


def say(text: str) -> None:
    """Print at once: a run takes minutes."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

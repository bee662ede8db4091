"""Command-line options that every command over the harness shares, and what they mean for a plan."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.client import EngineError
from harness.engines import ENGINES
from harness.records import METRICS
from harness.session import Entrant, Plan, measure_model


def add_run_options(found: argparse.ArgumentParser) -> None:
    """Options that every command over the harness has."""
    found.add_argument("--engines", nargs="+", default=["nanovllm"], choices=list(ENGINES))
    found.add_argument(
        "--fusion", nargs="+", default=["auto", "off"], choices=["auto", "on", "off"], help="one engine each"
    )
    found.add_argument(
        "--command", action="append", default=[], metavar="ENGINE=WORDS",
        help="what starts an engine's Python, in place of this interpreter (may be repeated)",
    )  # fmt: skip
    found.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found.add_argument("--rounds", type=int, default=5, help="timed turns of each decode cell (%(default)s)")
    found.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no cell is begun")
    found.add_argument("--kv-gb", type=float, help="KV cache of each engine; default: what the cells need")
    found.add_argument("--models", type=Path, default=Plan.models, help="where random weights are kept (%(default)s)")
    found.add_argument("--csv", type=Path, help=f"default: {METRICS}")


def plan_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Plan` that the shared options fill."""
    return dict(
        device=args.device, rounds=args.rounds, models=args.models, limit=args.limit,
        kv_bytes=int(args.kv_gb * 1e9) if args.kv_gb else None,
    )  # fmt: skip


def entrants(args: argparse.Namespace, extra: dict[str, Any] | None = None, remarks: str = "") -> list[Entrant]:
    """The engines that take part; ours once for each fusion, with `extra` arguments that `remarks` names.

    ValueError for a --command that names no engine or no words.
    """
    commands = {}
    for text in args.command:
        name, _, words = text.partition("=")
        if name not in ENGINES or not words:
            raise ValueError(f"--command {text!r} is not ENGINE=WORDS with an engine of {', '.join(ENGINES)}")
        commands[name] = tuple(shlex.split(words))
    found = []
    for engine in args.engines:
        command = commands.get(engine, (sys.executable,))
        if engine == "nanovllm":
            found += [Entrant(engine, fusion, extra or {}, command, remarks) for fusion in args.fusion]
        else:
            found.append(Entrant(engine, command=command))
    return found


def run(name: str, models: Sequence[str], make: Callable[[], Plan]) -> int:
    """Measure every model; what is missing becomes a sentence on stderr each, and status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    try:
        plan = make()
        problems = [problem for model in models for problem in measure_model(plan, model)]
    except (EngineError, OSError, ValueError) as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        problems = ["interrupted: every finished cell is written; `suite.py --resume` goes on with the rest"]
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return int(bool(problems))

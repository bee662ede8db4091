"""`nanovllm tune [MODEL ...]`: measure which form of RMSNorm+Linear is fastest on this GPU, and keep the answers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.kernels.fusion_config import ELEMENT_SIZES
from nanovllm.kernels.fusion_table import OPERATOR, VARIABLE, user_tables
from nanovllm.tuning.cases import ROWS, SHAPES, Shape, cases

if TYPE_CHECKING:
    from nanovllm.tuning.measure import Result

_DESCRIPTION = f"""Measure every candidate for the RMSNorm+Linear operator of the given models on this GPU.
The table is read by all later runs; it goes to ${VARIABLE}, or to nanovllm/tuned in the user's cache folder.
An interrupted run keeps what it has measured; running again replaces only the problems that it measures."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "tune", help="measure the fused operator on this GPU and write its table", description=_DESCRIPTION
    )
    names = ", ".join(SHAPES)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"directory, config.json, .gguf file, hub id, or one of {names}"
    )
    parser.add_argument("--rows", type=_rows, default=ROWS, metavar="M,M,...", help=f"default: {_text(ROWS)}")
    parser.add_argument("--dtype", choices=list(ELEMENT_SIZES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder for {OPERATOR}/<device>.json")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help="begin no case after S s")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile; default: by cores and memory")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one sentence")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each case, write the table after each."""
    shapes = {name: _shape(name) for name in args.models or SHAPES}
    wanted = cases(shapes, args.rows, args.dtype)
    device = _gpu()
    folder = user_tables(os.environ) if args.output is None else args.output / OPERATOR

    import torch

    from nanovllm.kernels.jit import gpu_of
    from nanovllm.tuning.compilers import default_jobs
    from nanovllm.tuning.measure import rotate_bytes
    from nanovllm.tuning.search import plan, search
    from nanovllm.tuning.table import TableWriter, provenance
    from nanovllm.utils.progress import progress_bar

    target = torch.device(device)
    name = torch.cuda.get_device_name(target)
    table = TableWriter(folder, name, provenance(rotate_bytes(target)))
    stages = plan(wanted, gpu_of(target))
    jobs = default_jobs(torch.cuda.mem_get_info(target)[0]) if args.jobs is None else args.jobs
    print(f"{len(wanted)} cases on {name}; writing {table.path}")
    count = 0
    with progress_bar(sum(s.steps for s in stages), "tune", unit="kernel", enabled=sys.stderr.isatty()) as bar:
        for result in search(stages, target, jobs=jobs, time_limit=args.time_limit, progress=bar.update):
            table.add(result)
            count += 1
            bar.write(line(result), file=sys.stdout)
    print(f"{count} of {len(wanted)} cases measured")
    return 0


def line(result: Result) -> str:
    """One case in one line of text."""
    case, choice = result.case, result.choice()
    times = f"{choice} {result.us(choice):.2f} us, norm + linear {result.us('unfused'):.2f} us"
    if result.has_dependents:
        times += f", as a dependent {result.choice(dependent=True)} {result.us('dependent'):.2f} us"
    refused = f", {len(result.refused)} refused" if result.refused else ""
    return f"{case.model:14} {case.layer:15} M {case.problem.m:4}  {times}{refused}"


def _rows(text: str) -> tuple[int, ...]:
    try:
        rows = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        rows = ()
    if not rows or min(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers such as {_text(ROWS)}")
    return rows


def _text(rows: tuple[int, ...]) -> str:
    return ",".join(map(str, rows))


def _shape(name: str) -> Shape:
    """The shape of a model that is built in, or of one whose configuration can be read; no weights are downloaded."""
    if name in SHAPES:
        return SHAPES[name]
    from nanovllm.loader import ModelSource, load_model_config, resolve_model

    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return Shape.of(load_model_config(ModelSource("hf", path.parent, name)))
    return Shape.of(load_model_config(resolve_model(name, weights=False)))


def _gpu() -> str:
    """The device to tune. ValueError where there is nothing to measure."""
    import torch

    from nanovllm.kernels.jit import triton_installed

    if not torch.cuda.is_available():
        raise ValueError(
            "tune measures kernels on a CUDA GPU and PyTorch finds none here: run it on the machine that will serve"
        )
    if not triton_installed():
        raise ValueError("tune measures Triton kernels and Triton is not installed: pip install triton")
    return "cuda"

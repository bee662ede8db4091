"""One model from weights to rows: engines are started once, cells are measured one after the other, rows are written
as they come.

A run that ends early (time limit, Ctrl-C, a full disk) leaves a whole CSV with every cell that was finished; `resume`
goes on with those that were not.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.cells import Cell, Request
from harness.client import EngineError, Process
from harness.engines import Options
from harness.measure import ELEMENT_SIZES, TEMPERATURE, Bench
from harness.models import SHAPES, SMOKE
from harness.nvml import Nvml
from harness.records import METRICS, Record, git_commit, read, write
from harness.work import Shape
from nanovllm.utils.progress import progress_bar

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "CUDA_CACHE_PATH")
BLOCK = 64  # tokens of the largest KV block: what a sequence may waste
BESIDE = 4 << 30  # bytes an engine takes besides weights and KV cache: context, activations, graphs, sampling


@dataclass(frozen=True)
class Entrant:
    """An engine as it takes part: which, with which fusion (ours), arguments and launch command."""

    engine: str
    fusion: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable,)
    remarks: str = ""  # what differs from the engine's defaults, for the row

    @property
    def options(self) -> str:
        """The `options` of its rows."""
        return " ".join([f"fusion={self.fusion}"] * (self.fusion != "auto") + [self.remarks] * bool(self.remarks))

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.engine} {self.options}".strip()


@dataclass
class Plan:
    """What one run measures, and how."""

    entrants: list[Entrant]
    cells: list[Cell]
    start: bool = False  # also the start, with cold and with compiled kernels
    device: str = "cuda"
    rounds: int = 5
    csv: Path = METRICS
    models: Path = Path(tempfile.gettempdir()) / "nanovllm-bench-models"
    kv_bytes: int | None = None  # default: what the cells need
    limit: float = float("inf")  # seconds after which no cell is begun
    run: str = field(default_factory=lambda: datetime.datetime.now().isoformat(timespec="seconds"))
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.deadline = self.clock() + self.limit


def last_run(csv: Path) -> str | None:
    """The newest run in a CSV that belongs to this commit: what `resume` goes on with."""
    commit = git_commit()
    return max((r.run for r in read(csv) if r.run and r.commit == commit), default=None)


def unfinished(plan: Plan, written: Sequence[Record]) -> list[Cell]:
    """The cells of which some engine of the plan has no row among those that this run has written of a model."""
    seen = {(r.engine, r.options, r.test, r.metric, r.batch, r.prompt) for r in written}

    def done(cell: Cell, entrant: Entrant) -> bool:
        shape = cell.shape
        return (entrant.engine, entrant.options, cell.test, cell.metric, shape["batch"], shape["prompt"]) in seen

    return [cell for cell in plan.cells if not all(done(cell, entrant) for entrant in plan.entrants)]


def measure_model(plan: Plan, model: str, say: Callable[[str], None] = print) -> list[str]:
    """Measure the cells of one model that are not done yet; returns what was refused or left out, a sentence each.

    EngineError or ValueError, one sentence, when nothing can be measured. OSError when a row cannot be written.
    """
    written = [row for row in read(plan.csv) if (row.run, row.model) == (plan.run, model)]
    cells = unfinished(plan, written)
    if not cells:
        say(f"{model}: every cell of run {plan.run} is done")
        return []
    path, weights = find_model(plan, model, say)
    shape, nvml = Shape(json.loads((path / "config.json").read_text())), Nvml()
    fixed = _settings(plan, shape, cells, path, nvml)
    with ExitStack() as stack:
        engines, origins, problems = [], {}, []
        for entrant in plan.entrants:
            about = dict(model=model, weights=weights, engine=entrant.engine, options=entrant.options)
            told = any((r.test, r.engine, r.options) == ("start", entrant.engine, entrant.options) for r in written)
            try:
                process = stack.enter_context(started(plan, entrant, fixed, about, nvml, plan.start and not told))
                say(f"{entrant.label} {process.about['version']} ready after {process.ready_seconds:.1f} s")
            except EngineError as error:
                problems.append(str(error))
                say(f"LEFT OUT {error}")
                continue
            engines.append(process)
            origins[process.label] = about | origin(plan, process, nvml)
        if not engines:
            raise EngineError("no engine started, so nothing was measured")
        bench = Bench(engines, shape, origins, nvml=nvml, rounds=plan.rounds, say=say)
        write(bench.measure_roofs(), plan.csv)
        problems += run_cells(plan, cells, bench, say)
        if nvml.why and plan.device == "cuda":
            say(nvml.why)
    return problems


def run_cells(plan: Plan, cells: Sequence[Cell], bench: Bench, say: Callable[[str], None]) -> list[str]:
    """Every cell, its rows written before the next begins; the refusals."""
    with progress_bar(len(cells), "measure", unit="cell", enabled=sys.stderr.isatty()) as bar:
        for cell in cells:
            if plan.clock() > plan.deadline:
                left = len(cells) - cells.index(cell)
                bench.refused.append(f"{left} cells were not begun: the time limit of {plan.limit:.0f} s is over")
                say(bench.refused[-1])
                break
            rows = bench.measure(cell)
            write(rows, plan.csv)
            bar.clear()
            for row in rows:
                if row.metric == cell.metric:
                    spread = f" ({row.p20:.4g} to {row.p80:.4g})" if row.p20 is not None else ""
                    say(f"{cell.label:34} {row.engine + ' ' + row.options:28} {row.metric} {row.value:.4g}{spread}")
            bar.update()
    return bench.refused


def origin(plan: Plan, process: Process, nvml: Nvml) -> dict[str, str]:
    """The provenance of an engine's rows."""
    about = {name: str(process.about[name]) for name in ("version", "dtype", "device", "torch", "triton")}
    about["device"] = about["device"] or nvml.name()  # an engine whose model runs in a child process has not looked
    return about | dict(
        date=datetime.date.today().isoformat(), commit=git_commit(), run=plan.run,
        driver=nvml.driver() if plan.device == "cuda" else "",
    )  # fmt: skip


def find_model(plan: Plan, model: str, say: Callable[[str], None]) -> tuple[Path, str]:
    """(directory, "random" or "real"). Random weights are written once, by a process that may use the GPU."""
    if model not in SHAPES and model != SMOKE:
        path = Path(model).expanduser()
        if not (path / "config.json").exists():
            raise ValueError(
                f"{model!r} is neither a known shape ({', '.join(SHAPES)}) nor a directory with config.json"
            )
        return path, "real"
    if not (plan.models / model / "model.safetensors").exists():
        say(f"writing random weights of {model} to {plan.models}")
        script = Path(__file__).with_name("models.py")
        command = [sys.executable, script, model, plan.models, plan.device]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise ValueError((child.stderr.strip().splitlines() or ["the weights could not be written"])[-1])
    return plan.models / model, "random"


@contextmanager
def started(
    plan: Plan, entrant: Entrant, fixed: Options, about: dict[str, str], nvml: Nvml, timed: bool
) -> Iterator[Process]:
    """An engine, ready: `timed`, its start is measured, and in any case the memory of its process when it ends."""
    options = replace(fixed, engine=entrant.engine, fusion=entrant.fusion, extra=entrant.extra)
    with ExitStack() as stack:
        if timed:
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-caches-")))
            options = replace(options, environment={name: str(caches / name.lower()) for name in CACHES})
            cold = Process(entrant.label, options, entrant.command)
            stack.callback(cold.close)
            write(start_rows(plan, cold, about, nvml, "cold"), plan.csv)
            cold.close()
        process = Process(entrant.label, options, entrant.command)
        stack.callback(process.close)
        if timed:
            write(start_rows(plan, process, about, nvml, "warm"), plan.csv)
        try:
            yield process
        finally:
            before = nvml.memory()
            process.close()
            after = nvml.memory()
            if before and after:
                row = Record("memory", "process_bytes", float(before[0] - after[0]), **about)
                note = f"freed when the process ended; KV pool {options.kv_bytes} bytes"
                write([replace(row, note=note, **origin(plan, process, nvml))], plan.csv)


def start_rows(plan: Plan, process: Process, about: dict[str, str], nvml: Nvml, when: str) -> list[Record]:
    """Seconds from the start of the process until it was ready, and until the first token of 128."""
    process.generate(Request([list(range(1, 129))], [1]), TEMPERATURE)
    first, shared = process.since_start(), about | origin(plan, process, nvml)
    return [
        Record("start", f"start_to_ready_s_{when}", process.ready_seconds, **shared),
        Record("start", f"start_to_first_token_s_{when}", first, prompt="128", batch="1", **shared),
    ]


def _settings(plan: Plan, shape: Shape, cells: Sequence[Cell], path: Path, nvml: Nvml) -> Options:
    """What all engines share: the context and the KV cache that the cells need. ValueError when it cannot fit."""
    element_size = ELEMENT_SIZES["bfloat16" if plan.device == "cuda" else "float32"]
    tokens = max(cell.kv_tokens + cell.batch * BLOCK for cell in cells) + BLOCK
    kv_bytes = plan.kv_bytes or int(shape.kv_bytes(tokens, element_size) * 1.02)
    need = len(plan.entrants) * (shape.parameters * element_size + kv_bytes + BESIDE)
    memory = nvml.memory() if plan.device == "cuda" else None
    if memory and need > (free := memory[1] - memory[0]):
        raise ValueError(
            f"{len(plan.entrants)} engines need {need / 1e9:.0f} GB and {free / 1e9:.0f} GB are free: let fewer take "
            "part at a time, leave out large cells (throughput), or give --kv-gb"
        )
    longest = max(max(cell.longest for cell in cells) + BLOCK, 256)
    return Options("nanovllm", str(path), plan.device, longest, kv_bytes)

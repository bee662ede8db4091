"""The profiled process: `python -m nanovllm.profiling.child SPEC.json` loads a model once and runs cases on it.

    "profiler": "none"   times the steps that nothing records
                "nsys"   marks windows, steps and one labelled step a case, between cudaProfilerStart and -Stop
                "torch"  the same, and records itself
                "ncu"    only the labelled step, since a counter costs a replay of every kernel

What was run is written as one JSON file a case, {"error": sentence} where it failed. A mistake is one sentence on
stderr and status 2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import __version__
from nanovllm.profiling.drive import Counts, Recorder, Running, measure
from nanovllm.profiling.facts import CASES, Case, Facts
from nanovllm.utils import nvtx

if TYPE_CHECKING:
    from nanovllm.llm import LLM

_LONGEST = 4096  # tokens of context that the engine is made for; every case fits
_NCU_KV_BYTES = 1 << 30  # ncu saves what kernels may write to


def main(argv: list[str]) -> int:
    """Run the cases of a specification."""
    spec: dict[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        run(spec)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"nanovllm: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def run(spec: dict[str, Any]) -> None:
    """Load the engine and run every case in it."""
    from nanovllm.llm import LLM

    cases, profiler = [CASES[name] for name in spec["cases"]], spec["profiler"]
    tool = Tool(profiler, spec["device"])
    copy_gb_s = 0.0 if profiler == "ncu" else tool.copy_gb_s()
    options = dict(
        device=spec["device"], max_model_len=_LONGEST, max_num_seqs=max(case.batch for case in cases),
        enable_prefix_caching=False, skip_tokenizer_init=True, show_progress=False, fusion=spec["fusion"],
    )  # fmt: skip
    if profiler == "ncu":
        options["kv_cache_memory_bytes"] = _NCU_KV_BYTES
    with LLM(spec["model"], **options | spec["options"]) as llm:
        recorder = Recorder(tool.mark, tool.sync, tool.start, tool.stop if profiler == "ncu" else None)
        failed = []
        for case in cases:
            try:
                result = _case(llm, case, profiler, tool, recorder)
                if isinstance(result, Counts):
                    result = asdict(_facts(llm, case, spec, result, copy_gb_s, tool))
            except (ValueError, RuntimeError) as error:  # out of memory, say: the other cases are smaller
                failed.append(result := {"error": _sentence(error)})
            Path(f"{spec['out']}.{case.name}.json").write_text(json.dumps(result), encoding="utf-8")
        if len(failed) == len(cases):
            raise RuntimeError(failed[0]["error"])
        tool.stop()
        tool.export(Path(f"{spec['out']}.trace.json"))


def _case(llm: LLM, case: Case, profiler: str, tool: Tool, recorder: Recorder) -> Counts | dict[str, Any]:
    """Facts of the recorded steps, or times where nothing is recorded."""
    engine, vocab_size = llm.engine, llm.engine.model_config.vocab_size
    model = engine.runner.model
    steps = case.steps * (4 if case.prompt and profiler == "none" else 1)
    running = Running(engine, case, vocab_size, steps + 1)
    try:
        if profiler == "none":
            return asdict(measure(running, steps, tool.sync, tool.replay_us))
        counts = Counts() if profiler == "ncu" else recorder.steps(running)
        with _inference(), nvtx.annotated(model, tool.mark):
            recorder.labels(running)
        return counts
    finally:
        running.close()


def _inference() -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.inference_mode()


class Tool:
    """What a recorder and a device offer: ranges, start and stop, waiting, timing."""

    def __init__(self, profiler: str, device: str) -> None:
        import torch

        self._cuda = device == "cuda"
        self._profiler = profiler
        self._torch: torch.profiler.profile | None = None
        if profiler == "torch":
            kinds = torch.profiler.ProfilerActivity
            self._torch = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if self._cuda else [kinds.CPU])

    def start(self) -> None:
        """Record from here on."""
        import torch

        if self._torch is not None:
            self._torch.start()
        elif self._cuda:
            torch.cuda.cudart().cudaProfilerStart()

    def stop(self) -> None:
        """Record no more."""
        import torch

        if self._torch is not None:
            self._torch.stop()
        elif self._profiler != "none" and self._cuda:
            torch.cuda.cudart().cudaProfilerStop()

    def export(self, path: Path) -> None:
        """Write what PyTorch's profiler recorded; other recorders do that themselves."""
        if self._torch is not None:
            self._torch.export_chrome_trace(str(path))

    def mark(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A range that the recorder shows."""
        import torch

        if self._torch is not None:
            return torch.profiler.record_function(name)
        return nvtx.Range(name) if self._cuda else contextlib.nullcontext()

    def sync(self) -> None:
        """Wait for the device."""
        import torch

        if self._cuda:
            torch.cuda.synchronize()

    def device_name(self) -> str:
        """As its maker calls it."""
        import torch

        return torch.cuda.get_device_name() if self._cuda else "CPU"

    def replay_us(self, function: Callable[[], Any], times: int) -> float:
        """µs of one of `times` calls back to back, by the device's clock; the first call is not counted."""
        import torch

        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        function()
        begin.record()
        for _ in range(times):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / times

    def copy_gb_s(self) -> float:
        """Bandwidth of a device-to-device copy of 1 GiB, read and written bytes counted; best of 5. 0 on a CPU."""
        import torch

        if not self._cuda:
            return 0.0
        best = min(_copy_us(self.replay_us) for _ in range(5))
        torch.cuda.empty_cache()
        return 2 * 2**30 / best / 1e3


def _copy_us(replay_us: Callable[..., float]) -> float:
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return replay_us(lambda: target.copy_(source), 1)


def _facts(llm: LLM, case: Case, spec: dict[str, Any], counts: Counts, copy_gb_s: float, tool: Tool) -> Facts:
    import torch

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    runner, config = llm.engine.runner, llm.engine.model_config
    steps = max(1, counts.steps)
    notes = [note for note in (case.note, spec["note"]) if note]
    return Facts(
        case=case.name, fusion=spec["fusion"], model=spec["name"], device=tool.device_name(),
        dtype=str(runner.dtype).removeprefix("torch."), element_size=runner.dtype.itemsize, torch=torch.__version__,
        triton=triton, version=__version__, graphs=runner.graphs is not None,
        wall_ms_per_step=counts.wall_s * 1e3 / steps, copy_gb_s=copy_gb_s, num_layers=config.num_layers,
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        tokens=counts.tokens / steps, rows=counts.rows / steps, kv_tokens=counts.kv_tokens / steps,
        profiler="torch.profiler" if spec["profiler"] == "torch" else spec["profiler"], note=". ".join(notes),
        **spec["origin"],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

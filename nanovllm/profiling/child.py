"""The profiled process: `python -m nanovllm.profiling.child SPEC.json` loads a model, warms up and runs one case.

What counts runs between cudaProfilerStart and cudaProfilerStop, inside ranges that `trace` knows. The facts of the run
go to a JSON file; with "profiler": "torch" the process records itself.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from nanovllm import __version__
from nanovllm.profiling.facts import CASES, Case, Facts
from nanovllm.profiling.trace import STEP, WINDOW
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

_WARM_STEPS = 12
_LONGEST = 4096  # tokens of context that the engine is made for; every case fits


@dataclass
class Counts:
    """What the window held."""

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    kv_tokens: int = 0
    wall_s: float = 0.0


class Window:
    """The recorded stretch, and steps inside it. `mark(name)` opens a range; `sync` waits for the device."""

    def __init__(
        self,
        mark: Callable[[str], contextlib.AbstractContextManager[Any]],
        sync: Callable[[], Any],
        start: Callable[[], Any],
        stop: Callable[[], Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._mark, self._sync, self._start, self._stop, self._clock = mark, sync, start, stop, clock
        self.counts = Counts()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Record what happens inside, from an idle device to an idle device."""
        self._sync()
        self._start()
        with self._mark(WINDOW):
            started = self._clock()
            yield
            self._sync()
            self.counts.wall_s += self._clock() - started
        self._stop()

    def step(self) -> contextlib.AbstractContextManager[Any]:
        """A range around one step."""
        self.counts.steps += 1
        return self._mark(STEP)


def drive(engine: Any, case: Case, window: Window, vocab_size: int) -> Counts:
    """Warm up and run a case on an engine (`make_request`, `submit`, `step`, `has_unfinished`)."""
    rng = Random(0)
    if case.name == "workload":
        return _workload(engine, window)
    if case.isolated:
        return _isolated(engine, case, window, rng, vocab_size)
    requests = [
        engine.make_request(_prompt(rng, case.prompt, vocab_size), _params(case.steps + 4 * _WARM_STEPS))
        for _ in range(case.batch)
    ]
    engine.submit(requests)
    decoded = 0
    while decoded < _WARM_STEPS:
        info = engine.step()
        decoded += info is not None and info.num_prefill_tokens == 0
    with window.open():
        for _ in range(case.steps):
            with window.step():
                engine.step()
    counts = window.counts
    counts.tokens = counts.rows = case.batch * case.steps
    # The k-th decode step reads the prompt and the k tokens sampled so far, its own included.
    counts.kv_tokens = case.batch * sum(case.prompt + _WARM_STEPS + k + 1 for k in range(case.steps))
    for request in requests:
        engine.abort(request.request_id)
    return counts


def _isolated(engine: Any, case: Case, window: Window, rng: Random, vocab_size: int) -> Counts:
    requests = [engine.make_request(_prompt(rng, case.prompt, vocab_size), _params(1)) for _ in range(case.steps + 3)]
    for request in requests[: -case.steps]:
        engine.submit([request])
        _finish(engine)
    with window.open():
        for request in requests[-case.steps :]:
            with window.step():
                engine.submit([request])
                _finish(engine)
    window.counts.tokens = case.prompt * case.steps
    window.counts.rows = case.steps
    return window.counts


def _workload(engine: Any, window: Window) -> Counts:
    """nano-vLLM's bench.py: its seed, its order, 256 requests of 100 to 1,024 tokens in and out."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [_params(rng.randint(100, 1024)) for _ in range(256)]
    engine.submit([engine.make_request([token + 1 for token in p], _params(8)) for p in prompts[:32]])
    _finish(engine)
    engine.submit([engine.make_request(p, one) for p, one in zip(prompts, params, strict=True)])
    counts = window.counts
    with window.open():
        while engine.has_unfinished:
            with window.step():
                info = engine.step()
            counts.tokens += info.num_tokens if info is not None else 0
    counts.rows = sum(one.max_tokens or 0 for one in params)
    return counts


def _finish(engine: Any) -> None:
    while engine.has_unfinished:
        engine.step()


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)


def _prompt(rng: Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(min(10000, vocab_size)) for _ in range(length)]


@contextlib.contextmanager
def _mark(name: str) -> Iterator[None]:
    """A range for either profiler."""
    import torch

    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name):
        yield


def _copy_gb_s() -> float:
    """Measured bandwidth of a device-to-device copy of 1 GiB, read and written bytes counted; best of 5."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return 2 * 2**30 / best / 1e6


def _facts(llm: LLM, case: Case, spec: dict[str, Any], counts: Counts, copy_gb_s: float) -> Facts:
    import torch

    try:
        import importlib.metadata

        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    runner, config = llm.engine.runner, llm.engine.model_config
    steps = max(1, counts.steps)
    return Facts(
        case=case.name, fusion=spec["fusion"], model=spec["name"], device=torch.cuda.get_device_name(),
        dtype=str(runner.dtype).removeprefix("torch."), element_size=runner.dtype.itemsize, torch=torch.__version__,
        triton=triton, version=__version__, graphs=runner.graphs is not None,
        wall_ms_per_step=counts.wall_s * 1e3 / steps, copy_gb_s=copy_gb_s, num_layers=config.num_layers,
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        tokens=counts.tokens / steps, rows=counts.rows / steps, kv_tokens=counts.kv_tokens / steps,
        profiler="torch.profiler" if spec["profiler"] == "torch" else spec["profiler"], note=spec.get("note", ""),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the case of a specification; a mistake is one sentence on stderr and status 2."""
    spec: dict[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        _run(spec)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"nanovllm: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def _run(spec: dict[str, Any]) -> None:
    import torch

    from nanovllm.llm import LLM

    case = CASES[spec["case"]]
    copy_gb_s = _copy_gb_s()
    torch.cuda.empty_cache()
    cudart: Any = torch.cuda.cudart()
    recorder = None
    if spec["profiler"] == "torch":
        from torch.profiler import ProfilerActivity, profile

        recorder = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    start = cudart.cudaProfilerStart if recorder is None else recorder.start
    stop = cudart.cudaProfilerStop if recorder is None else recorder.stop
    window = Window(_mark, torch.cuda.synchronize, start, stop)
    options = dict(
        max_model_len=_LONGEST, max_num_seqs=case.batch, enable_prefix_caching=False, skip_tokenizer_init=True,
        show_progress=False, fusion=spec["fusion"], **spec["options"],
    )  # fmt: skip
    with LLM(spec["model"], **options) as llm:
        counts = drive(llm.engine, case, window, llm.engine.model_config.vocab_size)
        facts = _facts(llm, case, spec, counts, copy_gb_s)
    if recorder is not None:
        recorder.export_chrome_trace(spec["trace"])
    Path(spec["facts"]).write_text(facts.to_json(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Cases on an engine: warmed up, then run step by step under a recorder, under a clock, or operation by operation.

Knows an engine's verbs (`make_request`, `submit`, `step`, `abort`) and nothing of profilers: those are callables.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from nanovllm.profiling.facts import Case
from nanovllm.profiling.trace import LABELS, STEP, WINDOW
from nanovllm.sampling_params import SamplingParams

Mark = Callable[[str], contextlib.AbstractContextManager[Any]]  # opens a named range
_REPLAYS = 50


class Running:
    """A warm case; `steps` more are wanted of it."""

    def __init__(self, engine: Any, case: Case, vocab_size: int, steps: int) -> None:
        self.engine, self.case = engine, case
        rng = Random(0)
        if case.isolated:
            self._requests = [self._request(rng, vocab_size, 1) for _ in range(case.warm + steps)]
            for _ in range(case.warm):
                self.step()
            return
        if case.prompt:
            self._requests = [self._request(rng, vocab_size, 4 * case.warm + steps) for _ in range(case.batch)]
        else:
            self._requests = self._workload(rng, vocab_size)
        engine.submit(self._requests)
        decoded = 0
        while decoded < case.warm:
            info = self._advance()
            decoded += info.num_tokens > 0 and info.num_prefill_tokens == 0

    def _request(self, rng: Random, vocab_size: int, tokens: int) -> Any:
        prompt = [rng.randrange(min(10000, vocab_size)) for _ in range(self.case.prompt)]
        return self.engine.make_request(prompt, _params(tokens))

    def _workload(self, rng: Random, vocab_size: int) -> list[Any]:
        """nano-vLLM's bench.py: its seed, its order, 256 requests of 100 to 1,024 tokens in and out."""
        last = min(10000, vocab_size - 1)
        prompts = [[rng.randint(0, last) for _ in range(rng.randint(100, 1024))] for _ in range(self.case.batch)]
        lengths = [rng.randint(100, 1024) for _ in range(self.case.batch)]
        pairs = zip(prompts, lengths, strict=True)
        return [self.engine.make_request(prompt, _params(length)) for prompt, length in pairs]

    def _advance(self) -> Any:
        info = self.engine.step()
        if info is None:
            raise ValueError(f"{self.case.name} ended before its steps had run: raise max_model_len or the KV memory")
        return info

    def step(self) -> int:
        """Run one step; the number of its tokens."""
        if not self.case.isolated:
            return int(self._advance().num_tokens)
        self.engine.submit([self._requests.pop()])
        while self.engine.has_unfinished:
            self.engine.step()
        return self.case.prompt

    def contexts(self) -> list[int]:
        """Tokens of every running sequence."""
        return [seq.num_tokens for seq in self.engine.scheduler.running]

    def graph(self) -> tuple[Any, int, int] | None:
        """The CUDA graphs, rows and longest context of the next step; None when it takes no graph."""
        graphs, contexts = self.engine.runner.graphs, self.contexts()
        if graphs is None or not contexts:
            return None
        size = graphs.size_for(len(contexts))
        return graphs, size, graphs.context_for(size, max(contexts))

    def once(self) -> None:
        """One step operation by operation: what its graph recorded, if it has one.

        The sequences learn nothing of it, so afterwards the case can only end.
        """
        found = self.graph()
        if found is None:
            self.step()
        else:
            _, size, context = found
            self.engine.runner.decode_and_sample(size, context)

    def close(self) -> None:
        """End its requests; the engine may have been led past steps that it does not know of."""
        for request in self._requests:
            self.engine.abort(request.request_id)
        self.engine.runner.drain()


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)


@dataclass
class Counts:
    """What the recorded steps of a case held."""

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    kv_tokens: float = 0.0
    wall_s: float = 0.0


class Recorder:
    """Recorded windows. `mark(name)` opens a range and `sync` waits for the device.

    `start` is called before the first window, and with a `stop` before every one, since what lies between them is dear.
    """

    def __init__(
        self,
        mark: Mark,
        sync: Callable[[], Any],
        start: Callable[[], Any],
        stop: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._mark, self._sync, self._start, self._stop, self._clock = mark, sync, start, stop, clock
        self._started = False

    @contextlib.contextmanager
    def _window(self, name: str) -> Iterator[None]:
        """From an idle device to an idle device."""
        self._sync()
        if not self._started:
            self._start()
            self._started = True
        with self._mark(name):
            yield
            self._sync()
        if self._stop is not None:
            self._stop()
            self._started = False

    def steps(self, running: Running) -> Counts:
        """Record the steps that a case is about."""
        case, counts = running.case, Counts()
        before = sum(running.contexts())
        with self._window(f"{WINDOW} {case.name}"):
            started = self._clock()
            for _ in range(case.steps):
                with self._mark(STEP):
                    counts.tokens += running.step()
                counts.steps += 1
            self._sync()
            counts.wall_s = self._clock() - started
        counts.rows = case.steps if case.isolated else counts.tokens  # a decode samples for every token
        # A decode reads all tokens of its sequence; what ends within the window is averaged away.
        counts.kv_tokens = 0.0 if case.isolated else (before + sum(running.contexts())) / 2 * case.steps
        return counts

    def labels(self, running: Running) -> None:
        """Record one step operation by operation; the caller has given the modules ranges."""
        with self._window(f"{LABELS} {running.case.name}"):
            running.once()


@dataclass(frozen=True)
class Free:
    """µs of a step that nothing records; see `Facts`."""

    step_us: float
    wait_us: float
    graph_us: float


def measure(
    running: Running,
    steps: int,
    sync: Callable[[], Any],
    replay_us: Callable[..., float],
    clock: Callable[[], float] = time.perf_counter,
) -> Free:
    """Time `steps` steps by the host's clock, how long the host waits in them, and the graph alone.

    `replay_us(function, times)` is what one call takes on the device, called back to back.
    """
    runner = running.engine.runner
    collect, waits, times = runner.collect, [], []

    def waiting(step: Any) -> Any:
        started = clock()
        if step.done is not None:
            step.done.synchronize()
        waits.append(clock() - started)
        return collect(step)

    runner.collect = waiting
    try:
        sync()
        last = clock()
        for _ in range(steps):
            running.step()
            now = clock()
            times.append(now - last)
            last = now
    finally:
        del runner.collect  # the class's own again
    found = running.graph()
    sync()
    graph = 0.0 if found is None else replay_us(lambda: found[0].replay(*found[1:]), _REPLAYS)
    return Free(statistics.median(times) * 1e6, sum(waits) / steps * 1e6, graph)

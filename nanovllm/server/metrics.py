"""What `/metrics` says, in Prometheus' text format, under vLLM's names so that existing dashboards work.

Counts that the engine keeps are read when somebody asks. The rest is added up once a request (by the event loop) or
once a step (by the engine's thread): nothing happens per token. A "request" is a sequence, as in vLLM: one of the n.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.engine.llm_engine import StepInfo
    from nanovllm.engine.request import Request


# From a token of a small model to a day's longest answer.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = tuple(float(2**power) for power in range(15))
REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of observations up to each bound, their sum and their number."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add `times` observations of one value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Metrics:
    """The numbers of one server."""

    def __init__(self, model: str) -> None:
        escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._labels = f'engine="0",model_name="{escaped}"'
        self._active: dict[str, Request] = {}
        self._prompt_tokens = self._generation_tokens = 0  # of requests that ended
        self._ended = dict.fromkeys(REASONS, 0)
        names = ["time_to_first_token", "inter_token_latency", "e2e_request_latency"]
        names += ["request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time"]
        self._seconds = {name: Histogram(_SECONDS) for name in names}
        self._step_tokens = Histogram(_TOKENS)
        self._last_step: float | None = None

    def on_step(self, step: StepInfo | None) -> None:
        """Called by the engine's thread: the time since the last step is what each decoding sequence waited."""
        now, last = time.monotonic(), self._last_step
        self._last_step = None if step is None else now
        if step is None or not step.num_tokens:
            return
        self._step_tokens.observe(step.num_tokens)
        decodes = step.num_tokens - step.num_prefill_tokens
        if last is not None and decodes:
            self._seconds["inter_token_latency"].observe(now - last, decodes)

    def begin(self, requests: Sequence[Request]) -> None:
        """Requests are on their way to the engine."""
        self._active.update((request.request_id, request) for request in requests)

    def end(self, requests: Sequence[Request]) -> None:
        """They have ended, or nobody waits for them any more."""
        for request in requests:
            del self._active[request.request_id]
            prompt, made = _tokens(request)
            self._prompt_tokens += prompt
            self._generation_tokens += made
            for completion in request.completions:
                self._ended[completion.seq.finish_reason or "abort"] += 1
            self._observe_times(request)

    def _observe_times(self, request: Request) -> None:
        arrival, scheduled = request.arrival_time, request.scheduled_time
        first, finished = request.first_token_time, request.finished_time
        if finished is None or scheduled is None or first is None:
            return  # aborted or failed: its times say nothing about the engine
        times = {
            "time_to_first_token": first - arrival,
            "e2e_request_latency": finished - arrival,
            "request_queue_time": scheduled - arrival,
            "request_prefill_time": first - scheduled,
            "request_decode_time": finished - first,
            "request_inference_time": finished - scheduled,
        }
        for name, seconds in times.items():
            self._seconds[name].observe(max(seconds, 0.0))

    def render(self, llm: AsyncLLM) -> str:
        """The page."""
        return "".join(self._lines(llm))

    def _lines(self, llm: AsyncLLM) -> Iterator[str]:
        scheduler = llm.engine.scheduler
        blocks = scheduler.block_manager
        running = [_tokens(request) for request in list(self._active.values())]
        yield from self._value("num_requests_running", "Sequences in the batch", len(scheduler.running))
        yield from self._value("num_requests_waiting", "Sequences in the queue", len(scheduler.waiting))
        yield from self._value("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", blocks.usage)
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", blocks.prefix_query_tokens),
            "prefix_cache_hits": ("Prompt tokens found there", blocks.prefix_hit_tokens),
            "num_preemptions": ("Sequences that lost their KV and came back", scheduler.num_preemptions),
            "prompt_tokens": ("Prompt tokens read", self._prompt_tokens + sum(p for p, _ in running)),
            "generation_tokens": ("Tokens made", self._generation_tokens + sum(made for _, made in running)),
        }
        for name, (text, value) in counters.items():
            yield from self._value(f"{name}_total", text, value, "counter")
        yield from self._header("request_success_total", "Sequences that ended, by reason", "counter")
        for reason, count in self._ended.items():
            yield f'vllm:request_success_total{{{self._labels},finished_reason="{reason}"}} {count}\n'
        for name, histogram in self._seconds.items():
            yield from self._histogram(f"{name}_seconds", name.replace("_", " "), histogram)
        yield from self._histogram("iteration_tokens_total", "Tokens that a step ran", self._step_tokens)

    def _header(self, name: str, text: str, kind: str) -> Iterator[str]:
        yield f"# HELP vllm:{name} {text}.\n# TYPE vllm:{name} {kind}\n"

    def _value(self, name: str, text: str, value: float, kind: str = "gauge") -> Iterator[str]:
        yield from self._header(name, text, kind)
        yield f"vllm:{name}{{{self._labels}}} {value}\n"

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Iterator[str]:
        yield from self._header(name, text, "histogram")
        total = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            total += count
            yield f'vllm:{name}_bucket{{{self._labels},le="{bound}"}} {total}\n'
        yield f"vllm:{name}_sum{{{self._labels}}} {histogram.sum}\nvllm:{name}_count{{{self._labels}}} {total}\n"


def _tokens(request: Request) -> tuple[int, int]:
    """(prompt tokens read, tokens made) of one request; the prompt counts once it has been read to its end."""
    read = len(request.prompt_token_ids) if request.first_token_time is not None else 0
    return read, sum(completion.seq.num_output_tokens for completion in request.completions)

"""What is measured: cells, and the scenarios that are made of them. Pure: no device, no engine.

A cell is one table entry of one test. Scenarios overlap (batch 1 at 128 tokens stands in four of them); a plan holds
every cell once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
GRID_BATCHES = (1, 2, 4, 8, 16)
GRID_CONTEXTS = (128, 512, 1024, 2048, 4096)
LONG_CONTEXT = 32768
TOKEN_IDS = 10000  # prompts are drawn from the first so many, as nano-vLLM's bench.py does


@dataclass(frozen=True)
class Request:
    """Prompts of token ids and the number of tokens that each is to be answered with."""

    prompts: list[list[int]]
    outs: list[int]

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.outs)


@dataclass(frozen=True)
class Cell:
    """What all cells share. `test` and `metric` name the row that shows the cell to be done."""

    batch: int
    prompt: int
    out: int
    test = ""
    metric = ""

    @property
    def shape(self) -> dict[str, str]:
        """The fields of a row that say how large the cell is."""
        return {"batch": str(self.batch), "prompt": str(self.prompt), "out": str(self.out)}

    @property
    def label(self) -> str:
        """For a progress line."""
        return f"{self.test} batch {self.batch} prompt {self.prompt}"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.out

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values must be held at once."""
        return self.batch * self.longest

    def request(self, turn: str, vocab: int, out: int | None = None) -> Request:
        """New random prompts for each turn (no prefix cache can help), the same ones for every engine."""
        rng = Random(f"{self.test} {self.batch} {self.prompt} {turn} {out}")
        ids = min(TOKEN_IDS, vocab)
        prompts = [[rng.randrange(ids) for _ in range(self.prompt)] for _ in range(self.batch)]
        return Request(prompts, [self.out if out is None else out] * self.batch)


@dataclass(frozen=True)
class Decode(Cell):
    """Milliseconds per token: (time for `out` tokens - time for `short`) / (out - short), so that prefill cancels."""

    out: int = 256
    short: int = 64
    test = "decode"
    metric = "ms_per_token"

    @property
    def context(self) -> float:
        """Mean number of tokens that a query of the timed steps looks back on."""
        return self.prompt + (self.out + self.short) / 2


@dataclass(frozen=True)
class Prefill(Cell):
    """Time to the first token of one prompt on an idle engine."""

    batch: int = 1
    prompt: int = 128
    out: int = 1
    test = "prefill"
    metric = "ttft_ms"


@dataclass(frozen=True)
class Energy(Cell):
    """Joules per output token: the device's energy counter around requests that go on for `seconds`."""

    out: int = 256
    seconds: float = 3.0
    test = "energy"
    metric = "joule_per_token"


@dataclass(frozen=True)
class Workload(Cell):
    """nano-vLLM's bench.py: `batch` requests of 100 to `prompt` tokens and as many out, its seed and order of draws."""

    batch: int = 256
    prompt: int = 1024
    out: int = 1024
    test = "workload"
    metric = "output_tok_s_warm"

    @property
    def shape(self) -> dict[str, str]:
        """A range of lengths, as in the rows of other engines."""
        lengths = {"prompt": self.prompt, "out": self.out}
        return {"batch": str(self.batch), **{name: f"{_least(n)}-{n}" for name, n in lengths.items()}}

    @property
    def kv_tokens(self) -> int:
        """The fullest moment when all requests start together."""
        drawn = self.request("cold", TOKEN_IDS)
        pairs = [(len(prompt), out) for prompt, out in zip(drawn.prompts, drawn.outs, strict=True)]
        return max(sum(n + step for n, out in pairs if out >= step) for step in range(1, self.out + 1))

    def request(self, turn: str, vocab: int, out: int | None = None) -> Request:
        """The draw itself for the turn "cold"; other tokens of the same lengths for any other."""
        rng, last = Random(0), min(TOKEN_IDS, vocab - 1)
        lengths = (_least(self.prompt), self.prompt)
        prompts = [[rng.randint(0, last) for _ in range(rng.randint(*lengths))] for _ in range(self.batch)]
        outs = [rng.randint(_least(self.out), self.out) for _ in range(self.batch)]
        if turn != "cold":
            other = Random(turn)
            prompts = [[other.randint(0, last) for _ in prompt] for prompt in prompts]
        return Request(prompts, outs if out is None else [out] * self.batch)


def _least(most: int) -> int:
    return min(100, most // 4)


SCENARIOS: dict[str, tuple[str, Callable[[], list[Cell]]]] = {
    "lengths": (
        "first token and decode at batch 1 against the prompt's length",
        lambda: [cell for n in LENGTHS for cell in (Prefill(prompt=n), Decode(1, n))],
    ),
    "batches": ("decode against batch size, prompt 128", lambda: [Decode(b, 128) for b in BATCHES]),
    "latency": (
        "process start to first token with cold and with compiled kernels, first token and whole answer of one request",
        lambda: [Prefill(prompt=128), Decode(1, 128)],
    ),
    "throughput": ("nano-vLLM's bench.py workload, cold and warm", lambda: [Workload()]),
    "memory": ("peak memory; every other cell records it as well", lambda: [Prefill(prompt=4096), Decode(64, 128)]),
    "grid": (
        "decode: batch against context",
        lambda: [Decode(b, c) for c in GRID_CONTEXTS for b in GRID_BATCHES],
    ),
    "energy": ("joules per token", lambda: [Energy(b, 128) for b in (1, 16, 64)]),
}


def plan(scenarios: Sequence[str], *, long: bool = False) -> list[Cell]:
    """The cells of some scenarios, each once, in order; `long` adds decode at batch 1 over 32,768 tokens."""
    cells = [cell for name in scenarios for cell in SCENARIOS[name][1]()]
    return list(dict.fromkeys(cells + [Decode(1, LONG_CONTEXT)] * long))


def quick() -> list[Cell]:
    """A cell of each kind, so small that every path runs in seconds on a CPU."""
    return [Decode(1, 16, 12, 4), Decode(3, 16, 12, 4), Prefill(prompt=40), Workload(4, 24, 12), Energy(2, 16, 8, 0.05)]

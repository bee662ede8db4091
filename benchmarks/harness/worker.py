"""One engine in a process of its own, driven by lines of JSON: `python worker.py '{"engine": "nanovllm", ...}'`.

Requests come on stdin, one a line, answers go to stdout behind a mark; whatever the engine itself prints goes to
stderr. The clock around a request is this process's own, so that the pipe is not timed. Started by `client.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the folder of a script comes first on the path, where names like `models` would shadow
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from harness.engines import ENGINES, MARK, Engine, Options


class Worker:
    """Answers the operations that are its public methods, each with a dictionary."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = Options(**options)
        os.environ.update(self.options.environment)
        self.engine: Engine = ENGINES[self.options.engine](self.options)

    def about(self) -> dict[str, Any]:
        """What rows say about where they come from."""
        from harness.records import installed

        return {**installed(self.options.device), **self.engine.about()}

    def generate(self, prompts: Any, outs: list[int], temperature: float, tokens: bool) -> dict[str, Any]:
        """Seconds of one call of the engine's API, the number of tokens of each answer, and the answers if wanted."""
        started = time.perf_counter()
        found = self.engine.generate(prompts, outs, temperature)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "counts": [len(answer) for answer in found], "tokens": found if tokens else None}

    def score(self, texts: Any, starts: list[int]) -> dict[str, Any]:
        """How much less likely than the likeliest each token is, from each text's start on (nats)."""
        return {"regrets": self.engine.score(texts, starts)}

    def peaks(self) -> dict[str, Any]:
        """Most bytes that PyTorch's allocator held in this process since the last call; {} where it held none."""
        import torch

        if not torch.cuda.is_initialized():
            return {}  # no GPU, or an engine whose model runs in a child process
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        torch.cuda.reset_peak_memory_stats()
        return found

    def roofs(self) -> dict[str, Any]:
        """What this device reaches at most."""
        import torch

        from harness.roofs import matmul_flops, read_bandwidth

        device = torch.device("cuda")
        found = {"read_bytes_per_s": read_bandwidth(device), "bf16_flop_per_s": matmul_flops(device)}
        torch.cuda.empty_cache()
        return found


def main() -> None:
    """Build the engine, then answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not pass for an answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(f"{MARK}{json.dumps(answer)}\n")
        answers.flush()

    try:
        worker = Worker(json.loads(sys.argv[1]))
        say(worker.about())
    except Exception as error:  # whatever keeps an engine from starting: the parent hears it, the log has the rest
        say({"error": _sentence(error)})
        raise
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(getattr(worker, request.pop("op"))(**request))
        except Exception as error:  # it may be the engine's alone to answer for; the parent decides what becomes of it
            say({"error": _sentence(error)})


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed for {sys.executable}: install it there or name another with --command"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()

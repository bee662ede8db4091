"""Starts engines in processes of their own and asks them. The other end is `worker.py`."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from harness.cells import Request
from harness.engines import MARK, Options

ROOT = Path(__file__).resolve().parents[2]


class EngineError(RuntimeError):
    """An engine that does not start, does not answer or answers with an error; one sentence."""


class Timed(Protocol):
    """What is measured: `Process`, or in tests an engine with a clock of its own."""

    label: str
    options: Options
    about: dict[str, Any]

    def generate(self, request: Request, temperature: float, tokens: bool = False) -> dict[str, Any]:
        """{"seconds", "tokens"} of one call of the engine's API; EngineError when tokens are missing."""

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Another operation of `worker.Worker`."""


class Process:
    """One engine. `label` names it to people and tells it from the others of a run."""

    def __init__(
        self, label: str, options: Options, command: Sequence[str] = (sys.executable,), *,
        start_timeout: float = 600, timeout: float = 300,
    ) -> None:  # fmt: skip
        self.label, self.options, self.timeout = label, options, timeout
        self._log = tempfile.NamedTemporaryFile("w+", prefix="bench-", suffix=".log", errors="replace")  # noqa: SIM115
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._started = time.perf_counter()
        arguments = [*command, str(Path(__file__).with_name("worker.py")), json.dumps(asdict(options))]
        try:
            self._child = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env=_environment(options.engine), start_new_session=True,  # Ctrl-C is for the parent alone
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"{label} does not start: {error.strerror or error} ({command[0]})") from error
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._answer(start_timeout)
        except BaseException:
            self.close()
            raise
        self.ready_seconds = self.since_start()

    def since_start(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._started

    def generate(self, request: Request, temperature: float, tokens: bool = False) -> dict[str, Any]:
        """The worker's `generate`. EngineError when an answer has not the number of tokens that was asked for."""
        answer = self.ask("generate", temperature=temperature, tokens=tokens, **asdict(request))
        if answer["counts"] != request.outs:
            got = sorted(set(answer["counts"]))
            raise EngineError(f"{self.label} answered with {got} tokens, not {sorted(set(request.outs))}")
        return answer

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One operation of `worker.Worker`. EngineError when it fails or takes longer than the timeout."""
        pipe = self._child.stdin
        try:
            if pipe is None or pipe.closed:
                raise EngineError(f"{self.label} is closed")
            pipe.write(json.dumps({"op": op, **arguments}) + "\n")
            pipe.flush()
        except OSError as error:
            raise EngineError(f"{self.label} has ended: {self.last_words()}") from error
        return self._answer(self.timeout)

    def close(self) -> None:
        """End the process; kill it if it does not."""
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._kill()
        self._log.close()

    def last_words(self) -> str:
        """The last line of the output of an engine that ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"status {self._child.poll()} and no word"

    def _kill(self) -> None:
        """With its children: vLLM's model runs in one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def _read(self) -> None:
        for line in self._child.stdout or ():
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
        self._answers.put(None)

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._kill()
            raise EngineError(f"{self.label} did not answer within {timeout:.0f} s and was ended") from None
        if line is None:
            raise EngineError(f"{self.label} has ended: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.label}: {answer['error']}")
        return answer


def _environment(engine: str) -> dict[str, str]:
    """Ours finds this checkout first; nano-vLLM, a package of the same name, does not find it."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if engine == "nanovllm":
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    return found

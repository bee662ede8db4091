"""Cells to rows: the gate, the engines in turns, and what the meters say.

Every engine runs the same prompts in the same round, one after the other and back and forth, so that a clock that
drifts meets all of them. This module knows neither processes nor devices: an engine is anything that answers
`Timed`, and its seconds are whatever its clock says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.cells import Cell, Decode, Energy, Prefill, Request, Workload
from harness.client import EngineError, Timed
from harness.gate import choose_referee, gate_request, judge
from harness.nvml import Nvml
from harness.records import Record
from harness.work import Shape, Work
from nanovllm.tuning.turns import in_turns, percentiles

TEMPERATURE = 0.6
SLOW_OUTS = (8, 40)  # answers of `generate` of Hugging Face, twenty times slower: the same rate from fewer tokens
ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Bench:
    """The engines of one model, ready to be measured."""

    def __init__(
        self, engines: Sequence[Timed], shape: Shape, origins: dict[str, dict[str, Any]], *, nvml: Nvml,
        rounds: int = 3, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.engines, self.shape, self.origins = list(engines), shape, origins  # origins: by label
        self.nvml, self.rounds, self.say = nvml, rounds, say
        self.roofs: dict[str, float] = {}
        self.refused: list[str] = []

    def measure(self, cell: Cell) -> list[Record]:
        """The rows of a cell; of an engine whose gate is red or that fails there are none, but a sentence."""
        found: list[Record] = []
        passed = [engine for engine in list(self.engines) if self._passes(engine, cell)]
        for engine in passed:  # behind all gates, for judging takes memory too
            engine.ask("peaks")
        kinds: dict[type[Cell], Callable[[Any, Sequence[Timed]], list[Record]]] = {
            Decode: self._decode, Prefill: self._prefill, Workload: self._workload, Energy: self._energy,
        }  # fmt: skip
        while passed:
            try:
                found = kinds[type(cell)](cell, passed)
                break
            except FailedTurn as failed:  # the others are measured without it
                self._refuse(f"{cell.label}: {failed}; it is left out from here on")
                self.engines = [engine for engine in self.engines if engine is not failed.engine]
                passed = [engine for engine in passed if engine is not failed.engine]
        return found + [row for engine in passed for row in self._memory(cell, engine)]

    def measure_roofs(self) -> list[Record]:
        """What the device reaches at most, by one of our engines; shares of it are in the rows from then on."""
        engine = next((e for e in self.engines if e.options.engine == "nanovllm"), None)
        if engine is None or engine.options.device != "cuda":
            return []
        self.roofs = engine.ask("roofs")
        origin = {**self.origins[engine.label], "model": "", "options": "", "weights": ""}
        about = {"read_bytes_per_s": ("float32", "1 GiB summed"), "bf16_flop_per_s": ("bfloat16", "8192 cubed")}
        return [
            Record("roof", metric, value, **{**origin, "dtype": about[metric][0], "options": about[metric][1]})
            for metric, value in self.roofs.items()
        ]

    # -- one kind of cell each -----------------------------------------------------------------------------------------

    def _decode(self, cell: Decode, engines: Sequence[Timed]) -> list[Record]:
        def run(engine: Timed, turn: int) -> tuple[float, float]:
            short, out = self._outs(cell, engine)
            seconds = [self._seconds(engine, self._request(cell, turn, n)) for n in (short, out)]
            return (seconds[1] - seconds[0]) / (out - short), seconds[1]

        rows = []
        for engine, times in self._turns(run, engines, self.rounds):
            short, out = self._outs(cell, engine)
            step = percentiles([step for step, _ in times])
            if step[0] <= 0:
                self._refuse(f"{cell.label}: {engine.label} took no longer for {out} tokens than for {short}: noise")
                continue
            context = cell.prompt + (out + short) / 2
            work = self.shape.decode(cell.batch, context, self._element_size(engine))
            row = self._row(cell, engine, out=str(out))
            rows += [
                row("ms_per_token", [t * 1e3 for t in step], runs=len(times), bytes=work.bytes, flop=work.flop),
                row("output_tok_s", [cell.batch / step[i] for i in (0, 2, 1)], runs=len(times)),
                row("answer_ms", [t * 1e3 for t in percentiles([whole for _, whole in times])], runs=len(times)),
                *self._shares(row, work, step[0]),
            ]
        return rows

    def _prefill(self, cell: Prefill, engines: Sequence[Timed]) -> list[Record]:
        def run(engine: Timed, turn: int) -> float:
            return self._seconds(engine, self._request(cell, turn))

        rows = []
        for engine, times in self._turns(run, engines, max(5, self.rounds)):
            row, seconds = self._row(cell, engine), percentiles(times)
            work = self.shape.prefill(cell.prompt, self._element_size(engine))
            ms = [t * 1e3 for t in seconds]
            rows.append(row("ttft_ms", ms, runs=len(times), bytes=work.bytes, flop=work.flop))
            rows += self._shares(row, work, seconds[0])
        return rows

    def _workload(self, cell: Workload, engines: Sequence[Timed]) -> list[Record]:
        turns = ("cold", "warm")

        def run(engine: Timed, turn: int) -> tuple[float, float | None]:
            before = self.nvml.energy_joules()
            request = cell.request(turns[turn], self.shape.vocab)
            tokens = request.new_tokens
            rate = tokens / self._seconds(engine, request)
            after = self.nvml.energy_joules()
            return rate, None if before is None or after is None else (after - before) / tokens

        rows = []
        for engine, found in self._turns(run, engines, len(turns)):
            row = self._row(cell, engine, note="bench.py draw")
            for turn, (rate, joules) in zip(turns, found, strict=True):
                rows.append(row(f"output_tok_s_{turn}", [rate], runs=1))
                rows += [row(f"joule_per_token_{turn}", [joules], runs=1)] if joules is not None else []
        return rows

    def _energy(self, cell: Energy, engines: Sequence[Timed]) -> list[Record]:
        if self.nvml.energy_joules() is None:
            return []

        def run(engine: Timed, turn: int) -> tuple[float, float]:
            before, seconds, tokens, repeats = self.nvml.energy_joules() or 0.0, 0.0, 0, 0
            while seconds < cell.seconds:
                request = cell.request(f"{turn} {repeats}", self.shape.vocab)
                seconds += self._seconds(engine, request)
                tokens += request.new_tokens
                repeats += 1
            joules = (self.nvml.energy_joules() or 0.0) - before
            return joules / tokens, joules / seconds

        rows = []
        for engine, ((joules, watts),) in self._turns(run, engines, 1):
            row = self._row(cell, engine, note="whole requests, idle power included")
            rows += [row("joule_per_token", [joules], runs=1), row("watts", [watts], runs=1)]
        return rows

    # -- what they share -----------------------------------------------------------------------------------------------

    def _turns(self, run: Callable[[Timed, int], Any], engines: Sequence[Timed], rounds: int) -> list[Any]:
        """[(engine, what its runs returned)]; FailedTurn names an engine that fails."""

        def guarded(engine: Timed) -> Callable[[int], Any]:
            def call(turn: int) -> Any:
                try:
                    return run(engine, turn)
                except EngineError as error:
                    raise FailedTurn(engine, error) from error

            return call

        found = in_turns({engine.label: guarded(engine) for engine in engines}, rounds)
        return [(engine, found[engine.label]) for engine in engines]

    def _passes(self, engine: Timed, cell: Cell) -> bool:
        referee = choose_referee(self.engines)
        try:
            if referee is None:
                raise EngineError("nobody can judge: let nanovllm or transformers take part")
            reason = judge(engine, referee, gate_request(cell, self.shape.vocab))
        except EngineError as error:
            reason = str(error)
        if reason:
            self._refuse(f"{cell.label}: {reason}")
        return not reason

    def _refuse(self, sentence: str) -> None:
        self.refused.append(sentence)
        self.say(f"REFUSED {sentence}")

    def _request(self, cell: Cell, turn: int, out: int | None = None) -> Request:
        return cell.request(str(turn), self.shape.vocab, out)

    def _seconds(self, engine: Timed, request: Request) -> float:
        return float(engine.generate(request, TEMPERATURE)["seconds"])

    def _outs(self, cell: Decode, engine: Timed) -> tuple[int, int]:
        if engine.options.engine == "transformers" and cell.out > SLOW_OUTS[1]:
            return SLOW_OUTS
        return cell.short, cell.out

    def _element_size(self, engine: Timed) -> int:
        return ELEMENT_SIZES[engine.about["dtype"]]

    def _row(self, cell: Cell, engine: Timed, **more: str) -> Callable[..., Record]:
        """A maker of rows: metric, [median, p20, p80] or [value], further columns."""
        shared: dict[str, Any] = {**self.origins[engine.label], **cell.shape, **more}

        def make(metric: str, values: Sequence[float], **columns: Any) -> Record:
            low, high = (values[1], values[2]) if len(values) == 3 else (None, None)
            return Record(cell.test, metric, values[0], p20=low, p80=high, **{**shared, **columns})

        return make

    def _shares(self, row: Callable[..., Record], work: Work, seconds: float) -> list[Record]:
        """Of the measured roofs, where they were measured."""
        if not self.roofs:
            return []
        return [
            row("read_share", [work.bytes / seconds / self.roofs["read_bytes_per_s"]]),
            row("flop_share", [work.flop / seconds / self.roofs["bf16_flop_per_s"]]),
        ]

    def _memory(self, cell: Cell, engine: Timed) -> list[Record]:
        """Peaks of PyTorch's allocator since the gate, and what is left of them without the KV cache's fixed pool."""
        try:
            peaks = engine.ask("peaks")
        except EngineError as error:
            self._refuse(f"{cell.label}: {error}")
            return []
        row = self._row(cell, engine)
        found = [row(f"peak_{kind}_bytes", [float(value)]) for kind, value in peaks.items()]
        pool = engine.about.get("kv_bytes")
        if peaks and pool:
            found.append(row("peak_beside_kv_bytes", [float(peaks["allocated"] - pool)], note=f"KV pool {pool} bytes"))
        return found


class FailedTurn(Exception):
    """An engine failed while it was timed."""

    def __init__(self, engine: Timed, error: EngineError) -> None:
        super().__init__(str(error))
        self.engine = engine

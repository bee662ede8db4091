"""The benchmark harness under a clock of its own: order of turns, percentiles, gates, rows, and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_baseline
import pytest
import suite
from harness import session
from harness.cells import BATCHES, LENGTHS, SCENARIOS, Cell, Decode, Energy, Prefill, Request, Workload, plan, quick
from harness.client import EngineError, Process
from harness.engines import Options
from harness.gate import choose_referee
from harness.measure import Bench
from harness.models import SHAPES, SMOKE, write_model
from harness.nvml import Nvml
from harness.records import Record, git_commit, read, write
from harness.session import Entrant, Plan, last_run, unfinished
from harness.work import Shape

from nanovllm.tuning.turns import balanced_orders, in_turns, percentiles

SHAPE = Shape(SHAPES["Qwen3-0.6B"])


class Meter(Nvml):
    """100 W of whatever clock it is given; None where there is no counter."""

    def __init__(self, seconds: Callable[[], float] | None = None) -> None:
        self.why, self.seconds, self._lib = "", seconds, None

    def energy_joules(self) -> float | None:
        return None if self.seconds is None else 100 * self.seconds()

    def memory(self) -> tuple[int, int] | None:
        return None


class FakeEngine:
    """Prefill takes a microsecond a prompt token, a step a millisecond times `slow`; calls are put down in `log`."""

    def __init__(self, log: list[Any], engine: str = "nanovllm", fusion: str = "auto", slow: float = 1.0) -> None:
        self.label, self.log, self.slow = f"{engine} {fusion}", log, slow
        self.options = Options(engine, "model", fusion=fusion)
        self.about: dict[str, Any] = {"version": "1", "dtype": "bfloat16", "device": "GPU", "kv_bytes": 1000}
        self.now, self.regret, self.fails_at, self.calls, self.requests = 0.0, 0.0, -1, 0, []

    def generate(self, request: Request, temperature: float, tokens: bool = False) -> dict[str, Any]:
        self.log.append((self.label, temperature, request.outs[0]))
        self.requests.append((temperature, request))
        self.calls += 1
        if self.calls == self.fails_at:
            raise EngineError(f"{self.label} has ended: out of memory")
        seconds = sum(map(len, request.prompts)) * 1e-6 + max(request.outs) * 1e-3 * self.slow
        self.now += seconds
        return {"seconds": seconds, "tokens": [[7] * n for n in request.outs]}

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "score":
            self.log.append((self.label, "judges"))
            texts = zip(arguments["texts"], arguments["starts"], strict=True)
            return {"regrets": [[self.regret] * (len(text) - start) for text, start in texts]}
        if op == "roofs":
            return {"read_bytes_per_s": 4e12, "bf16_flop_per_s": 8e14}
        self.log.append((self.label, op))
        return {"allocated": 5000, "reserved": 6000}


def bench(*engines: FakeEngine, said: list[str] | None = None, nvml: Nvml | None = None, rounds: int = 3) -> Bench:
    origins = {e.label: dict(engine=e.options.engine, model="M", options=e.label) for e in engines}
    say = (said if said is not None else []).append
    return Bench(engines, SHAPE, origins, nvml=nvml or Meter(), rounds=rounds, say=say)


def rows_of(rows: list[Record], metric: str) -> dict[str, Record]:
    return {row.options: row for row in rows if row.metric == metric}


# ------------------------------------------------------------------------------------------------------ turns, numbers


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    found = in_turns({name: lambda turn, name=name: order.append(name) or turn for name in "abc"}, 3)
    assert order == [*"abc", *"cba", *"abc"] and found == {name: [0, 1, 2] for name in "abc"}


@pytest.mark.parametrize("count", range(1, 9))
def test_balanced_orders_favour_nobody(count: int) -> None:
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((i, place) for order in orders for place, i in enumerate(order))
    assert set(places.values()) == {len(orders) // count} and len(places) == count**2
    neighbours = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(neighbours) == count * (count - 1) and len(set(neighbours.values())) <= 1
    order: list[str] = []
    in_turns({str(i): lambda turn, i=i: order.append(str(i)) for i in range(count)}, len(orders), balanced=True)
    assert order == [str(i) for row in orders for i in row]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 2.0], (1.5, 1.2, 1.8)), ([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], (3.5, 2, 5))],
)
def test_percentiles_lie_within_the_values(values: list[float], expected: tuple[float, ...]) -> None:
    assert percentiles(values) == pytest.approx(expected)


def test_fused_and_unfused_take_turns_behind_their_gates() -> None:
    log: list[Any] = []
    fused, unfused = FakeEngine(log), FakeEngine(log, fusion="off", slow=2)
    bench(fused, unfused, rounds=2).measure(Decode(2, 128))
    gate = [
        ("nanovllm auto", 0.0, 64),
        ("nanovllm off", "judges"),
        ("nanovllm off", 0.0, 64),
        ("nanovllm off", "judges"),
    ]
    one = [[(name, 0.6, 64), (name, 0.6, 256)] for name in ("nanovllm auto", "nanovllm off")]
    resets = [("nanovllm auto", "peaks"), ("nanovllm off", "peaks")]
    assert log == gate + resets + one[0] + one[1] + one[1] + one[0] + resets


def test_a_turn_has_new_prompts_and_all_engines_the_same() -> None:
    fused, unfused = FakeEngine([]), FakeEngine([], fusion="off")
    bench(fused, unfused).measure(Decode(2, 128))
    assert sorted(fused.requests, key=repr) == sorted(unfused.requests, key=repr)
    prompts = [tuple(prompt) for _, request in fused.requests for prompt in request.prompts]
    assert len(set(prompts)) == len(prompts) == 14 and {len(p) for p in prompts} == {128}


def test_decode_cancels_prefill_and_fills_its_columns() -> None:
    rows = bench(FakeEngine([], slow=0.5), FakeEngine([], fusion="off")).measure(Decode(4, 1000))
    step = rows_of(rows, "ms_per_token")
    assert step["nanovllm off"].value == pytest.approx(1.0) and step["nanovllm auto"].value == pytest.approx(0.5)
    row = step["nanovllm off"]
    assert (row.test, row.batch, row.prompt, row.out, row.runs) == ("decode", "4", "1000", "256", 3)
    assert row.p20 is not None and row.p80 is not None and row.p20 <= row.value <= row.p80
    assert rows_of(rows, "output_tok_s")["nanovllm off"].value == pytest.approx(4000)
    assert rows_of(rows, "answer_ms")["nanovllm off"].value == pytest.approx(256 + 4)
    assert rows_of(rows, "peak_beside_kv_bytes")["nanovllm auto"].value == 4000
    assert len({r.key for r in rows}) == len(rows)


def test_shares_of_the_measured_roofs() -> None:
    measuring = bench(FakeEngine([], slow=0.5))
    roofs = {row.metric: row for row in measuring.measure_roofs()}
    assert roofs["read_bytes_per_s"].value == 4e12 and roofs["bf16_flop_per_s"].test == "roof"
    rows = measuring.measure(Decode(1, 128))
    row = rows_of(rows, "ms_per_token")["nanovllm auto"]
    assert row.bytes == pytest.approx(1.192e9 + 289 * 112 * 1024, rel=1e-3)  # weights once, 112 KiB of KV a token
    assert rows_of(rows, "read_share")["nanovllm auto"].value == pytest.approx(row.bytes / 0.5e-3 / 4e12)
    assert rows_of(rows, "flop_share")["nanovllm auto"].value == pytest.approx(row.flop / 0.5e-3 / 8e14)


def test_prefill_workload_and_energy() -> None:
    engine = FakeEngine([])
    measuring = bench(engine, nvml=Meter(lambda: engine.now))
    (first,) = rows_of(measuring.measure(Prefill(prompt=2000)), "ttft_ms").values()
    assert first.value == pytest.approx(3) and first.runs == 5 and first.batch == "1"
    rows = measuring.measure(Workload())
    (cold,), (warm,) = (rows_of(rows, f"output_tok_s_{turn}").values() for turn in ("cold", "warm"))
    assert cold.value == warm.value == pytest.approx(133966 / (142827e-6 + 1.024), rel=2e-3)
    (joules,) = rows_of(rows, "joule_per_token_warm").values()
    assert joules.value == pytest.approx(100 / warm.value)
    rows = measuring.measure(Energy(4, 128))
    (watts,), (joules,) = (rows_of(rows, metric).values() for metric in ("watts", "joule_per_token"))
    assert watts.value == pytest.approx(100) and joules.value == pytest.approx(100 * (256e-3 + 512e-6) / 1024)


def test_without_an_energy_counter_there_is_no_row() -> None:
    measuring = bench(FakeEngine([]))
    rows = measuring.measure(Energy(1, 128)) + measuring.measure(Workload())
    assert not any("joule" in row.metric for row in rows) and not measuring.refused


def test_hugging_face_answers_shorter_and_judges() -> None:
    log: list[Any] = []
    theirs, ours = FakeEngine(log, "transformers"), FakeEngine(log)
    rows = bench(ours, theirs).measure(Decode(1, 128))
    step = rows_of(rows, "ms_per_token")
    assert step["transformers auto"].value == pytest.approx(1) and step["transformers auto"].out == "40"
    assert log.count(("transformers auto", "judges")) == 2 and ("nanovllm auto", "judges") not in log


def test_a_difference_that_is_noise_is_no_row() -> None:
    engine, said = FakeEngine([], slow=-1), []
    rows = bench(engine, said=said).measure(Decode(1, 128))
    assert not rows_of(rows, "ms_per_token") and "took no longer for 256 tokens than for 64: noise" in said[0]


# --------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("regret", [0.51, 0.06, float("nan")])
def test_a_red_gate_refuses_the_time(regret: float) -> None:
    said: list[str] = []
    judge, judged = FakeEngine([], fusion="off"), FakeEngine([])
    judge.regret = regret
    measuring = bench(judged, judge, said=said)
    assert measuring.measure(Decode(1, 128)) == []
    assert len(measuring.refused) == 2 and "decode batch 1 prompt 128: nanovllm auto is not timed" in said[0]
    assert all(temperature == 0 for temperature, _ in judged.requests + judge.requests)


def test_a_green_gate_at_the_limit() -> None:
    engine = FakeEngine([])
    engine.regret = 0.05
    assert bench(engine).measure(Decode(1, 128))


def test_the_referee() -> None:
    auto, off, theirs, other = (
        FakeEngine([], *names) for names in (("nanovllm",), ("nanovllm", "off"), ("transformers",), ("vllm",))
    )
    assert choose_referee([other, auto, off, theirs]) is theirs
    assert choose_referee([other, auto, off]) is off
    assert choose_referee([other, auto]) is auto
    assert choose_referee([other]) is None
    measuring = bench(other)
    assert measuring.measure(Decode(1, 128)) == [] and "nobody can judge" in measuring.refused[0]


def test_an_engine_that_fails_leaves_the_others_their_rows() -> None:
    said: list[str] = []
    steady, failing = FakeEngine([], fusion="off"), FakeEngine([])
    failing.fails_at = 4
    measuring = bench(steady, failing, said=said)
    rows = measuring.measure(Decode(1, 128))
    assert set(rows_of(rows, "ms_per_token")) == {"nanovllm off"}
    assert measuring.engines == [steady] and "out of memory; it is left out from here on" in said[0]


# --------------------------------------------------------------------------------------------------------------- cells


def test_the_scenarios_cover_the_plan() -> None:
    cells = plan(list(SCENARIOS), long=True)
    assert len(set(cells)) == len(cells)
    decodes = {(c.batch, c.prompt) for c in cells if isinstance(c, Decode)}
    assert {(b, 128) for b in (1, 4, 8, 16, 32, 64)} | {(1, n) for n in (128, 256, 512, 1024, 2048, 4096)} <= decodes
    assert {(b, c) for b in (1, 2, 4, 8, 16) for c in (128, 512, 1024, 2048, 4096)} | {(1, 32768)} <= decodes
    assert {c.prompt for c in cells if isinstance(c, Prefill)} == set(LENGTHS) and 64 in BATCHES
    assert any(isinstance(c, Workload) for c in cells) and any(isinstance(c, Energy) for c in cells)


def test_the_workload_is_bench_py() -> None:
    cold, warm = (Workload().request(turn, 151936) for turn in ("cold", "warm"))
    assert (sum(map(len, cold.prompts)), cold.new_tokens) == (142827, 133966)
    assert [*map(len, warm.prompts)] == [*map(len, cold.prompts)] and warm.prompts != cold.prompts
    assert Workload().shape == {"batch": "256", "prompt": "100-1024", "out": "100-1024"}
    assert 142827 < Workload().kv_tokens < 142827 + 133966


def test_work_of_a_step() -> None:
    """Against the floors that docs/04 derives: 1.192 GB of weights, 112 KiB of KV a token."""
    work = SHAPE.decode(1, 0, 2)
    assert work.bytes == pytest.approx(1.192e9 + 114688, rel=1e-3) and work.flop == pytest.approx(1.192e9, rel=1e-3)
    assert SHAPE.decode(64, 1000, 2).bytes == pytest.approx(1.192e9 + 64 * 1001 * 114688, rel=1e-3)
    assert Shape(SHAPES["Qwen3-8B"]).parameters == pytest.approx(8.19e9, rel=1e-2)
    long = SHAPE.prefill(4096, 2)
    assert long.flop == pytest.approx(2 * 4096 * SHAPE.body + 2 * 4096**2 * 16 * 128 * 28, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans whose engines are fake: processes are not started, the model is not written."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["Qwen3-0.6B"]))
    monkeypatch.setattr(session, "find_model", lambda *_: (tmp_path, "random"))
    monkeypatch.setattr(session, "Nvml", Meter)

    class FakeProcess(FakeEngine):
        ready_seconds = 1.0

        def __init__(self, label: str, options: Options, command: Any) -> None:
            super().__init__([], options.engine, options.fusion)
            self.label, self.options = label, options
            self.about |= {"torch": "2", "triton": "3", "device": "NVIDIA H100 80GB HBM3"}

        def since_start(self) -> float:
            return 2.0

        def close(self) -> None:
            pass

    monkeypatch.setattr(session, "Process", FakeProcess)

    def make(cells: list[Cell], **fields: Any) -> Plan:
        entrants = [Entrant("nanovllm"), Entrant("nanovllm", "off")]
        return Plan(entrants, cells, csv=tmp_path / "m.csv", **fields)

    return make


CELLS: list[Cell] = [Decode(1, 128), Prefill(prompt=128), Decode(2, 128)]


def test_rows_carry_their_provenance(faked: Callable[..., Plan]) -> None:
    wanted = faked(CELLS, start=True, run="now")
    assert session.measure_model(wanted, "M", say=lambda _: None) == []
    rows = read(wanted.csv)
    assert {(r.run, r.commit, r.torch, r.triton, r.device, r.weights) for r in rows} == {
        ("now", git_commit(), "2", "3", "NVIDIA H100 80GB HBM3", "random")
    } | {("now", git_commit(), "2", "3", "NVIDIA H100 80GB HBM3", "")}  # the roofs have no model
    assert {r.options for r in rows if r.test == "decode"} == {"", "fusion=off"}
    starts = {r.metric: r.value for r in rows if r.test == "start" and not r.options}
    assert starts == {f"start_to_{what}_s_{when}": value for when in ("cold", "warm")
                      for what, value in (("ready", 1), ("first_token", 2))}  # fmt: skip


def test_a_full_disk_stops_the_run_and_leaves_the_finished_cells(
    faked: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, writes = faked(CELLS, device="cpu"), []

    def failing(rows: list[Record], path: Path) -> None:
        writes.append(rows)
        if any(r.batch == "2" for r in rows):
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
                write(rows, path)
        write(rows, path)

    monkeypatch.setattr(session, "write", failing)
    with pytest.raises(OSError, match="cannot write .*No space left.*: free some space; the old file is unchanged"):
        session.measure_model(wanted, "M", say=lambda _: None)
    assert {r.test for r in read(wanted.csv)} == {"decode", "prefill"}
    assert {r.batch for r in read(wanted.csv) if r.test == "decode"} == {"1"}
    assert [p.name for p in wanted.csv.parent.iterdir() if "partial" in p.name] == []


def test_an_interrupted_run_is_resumed_where_it_stopped(
    faked: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = faked(CELLS, run="first", device="cpu")
    original = Bench.measure

    def interrupted(self: Bench, cell: Cell) -> list[Record]:
        if cell == CELLS[1]:
            raise KeyboardInterrupt
        return original(self, cell)

    monkeypatch.setattr(Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.measure_model(wanted, "M", say=lambda _: None)
    assert last_run(wanted.csv) == "first"
    assert unfinished(wanted, read(wanted.csv)) == CELLS[1:]
    monkeypatch.setattr(Bench, "measure", original)
    before = {r.key: r for r in read(wanted.csv)}
    said: list[str] = []
    assert session.measure_model(wanted, "M", say=said.append) == []
    assert unfinished(wanted, read(wanted.csv)) == [] and not any("decode batch 1 " in line for line in said)
    assert all(r in read(wanted.csv) for r in before.values())
    session.measure_model(wanted, "M", say=said.append)
    assert said[-1] == "M: every cell of run first is done"


def test_a_time_limit_begins_no_new_cell(faked: Callable[..., Plan]) -> None:
    ticks = iter([0.0, 1.0, 11.0])
    wanted = faked(CELLS, limit=10, clock=lambda: next(ticks), device="cpu")
    (problem,) = session.measure_model(wanted, "M", say=lambda _: None)
    assert problem == "2 cells were not begun: the time limit of 10 s is over"
    assert {r.test for r in read(wanted.csv)} == {"decode"}


def test_engines_that_do_not_fit_together_are_one_sentence(
    faked: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "memory", lambda _: (10 << 30, 80 << 30))
    with pytest.raises(ValueError, match="2 engines need .* GB and 75 GB are free: let fewer take part"):
        session.measure_model(faked([Decode(64, 4096)]), "M", say=lambda _: None)


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_worker_without_its_engine_is_one_sentence() -> None:
    with pytest.raises(EngineError, match="^vllm: vllm is not installed for .*python.*: install it there or name"):
        Process("vllm", Options("vllm", "model"))


def test_a_worker_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="PyTorch finds no CUDA GPU"):
        Process("nanovllm", Options("nanovllm", str(tmp_path)))


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("/no/such/python",), "does not start: No such file or directory"),
        (("bash", "-c", "echo chatter; echo out of luck >&2; exit 3", "x"), "has ended: out of luck"),
        (("bash", "-c", "exit 3", "x"), "has ended: status 3 and no word"),
    ],
)
def test_a_process_that_fails_is_one_sentence(command: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        Process("x", Options("nanovllm", "model"), command)


def test_a_process_that_hangs_is_ended_with_its_children() -> None:
    with pytest.raises(EngineError, match="did not answer within 0 s and was ended"):
        Process("x", Options("nanovllm", "model"), ("bash", "-c", "sleep 60; exit", "x"), start_timeout=0.3)


def test_meters_without_nvml() -> None:
    class Broken:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *_: 3 if name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo") else 0

    meters = Nvml(Broken())
    assert meters.energy_joules() is None and "no energy counter" in meters.why and meters.memory() is None
    assert dataclasses.asdict(Record("a", "b", 1.0))["p20"] is None


# ------------------------------------------------------------------------------------------------------- the commands


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(suite.__file__)
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=240)


def test_every_path_runs_on_the_cpu(tmp_path: Path) -> None:
    """The smoke: ours fused and unfused, Hugging Face as the referee, real processes, every kind of cell."""
    csv = tmp_path / "m.csv"
    common = ["--quick", "--device", "cpu", "--rounds", "1", "--csv", str(csv), "--models", str(tmp_path / "models")]
    done = run_suite(*common, "--engines", "nanovllm", "transformers", "vllm")
    assert done.returncode == 1  # for vLLM and for the workload that `generate` does not take
    assert "suite: vllm: vllm is not installed" in done.stderr and "a mixed workload it could only pad" in done.stderr
    rows = read(csv)
    assert {(r.engine, r.options) for r in rows} == {("nanovllm", ""), ("nanovllm", "fusion=off"), ("transformers", "")}
    for cell in quick():
        if not isinstance(cell, Energy):
            found = [r for r in rows if (r.test, r.metric, r.batch) == (cell.test, cell.metric, str(cell.batch))]
            noise = done.stderr.count(f"{cell.label}: ") if isinstance(cell, Decode) else 0  # a busy machine
            assert len(found) + noise == (2 if isinstance(cell, Workload) else 3), cell
    assert {r.run for r in rows} == {rows[0].run} and all(r.weights == "random" for r in rows)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_random_weights_are_right_by_hugging_face(tmp_path: Path) -> None:
    """Every tensor that Hugging Face expects is there and none else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_model(SMOKE, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.model.norm.weight.std() > 0.02 and AutoTokenizer.from_pretrained(path).eos_token_id == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [SMOKE]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nowhere"], "'nowhere' is neither a known shape .* nor a directory with config.json"),
        (["--resume", "--csv", "none.csv"], "none.csv has no run of this commit to go on with"),
        (["--command", "vllm"], "--command 'vllm' is not ENGINE=WORDS"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert suite.main(["--quick", *arguments]) == 1
    assert re.search(f"suite: .*{sentence}", capsys.readouterr().err)


def test_the_baseline_command_asks_for_the_same_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("harness.options.measure_model", lambda plan, model: plans.append(plan) or [])
    text = "decode prefill --batch 1 2 --context 128 --prompt 64 --fusion off --enforce-eager"
    words = text.split()
    assert bench_baseline.main([*words, "--csv", str(tmp_path / "m.csv")]) == 0
    assert plans[0].cells == [Decode(1, 128), Decode(2, 128), Prefill(prompt=64)]
    assert plans[0].entrants[0].options == "fusion=off enforce_eager" and plans[0].entrants[0].extra["enforce_eager"]


# ----------------------------------------------------------------------------------------------------------- the schema


def test_older_files_are_read_and_new_columns_come_last(tmp_path: Path) -> None:
    path, old = tmp_path / "m.csv", "test,metric,value,engine\ndecode,ms_per_token,1.5,vllm\n"
    path.write_text(old)
    (row,) = read(path)
    assert (row.value, row.engine, row.p20, row.runs, row.run) == (1.5, "vllm", None, None, "")
    new = dataclasses.replace(row, batch="2", p20=1.25, p80=2.0, runs=3, bytes=1e9, driver="580", run="r")
    write([new], path)
    assert read(path) == [row, new]
    assert (
        path.read_text()
        .splitlines()[0]
        .startswith(
            "test,metric,value,engine,version,model,device,dtype,weights,batch,prompt,out,options,date,commit,torch,triton,note"
        )
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("test,metric,value,colour\na,b,1,red\n", "columns that no row has .colour."),
        ("test,metric,value\na,b,1\na,b\n", "line 3: not a row"),
        ("test,metric,value\na,b,fast\n", "line 2: not a row"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(path)

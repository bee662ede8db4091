"""Recording: the driver on a fake engine, profilers that are missing or fail, files that are whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import profiling_traces as synthetic
import pytest
import tiny_models
from profiling import capture as benchmark

from nanovllm.cli import main
from nanovllm.profiling import capture, child, ncu, nsys
from nanovllm.profiling.drive import Free, Recorder, Running, measure
from nanovllm.profiling.facts import CASES
from nanovllm.profiling.files import write_whole
from nanovllm.profiling.trace import LABELS, STEP, WINDOW, Labelled, Trace, read_trace
from nanovllm.utils import nvtx

ROOT = Path(__file__).resolve().parents[1]


class FakeEngine:
    """Prefills all it is given in one step, then gives a token to everybody a step; logs what happens when."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.running, self.made = log, [], []
        self.scheduler = self
        self.runner = SimpleNamespace(graphs=None, drain=lambda: log.append("drain"))

    def make_request(self, prompt: list[int], params: Any) -> SimpleNamespace:
        request = SimpleNamespace(
            request_id=str(len(self.made)), prompt=prompt, left=params.max_tokens, fresh=True, num_tokens=len(prompt)
        )
        self.made.append(request)
        return request

    def submit(self, requests: list[SimpleNamespace]) -> None:
        self.running += requests

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> SimpleNamespace | None:
        if not self.running:
            return None
        fresh = [r for r in self.running if r.fresh]
        for request in fresh or self.running:
            request.fresh = False
            request.left -= 1
            request.num_tokens += 1
        self.log.append("prefill" if fresh else "decode")
        prefill = sum(len(r.prompt) for r in fresh)
        tokens = prefill or len(self.running)
        self.running = [r for r in self.running if r.left > 0]
        return SimpleNamespace(num_tokens=tokens, num_prefill_tokens=prefill)

    def abort(self, request_id: str) -> None:
        self.running = [r for r in self.running if r.request_id != request_id]


def fake_recorder(log: list[str], each: bool = False) -> Recorder:
    """Marks and calls go to `log`; every look at the clock costs a second. `each`: windows are recorded apart."""

    @contextlib.contextmanager
    def mark(name: str) -> Iterator[None]:
        log.append(f"<{name}")
        yield
        log.append(f"{name}>")

    ticks = iter(range(1000))
    calls = {name: (lambda name=name: log.append(name)) for name in ("sync", "start", "stop")}
    stop = calls["stop"] if each else None
    return Recorder(mark, calls["sync"], calls["start"], stop, clock=lambda: next(ticks))


def between(log: list[str], name: str) -> list[str]:
    return log[log.index(f"<{name}") : log.index(f"{name}>")]


@pytest.mark.parametrize("name", ["decode-b1", "decode-b16"])
def test_a_decode_window_holds_decode_steps_only(name: str) -> None:
    case, log = CASES[name], []
    engine = FakeEngine(log)
    running = Running(engine, case, 100, case.steps)
    counts = fake_recorder(log).steps(running)
    inside = between(log, f"{WINDOW} {name}")
    assert inside.count("decode") == inside.count(f"<{STEP}") == case.steps == counts.steps
    assert "prefill" not in inside and log.count("prefill") == 1
    assert log[log.index("start") - 1] == "sync" and inside[-1] == "sync", "an idle device on both sides"
    assert counts.tokens == counts.rows == case.batch * case.steps and counts.wall_s == 1
    assert all(len(r.prompt) == 128 and max(r.prompt) < 100 for r in engine.made)
    # By hand: behind the prompt's own token and 12 warm-up steps the k-th step sees 128 + 13 + k keys of each sequence.
    exact = case.batch * sum(141 + k for k in range(case.steps))
    assert counts.kv_tokens == pytest.approx(exact, rel=0.01)
    running.close()
    assert not engine.running and log[-1] == "drain", "what ran behind the engine may have taken turns"


def test_prefill_records_one_request_a_step() -> None:
    case, log = CASES["prefill-2048"], []
    counts = fake_recorder(log).steps(Running(FakeEngine(log), case, 10**6, case.steps))
    inside = between(log, f"{WINDOW} prefill-2048")
    assert inside.count("prefill") == case.steps and log.count("prefill") == case.steps + case.warm
    assert (counts.tokens, counts.rows, counts.steps) == (2048 * case.steps, case.steps, case.steps)
    assert counts.kv_tokens == 0, "not known"


def test_the_workload_is_nano_vllms() -> None:
    """Its published totals: 142,827 prompt tokens and 133,966 output tokens. The slice is its middle."""
    case, log = CASES["workload"], []
    engine = FakeEngine(log)
    running = Running(engine, case, 10**6, case.steps)
    assert sum(len(r.prompt) for r in engine.made) == 142_827
    assert sum(r.left + r.num_tokens - len(r.prompt) for r in engine.made) == 133_966
    counts = fake_recorder(log).steps(running)
    rows = counts.tokens / counts.steps
    assert 0.8 < rows / (133_966 / 1023) < 1.25, "as many requests as in the mean of all steps"
    assert 700 < counts.kv_tokens / counts.tokens < 1100, "with contexts of about 900 tokens"


def test_a_case_that_ends_early_says_so() -> None:
    running = Running(FakeEngine([]), CASES["decode-b1"], 100, 1)
    with pytest.raises(ValueError, match="decode-b1 ended before its steps had run"):
        for _ in range(99):
            running.step()


def test_recording_starts_once_or_around_every_window() -> None:
    for each, expected in ((False, ["start"]), (True, ["start", "stop", "start", "stop"])):
        log: list[str] = []
        recorder = fake_recorder(log, each)
        for name in ("decode-b1", "prefill-2048"):
            recorder.labels(Running(FakeEngine(log), CASES[name], 100, 1))
        assert [word for word in log if word in ("start", "stop")] == expected


def test_the_labelled_step_is_what_the_graph_recorded() -> None:
    """A graph's step is run operation by operation at the graph's own size; without graphs any step is."""
    log: list[str] = []
    engine = FakeEngine(log)
    graphs = SimpleNamespace(size_for=lambda n: 24, context_for=lambda size, context: 512 if context < 512 else 4096)
    ran: list[tuple[int, int]] = []
    engine.runner = SimpleNamespace(graphs=graphs, decode_and_sample=lambda *size: ran.append(size))
    recorder = fake_recorder(log)
    recorder.labels(Running(engine, CASES["decode-b16"], 100, 1))
    assert ran == [(24, 512)] and between(log, f"{LABELS} decode-b16") == [f"<{LABELS} decode-b16", "sync"]
    engine.runner.graphs = None
    recorder.labels(Running(engine, CASES["decode-b1"], 100, 1))
    assert "decode" in between(log, f"{LABELS} decode-b1") and len(ran) == 1


def test_free_steps_tell_the_host_from_the_device() -> None:
    """By a clock of their own: every step waits 2 s for the device and works for 1; the graph is timed apart."""
    engine = FakeEngine([])
    now = [0.0]
    done = SimpleNamespace(synchronize=lambda: now.__setitem__(0, now[0] + 2))

    class Runner:
        graphs = SimpleNamespace(size_for=lambda n: n, context_for=lambda *_: 512, replay=lambda *_: None)

        def collect(self, step: object) -> str:
            return "collected"

    plain = engine.step
    engine.runner = Runner()

    def step() -> SimpleNamespace | None:
        assert engine.runner.collect(SimpleNamespace(done=done)) == "collected"
        now[0] += 1
        return plain()

    engine.step = step
    running = Running(engine, CASES["decode-b1"], 100, 20)
    free = measure(running, 20, lambda: None, lambda function, times: function() or 7.0, clock=lambda: now[0])
    assert free == Free(step_us=3e6, wait_us=2e6, graph_us=7.0)
    assert "collect" not in vars(engine.runner), "the engine is left as it was"


# ------------------------------------------------------------------------------------------------------ what goes wrong


def run_cli(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "nanovllm", *words], capture_output=True, text=True, env=environment)


def test_no_gpu_is_one_sentence(tmp_path: Path) -> None:
    done = run_cli("profile", "nowhere", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_nsys() -> None:
    assert capture.choose_profiler("auto", None) == "torch"
    assert capture.choose_profiler("auto", Path("nsys")) == "nsys" == capture.choose_profiler("nsys", Path("nsys"))
    assert capture.choose_profiler("torch", Path("nsys")) == "torch"
    with pytest.raises(OSError, match="nsys was not found"):
        capture.choose_profiler("nsys", None)


def test_nsys_is_found_inside_nsight_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nsys.find_nsys(tmp_path) is None and ncu.find_ncu(tmp_path) is None
    for version in ("2025.1", "2025.3"):
        host = tmp_path / "nsight-compute" / version / "host"
        for folder, name in (("target-linux-x64", "nsys"), ("linux-desktop-glibc_2_11_3-x64", "QdstrmImporter")):
            (host / folder).mkdir(parents=True)
            (host / folder / name).touch()
    found = nsys.find_nsys(tmp_path)
    assert found == tmp_path / "nsight-compute" / "2025.3" / "host" / "target-linux-x64" / "nsys"
    assert (
        nsys.importer_of(found) == tmp_path / "nsight-compute/2025.3/host/linux-desktop-glibc_2_11_3-x64/QdstrmImporter"
    )


def write_tool(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("importer", [False, True])
def test_recording_with_a_stand_in_for_nsys(tmp_path: Path, importer: bool) -> None:
    """The real calls in their real order; the nsys of Nsight Compute leaves a .qdstrm for the importer."""
    parts = synthetic.schedule(synthetic.step_kernels(True, 2), 3, 0.5, host=9.0)
    synthetic.write_nsys(tmp_path / "made.sqlite", parts)
    ending = "qdstrm" if importer else "nsys-rep"
    tool = write_tool(
        tmp_path / "v" / "host" / "target-linux-x64" / "nsys",
        f'echo "$1" >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do [ "$1" = export ] && export=1; shift; done\n'
        f'if [ -n "${{export:-}}" ]; then [ -e "$3" ] && cp {tmp_path}/made.sqlite "$2"\n'
        f'else touch "$2.{ending}"; shift 2; "$@"; fi',
    )
    write_tool(tmp_path / "v/host/desktop/QdstrmImporter", f'echo import >> {tmp_path}/calls; touch "$5"')
    exported = nsys.record(tool, tmp_path / "raw", ["touch", str(tmp_path / "ran")])
    assert (tmp_path / "ran").exists() and len(read_trace(exported).events) == 1 + sum(map(len, parts))
    expected = ["profile", "import", "export"] if importer else ["profile", "export"]
    assert (tmp_path / "calls").read_text().split() == expected


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("echo noise; echo 'nanovllm: the model is not there'; echo later; exit 2", "status 2: the model is not there"),
        ("echo 'write: No space left on device'; exit 1", "the disk is full; free some space"),
        ("exit 7", "status 7: it said nothing"),
        ("echo '==ERROR== ERR_NVGPUCTRPERM - denied'; exit 1", "performance counters"),
    ],
)
def test_a_failing_tool_is_one_sentence(tmp_path: Path, body: str, sentence: str) -> None:
    with pytest.raises(OSError, match=sentence):
        nsys.run([str(write_tool(tmp_path / "tool", body))], "the tool")
    with pytest.raises(OSError, match="the tool cannot start"):
        nsys.run([str(tmp_path / "nowhere")], "the tool")


def test_an_interrupt_ends_the_whole_group(tmp_path: Path) -> None:
    """Ctrl-C while a child of the profiler runs: nothing goes on in the background."""
    tool = write_tool(tmp_path / "tool", f"(sleep 2; touch {tmp_path}/survived) & wait")
    code = (
        "import signal, sys, threading, os\nfrom nanovllm.profiling import nsys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    nsys.run([sys.argv[1]], 'tool')\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tool)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "interrupted\n", done.stderr
    time.sleep(2.2)
    assert not (tmp_path / "survived").exists()


NCU = (
    "==PROF== Connected\nsome engine output, with commas\n"
    '"ID","Kernel Name","thread Domain:Push/Pop_Range:PL_Type","dram__bytes_read.sum","dram__bytes_write.sum",'
    '"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",'
    '"sm__warps_active.avg.pct_of_peak_sustained_active"\n'
    '"","","","Mbyte","Kbyte","%","us","%"\n'
    '"0","gemv_kernel","""<default domain>:nanovllm.labels decode-b1:none""","12.0","8.0","60","4.0","40"\n'
    '"1","void f::norm<float>(int)","""<default domain>:nanovllm.labels decode-b1:none""","1.0","0","5","2.0","20"\n'
    '"2","gemv_kernel","""<default domain>:nanovllm.labels decode-b1:none""","1,014.0","8.0","70","6,000.0","50"\n'
    '"3","gemm","""<default domain>:nanovllm.labels decode-b16:none""","1.0","8.0","70","6,000.0","50"\n'
)


def test_ncu_counts_kernels_by_case_and_role() -> None:
    tables = ncu.split(NCU, ["decode-b1", "decode-b16", "prefill-2048"])
    assert list(tables) == ["decode-b1", "decode-b16"]
    layer = "model.layers.0.self_attn"
    twin = [Labelled("gemv_kernel", (f"{layer}.qkv_proj",)), Labelled("norm", ("model.norm",)),
            Labelled("gemv_kernel", ("lm_head",))]  # fmt: skip
    head, qkv, norm = ncu.count(tables["decode-b1"], 1, twin)
    assert (head.role, head.us, head.bytes_read) == ("head", 6000, 1014e6)
    assert (qkv.role, qkv.launches, qkv.us, qkv.dram_percent, qkv.occupancy_percent) == ("qkv", 1, 4.0, 60, 40)
    assert qkv.gb_s == pytest.approx((12e6 + 8e3) / 4e-6 / 1e9) and (norm.name, norm.role) == ("norm", "final norm")


def test_ncu_finds_the_roles_of_a_graph_that_has_no_ranges() -> None:
    attention = ["_rms_norm_kernel", "gemm_a", "_prefill_kernel", "gemm_b"]
    mlp = ["_rms_norm_kernel", "gemm_c", "_silu_mul_kernel", "gemm_d"]
    names = ["_feed_kernel", *[*attention, *mlp] * 2, "_rms_norm_kernel", "gemm_e"]
    header = NCU.splitlines()[2:4]
    rows = [f'"{i}","{name}","","1.0","0","5","2.0","20"' for i, name in enumerate(names)]
    found = ncu.count("\n".join([*header, *rows]) + "\n", 2, [])
    roles = {(row.name, row.role): row.launches for row in found}
    assert roles["gemm_a", "qkv"] == roles["gemm_c", "gate_up"] == roles["_prefill_kernel", "attention"] == 2
    assert roles["_rms_norm_kernel", "norm"] == 4 and roles["gemm_e", "head"] == roles["_feed_kernel", "prepare"] == 1


def test_what_is_no_table_of_ncu() -> None:
    with pytest.raises(ValueError, match="ncu printed no table: .*performance counters"):
        ncu.split("==ERROR== ERR_NVGPUCTRPERM", ["decode-b1"])
    with pytest.raises(ValueError, match="names no NVTX ranges"):
        ncu.split(NCU.replace("nanovllm.labels", "other"), ["decode-b1"])
    with pytest.raises(ValueError, match="not a table of ncu"):
        ncu.count('"ID","Kernel Name"\n"",""\n"0","k"\n', 1, [])


def test_unknown_cases_and_profilers() -> None:
    with pytest.raises(ValueError, match="unknown case 'decode': use one of workload, decode-b1"):
        capture.Request("m", ("decode",))
    with pytest.raises(ValueError, match="profiler must be"):
        capture.Request("m", ("decode-b1",), profiler="perf")


# ---------------------------------------------------------------------------------------------------------------- files


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "summary.csv"
    write_whole(target, "old\n")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="cannot write .*No space left on device.* unchanged"):
        write_whole(target, "new\n")
    assert target.read_text() == "old\n" and list(tmp_path.iterdir()) == [target]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "summary.csv"
    write_whole(target, "old\n")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, "new\n")
    assert target.read_text() == "old\n" and list(tmp_path.iterdir()) == [target]


def fake_tools(monkeypatch: pytest.MonkeyPatch, tools: dict[str, object]) -> list[str]:
    """A GPU and tools that are not there: each profiled process is replaced by one that leaves its results."""
    log: list[str] = []

    def fake_run(command: list[str], what: str, environment: object = None, timeout: float | None = None) -> str:
        spec = json.loads(Path(command[-1]).read_text())
        log.append(f"{spec['profiler']} {spec['fusion']}")
        assert timeout is None or timeout > 0
        outcome = tools.get(spec["profiler"], "")
        if isinstance(outcome, BaseException):
            raise outcome
        for case in spec["cases"]:
            if spec["profiler"] == "none":
                result: dict[str, object] = {"step_us": 900.0, "wait_us": 300.0, "graph_us": 850.0}
            else:
                result = dataclasses.asdict(synthetic.facts(spec["fusion"], case=case, note=spec["note"]))
            Path(f"{spec['out']}.{case}.json").write_text(json.dumps(result))
        parts = synthetic.schedule(synthetic.step_kernels(spec["fusion"] != "off", 28), 4, 0.5, host=9.0)
        synthetic.write_torch(Path(f"{spec['out']}.trace.json"), parts, spec["cases"][0])
        return str(outcome)

    monkeypatch.setattr(capture, "require_gpu", lambda: None)
    monkeypatch.setattr(nsys, "find_nsys", lambda: tools.get("nsys path"))
    monkeypatch.setattr(ncu, "find_ncu", lambda: tools.get("ncu path"))
    monkeypatch.setattr(nsys, "run", fake_run)
    return log


def test_a_case_is_four_files_without_raw_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tools(monkeypatch, {})
    assert main(["profile", "a model", "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in (tmp_path / "decode-b1").iterdir())
    assert files == ["command.txt", "notes.md", "summary.csv", "timeline.html"]
    again = (tmp_path / "decode-b1" / "command.txt").read_text()
    assert again == "nanovllm profile 'a model' --case decode-b1 --fusion both\n"


def test_the_command_records_distils_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = fake_tools(monkeypatch, {})
    assert main(["profile", "some/model", "--out", str(tmp_path), "--ncu"]) == 0
    assert log == ["none off", "torch off", "none auto", "torch auto"]
    printed = capsys.readouterr()
    assert "nsys was not found" in printed.err and "fusion off" in printed.out and "fusion auto" in printed.out
    notes = (tmp_path / "decode-b1" / "notes.md").read_text()
    for part in ("nsys was not found", "recorded with torch.profiler", "ncu was not found",
                 "Fused: the device sets the pace; the host works 600 µs a step and waits 300 µs. 50 µs"):  # fmt: skip
        assert part in notes
    assert "nsys was not found" in (tmp_path / "decode-b1" / "timeline.html").read_text()


def test_an_nsys_that_fails_is_replaced_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_tools(monkeypatch, {"nsys path": Path("nsys"), "nsys": OSError("the importer found no libdw")})
    assert main(["profile", "m", "--out", str(tmp_path)]) == 0
    assert log == ["none off", "nsys off", "torch off", "none auto", "torch auto"], "asked once"
    assert "(the importer found no libdw), so PyTorch" in (tmp_path / "decode-b1" / "notes.md").read_text()
    assert main(["profile", "m", "--out", str(tmp_path / "b"), "--profiler", "nsys"]) == 2, "asked for by name"


# ------------------------------------------------------------------------------------------ all cases in one command


def run_capture(tmp_path: Path, *words: str) -> int:
    return benchmark.main(["--out", str(tmp_path / "out"), "--csv", str(tmp_path / "rows.csv"), *words])


def test_packed_profiles_are_published_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording on one machine and publishing on another gives what publishing at once gives."""
    monkeypatch.setenv("NANOVLLM_COMMIT", "abc1234")
    fake_tools(monkeypatch, {"ncu path": Path("ncu"), "ncu": NCU})
    case = ["--case", "decode-b1", "--ncu"]
    assert run_capture(tmp_path, *case) == 0
    monkeypatch.undo()
    before = {p.name: p.read_text() for p in (tmp_path / "out" / "decode-b1").iterdir()}
    rows = (tmp_path / "rows.csv").read_text()
    assert "free_graph_us" in rows and "Hardware counters" in before["notes.md"]

    fake_tools(monkeypatch, {"ncu path": Path("ncu"), "ncu": NCU})
    assert run_capture(tmp_path / "there", *case, "--pack", str(tmp_path / "packed")) == 0
    assert [p.name for p in (tmp_path / "packed").iterdir()] == ["profiles.tar.gz"] and not (
        tmp_path / "there"
    ).exists()
    monkeypatch.undo()
    assert run_capture(tmp_path / "here", "--unpack", str(tmp_path / "packed" / "profiles.tar.gz")) == 0
    after = {p.name: p.read_text() for p in (tmp_path / "here" / "out" / "decode-b1").iterdir()}
    assert before.keys() == after.keys() and before["summary.csv"] == after["summary.csv"]
    assert before["command.txt"] == after["command.txt"]


def test_a_slow_ncu_costs_its_counters_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupt while ncu counts: what nsys recorded had been published."""
    fake_tools(monkeypatch, {"ncu path": Path("ncu"), "ncu": KeyboardInterrupt()})
    assert run_capture(tmp_path, "--case", "decode-b1", "--ncu") == 130
    assert "interrupted: what had been published is kept" in capsys.readouterr().err
    assert (tmp_path / "out" / "decode-b1" / "timeline.html").exists() and (tmp_path / "rows.csv").exists()
    fake_tools(monkeypatch, {"ncu path": Path("ncu"), "ncu": OSError("ncu took longer than 120 s and was ended")})
    assert run_capture(tmp_path, "--case", "decode-b1", "--ncu") == 1
    assert "no counters of decode-b1: ncu took longer than 120 s and was ended" in capsys.readouterr().err
    assert "None: ncu took longer than 120 s" in (tmp_path / "out" / "decode-b1" / "notes.md").read_text()


def test_a_case_that_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """decode-b16 runs out of memory: decode-b1 is packed, and what another run recorded is published beside it."""
    log = fake_tools(monkeypatch, {})
    sound = nsys.run

    def short_of_memory(command: list[str], *args: Any, **kwargs: Any) -> str:
        said = sound(command, *args, **kwargs)
        failed = Path(f"{json.loads(Path(command[-1]).read_text())['out']}.decode-b16.json")
        if failed.exists():
            failed.write_text('{"error": "out of memory"}')
        return said

    monkeypatch.setattr(nsys, "run", short_of_memory)
    words = ["--case", "decode-b1", "decode-b16", "--pack", str(tmp_path)]
    assert run_capture(tmp_path, *words) == 1
    assert log == ["none auto", "torch auto", "none off", "torch off"]
    assert "decode-b16 fusion off: not recorded (out of memory)" in capsys.readouterr().err
    archive = tmp_path / "profiles.tar.gz"
    first = archive.rename(tmp_path / "first.tar.gz")
    monkeypatch.setattr(nsys, "run", sound)
    assert run_capture(tmp_path, "--case", "prefill-2048", "--pack", str(tmp_path)) == 0
    assert run_capture(tmp_path, "--unpack", str(first), str(archive)) == 0
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["decode-b1", "prefill-2048"]


def test_the_limit_ends_what_runs_and_begins_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tools(monkeypatch, {})
    limits: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    fake_run = nsys.run

    def a_minute_each(*args: Any, timeout: float) -> str:
        limits.append(timeout)
        clock[0] += 60
        return fake_run(*args, timeout=timeout)

    monkeypatch.setattr(nsys, "run", a_minute_each)
    assert run_capture(tmp_path, "--case", "decode-b1", "--limit", "130") == 1
    assert limits == [130, 70] and (tmp_path / "out" / "decode-b1" / "timeline.html").exists()
    assert "fusion off: the time limit is over" in capsys.readouterr().err


def test_one_failed_case_of_an_engine_is_told_and_all_of_them_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save_model("qwen3", tmp_path / "model")
    for name, prompt in (("decode-b1", 20), ("decode-b16", 500)):
        monkeypatch.setitem(CASES, name, dataclasses.replace(CASES[name], prompt=prompt, batch=1, warm=1, steps=2))
    options = {"max_model_len": 100, "kv_cache_memory_bytes": 1 << 22}
    spec = {
        "model": str(tmp_path / "model"), "name": "tiny", "cases": ["decode-b1", "decode-b16"], "fusion": "off",
        "profiler": "none", "device": "cpu", "options": options, "out": str(tmp_path / "x"), "note": "", "origin": {},
    }  # fmt: skip
    child.run(spec)
    assert json.loads((tmp_path / "x.decode-b1.json").read_text())["step_us"] > 0
    assert "max_model_len" in json.loads((tmp_path / "x.decode-b16.json").read_text())["error"]
    with pytest.raises(RuntimeError, match="max_model_len"):
        child.run({**spec, "cases": ["decode-b16"]})


def test_bad_archives_and_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(b"nothing")
    assert run_capture(tmp_path, "--unpack", str(tmp_path / "bad.tar.gz")) == 1
    assert "is no archive of profiles" in capsys.readouterr().err
    assert run_capture(tmp_path, "--unpack", str(tmp_path / "nowhere.tar.gz")) == 1
    assert run_capture(tmp_path) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(OSError, match="the tool took longer than 0 s and was ended"):
        nsys.run(["sleep", "30"], "the tool", timeout=0.2)


# ------------------------------------------------------------------------------------------------ the engine, on a CPU


def operators_as_kernels(path: Path) -> Trace:
    """A CPU has no kernels: its innermost operators play them, launched when they run."""
    items = json.loads(path.read_text())["traceEvents"]
    operators = sorted((i for i in items if i.get("cat") == "cpu_op"), key=lambda i: i["ts"])
    leaves = [a for a, b in zip(operators, [*operators[1:], None], strict=True)
              if b is None or b["ts"] >= a["ts"] + a["dur"]]  # fmt: skip
    for number, item in enumerate(leaves):
        item |= {"cat": "kernel", "args": {"correlation": number}}
    calls = [{**i, "cat": "cuda_runtime"} for i in leaves]
    path.write_text(json.dumps({"traceEvents": items + calls}))
    return read_trace(path)


@pytest.mark.parametrize("name", ["decode-b1", "prefill-2048"])
def test_a_real_engine_under_a_real_profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Warm-up, windows, steps, labels, times and reports of a tiny Qwen3 on the CPU, by PyTorch's profiler."""
    tiny_models.save_model("qwen3", tmp_path / "model")
    case = dataclasses.replace(CASES[name], prompt=20, warm=2, steps=4)
    monkeypatch.setitem(CASES, name, case)
    options = {"max_model_len": 100, "kv_cache_memory_bytes": 1 << 22}
    request = capture.Request(str(tmp_path / "model"), (name,), ("off",), "torch", "tiny", options, device="cpu")
    monkeypatch.setattr(capture, "read_trace", operators_as_kernels)
    monkeypatch.setattr(nsys, "run", lambda command, what, **_: child.run(json.loads(Path(command[-1]).read_text())))
    capture.record(request, tmp_path, say=lambda _: None)
    published = capture.publish(tmp_path, tmp_path / "out", lambda profiles: ["again"])
    (profile,) = published[name]
    assert len(profile.steps) == case.steps - (not case.isolated) and profile.layers_found
    assert {p.place.layer for p in profile.median.placed} == {None, 0, 1, 2}
    per_layer = [[p.place.role for p in profile.median.placed if p.place.layer == layer] for layer in range(3)]
    assert per_layer[1] == per_layer[2], "layers run the same operators"
    wanted = {"norm", "qkv", "rope", "attention", "o_proj", "gate_up", "activation", "down"}
    assert wanted <= set(per_layer[0]) <= wanted | {"prepare"}
    assert {"head", "final norm", "sample"} <= {row.name for row in profile.roles}
    assert profile.facts.free_step_us > 0 and profile.facts.tokens == (20 if case.isolated else 1)
    assert (tmp_path / "out" / name / "timeline.html").exists()


# ----------------------------------------------------------------------------------------------------------------- nvtx


def test_ranges_cost_nothing_when_off() -> None:
    from torch import nn

    assert nvtx.range("a") is nvtx.range("b"), "one object for all: no allocation"
    with nvtx.range("a"):
        pass
    model = nn.Sequential(nn.Linear(2, 2))
    nvtx.annotate(model)
    assert not model[0]._forward_pre_hooks and not model[0]._forward_hooks


def test_ranges_when_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    log: list[str] = []
    monkeypatch.setattr(nvtx, "_ON", True)
    monkeypatch.setattr(nvtx, "_push", log.append)
    monkeypatch.setattr(nvtx, "_pop", lambda: log.append("/"))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
    nvtx.annotate(model)
    with nvtx.range("step"):
        model["layers"][0](torch.zeros(1, 2))
    assert log == ["step", "layers.0", "layers.0.0", "/", "/", "/"]
    with pytest.raises(RuntimeError):
        model["layers"][0](torch.zeros(1, 3))
    assert log.count("/") == 5, "a failing module closes its range"


def test_ranges_for_a_while() -> None:
    """Calls, functions named by a module and named parts of one; afterwards the model is as it was."""
    import torch
    from torch import nn

    log: list[str] = []

    @contextlib.contextmanager
    def marker(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append("/")

    @nvtx.ranged(1, "part")
    def function(x: int, module: nn.Module, *, more: int) -> int:
        return x + more

    model = nn.Sequential(nn.Linear(2, 2))
    before = dict(vars(model[0]))
    assert function(1, model[0], more=2) == 3 and not log
    with nvtx.annotated(model, marker):
        assert function(1, model[0], more=2) == 3
        with nvtx.of(model[0]):
            model(torch.zeros(1, 2))
    assert log == ["0.part", "/", "0", "0", "/", "/"]
    assert vars(model[0]) == before and not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert nvtx.of(model[0]) is nvtx.of(model) is nvtx.range("a"), "nothing is allocated when off"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_variable(value: str, on: bool) -> None:
    assert nvtx.wanted({"NANOVLLM_NVTX": value}) is on and nvtx.wanted({}) is False
    with pytest.raises(ValueError, match="NANOVLLM_NVTX must be 0 or 1, got 'yes'"):
        nvtx.wanted({"NANOVLLM_NVTX": "yes"})

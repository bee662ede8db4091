"""Recording: the driver on a fake engine, profilers that are missing or fail, files that are whole or not at all."""

from __future__ import annotations

import contextlib
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

from nanovllm.cli import main
from nanovllm.profiling import capture, nsys
from nanovllm.profiling.child import Window, drive
from nanovllm.profiling.distil import distil
from nanovllm.profiling.facts import CASES
from nanovllm.profiling.files import write_whole
from nanovllm.profiling.trace import STEP, WINDOW, read_trace
from nanovllm.utils import nvtx

ROOT = Path(__file__).resolve().parents[1]


class FakeEngine:
    """Prefills all it is given in one step, then gives a token to everybody a step; logs what happens when."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.running, self.made = log, [], []

    def make_request(self, prompt: list[int], params: Any) -> SimpleNamespace:
        request = SimpleNamespace(request_id=str(len(self.made)), prompt=prompt, left=params.max_tokens, fresh=True)
        self.made.append(request)
        return request

    def submit(self, requests: list[SimpleNamespace]) -> None:
        self.running += requests

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> SimpleNamespace:
        fresh = [r for r in self.running if r.fresh]
        for request in fresh or self.running:
            request.fresh = False
            request.left -= 1
        self.log.append("prefill" if fresh else "decode")
        prefill = sum(len(r.prompt) for r in fresh)
        tokens = prefill or len(self.running)
        self.running = [r for r in self.running if r.left > 0]
        return SimpleNamespace(num_tokens=tokens, num_prefill_tokens=prefill)

    def abort(self, request_id: str) -> None:
        self.running = [r for r in self.running if r.request_id != request_id]


def fake_window(log: list[str]) -> Window:
    """Marks and calls go to `log`; every look at the clock costs a second."""

    @contextlib.contextmanager
    def mark(name: str) -> Iterator[None]:
        log.append(f"<{name}")
        yield
        log.append(f"{name}>")

    ticks = iter(range(1000))
    calls = {name: (lambda name=name: log.append(name)) for name in ("sync", "start", "stop")}
    return Window(mark, calls["sync"], calls["start"], calls["stop"], clock=lambda: next(ticks))


@pytest.mark.parametrize("name", ["decode-b1", "decode-b16"])
def test_a_decode_window_holds_decode_steps_only(name: str) -> None:
    case, log = CASES[name], []
    engine = FakeEngine(log)
    counts = drive(engine, case, fake_window(log), vocab_size=100)
    inside = log[log.index(f"<{WINDOW}") : log.index(f"{WINDOW}>")]
    assert inside.count("decode") == inside.count(f"<{STEP}") == case.steps == counts.steps
    assert "prefill" not in inside and log.count("prefill") == 1 and not engine.running
    assert log[log.index("start") - 1] == "sync" and inside[-1] == "sync", "an idle device on both sides"
    assert counts.tokens == case.batch * case.steps and counts.wall_s == 1
    assert all(len(r.prompt) == 128 and max(r.prompt) < 100 for r in engine.made)
    # By hand: after 12 warm-up steps the k-th step sees 128 + 12 + k + 1 keys of each sequence.
    assert counts.kv_tokens == case.batch * (case.steps * 141 + case.steps * (case.steps - 1) // 2)


def test_prefill_records_one_request_a_step() -> None:
    case, log = CASES["prefill-2048"], []
    counts = drive(FakeEngine(log), case, fake_window(log), vocab_size=10**6)
    inside = log[log.index(f"<{WINDOW}") : log.index(f"{WINDOW}>")]
    assert inside.count("prefill") == case.steps and log.count("prefill") == case.steps + 3
    assert (counts.tokens, counts.rows, counts.steps) == (2048 * case.steps, case.steps, case.steps)


def test_the_workload_is_nano_vllms() -> None:
    """Its published totals: 142,827 prompt tokens and 133,966 output tokens."""
    log: list[str] = []
    engine = FakeEngine(log)
    counts = drive(engine, CASES["workload"], fake_window(log), vocab_size=10**6)
    assert sum(len(r.prompt) for r in engine.made[32:]) == 142_827 and counts.rows == 133_966
    assert counts.steps == log[log.index(f"<{WINDOW}") :].count("decode") + 1 and not engine.running


# ------------------------------------------------------------------------------------------------------ what goes wrong


def run_cli(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from nanovllm.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


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
    assert nsys.find_nsys(tmp_path) is None and nsys.find_ncu(tmp_path) is None
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
        "threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    nsys.run([sys.argv[1]], 'tool')\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tool)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "interrupted\n", done.stderr
    time.sleep(2.2)
    assert not (tmp_path / "survived").exists()


def test_ncu_table() -> None:
    said = (
        "==PROF== Connected\nsome engine output, with commas\n"
        '"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"\n'
        '"","","Mbyte","Kbyte","us"\n'
        '"0","gemv_kernel","12.0","8.0","4.0"\n'
        '"1","void f::norm<float>(int)","1.0","0","2.0"\n"2","gemv_kernel","14.0","8.0","6.0"\n'
    )
    first, second = nsys.parse_ncu(said)
    assert (first.kernel, first.launches, first.us, first.bytes_read) == ("gemv_kernel", 2, 5.0, 13e6)
    assert first.gb_s == pytest.approx((13e6 + 8e3) / 5e-6 / 1e9) and second.kernel == "norm"
    with pytest.raises(ValueError, match="ncu printed no table: .*performance counters"):
        nsys.parse_ncu("==ERROR== ERR_NVGPUCTRPERM")


def test_unknown_cases_and_profilers() -> None:
    with pytest.raises(ValueError, match="unknown case 'decode': use one of decode-b1"):
        capture.Request("m", "decode")
    with pytest.raises(ValueError, match="profiler must be"):
        capture.Request("m", "decode-b1", profiler="perf")


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


def test_a_case_is_four_files_without_raw_reports(tmp_path: Path) -> None:
    parts = synthetic.schedule(synthetic.step_kernels(True, 2), 4, 0.5, host=9.0)
    profile = distil(read_trace(synthetic.write_nsys(tmp_path / "a.sqlite", parts)), synthetic.facts("auto", 2))
    written = capture.write(tmp_path / "case", [profile], "", ["nanovllm", "profile", "a model"])
    assert sorted(path.name for path in written) == ["command.txt", "notes.md", "summary.csv", "timeline.html"]
    assert (tmp_path / "case" / "command.txt").read_text() == "nanovllm profile 'a model'\n"


def test_the_command_records_distils_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the GPU: the profiled process is replaced by one that leaves a trace and its facts."""

    def fake_run(command: list[str], what: str, environment: object = None) -> str:
        spec = json.loads(Path(command[-1]).read_text())
        parts = synthetic.schedule(synthetic.step_kernels(spec["fusion"] != "off", 28), 4, 0.5, host=9.0)
        synthetic.write_torch(Path(spec["trace"]), parts)
        Path(spec["facts"]).write_text(synthetic.facts(spec["fusion"], note=spec["note"]).to_json())
        return ""

    monkeypatch.setattr(capture, "require_gpu", lambda: None)
    monkeypatch.setattr(nsys, "find_nsys", lambda: None)
    monkeypatch.setattr(nsys, "run", fake_run)
    assert main(["profile", "some/model", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "nsys was not found" in printed.err and "fusion off" in printed.out and "fusion auto" in printed.out
    notes = (tmp_path / "decode-b1" / "notes.md").read_text()
    assert "nsys was not found" in notes and "recorded with torch.profiler" in notes
    assert "nsys was not found" in (tmp_path / "decode-b1" / "timeline.html").read_text()


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
    nvtx.annotate(model, "model")
    with nvtx.range("step"):
        model["layers"][0](torch.zeros(1, 2))
    assert log == ["step", "model.layers.0", "model.layers.0.0", "/", "/", "/"]
    with pytest.raises(RuntimeError):
        model["layers"][0](torch.zeros(1, 3))
    assert log.count("/") == 5, "a failing module closes its range"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_variable(value: str, on: bool) -> None:
    assert nvtx.wanted({"NANOVLLM_NVTX": value}) is on and nvtx.wanted({}) is False
    with pytest.raises(ValueError, match="NANOVLLM_NVTX must be 0 or 1, got 'yes'"):
        nvtx.wanted({"NANOVLLM_NVTX": "yes"})

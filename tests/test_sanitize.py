"""The sanitizer run covers every kernel and can fail: a verdict that does not take silence for a yes.

compute-sanitizer itself needs a GPU: `make sanitize`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import sanitize
import torch
from sanitize import DONE, REPORTED, blind, verdict
from sanitize_cases import CASES, distinct_cases, package_kernels, record
from test_kernels_compile import DEPENDENT

from nanovllm.kernels import jit, linear_residual, norm

ALL = distinct_cases()
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")


def test_every_kernel_has_a_case() -> None:
    assert sorted(CASES) == sorted(package_kernels()), "the kernels of the package and tests/sanitize_cases.py differ"
    assert all(CASES.values())


def test_a_new_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that other kernels call are not launched and need no case."""
    source = "def _new_kernel(x):\n    _helper(x)\ndef _helper(x):\n    pass"
    made: dict = {"__name__": norm.__name__}
    exec(source, made)
    before = set(package_kernels())
    for name in ("_new_kernel", "_helper"):
        monkeypatch.setattr(norm, name, jit.jit()(made[name]), raising=False)
    assert set(package_kernels()) - before == {"norm._new_kernel"}


@pytest.mark.parametrize("number", range(len(ALL)))
def test_cases_launch_what_they_say(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Hopper GPU would be asked for it, on CPU tensors, up to the launch."""
    pytest.importorskip("triton")
    kernels, case = ALL[number]
    for module in {module for module, _ in package_kernels().values()} | {linear_residual}:
        for name, value in (("use_triton", lambda x: True), ("gpu_of", lambda device: DEPENDENT)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    launched = record(monkeypatch.setattr, forward=False)
    case.run("cpu", torch.bfloat16)
    assert kernels <= set(launched)


@pytest.mark.interpret
@pytest.mark.parametrize("number", [i for i, (_, case) in enumerate(ALL) if not case.pdl])
def test_cases_run(number: int) -> None:
    """A case that is wrong itself must not wait for a GPU to say so."""
    kernels, case = ALL[number]
    if kernels != {"feed._feed_kernel"}:  # its CPU path is the reference body, interpreted or not
        case.run("cpu", torch.float16)


MEMCHECK = "========= COMPUTE-SANITIZER\n{}========= ERROR SUMMARY: {}\n"
RACECHECK = "========= COMPUTE-SANITIZER\n{}========= RACECHECK SUMMARY: {}\n"
VERDICTS = {
    # tool, log, exit status, a piece of the verdict
    "clean": ("memcheck", MEMCHECK.format(f"{DONE}\n", "0 errors"), 0, None),
    "no hazards": ("racecheck", RACECHECK.format(f"{DONE}\n", "0 hazards displayed (0 errors, 0 warnings)"), 0, None),
    "an error": ("memcheck", MEMCHECK.format(f"{DONE}\n", "1 error"), REPORTED, "ended with status"),
    "an error, status lost": ("memcheck", MEMCHECK.format(f"{DONE}\n", "2 errors"), 0, "ERROR SUMMARY: 2 errors"),
    "a warning": (
        "racecheck", RACECHECK.format(f"{DONE}\n", "1 hazard displayed (0 errors, 1 warning)"), 0, "1 hazard displayed",
    ),
    "ten errors": ("memcheck", MEMCHECK.format(f"{DONE}\n", "10 errors"), 0, "10 errors"),
    "no summary": ("memcheck", f"{DONE}\n", 0, "says: nothing"),
    "ended early": ("memcheck", MEMCHECK.format("Traceback ...\n", "0 errors"), 0, "did not run to their end"),
    "killed": ("racecheck", "", 124, "did not run to their end"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    tool, log, status, piece = VERDICTS[name]
    said = verdict(tool, log, status)
    assert said is None if piece is None else piece in str(said)


def test_a_blind_tool_is_noticed() -> None:
    assert blind("memcheck", MEMCHECK.format("", "128 errors")) is None
    assert blind("racecheck", RACECHECK.format("", "1 hazard displayed (1 error, 0 warnings)")) is None
    for log in ("", MEMCHECK.format("", "0 errors"), "Error: Device not supported", RACECHECK.format("", "0 hazards")):
        assert "did not report a planted fault" in str(blind("memcheck", log))


@compiles
def test_planted_faults_compile() -> None:
    """For a GPU that is not here, with the accesses that a tool is to find."""
    triton = pytest.importorskip("triton")
    import planted_faults

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for tool, instruction in (("memcheck", "st.global"), ("racecheck", "st.shared.b32 [cell]")):
        kernel = planted_faults.FAULTS[tool]
        source = triton.compiler.ASTSource(kernel, {"x": "*i32", "BLOCK": "constexpr"}, {"BLOCK": 128})
        binary = triton.compile(source, target=target, options={"num_warps": 4})
        assert instruction in binary.asm["ptx"] and binary.asm["cubin"]


PYTHON = """#!/bin/sh
# Stands in for Python: planted faults say nothing, a part says that all its cases ran, unless its number is SLOW.
case "$*" in
  *--planted*) ;;
  *"--part $SLOW/"*) sleep 60 & echo $! > "$PID"; wait ;;
  *) echo "all cases ran" ;;
esac
"""
TOOL = """#!/bin/sh
# Stands in for compute-sanitizer: --tool T and two options with a value, then the command.
tool=$2; shift 6
"$@" || exit 1
case "$tool $*" in
  *--planted*) echo "========= $tool SUMMARY: 1 error" ;;
  memcheck*) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck*) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("python", PYTHON), ("compute-sanitizer", TOOL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PID", str(tmp_path / "pid"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return tmp_path


def test_the_whole_run(stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLOW", "none")
    assert sanitize.check(["memcheck", "racecheck"], stand_ins) == 0
    assert "no report" in capsys.readouterr().out


def has_ended(pid: int, patience: float = 10.0) -> bool:
    """Whether a process that was killed is gone, or waits for its parent, before long: a signal takes its time."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_the_limit_ends_a_part_and_what_it_started(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: a part that fails by itself does not keep the tools from the others."""
    monkeypatch.setenv("SLOW", "0")
    began = time.monotonic()
    assert sanitize.check(["memcheck"], stand_ins, limit=2.0) == 1
    assert time.monotonic() - began < 20
    told = capsys.readouterr().out
    assert "parts fail without a tool too" in told and "memcheck   kernels1 as it should be" in told
    assert "the cases did not run to their end (exit status 124)" in told
    assert has_ended(int((stand_ins / "pid").read_text())), "what the tool watched has ended"

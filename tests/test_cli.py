"""The command line as shells use it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import nanovllm
from nanovllm.cli import main


def test_a_reader_that_leaves_is_no_mistake() -> None:
    """`nanovllm collect-env | head -1`: no complaint, and the exit status of a program that SIGPIPE ended."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nanovllm", "collect-env"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"nanovllm {nanovllm.__version__}\n")


def test_letters_that_a_terminal_lacks_are_no_error() -> None:
    command = [sys.executable, "-m", "nanovllm", "inspect", "smollm2"]  # prints an arrow
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "RMSNorm\\u2192Linear" in done.stdout


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(model: str, **options: object) -> None:
        raise ImportError("pip install transformers")

    monkeypatch.setattr("nanovllm.loader.resolve_model", missing)
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "nanovllm: pip install transformers\n"

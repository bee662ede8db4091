"""`import nanovllm` is light: no torch, no GPU, a fraction of a second. Each check runs in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from arch_rules import PURE

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "triton", "transformers", "numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub", "jinja2")
HEAVY += ("starlette", "uvicorn", "llguidance")
PUBLIC = ["LLM", "AsyncLLM", "SamplingParams", "RequestOutput", "CompletionOutput"]


def run(code: str) -> str:
    """Standard output of `code` in a new Python."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_less_than_300_ms() -> None:
    """The product's promise, not a benchmark: the best of five is some 10 ms unless something heavy came in."""
    code = "import time; t = time.perf_counter(); import nanovllm; print(time.perf_counter() - t)"
    best = min(float(run(code)) for _ in range(5))
    assert best < 0.3, f"import nanovllm took {best:.3f} s"


def test_import_loads_nothing_heavy() -> None:
    assert run(f"import sys, nanovllm; print([m for m in {HEAVY!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_modules_load_no_torch(module: str) -> None:
    heavy = ("torch", "triton", "transformers", "numpy")
    assert run(f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_public_names_resolve_on_first_use() -> None:
    """Request parameters and outputs come without torch; the engine brings it, but starts no CUDA."""
    code = f"""
import sys, nanovllm
from nanovllm import CompletionOutput, RequestOutput, SamplingParams
print("torch" in sys.modules)
print([getattr(nanovllm, name).__name__ for name in {PUBLIC!r}])
import torch
print(torch.cuda.is_initialized(), "transformers" in sys.modules)
"""
    assert run(code).splitlines() == ["False", str(PUBLIC), "False False"]


def test_dir_lists_the_public_names() -> None:
    names = run("import nanovllm; print(*dir(nanovllm))").split()
    assert set(PUBLIC) | {"__version__"} <= set(names)


def test_all_names_exist() -> None:
    assert run("import nanovllm; print([n for n in nanovllm.__all__ if not hasattr(nanovllm, n)])") == "[]"


def test_unknown_name_is_an_attribute_error() -> None:
    code = """
import nanovllm
try:
    nanovllm.LMM
except AttributeError as error:
    print(error)
"""
    assert "LMM" in run(code)

"""Tiers of the test suite (see `pyproject.toml` for the markers) and what they share.

* no marker: CPU tier. `interpret`: Triton kernels on CPU tensors, a process of its own with TRITON_INTERPRET=1.
* `gpu`, `multi_gpu`: need one or two CUDA devices; skipped without them, unless --require-gpu makes that a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a skipped gpu test is a failure")


def _missing(item: pytest.Item) -> str | None:
    """Why this machine or process cannot run `item`."""
    if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs TRITON_INTERPRET=1 in a process of its own: make test-interpret"
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
        return "needs two CUDA GPUs"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    needs_gpu = item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu")
    if report.skipped and needs_gpu and item.config.getoption("--require-gpu"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped under --require-gpu: {call.excinfo}"
    return report


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point tensors are full of NaN: an element that nobody writes shows."""

    def poisoned(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))

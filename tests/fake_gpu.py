"""An H100 that is not there: the engine's Triton path on CPU tensors, up to the launch.

Triton's own launch code runs, for the target sm_90: it specialises, looks into its caches and compiles. What it would
start on the device does nothing, so what kernels compute is undefined, as it is in a rehearsal.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import jit
from nanovllm.kernels.launch_config import Gpu
from nanovllm.layers import fused_norm_linear
from nanovllm.layers.attention.triton_paged import TritonBackend

GPU = Gpu(num_sms=132, shared_memory=227 * 1024, pdl=True)


class Driver:
    """What `JITFunction.run` asks the active driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, CPU tensors take the path of CUDA tensors, and Triton compiles for an H100."""
    import triton

    replaced = {"use_triton": lambda x: True, "gpu_of": lambda device: GPU, "usable_cores": lambda: 4}
    for module in [module for name, module in sys.modules.items() if name.startswith("nanovllm.")]:
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(TritonBackend, "why_not", classmethod(lambda cls, spec: []))
    monkeypatch.setattr(fused_norm_linear, "why_not_fused", lambda *facts: [])
    monkeypatch.setattr(sys.modules["nanovllm.engine.loading"], "why_not_fused", lambda *facts: [])
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])))
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    forget(monkeypatch)


def kernels() -> list[Any]:
    """All of the package's jitted functions, those that have not been launched yet as well."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith("nanovllm.kernels."):
            if any(isinstance(value, jit.LazyKernel) for value in vars(module).values()):
                jit._materialise(vars(module))
            found += [value for value in vars(module).values() if hasattr(value, "device_caches")]
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has compiled, as a new one would."""
    for kernel in kernels():
        caches = kernel.device_caches
        monkeypatch.setattr(kernel, "device_caches", type(caches)(caches.default_factory))

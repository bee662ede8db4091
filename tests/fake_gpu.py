"""An H100 that is not there: the engine's Triton path on CPU tensors, up to the launch.

Triton's own launch code runs, for the target sm_90: it specialises, looks into its caches and compiles. What it would
start on the device does nothing, so what kernels compute is undefined, as it is in a rehearsal.
"""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanovllm.config import EngineConfig
from nanovllm.engine import loading
from nanovllm.engine.cuda_graph import ChunkGraphs, DecodeGraphs, chunk_sizes, graph_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.kernels import jit
from nanovllm.kernels.compile_ahead import compile_together
from nanovllm.kernels.launch_config import Gpu
from nanovllm.layers.attention.triton_paged import TritonBackend

GPU = Gpu(num_sms=132, shared_memory=227 * 1024, pdl=True)


class Driver:
    """What `JITFunction.run` asks the active driver, and the threads that made launchers."""

    def __init__(self) -> None:
        self.launchers: list[str] = []

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        self.launchers.append(threading.current_thread().name)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiler:
    """`triton.compile` without its work: who compiled what, found what on disk and launched what."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.disk: set[str] = set()
        self.compiled: dict[str, str] = {}  # what, and the thread's name
        self.hits: list[str] = []
        self.launched: list[str] = []
        self.refused: set[str] = set()  # names of kernels that cannot be compiled
        self.may_go_on = threading.Event()  # until then nothing is compiled
        self.may_go_on.set()

    def __call__(self, src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> Any:
        from triton import knobs

        key, thread = f"{src.name} {src.hash()} {sorted(options.items())}", threading.current_thread().name
        self.may_go_on.wait()
        if src.name in self.refused:
            raise RuntimeError(f"{src.name} was refused")
        if hit := key in self.disk:
            self.hits.append(key)
        else:
            assert key not in self.compiled, "compiled twice"
            self.compiled[key] = thread
            self.disk.add(key)
        if knobs.compilation.listener is not None:
            knobs.compilation.listener(src=src, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        return Compiled(key, self.launched)

    def new_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is left but the disk."""
        for kernel in kernels():
            caches = kernel.device_caches
            monkeypatch.setattr(kernel, "device_caches", type(caches)(caches.default_factory))
        self.compiled, self.hits = {}, []
        self.launched.clear()


class Compiled:
    """A kernel to be launched."""

    function = packed_metadata = src = metadata = None

    def __init__(self, key: str, launched: list[str]) -> None:
        self.key, self.launched = key, launched

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launched.append(self.key)


def install(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Until the test ends, CPU tensors take the path of CUDA tensors, on a machine of four cores."""
    import triton

    replaced = {"use_triton": lambda x: True, "gpu_of": lambda device: GPU, "usable_cores": lambda: 4}
    replaced |= {"why_not_fused": lambda *facts: [], "prepare_for_inference": lambda model, fused: None}
    for module in [module for name, module in sys.modules.items() if name.startswith("nanovllm.")]:
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    assert loading.gpu_of(torch.device("cpu")) is GPU
    monkeypatch.setattr(TritonBackend, "why_not", classmethod(lambda cls, spec: []))
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])))
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    compiler = Compiler()
    monkeypatch.setattr(triton.runtime.driver, "_active", compiler.driver)
    monkeypatch.setattr(triton.compiler, "compile", compiler)
    compiler.new_process(monkeypatch)
    return compiler


def kernels() -> list[Any]:
    """All of the package's jitted functions that are loaded."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith("nanovllm.kernels."):
            if any(isinstance(value, jit.LazyKernel) for value in vars(module).values()):
                jit._materialise(vars(module))
            found += [value for value in vars(module).values() if hasattr(value, "device_caches")]
    return found


def runner(model: Path, **options: Any) -> ModelRunner:
    """A runner as it is before it plans its KV cache."""
    given = dict(
        dtype="bfloat16", device="cpu", load_format="dummy", attention_backend="triton", max_num_batched_tokens=300,
        max_num_seqs=80, kvcache_block_size=32, num_kvcache_blocks=8, show_progress=False,
    )  # fmt: skip
    made = ModelRunner(EngineConfig(model=str(model), **{**given, **options}))
    sizes, tokens = graph_sizes(made.config.max_num_seqs), made.token_budget
    made.graphs = DecodeGraphs(made.decode_and_sample, sizes, made.max_model_len, made.loaded.fused_rows)
    made.chunk_graphs = ChunkGraphs(made.forward_chunks, chunk_sizes(tokens, made.config.max_num_seqs, 256))
    made.caches = []
    return made


@torch.inference_mode()
def start(runner: ModelRunner) -> None:
    """What a start runs, apart from recording graphs."""
    compile_together(runner._profile, runner._rehearse, False)
    runner.caches = runner._allocate(8)
    for graphs in filter(None, (runner.graphs, runner.chunk_graphs)):
        for key in graphs._keys:
            compile_together(functools.partial(graphs._forward, *key), graphs.run_all, False)

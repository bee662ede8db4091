"""Faults reported against nano-vLLM: each has a test here or, by name, in the file that owns the part.

`WHERE` is the index; a test that it names and that does not exist fails. Numbers are threads of nano-vLLM's tracker.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm.engine.kv_cache import DeviceMemory, kv_block_bytes, num_kv_blocks
from nanovllm.loader import resolve_model

ROOT = Path(__file__).resolve().parents[1]
WHERE = {
    "a process group and a shared-memory name even on one GPU": "test_engine.py::test_two_engines_in_one_process",
    "greedy forbidden, one EOS id, generation_config.json ignored": "test_engine.py::test_several_eos_ids",
    "no stop strings": "test_smollm2.py::test_stop_strings",
    "a prompt larger than the cache (#190)": "test_engine.py::test_prompt_larger_than_the_cache",
    "not thread-safe": "test_engine.py::test_threads_share_one_engine",
    "an exception in a step leaks blocks": "test_engine.py::test_a_failing_step_ends_its_requests_only",
    "per-step allocations (#175, #176)": "test_engine.py::test_inputs_travel_in_one_copy_and_buffers_stay",
    "unknown keyword arguments dropped": "test_engine.py::test_unknown_keywords_name_the_nearest",
    "YaRN and llama3 RoPE ignored": "test_model_parity.py::test_teacher_forced_logits",
    "scheduler: the rest": "test_scheduler_regressions.py",
}
MODEL = ModelConfig("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, RopeConfig(), True)
GIB = 1 << 30


@pytest.mark.parametrize("fault", WHERE)
def test_index_is_true(fault: str) -> None:
    file, _, name = WHERE[fault].partition("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert f"def {name or 'test_'}" in source


def blocks(memory: DeviceMemory | None, **options: int | float) -> int:
    config = EngineConfig.from_kwargs("x", **options)
    return num_kv_blocks(config, kv_block_bytes(MODEL, config.kvcache_block_size, 2), 40960, memory)


def test_memory_of_other_processes_is_not_ours() -> None:
    """The share is of the whole device and only this process's use is taken off, unless there is really no room."""
    block = 112 * 1024 * 32  # bytes: 112 KiB a token in bf16
    alone = DeviceMemory(total=80 * GIB, free=78 * GIB, own_peak=3 * GIB, own_now=2 * GIB)
    beside = DeviceMemory(total=80 * GIB, free=48 * GIB, own_peak=3 * GIB, own_now=2 * GIB)  # somebody holds 30 GiB
    assert blocks(alone, gpu_memory_utilization=0.5) == blocks(beside, gpu_memory_utilization=0.5) == 37 * GIB // block
    assert blocks(beside, gpu_memory_utilization=0.9) < blocks(alone, gpu_memory_utilization=0.9)


def test_absolute_sizes_win() -> None:
    memory = DeviceMemory(total=80 * GIB, free=78 * GIB, own_peak=3 * GIB, own_now=2 * GIB)
    assert blocks(memory, kv_cache_memory_bytes=GIB) == GIB // (112 * 1024 * 32)
    assert blocks(memory, kv_cache_memory_bytes=GIB, num_kvcache_blocks=77) == 77
    assert blocks(None, kv_cache_memory_bytes=GIB) == GIB // (112 * 1024 * 32)


def test_no_room_is_one_sentence_with_the_remedy() -> None:
    full = DeviceMemory(total=80 * GIB, free=1 * GIB, own_peak=79 * GIB, own_now=79 * GIB)
    with pytest.raises(ValueError, match="no room for the KV cache.*gpu_memory_utilization.*raise it"):
        blocks(full, gpu_memory_utilization=0.9)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        blocks(None, kv_cache_memory_bytes=1000)


def test_a_missing_directory_is_not_a_hub_id() -> None:
    """nano-vllm#97: a name that is no directory gave garbage."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_model("/no/such/model")


def test_no_pickle_and_no_compiled_dynamic_shapes() -> None:
    """`pickle.loads` over shared memory; `torch.compile` on shapes that change (#105, #245)."""
    for path in (ROOT / "nanovllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.split(".")[0] in ("pickle", "cloudpickle") for name in names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "compile"), path

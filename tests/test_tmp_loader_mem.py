"""Loading never holds two copies of the model: peak host memory is at most 1.2 times the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

# A process of its own, whose high-water mark is that of loading. The embedding is a quarter of the model, as in
# small models: a loader that holds one whole tensor beside the model exceeds the limit.
CHILD = """
import sys
import torch
import torch.nn.functional
torch.set_num_threads(1)
from pathlib import Path
import gguf.quants
from nanovllm.config import ModelConfig, RopeConfig
from nanovllm.loader.resolve import ModelSource
from nanovllm.loader.weights import iter_weights
import tqdm

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status")

kind, path, dtype = sys.argv[1:]
config = ModelConfig("LlamaForCausalLM", 8, 1024, 8, 1, 16, 16, 64, 8, 1e-6, RopeConfig())
before = status("VmRSS")
source = ModelSource(kind, Path(path), "x")
model = {name: torch.empty(t.shape, dtype=getattr(torch, dtype)) for name, t in iter_weights(source, config)}
for name, tensor in iter_weights(source, config, show_progress=True):
    model[name].copy_(tensor)
weights = sum(p.numel() * p.element_size() for p in model.values())
print((status("VmHWM") - before) / weights, weights)
"""


def _peak(*arguments: str) -> float:
    """Peak of loading in units of the loaded weights."""
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratio, weights = done.stdout.split()
    assert int(weights) > 150e6
    return float(ratio)


def _shapes() -> dict[str, tuple[int, int]]:
    layers = {f"blk.{i}.{name}.weight": (2048, 1024) for i in range(15) for name in ("attn_q", "ffn_up")}
    return {"token_embd.weight": (20480, 1024), **layers}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the high-water mark is read from /proc")
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_peak_memory_while_loading(kind: str, tmp_path: Path) -> None:
    if kind == "hf":
        tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in _shapes().items()}
        save_file(tensors, tmp_path / "model.safetensors")
        ratio = _peak("hf", str(tmp_path), "bfloat16")
    else:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, (rows, columns) in _shapes().items():
            data = np.full((rows, columns // 32 * 20), 60, np.uint8)
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        ratio = _peak("gguf", str(path), "float32")
    assert 0.9 < ratio <= 0.2, f"peak memory is {ratio:.2f} times the weights"

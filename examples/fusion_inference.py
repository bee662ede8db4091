"""Fuse RMSNorm→Linear in a Hugging Face model with one call, and look at what that changes.

python examples/fusion_inference.py                        # SmolLM2-135M, read from its GGUF file
python examples/fusion_inference.py Qwen/Qwen3-0.6B        # a hub id or a directory, any causal model
python examples/fusion_inference.py tiny                   # three random layers: runs anywhere in a second

The fused kernels need a CUDA GPU with Triton; elsewhere the same call runs their PyTorch body. Needs `transformers`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nanovllm.fusion import fuse, report, unfuse
from nanovllm.loader import resolve_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str) -> Any:
    """A causal language model in bf16 on a GPU, in fp32 on a CPU."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    if name == "tiny":
        torch.manual_seed(0)
        sizes = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).to(DEVICE, dtype).eval()
    if name == "smollm2":
        file = resolve_model(name).path
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(DEVICE).eval()


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[int], float]:
    """Logits of a forward pass, 16 greedy tokens behind it, and seconds for those."""
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(ids, max_new_tokens=2, **options)  # warm-up: kernels compile
    start = time.perf_counter()
    tokens = model.generate(ids, max_new_tokens=16, **options)[0].tolist()
    return model(ids).logits.float(), tokens, time.perf_counter() - start


def main() -> None:
    """Report, fuse, compare, restore."""
    model = load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    ids = torch.arange(100, 132, device=DEVICE)[None]
    before, tokens, seconds = measure(model, ids)

    groups = fuse(model)
    print(report(model))
    after, fused_tokens, fused_seconds = measure(model, ids)

    error = (after - before).abs().max() / before.abs().max()
    print(f"\n{sum(group.fused for group in groups)} of {len(groups)} groups fused on {DEVICE}")
    print(f"largest difference of a logit: {error:.1e} of the largest logit")
    print(f"same 16 greedy tokens: {tokens == fused_tokens}; {seconds:.2f} s before, {fused_seconds:.2f} s after")
    print(f"restored: {unfuse(model)} groups, logits as at first: {torch.equal(measure(model, ids)[0], before)}")


if __name__ == "__main__":
    main()

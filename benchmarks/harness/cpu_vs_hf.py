"""SmolLM2 in fp32 on this CPU: our engine against Hugging Face's `generate`, same prompts, same number of new tokens.

Both generate greedily past EOS. The 16 prompts differ in length (10 to about 500 tokens), as requests do. Hugging
Face runs them in one batch, which it pads to the longest (`batch 16`), or one after the other (`one by one`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from harness.records import Record, provenance
from nanovllm import LLM, SamplingParams, __version__
from nanovllm.loader.resolve import resolve_model

NEW_TOKENS = 64
LENGTHS = [10, 16, 23, 31, 42, 57, 75, 98, 127, 160, 200, 250, 310, 370, 430, 500]


def make_prompts() -> list[list[int]]:
    """16 prompts of random token ids."""
    rng = Random(0)
    return [[rng.randrange(100, 40000) for _ in range(length)] for length in LENGTHS]


def measure_cpu(runs: int = 3) -> list[Record]:
    """Rows for batch 1 (a prompt of 127 tokens) and batch 16, both engines, and the ratios."""
    prompts = make_prompts()
    one, many = [prompts[8]], prompts
    base: dict[str, Any] = dict(
        model="SmolLM2-135M-Instruct", dtype="float32", weights="real (Q4_1 GGUF, dequantised)", **provenance("cpu")
    )
    llm = LLM("smollm2", kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, show_progress=False)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW_TOKENS)
    hf, version = hugging_face()
    variants: dict[tuple[str, str], Callable[[], Any]] = {
        ("nanovllm", "1"): lambda: llm.generate(one, params, use_tqdm=False),
        ("transformers", "1"): lambda: hf(one),
        ("nanovllm", "16"): lambda: llm.generate(many, params, use_tqdm=False),
        ("transformers", "16"): lambda: hf(many),
        ("transformers one by one", "16"): lambda: [hf([prompt]) for prompt in many],
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in variants}
    for run in range(runs + 1):  # interleaved; the first round warms up
        for key, variant in variants.items():
            if "one by one" in key[0] and run > 1:
                continue  # takes minutes
            started = time.perf_counter()
            variant()
            if run:
                seconds[key].append(time.perf_counter() - started)
    speed = {key: int(key[1]) * NEW_TOKENS / statistics.median(times) for key, times in seconds.items()}
    records = []
    for (engine, batch), value in speed.items():
        own = engine == "nanovllm"
        shape = dict(batch=batch, prompt="127" if batch == "1" else "10-500", out=str(NEW_TOKENS))
        records.append(
            Record(
                "cpu", "output_tok_s", value, engine=engine, version=__version__ if own else version, **shape, **base
            )
        )
        if not own:
            ratio = speed["nanovllm", batch] / value
            note = f"against {engine} {version}"
            records.append(Record("cpu", "speedup", ratio, version=__version__, options=note, **shape, **base))
    return records


def hugging_face() -> tuple[Callable[[list[list[int]]], Any], str]:
    """A function that generates greedily with transformers, batches padded on the left; and its version."""
    import transformers
    from transformers import AutoModelForCausalLM

    gguf = resolve_model("smollm2").path
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> Any:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )

    return generate, transformers.__version__

"""Engines behind one face: ours, Hugging Face's `generate`, vLLM and nano-vLLM. Runs inside a worker process.

An adapter is built from `Options`, answers requests through the engine's public API and says what it is. Nothing here
knows times, rows or the other engines, and nothing but the standard library is imported before an adapter is built:
each lives in the interpreter that has its engine. Prompts are token ids, no tokenizer takes part, no prefix is cached.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Tokens = list[list[int]]
MARK = "\x1ebench "  # in front of every answer of a worker; anything else on its stdout is chatter


@dataclass(frozen=True)
class Options:
    """What all engines are started with."""

    engine: str
    model: str  # a directory with config.json and safetensors
    device: str = "cuda"
    max_model_len: int = 4096
    kv_bytes: int = 1 << 30  # of the KV cache, the same for every engine that has one
    fusion: str = "auto"  # ours alone
    extra: dict[str, Any] = field(default_factory=dict)  # arguments of the engine's own constructor
    environment: dict[str, str] = field(default_factory=dict)  # set before anything of the engine is imported


class Engine:
    """The face."""

    def __init__(self, options: Options) -> None:
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """version, dtype, and kv_bytes where the engine tells the true size of its cache."""
        raise NotImplementedError

    def generate(self, prompts: Tokens, outs: list[int], temperature: float) -> Tokens:
        """Answers of exactly `outs` tokens, past any end-of-text; temperature 0 is greedy."""
        raise NotImplementedError

    def score(self, texts: Tokens, starts: list[int]) -> list[list[float]]:
        """For the tokens of each text from its start on: how much less likely (nats) than the likeliest each is."""
        raise NotImplementedError(f"{type(self).__name__} gives no log-probabilities of prompts")


class Ours(Engine):
    """nano-vllm-coconut."""

    def __init__(self, options: Options) -> None:
        from nanovllm import LLM, SamplingParams, __version__

        _need(options.device)
        self._params, self._version = SamplingParams, __version__
        self.llm = LLM(
            options.model, device=options.device, max_model_len=options.max_model_len, fusion=options.fusion,
            kv_cache_memory_bytes=options.kv_bytes, enable_prefix_caching=False, skip_tokenizer_init=True,
            show_progress=False, **options.extra,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        runner = self.llm.engine.runner
        held = sum(t.numel() * t.element_size() for pair in runner.caches for t in pair)
        return {"version": self._version, "dtype": str(runner.dtype).removeprefix("torch."), "kv_bytes": held}

    def generate(self, prompts: Tokens, outs: list[int], temperature: float) -> Tokens:
        params = [self._params(temperature=temperature, ignore_eos=True, max_tokens=n) for n in outs]
        return [output["token_ids"] for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def score(self, texts: Tokens, starts: list[int]) -> list[list[float]]:
        params = self._params(temperature=0, ignore_eos=True, max_tokens=1, prompt_logprobs=1)
        found = []
        for text, start in zip(texts, starts, strict=True):
            (output,) = self.llm.generate([text], params, use_tqdm=False)
            entries = (output.prompt_logprobs or [])[start:]
            pairs = zip(text[start:], entries, strict=True)
            found.append([max(p.logprob for p in entry.values()) - entry[t].logprob for t, entry in pairs if entry])
        return found


class HuggingFace(Engine):
    """transformers' `generate` in the checkpoint's dtype, attention by PyTorch's SDPA; prompts of one length."""

    def __init__(self, options: Options) -> None:
        import torch
        import transformers

        _need(options.device)
        self._torch, self._version = torch, transformers.__version__
        wanted = torch.float32 if options.device == "cpu" else torch.bfloat16
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=wanted, **options.extra)
        self.model = model.to(options.device).eval()
        self.model.generation_config.eos_token_id = None  # answers do not end early

    def about(self) -> dict[str, Any]:
        return {"version": self._version, "dtype": str(self.model.dtype).removeprefix("torch.")}

    def generate(self, prompts: Tokens, outs: list[int], temperature: float) -> Tokens:
        if len(set(outs)) > 1 or len({len(prompt) for prompt in prompts}) > 1:
            raise NotImplementedError("generate takes requests of one length; a mixed workload it could only pad")
        sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        ids = self._torch.tensor(prompts, device=self.model.device)
        with self._torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=outs[0], pad_token_id=0, **sampling
            )
        return found[:, ids.shape[1] :].tolist()

    def score(self, texts: Tokens, starts: list[int]) -> list[list[float]]:
        found = []
        with self._torch.inference_mode():
            for text, start in zip(texts, starts, strict=True):
                ids = self._torch.tensor([text], device=self.model.device)
                logits = self.model(ids, logits_to_keep=len(text) - start + 1).logits[0, :-1].float()
                chosen = logits.gather(1, ids[0, start:, None])[:, 0]
                found.append((logits.max(dim=1).values - chosen).tolist())
        return found


class Vllm(Engine):
    """vLLM with its own defaults, but for the prefix cache (off) and the size of the KV cache (ours)."""

    def __init__(self, options: Options) -> None:
        import vllm

        self._vllm = vllm
        # With the cache's size given, the share of the GPU is only checked against what is free at the start.
        settings: dict[str, Any] = dict(
            skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=options.max_model_len,
            enable_prefix_caching=False, kv_cache_memory_bytes=options.kv_bytes, gpu_memory_utilization=0.1,
        )  # fmt: skip
        self.llm = vllm.LLM(model=options.model, **{**settings, **options.extra})

    def about(self) -> dict[str, Any]:
        return {"version": self._vllm.__version__, "dtype": "bfloat16"}

    def generate(self, prompts: Tokens, outs: list[int], temperature: float) -> Tokens:
        params = [
            self._vllm.SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=n, detokenize=False)
            for n in outs
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(given, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class NanoVllm(Engine):
    """nano-vLLM; it has no absolute size of the KV cache, so the share of the GPU is chosen to give the same."""

    def __init__(self, options: Options) -> None:
        import nanovllm

        if hasattr(nanovllm, "__version__"):
            raise ImportError("the nanovllm found is this project's: --command nano-vllm=... must put the other first")
        from importlib.metadata import version

        import torch

        self._version = version("nano-vllm")
        free, total = torch.cuda.mem_get_info()
        weights = sum(file.stat().st_size for file in _files(options.model))
        share = min(0.95, (total - free + weights + options.kv_bytes + (3 << 30)) / total)
        self._params = nanovllm.SamplingParams
        self.llm = nanovllm.LLM(
            options.model,
            **{"max_model_len": options.max_model_len, "gpu_memory_utilization": share, **options.extra},
        )

    def about(self) -> dict[str, Any]:
        return {"version": self._version, "dtype": "bfloat16"}

    def generate(self, prompts: Tokens, outs: list[int], temperature: float) -> Tokens:
        warm = max(temperature, 1e-5)  # it refuses 0
        params = [self._params(temperature=warm, ignore_eos=True, max_tokens=n) for n in outs]
        return [output["token_ids"] for output in self.llm.generate(prompts, params, use_tqdm=False)]


def _need(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA GPU: run this where there is one, or give --device cpu")


def _files(model: str) -> list[Any]:
    from pathlib import Path

    return list(Path(model).glob("*.safetensors"))


ENGINES: dict[str, type[Engine]] = {
    "nanovllm": Ours,
    "transformers": HuggingFace,
    "vllm": Vllm,
    "nano-vllm": NanoVllm,
}

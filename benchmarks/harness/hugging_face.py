"""`nanovllm.fuse` on Hugging Face models: time of a decode step, and what bf16 does to a real model's answers.

Answers are compared token by token on given text ("teacher forcing"): of every position the next token's distribution
is compared with the one that the same weights give in float32.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.models import SHAPES
from harness.records import Record, provenance
from nanovllm import LLM, __version__
from nanovllm.fusion import fuse, unfuse
from nanovllm.loader.resolve import resolve_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from teacher_forcing import teacher_forced

TEXTS = Path(__file__).resolve().parents[2] / "tests" / "data" / "smollm2_greedy.json"
PROMPT, STEPS, RUNS = 128, 64, 5
FUSE = "nanovllm.fusion.fuse"
LONGEST = 400  # tokens of a text that are looked at
Logits = torch.Tensor  # [texts, tokens, vocab]


# ------------------------------------------------------------------------------------------------------------ time


def measure_speed(name: str, batches: list[int]) -> list[Record]:
    """ms a decode step of a published shape with random weights: unfused and fused, twice in turn, one CUDA graph."""
    import transformers

    config = transformers.AutoConfig.for_model(**SHAPES[name])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    base: dict[str, Any] = dict(
        engine="transformers", version=transformers.__version__, model=name, dtype="bfloat16", weights="random",
        prompt=str(PROMPT), **provenance("cuda"),
    )  # fmt: skip
    records = []
    for batch in batches:
        times: dict[str, list[float]] = {"unfused": [], FUSE: []}
        for _ in range(2):
            times["unfused"] += decode_ms(model, batch)
            groups = fuse(model)
            times[FUSE] += decode_ms(model, batch)
            unfuse(model)
        swiglu = sum(group.gate is not None for group in groups)
        notes = {
            "unfused": "StaticCache, one CUDA graph",
            FUSE: f"{sum(g.fused for g in groups)} groups, {swiglu} of them with SwiGLU",
        }
        records += [
            Record("fuse_hf", "ms_per_token", statistics.median(ms), batch=str(batch), options=form,
                   note=notes[form], **base)
            for form, ms in times.items()
        ]  # fmt: skip
    return records


@torch.inference_mode()
def decode_ms(model: Any, batch: int) -> list[float]:
    """ms a step, of RUNS runs of STEPS greedy steps behind PROMPT tokens, replayed from one graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
    ids = torch.arange(100, 100 + PROMPT, device="cuda").repeat(batch, 1)
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    def step() -> None:
        token.copy_(model(token, past_key_values=cache).logits[:, -1:].argmax(-1))

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    found = []
    for run in range(RUNS + 1):  # the first warms up
        rewind()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            graph.replay()
        end.record()
        end.synchronize()
        if run:
            found.append(start.elapsed_time(end) / STEPS)
    return found


# --------------------------------------------------------------------------------------------------------- answers


def measure_text(device: str, batches: list[int], longest: int = LONGEST) -> list[Record]:
    """Argmax agreement and KL of SmolLM2 in bf16 against the same weights computed in float32, fused and unfused.

    Forms: Hugging Face's model, the same fused by `fuse`, and our engine; each decodes token by token, as many texts at
    a time as `batches` says, so that the kernels for so many rows run.
    """
    import transformers

    versions = {"transformers": transformers.__version__, "nanovllm": __version__}
    base: dict[str, Any] = dict(
        model="SmolLM2-135M-Instruct", dtype="bfloat16", weights="real (Q4_1 GGUF, dequantised)", **provenance(device)
    )
    records = []
    for batch in batches:
        ids = texts(batch, longest).to(device)
        found = text_logits(ids)
        exact = found.pop(("transformers", "float32"))
        compared = [(engine, f"{form} against float32", logits, exact) for (engine, form), logits in found.items()]
        for engine, fused, unfused in (("transformers", FUSE, "unfused"), ("nanovllm", "fusion=on", "fusion=off")):
            if (engine, fused) in found:
                both = found[engine, fused], found[engine, unfused]
                compared.append((engine, f"{fused} against {unfused}", *both))
        for engine, what, ours, theirs in compared:
            about = dict(engine=engine, version=versions[engine], batch=str(batch), out=str(ids.shape[1]), **base)
            values = divergence(ours, theirs)
            records += [Record("real_text", m, value, options=what, **about) for m, value in values.items()]
    return records


def text_logits(ids: torch.Tensor) -> dict[tuple[str, str], Logits]:
    """Logits of every position of the texts [texts, tokens], by engine and form."""
    path, device = resolve_model("smollm2").path, ids.device.type
    model = hugging_face(path, torch.bfloat16, device)
    exact = nn.Module.float(copy.deepcopy(model))  # Hugging Face's own `float` refuses what was read from a GGUF file
    found = {("transformers", "float32"): forward(exact, ids)}
    del exact
    found["transformers", "unfused"] = one_by_one(model, ids)
    if not all(group.fused for group in fuse(model)[:-1]):  # the last one is the final norm, which stays
        raise RuntimeError("fuse() left layers of SmolLM2 alone: nanovllm.fusion.report(model) tells why")
    found["transformers", FUSE] = one_by_one(model, ids)
    del model
    for fusion in ("off", "on") if device == "cuda" else ("off",):
        found["nanovllm", f"fusion={fusion}"] = engine_logits(path, ids, fusion)
    return found


def texts(count: int, longest: int) -> torch.Tensor:
    """The `count` longest texts of the tests' file (prompt and answer), cut to one length. int64 [count, tokens]."""
    cases = json.loads(TEXTS.read_text(encoding="utf-8"))["cases"]
    found = sorted((case["prompt_token_ids"] + case["token_ids"] for case in cases), key=len, reverse=True)[:count]
    if len(found) < count:
        raise ValueError(f"there are {len(found)} texts, not {count}: ask for fewer at a time")
    return torch.tensor([ids[: min(longest, len(found[-1]))] for ids in found])


def hugging_face(path: Path, dtype: torch.dtype, device: str) -> Any:
    """The model of a GGUF file, every weight rounded to `dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).to(device).eval()


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor) -> Logits:
    """All tokens at once, a text at a time."""
    return torch.cat([model(row[None], use_cache=False).logits for row in ids])


@torch.inference_mode()
def one_by_one(model: Any, ids: torch.Tensor) -> Logits:
    """A token of every text at a time, as in decoding."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], dim=1)


def engine_logits(path: Path, ids: torch.Tensor, fusion: str) -> Logits:
    """Our engine; the first token of each text is its prompt, all others are decoded."""
    count, length = ids.shape
    with LLM(
        str(path), dtype="bfloat16", device=ids.device.type, fusion=fusion, max_model_len=max(256, length + 1),
        max_num_seqs=count, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, show_progress=False,
    ) as llm:  # fmt: skip
        rows = teacher_forced(llm, ids.tolist(), [1] * count)
    return torch.stack(rows).to(ids.device)


def divergence(ours: Logits, theirs: Logits) -> dict[str, float]:
    """Share of positions with the same most likely token; mean KL(theirs || ours) and its 99th percentile, in nats."""
    same, kl = [], []
    for a, b in zip(ours, theirs, strict=True):  # a text at a time: a vocabulary in float64 is large
        p, q = b.double().log_softmax(-1), a.double().log_softmax(-1)
        same.append((a.argmax(-1) == b.argmax(-1)).double())
        kl.append((p.exp() * (p - q)).sum(-1))
    every = torch.cat(kl)
    return {
        "argmax_agreement": float(torch.cat(same).mean()),
        "kl_nats": float(every.mean()),
        "kl_nats_p99": float(every.quantile(0.99)),
    }

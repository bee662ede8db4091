"""The engine end to end: decode and prefill latency, nano-vLLM's workload, and the CPU against Hugging Face.

    python benchmarks/bench_baseline.py decode   --model Qwen3-0.6B --batch 1 4 16
    python benchmarks/bench_baseline.py prefill  --model Qwen3-0.6B --prompt 128 1024
    python benchmarks/bench_baseline.py workload --model Qwen3-0.6B
    python benchmarks/bench_baseline.py cpu      (SmolLM2 in fp32 against Hugging Face's generate)

Models are named shapes with seeded random weights (bench_models.py) or any model path. Host time is included
everywhere: what is timed is a call of the public API. Rows go to bench_results/metrics.csv, or to --csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.models import SHAPES, write_config
from harness.records import METRICS, Record, provenance, write

from nanovllm import LLM, SamplingParams, __version__


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", nargs="+", choices=["decode", "prefill", "workload", "cpu"])
    parser.add_argument("--model", default="Qwen3-0.6B", help=f"{', '.join(SHAPES)} (random weights) or a path")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--context", type=int, nargs="+", default=[128], help="prompt lengths of the decode test")
    parser.add_argument("--fusion", nargs="+", default=["auto"], choices=["auto", "on", "off"], help="one engine each")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-async-scheduling", action="store_true")
    parser.add_argument("--csv", type=Path, default=METRICS)
    args = parser.parse_args()
    records: list[Record] = []
    if "cpu" in args.test:
        from harness.cpu_vs_hf import measure_cpu

        records += measure_cpu()
    if set(args.test) - {"cpu"}:
        for fusion in args.fusion:
            records += measure_engine(args, fusion)
    for r in records:
        what = f"{r.engine:24} {r.model:22} {r.test:9} batch {r.batch:>3} prompt {r.prompt:>8}"
        print(f"{what} {r.metric:>19} {r.value:10.4g}")
    write(records, args.csv)


def measure_engine(args: argparse.Namespace, fusion: str) -> list[Record]:
    """All GPU tests of one model in one engine."""
    with tempfile.TemporaryDirectory() as directory:
        path, load = args.model, "auto"
        if args.model in SHAPES:
            path, load = str(write_config(args.model, Path(directory))), "dummy"
        started = time.perf_counter()
        llm = LLM(
            path, load_format=load, max_model_len=max(4096, *(n + 512 for n in args.context)), fusion=fusion,
            enforce_eager=args.enforce_eager, async_scheduling=False if args.no_async_scheduling else None,
            enable_prefix_caching=False,
        )  # fmt: skip
        ready = time.perf_counter() - started
    device = llm.engine.runner.device.type
    base = dict(
        model=args.model, version=__version__, dtype=str(llm.engine.runner.dtype).removeprefix("torch."),
        weights="random" if load == "dummy" else "real",
        options=options(args, fusion), **provenance(device),
    )  # fmt: skip
    records = [Record("start", "load_to_ready_s", ready, **base)]
    with llm:
        if "decode" in args.test:
            for length in args.context:
                records += [record for batch in args.batch for record in decode(llm, batch, base, length)]
        if "prefill" in args.test:
            records += [prefill(llm, length, base) for length in args.prompt]
        if "workload" in args.test:
            records += workload(llm, base)
    return records


def options(args: argparse.Namespace, fusion: str) -> str:
    """What differs from the engine's defaults, as text."""
    found = [f"fusion={fusion}"] * (fusion != "auto") + ["enforce_eager"] * args.enforce_eager
    return " ".join(found + ["async_scheduling=False"] * args.no_async_scheduling)


def _prompts(rng: Random, count: int, length: int, vocab: int = 10000) -> list[list[int]]:
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def _seconds(llm: LLM, prompts: list[list[int]], params: Any) -> float:
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def decode(llm: LLM, batch: int, base: dict[str, Any], prompt: int = 128, runs: int = 3) -> list[Record]:
    """ms per token = (time for 256 tokens - time for 64) / 192, median of the runs: prefill cancels out."""
    rng, times = Random(0), []
    for run in range(runs + 1):  # the first is a warm-up
        seconds = {}
        for out in (64, 256):
            params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=out)
            seconds[out] = _seconds(llm, _prompts(rng, batch, prompt), params)
        if run:
            times.append((seconds[256] - seconds[64]) / 192)
    shape: dict[str, Any] = dict(batch=str(batch), prompt=str(prompt), out="256", **base)
    per_token = statistics.median(times)
    return [
        Record("decode", "ms_per_token", per_token * 1e3, **shape),
        Record("decode", "output_tok_s", batch / per_token, **shape),
    ]


def prefill(llm: LLM, length: int, base: dict[str, Any], runs: int = 5) -> Record:
    """Time to the first token of one prompt on an idle engine, median."""
    rng = Random(1)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1)
    times = [_seconds(llm, _prompts(rng, 1, length), params) for _ in range(runs + 1)][1:]
    return Record("prefill", "ttft_ms", statistics.median(times) * 1e3, batch="1", prompt=str(length), out="1", **base)


def workload(llm: LLM, base: dict[str, Any]) -> list[Record]:
    """nano-vLLM's bench.py: 256 requests of 100-1024 prompt tokens and 100-1024 output tokens, its seed and order."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(100, 1024)) for _ in range(256)]
    total = sum(p.max_tokens or 0 for p in params)
    shape: dict[str, Any] = dict(batch="256", prompt="100-1024", out="100-1024", **base)
    records = []
    for note in ("cold", "warm"):
        seconds = _seconds(llm, prompts, params)
        records.append(Record("workload", f"output_tok_s_{note}", total / seconds, note="bench.py draw", **shape))
        prompts = [[token + 1 for token in prompt] for prompt in prompts]
    return records


if __name__ == "__main__":
    main()

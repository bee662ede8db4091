"""A decoder layer of the decode chain, as a decode step runs it: all layers in one CUDA graph, over their own weights.

    python benchmarks/bench_decode_chain.py                                   fused and unfused, linears alone, LM head
    python benchmarks/bench_decode_chain.py --forms linears --rows 1 --linear qkv=gemv/16/256/4 down=gemv/4/256/4
    python benchmarks/bench_decode_chain.py --forms fused --attention 128,16,128,8 --contexts 256 4096

One CUDA GPU, about a minute. Layers follow each other as in a step, so weights come from memory and not from the L2
cache; the forms of a case take turns. `linears` leaves attention out. Rows go to bench_results/metrics.csv
(test=decode_chain, µs a layer; of `head` µs), or to --csv; what --linear and --attention ask for is in their options.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.decode_chain import FORMS, LINEARS, Chain, attention_config, linear_choice, said
from harness.models import SHAPES, config_of, write_config
from harness.records import METRICS, Record, provenance, write
from harness.work import Shape

from nanovllm import LLM, __version__
from nanovllm.tuning.turns import percentiles, take_turns

REPLAYS = 6  # in a row, for one time


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="Qwen3-0.6B", choices=list(SHAPES))
    found.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    found.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 384, 1024, 4096])
    found.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    found.add_argument(
        "--linear", type=linear_choice, nargs="+", default=[], metavar="NAME=CONFIG",
        help=f"instead of the policy's choice; NAME is one of {', '.join(LINEARS)}; dependent launch is added",
    )  # fmt: skip
    found.add_argument(
        "--attention",
        type=attention_config,
        metavar="BLOCK_N,SPLITS,MIN_SPLIT,WARPS",
        help="the same for attention",
    )
    found.add_argument("--rounds", type=int, default=7, help="times of each form")
    found.add_argument("--csv", type=Path, default=METRICS)
    return found.parse_args(words)


def replay_of(step: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that replays `step`, captured in a CUDA graph, and returns µs a replay."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
        stream.synchronize()
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / REPLAYS * 1000

    return replay


@torch.inference_mode()
def measure(args: argparse.Namespace, chain: Chain, origin: dict[str, str]) -> None:
    """Time, print and write every case: attention's forms for each context, the others once for each number of rows."""
    fixed = [form for form in args.forms if form in ("linears", "head")]
    others = [form for form in args.forms if form not in fixed]
    cases = [(rows, context, others) for rows in args.rows for context in args.contexts if others]
    cases += [(rows, 0, fixed) for rows in args.rows if fixed]
    for rows, context, forms in cases:
        steps = chain.steps(rows, max(context, 1))
        with chain.choosing(dict(args.linear), args.attention):
            replays = {form: replay_of(steps[form]) for form in forms}
        records = []
        for form, turns in take_turns(replays, args.rounds).items():
            value, p20, p80 = (time if form == "head" else time / chain.layers for time in percentiles(turns))
            options = said(form, dict(args.linear), args.attention)
            print(f"{rows:>3} rows  context {context or '-':>6}  {options:<40} {value:8.2f} us", flush=True)
            records.append(
                Record(
                    "decode_chain",
                    "us" if form == "head" else "us_per_layer",
                    value,
                    version=__version__,
                    model=args.model,
                    dtype="bfloat16",
                    weights="random",
                    batch=str(rows),
                    prompt=str(context or ""),
                    options=options,
                    p20=p20,
                    p80=p80,
                    runs=args.rounds,
                    **origin,
                )  # fmt: skip
            )
        write(records, args.csv)


def main() -> int:
    """0, or 1 with a sentence."""
    args = parse()
    if not torch.cuda.is_available():
        print("bench_decode_chain: PyTorch finds no CUDA GPU: run this where there is one", file=sys.stderr)
        return 1
    tokens = max(args.rows) * (max(args.contexts) + 256)  # and what a block rounds up
    memory = int(Shape(config_of(args.model)).kv_bytes(tokens, 2)) + (1 << 28)
    with tempfile.TemporaryDirectory() as directory:
        path = write_config(args.model, Path(directory))
        with LLM(
            str(path), load_format="dummy", enforce_eager=True, kv_cache_memory_bytes=memory,
            max_num_seqs=max(args.rows), max_model_len=max(args.contexts) + 1, show_progress=False,
        ) as llm:  # fmt: skip
            try:
                measure(args, Chain(llm.engine.runner), provenance("cuda"))
            except (OSError, ValueError) as error:
                print(f"bench_decode_chain: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

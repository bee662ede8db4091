"""Logits of every step of an engine that is made to follow given tokens, through its public API.

A logits processor records each row and forces the next token, so chunked prefill, paging and decoding all take part.
Imports nothing but torch and the package: benchmarks use it as well.
"""

from __future__ import annotations

import torch

from nanovllm import LLM, SamplingParams


class Teacher:
    """Records the logits of every step and forces `tokens`, one after the other."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = tokens
        self.rows: list[torch.Tensor] = []

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.rows.append(logits.clone())
        forced = torch.full_like(logits, float("-inf"))
        forced[self.tokens[len(output)]] = 0.0
        return forced


def teacher_forced(llm: LLM, sequences: list[list[int]], prompt_lens: list[int]) -> list[torch.Tensor]:
    """Logits [T - prompt_len + 1, vocab] of each sequence from its prompt's last token on, in one batch."""
    teachers = [Teacher([*seq[n:], 0]) for seq, n in zip(sequences, prompt_lens, strict=True)]
    params = [
        SamplingParams(temperature=0, max_tokens=len(t.tokens), ignore_eos=True, logits_processors=[t])
        for t in teachers
    ]
    prompts = [seq[:n] for seq, n in zip(sequences, prompt_lens, strict=True)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, teacher in zip(outputs, teachers, strict=True):
        if output.outputs[0].token_ids != teacher.tokens:
            raise RuntimeError(f"the engine did not follow the forced tokens: {output.error}")
    return [torch.stack(teacher.rows) for teacher in teachers]

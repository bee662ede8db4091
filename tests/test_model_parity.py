"""Every family and RoPE rule against Hugging Face: teacher-forced logits through the engine, fp32, within 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from teacher_forcing import teacher_forced
from tiny_models import CASES, reference_logits, save_model

from nanovllm import LLM, SamplingParams

TOLERANCE = 1e-5
ENGINE = dict(
    kvcache_block_size=8, num_kvcache_blocks=96, max_num_batched_tokens=40, max_num_seqs=8, show_progress=False
)


@pytest.mark.parametrize("case", CASES)
def test_teacher_forced_logits(case: str, tmp_path: Path) -> None:
    reference = save_model(case, tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompt_lens = [1, 7, 30, 44, 90]
    lengths = [25, 40, 47, 48, 100]
    sequences = [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]
    with LLM(str(tmp_path), max_model_len=128, **ENGINE) as llm:
        rows = teacher_forced(llm, sequences, prompt_lens)
    for sequence, n, ours in zip(sequences, prompt_lens, rows, strict=True):
        if case == "llama_dynamic" and len(sequence) > 48:
            # Its rotation depends on the length at the time, so every step is its own reference.
            theirs = dynamic_reference(reference, sequence, n)
        else:
            theirs = reference_logits(reference, sequence)[n - 1 :]
        error = (ours - theirs).abs().max().item()
        assert error < TOLERANCE, f"{case}, {n} of {len(sequence)} tokens in the prompt: {error:.2e}"


@torch.no_grad()
def dynamic_reference(model: torch.nn.Module, tokens: list[int], prompt_len: int) -> torch.Tensor:
    """Hugging Face decoding with a cache: keys stay rotated as they were when they were computed."""
    out = model(torch.tensor([tokens[:prompt_len]]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in tokens[prompt_len:]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("case", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_prompt_logprobs(case: str, tmp_path: Path) -> None:
    reference = save_model(case, tmp_path)
    prompt = torch.randint(3, 211, (70,), generator=torch.Generator().manual_seed(5)).tolist()
    with LLM(str(tmp_path), max_model_len=128, **ENGINE) as llm:
        for _ in range(2):  # the second time over a warm prefix cache
            output = llm.generate(
                prompt, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3), use_tqdm=False
            )[0]
    expected = torch.log_softmax(reference_logits(reference, prompt), dim=-1)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        row = expected[position - 1]
        assert entry is not None and prompt[position] in entry and len(entry) >= 3
        for token, logprob in entry.items():
            assert abs(logprob.logprob - row[token].item()) < TOLERANCE
            assert logprob.rank == int((row > row[token]).sum()) + 1
        assert set(row.topk(3).indices.tolist()) <= set(entry)


def test_tolerance_can_fail(tmp_path: Path) -> None:
    """The comparison above sees a difference of one weight in the last layer's norm."""
    reference = save_model("llama", tmp_path)
    reference.model.layers[2].input_layernorm.weight.data[5] *= 1.01
    tokens = list(range(3, 40))
    with LLM(str(tmp_path), max_model_len=128, **ENGINE) as llm:
        ours = teacher_forced(llm, [tokens], [30])[0]
    assert (ours - reference_logits(reference, tokens)[29:]).abs().max().item() > 10 * TOLERANCE

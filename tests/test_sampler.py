"""The sampler: each rule against Hugging Face's logits processors, and rows that do not depend on each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm.kernels import sample_reference
from nanovllm.kernels.sample_cut import cut_threshold
from nanovllm.layers import logits as ops
from nanovllm.layers.logits import score_prompt
from nanovllm.layers.sampler import Sampler, SamplerOutput
from nanovllm.layers.sampling_batch import SamplingBatch, SamplingRow, TokenCounts, to_device
from nanovllm.sampling_params import SamplingParams

CPU = torch.device("cpu")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
kernel_too = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ],
)
EOS = 2


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def row(seed: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SamplingRow:
    resolved = SamplingParams(**params).resolve(eos_token_ids=[EOS])
    return SamplingRow(resolved, seed, [5, 6, 5] if prompt is None else prompt, [] if output is None else output)


def sample(rows: list[SamplingRow], logits: torch.Tensor, positions: torch.Tensor | None = None) -> SamplerOutput:
    """One step of a new sampler; checks that the logits stay as they were."""
    kept = logits.clone()
    positions = torch.arange(len(rows), device=logits.device) if positions is None else positions
    output = Sampler(logits.shape[1], logits.device)(logits, rows, positions)
    assert torch.equal(logits.isnan(), kept.isnan())
    assert torch.equal(logits.nan_to_num(), kept.nan_to_num())
    assert output.token_ids.shape == (len(rows),)
    assert output.token_ids.dtype == torch.int64
    return output


def cut(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """What is left of `logits` [R, V] after the cuts of `rows`."""
    choice = SamplingBatch.build(rows, logits.shape[1], logits.device).choice
    assert choice.any_cut
    threshold = cut_threshold(logits, choice.temperature, choice.top_k, choice.top_p, choice.min_p)
    return logits.float().masked_fill(logits.float() < threshold[:, None], -math.inf)


# ------------------------------------------------------------------------------------------- against Hugging Face

CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100000},
    {"top_p": 0.001},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 5, "min_p": 0.2},
    {"top_p": 0.7, "min_p": 0.1},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1500, "top_p": 0.99},
]


def hugging_face(logits: torch.Tensor, temperature: float, cuts: dict[str, Any]) -> torch.Tensor:
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if "top_k" in cuts:
        chain.append(TopKLogitsWarper(cuts["top_k"]))
    if "top_p" in cuts:
        chain.append(TopPLogitsWarper(cuts["top_p"]))
    if "min_p" in cuts:
        chain.append(MinPLogitsWarper(cuts["min_p"]))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits)


@kernel_too
@pytest.mark.parametrize("vocab", [40, 3000])  # below and above the size from which the largest logits are selected
@pytest.mark.parametrize("scale", [0.1, 3.0])  # flat: top-p needs most of the vocabulary; peaked: a few tokens
@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.6])
def test_cuts_keep_what_hugging_face_keeps(device: str, vocab: int, scale: float, temperature: float) -> None:
    logits = torch.randn(len(CUTS), vocab) * scale
    ours = cut(logits.to(device), [row(temperature=temperature, **cuts) for cuts in CUTS]).cpu()
    for i, cuts in enumerate(CUTS):
        theirs = hugging_face(logits[i : i + 1].double(), temperature, cuts)[0]
        kept = torch.isfinite(ours[i])
        differing = (kept != torch.isfinite(theirs)).nonzero().flatten().tolist()
        assert len(differing) <= 1, cuts
        for token in differing:  # only where float32 cannot tell on which side of p the sum lies
            shares = torch.softmax(hugging_face(logits[i : i + 1].double(), temperature, {**cuts, "top_p": 1.0})[0], -1)
            assert abs(shares[shares > shares[token]].sum().item() - cuts["top_p"]) < 1e-6 * vocab**0.5, cuts
        assert torch.equal(ours[i][kept], logits[i][kept])  # cut, not changed


def test_selection_decides_as_the_sort_does(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(30, 4000) * torch.linspace(0.1, 4, 30)[:, None]
    rows = [row(top_p=0.3 + 0.02 * i) for i in range(30)]
    selected = cut(logits, rows)
    counts = torch.isfinite(selected).sum(dim=-1)
    assert counts.min() < sample_reference._HEAD < counts.max()
    monkeypatch.setattr(sample_reference, "_HEAD", 4000)
    assert torch.equal(selected, cut(logits, rows))


@kernel_too
def test_equal_logits_are_kept_or_cut_together(device: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, -1.0]], device=device)
    survivors = {(1,): [1, 3], (2,): [1, 3], (3,): [1, 2, 3, 4, 5]}
    for (k,), kept in survivors.items():
        assert torch.isfinite(cut(logits, [row(top_k=k)])[0]).nonzero().flatten().tolist() == kept
    half = torch.softmax(logits[0], dim=-1)[[1, 3]].sum().item()
    assert torch.isfinite(cut(logits, [row(top_p=half * 0.99)])[0]).nonzero().flatten().tolist() == [1, 3]
    assert torch.isfinite(cut(logits, [row(top_p=half * 1.01)])[0]).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


@kernel_too
@pytest.mark.parametrize("cuts", CUTS)
def test_broken_logits_give_a_valid_token(device: str, cuts: dict[str, Any]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        output = sample([row(**cuts)], torch.full((1, 2000), value, device=device))
        assert 0 <= output.token_ids.item() < 2000


@devices
def test_penalties(device: str) -> None:
    vocab = 50
    prompts = [[1, 2, 3, 3], [4], [9, 9, 9], [7, 8]]
    outputs = [[3, 5, 5, 5], [], [10], [7, 7, 11, 40]]
    values = [(1.3, 0.0, 0.0), (0.7, 1.0, 0.5), (1.0, 0.7, 0.0), (1.1, -0.5, 1.5)]
    logits = torch.randn(4, vocab, dtype=torch.float64)
    rows = [
        row(prompt=p, output=o, temperature=0, repetition_penalty=r, presence_penalty=a, frequency_penalty=f)
        for p, o, (r, a, f) in zip(prompts, outputs, values, strict=True)
    ]
    batch = SamplingBatch.build(rows, vocab, torch.device(device))
    assert batch.special is not None
    entries = batch.special_entries(vocab, torch.device(device))
    own = logits.float().to(device)
    ops.penalise_(own, entries["seen"], entries["counts"], batch.special.penalties)
    for i, (repetition, presence, frequency) in enumerate(values):
        ids = torch.tensor([prompts[i] + outputs[i]])
        expected = RepetitionPenaltyLogitsProcessor(repetition)(ids, logits[i : i + 1])[0]
        for token in set(outputs[i]):  # OpenAI's formula
            expected[token] -= presence + outputs[i].count(token) * frequency
        torch.testing.assert_close(own[i].cpu().double(), expected, atol=1e-6, rtol=1e-6)


def test_counts_follow_the_output() -> None:
    generator = torch.Generator().manual_seed(1)
    prompt, output = [3, 3, 700], []
    counts = TokenCounts(prompt)
    for token in torch.randint(0, 400, (500,), generator=generator).tolist():
        output.append(token)
        if token % 3 == 0:
            ids, numbers = counts.update(output)
            assert len(ids) == len(set(ids.tolist()))
            assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == {
                t: output.count(t) for t in {*prompt, *output}
            }


# --------------------------------------------------------------------------------------------- greedy, bias, min_tokens


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_whatever_is_cut(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 1000).to(dtype).to(device)
    greedy = [row(temperature=0), row(temperature=0, top_k=3, top_p=0.1, min_p=0.5), row(temperature=0, seed=9)]
    assert torch.equal(sample(greedy, logits).token_ids, logits.argmax(dim=-1))
    assert torch.equal(sample([*greedy[:2], row()], logits).token_ids[:2], logits.argmax(dim=-1)[:2])


@devices
def test_logit_bias(device: str) -> None:
    logits = torch.rand(3, 100, device=device)
    rows = [row(temperature=0), row(temperature=0, logit_bias={7: 100, 8: 98}), row(logit_bias={3: 50, 0: -100})]
    assert sample(rows, logits).token_ids[1:].tolist() == [7, 3]


@devices
def test_min_tokens_hold_back_every_end(device: str) -> None:
    logits = torch.zeros(1, 20, device=device)
    logits[0, [EOS, 9, 4, 7]] = torch.tensor([9.0, 8.0, 7.0, 1.0], device=device)
    one = row(temperature=0, min_tokens=2, stop_token_ids=[9])
    free = row(temperature=0, min_tokens=2, stop_token_ids=[9], ignore_eos=True)
    sampler = Sampler(20, torch.device(device))
    tokens = []
    for step in range(4):
        output = sampler(logits.repeat(2, 1), [one, free], torch.full((2,), step, device=device))
        tokens.append(output.token_ids.tolist())
        one.output_token_ids.append(0), free.output_token_ids.append(0)
    assert tokens == [[4, EOS], [4, EOS], [EOS, EOS], [EOS, EOS]]


def test_penalties_see_the_tokens_of_earlier_steps() -> None:
    logits = torch.tensor([[3.0, 2.5, 2.0, 0.0]])
    one = row(temperature=0, frequency_penalty=0.8, prompt=[0])
    sampler, tokens = Sampler(4, CPU), []
    for step in range(5):
        tokens.append(sampler(logits, [one], torch.tensor([step])).token_ids.item())
        one.output_token_ids.append(tokens[-1])
    assert tokens == [0, 1, 0, 2, 1]


# --------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9}],
)
def test_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 2,000 draws against the renormalised softmax; the seeds are fixed, the limit is five deviations."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -0.5, 0.2]])
    n, one = 2000, row(seed=77, **params)
    rows = [row(seed=77, **params) for _ in range(n)]
    tokens = sample(rows, logits.expand(n, -1)).token_ids
    left = cut(logits, [one]) if one.params.has_filters else logits
    expected = torch.softmax(left[0].double() / one.params.temperature, dim=-1) * n
    counts = torch.bincount(tokens, minlength=9).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 5


MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 10},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.05},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"logit_bias": {3: 2.0}, "temperature": 0.5},
    {"min_tokens": 5},
    {"temperature": 0, "presence_penalty": 1.0, "logprobs": 3},
    {"logits_processors": [lambda prompt, output, logits: logits * 0.5]},
]


@devices
def test_a_row_does_not_depend_on_its_company(device: str) -> None:
    count, vocab = 3 * len(MIXED), 1500
    rows = [row(seed=i % 7, output=[i, 3, 3], **MIXED[i % len(MIXED)]) for i in range(count)]
    logits, positions = (torch.randn(count, vocab) * 2).to(device), torch.arange(count, device=device) // 4
    alone = [sample([rows[i]], logits[i : i + 1], positions[i : i + 1]).token_ids.item() for i in range(count)]
    for order in (torch.arange(count), torch.randperm(count), torch.randperm(count)[:9]):
        place = order.to(device)
        together = sample([rows[i] for i in order.tolist()], logits[place], positions[place]).token_ids.tolist()
        assert together == [alone[i] for i in order.tolist()]


def test_seed_and_position_decide() -> None:
    logits = torch.zeros(1, 30000)

    def tokens(seed: int, first: int, **params: Any) -> list[int]:
        one = [row(seed=seed, **params)]
        return [sample(one, logits, torch.tensor([p])).token_ids.item() for p in range(first, first + 6)]

    assert tokens(1, 0) == tokens(1, 0)
    assert tokens(1, 0)[2:] == tokens(1, 2)[:4]
    assert tokens(1, 0, top_p=1 - 1e-6) == tokens(1, 0)  # a cut that removes nothing changes nothing
    assert tokens(-1, 0) == tokens(2**64 - 1, 0)
    seen = [t for seed in (1, 2, 2**32 + 1, 2**63) for t in tokens(seed, 0)]
    assert len(set(seen)) == len(seen)


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu() -> None:
    count = 3 * len(MIXED)
    rows = [row(seed=i, output=[i, 3, 3], **MIXED[i % len(MIXED)]) for i in range(count)]
    logits = torch.randn(count, 50000) * 3
    ours = sample(rows, logits.cuda()).token_ids.cpu()
    assert (ours != sample(rows, logits).token_ids).sum() <= 1  # logarithms differ in the last bit


# ------------------------------------------------------------------------------------------------------ batches, shapes


def test_a_batch_is_built_once_for_the_same_rows() -> None:
    logits, positions, sampler = torch.randn(2, 50), torch.zeros(2, dtype=torch.int64), Sampler(50, CPU)
    rows = [row(top_k=3), row()]
    sampler(logits, rows, positions)
    first = sampler._batch
    sampler(logits, list(rows), positions + 1)
    assert sampler._batch is first
    sampler(logits, rows[::-1], positions)
    assert sampler._batch is not first
    assert sampler._batch.rows == (rows[1], rows[0])


def test_wrong_shape_of_logits() -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \(1, 50\), got \(2, 50\)"):
        Sampler(50, CPU)(torch.zeros(2, 50), [row()], torch.zeros(1, dtype=torch.int64))


def test_no_rows() -> None:
    assert sample([], torch.zeros(0, 50)).token_ids.shape == (0,)


@devices
def test_packing(device: str) -> None:
    arrays = {"a": np.arange(3, dtype=np.int64), "b": np.float32([1.5]), "c": np.empty(0, np.int64), "d": np.arange(5)}
    tensors = to_device(arrays, torch.device(device))
    for name, array in arrays.items():
        assert tensors[name].device.type == device
        assert tensors[name].dtype == torch.from_numpy(array).dtype
        assert tensors[name].tolist() == array.tolist()


@devices
def test_prompt_logprobs(device: str) -> None:
    logits = torch.randn(6, 40, device=device, dtype=torch.float64).float()
    ids = torch.tensor([3, 39, 0, 7, 7, 1], device=device)
    found = score_prompt(logits, ids, 2).to_host()
    truth = torch.log_softmax(logits.double(), dim=-1).cpu()
    assert list(found) == list(range(6))
    for i, entries in found.items():
        token, value, rank = entries[0]
        assert token == ids[i].item()
        assert value == pytest.approx(truth[i, token].item(), abs=1e-5)
        assert rank == 1 + (truth[i] > truth[i, token]).sum().item()
        assert {t for t, _, _ in entries} == {token, *truth[i].topk(2).indices.tolist()}

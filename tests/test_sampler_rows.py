"""What the sampler says about single rows: log-probabilities, and errors of logits processors that harm no other."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from nanovllm.layers.sampler import Sampler, SamplerOutput
from nanovllm.layers.sampling_batch import SamplingRow
from nanovllm.sampling_params import SamplingParams

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def row(seed: int = 0, **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**params).resolve(eos_token_ids=[2]), seed, [5, 6], [7])


def sample(rows: list[SamplingRow], logits: torch.Tensor) -> SamplerOutput:
    return Sampler(logits.shape[1], logits.device)(logits, rows, torch.arange(len(rows), device=logits.device))


# --------------------------------------------------------------------------------------------------- log-probabilities


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_model(device: str, dtype: torch.dtype) -> None:
    """Of the distribution before temperature, bias, penalties and cuts."""
    wishes: list[dict[str, Any]] = [
        {"logprobs": 3, "temperature": 0.3},
        {},
        {"logprobs": 0, "logit_bias": {11: 100}},
        {"logprobs": 5, "top_k": 2, "frequency_penalty": 1.0},
        {"logprobs": 1, "temperature": 0},
        {"logprobs": 100, "min_p": 0.5},
    ]
    logits = (torch.randn(len(wishes), 90) * 2).to(dtype).to(device)
    output = sample([row(i, **wish) for i, wish in enumerate(wishes)], logits)
    truth = torch.log_softmax(logits.double(), dim=-1).cpu()
    assert output.logprobs is not None
    found = output.logprobs.to_host()
    assert list(found) == [0, 2, 3, 4, 5]
    assert found[2][0][0] == 11
    for i, entries in found.items():
        token = output.token_ids[i].item()
        assert entries[0][0] == token
        for t, value, _ in entries:
            assert value == pytest.approx(truth[i, t].item(), abs=1e-5)
        better = (truth[i] > truth[i, token]).sum().item()
        assert entries[0][2] == 1 + better
        count = min(wishes[i]["logprobs"], 90)
        assert len({t for t, _, _ in entries}) == len(entries)
        # Which of several equal bfloat16 logits come into the top is left open; their values are not.
        top = truth[i].topk(count).values.tolist()
        rest = [value for _, value, rank in entries[1:]]
        inside = better < count
        assert len(entries) == (count if inside and count else count + 1) or dtype is torch.bfloat16
        assert all(any(abs(value - t) < 1e-5 for t in top) for value in rest)
        if dtype is torch.float32:
            assert [rank for _, _, rank in entries[1:]] == [r for r in range(1, count + 1) if r != 1 + better]


def test_no_logprobs_unless_asked() -> None:
    assert sample([row(), row(top_k=2)], torch.randn(2, 20)).logprobs is None


# --------------------------------------------------------------------------------------------------- logits processors


def raises(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


def spoils_then_raises(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits.fill_(math.nan)
    raise RuntimeError("late")


BAD_PROCESSORS: list[tuple[Any, str]] = [
    (raises, r"^logits processor raises failed: KeyError: 'no such thing'$"),
    (spoils_then_raises, r"^logits processor spoils_then_raises failed: RuntimeError: late$"),
    (lambda p, o, x: None, r"failed: TypeError: it must return a tensor of 300 logits, got NoneType$"),
    (lambda p, o, x: x.tolist(), r"it must return a tensor of 300 logits, got list$"),
    (lambda p, o, x: x[:-1], r"it must return 300 float logits, got torch.float32 \(299,\)$"),
    (lambda p, o, x: x[None], r"it must return 300 float logits, got torch.float32 \(1, 300\)$"),
    (lambda p, o, x: x.long(), r"it must return 300 float logits, got torch.int64 \(300,\)$"),
    (lambda p, o, x: x * math.nan, r"^the logits processors returned NaN or \+inf: return finite logits, or -inf"),
    (lambda p, o, x: x.index_fill(0, torch.tensor([3]), math.inf), r"returned NaN or \+inf"),
    (lambda p, o, x: torch.full_like(x, -math.inf), r"^the logits processors excluded every token"),
    (lambda p: p, r"failed: TypeError: .*positional argument"),
    (dict, r"^logits processor dict failed: TypeError"),
]


@pytest.mark.parametrize(("processor", "sentence"), BAD_PROCESSORS)
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.9, "logprobs": 2}])
def test_a_failing_processor_fails_its_row_only(processor: Any, sentence: str, params: dict[str, Any]) -> None:
    logits = torch.randn(5, 300)
    good = {"logits_processors": [lambda p, o, x: -x], "temperature": 0}
    others = [row(1), row(2, top_k=5), row(4, **good), row(5, repetition_penalty=1.5)]
    plain = sample([*others[:2], row(3), *others[2:]], logits)
    output = sample([*others[:2], row(3, logits_processors=[processor], **params), *others[2:]], logits)
    assert list(output.errors) == [2]
    assert re.search(sentence, output.errors[2])
    assert "\n" not in output.errors[2]
    assert 0 <= output.token_ids[2].item() < 300
    for i in (0, 1, 3, 4):
        assert output.token_ids[i] == plain.token_ids[i]
    assert output.token_ids[3] == logits[3].argmin()


def test_excluded_tokens_and_min_tokens_together_leave_nothing() -> None:
    def only_eos(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        kept = logits[2].item()
        logits.fill_(-math.inf)[2] = kept
        return logits

    logits = torch.randn(2, 30)
    output = sample([row(logits_processors=[only_eos], min_tokens=2), row(logits_processors=[only_eos])], logits)
    assert output.token_ids[1] == 2
    assert list(output.errors) == [0]
    assert output.errors[0].startswith("the logits processors excluded every token")


@devices
def test_what_a_processor_sees(device: str) -> None:
    seen: list[Any] = []

    def first(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(prompt), list(output), logits.clone()))
        prompt.append(99), output.clear()
        return logits.double().cpu() if device == "cpu" else logits

    def second(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((prompt, output, logits.clone()))
        logits[8] = 1000.0  # in place is fine too
        return logits

    logits = torch.randn(1, 50, device=device)
    one = row(temperature=0, logits_processors=[first, second], logit_bias={4: 10}, frequency_penalty=2.0)
    assert sample([one], logits).token_ids.item() == 8
    assert (one.prompt_token_ids, one.output_token_ids) == ([5, 6], [7])
    expected = logits[0].clone()
    expected[4] += 10
    expected[7] -= 2
    for prompt, output, given in seen:
        assert (prompt, output) == ([5, 6], [7])
        assert given.dtype == torch.float32
        assert given.device.type == device
        torch.testing.assert_close(given, expected)


def test_interrupts_are_not_swallowed() -> None:
    def interrupted(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample([row(logits_processors=[interrupted])], torch.randn(1, 20))

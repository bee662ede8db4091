"""The engine through its public API on a tiny random model: outputs, errors, threads, streams, lifetimes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engine_lives import random_life
from tiny_models import save_model

from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.model_runner import LaunchedStep, StepOutput
from nanovllm.engine.request import Completion

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[3 + (7 * i + j) % 200 for j in range(5 + 9 * i)] for i in range(5)]
SMALL: dict[str, Any] = dict(
    max_model_len=128, kvcache_block_size=8, num_kvcache_blocks=64, max_num_batched_tokens=64, max_num_seqs=8,
    show_progress=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return str(path)


@pytest.fixture(scope="module", params=[False, True], ids=["one-step-at-a-time", "async"])
def llm(model: str, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(model, **SMALL, async_scheduling=request.param) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    with LLM(model, **SMALL, async_scheduling=False) as llm:
        return [llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"] for prompt in PROMPTS]


def ids(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def used_blocks(llm: LLM) -> int:
    manager = llm.engine.scheduler.block_manager
    return manager.num_blocks - manager.num_free_blocks


# -- shapes of calls and results -------------------------------------------------------------------------------------


def test_batch_equals_one_by_one(llm: LLM, expected: list[list[int]]) -> None:
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert ids(llm.generate([{"prompt_token_ids": p} for p in PROMPTS], [GREEDY] * 5, use_tqdm=True)) == expected


def test_output_fields(llm: LLM, expected: list[list[int]]) -> None:
    output = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
    assert output["token_ids"] == expected[0] and output["text"] == ""  # no tokenizer, no text
    assert output.finished and output.outputs[0].finish_reason == "length"
    assert output.prompt_token_ids == PROMPTS[0]
    assert output.metrics is not None and output.metrics.first_token_time is not None
    with pytest.raises(KeyError, match="attributes"):
        output["tokens"]


def test_empty_list_of_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_n_completions_share_the_prompt(llm: LLM) -> None:
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=1.0, seed=7, n=4, max_tokens=8, ignore_eos=True)
    output = llm.generate(PROMPTS[4], params, use_tqdm=False)[0]
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    again = llm.generate(PROMPTS[4], params.clone(n=1), use_tqdm=False)[0]
    assert again["token_ids"] == output["token_ids"]  # completion 0 does not depend on n


def test_stop_token_and_min_tokens(llm: LLM, expected: list[list[int]]) -> None:
    stop = expected[1][3]
    first = expected[1].index(stop)
    output = llm.generate(PROMPTS[1], GREEDY.clone(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == expected[1][: first + 1]
    later = llm.generate(PROMPTS[1], GREEDY.clone(stop_token_ids=[stop], min_tokens=8), use_tqdm=False)[0]
    assert len(later["token_ids"]) >= 8 and stop not in later["token_ids"][:8]


def test_several_eos_ids(model: str, tmp_path: Path, expected: list[list[int]]) -> None:
    """Greedy is allowed, generation_config.json is read, and every EOS id of its list ends a sequence."""
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    eos = expected[0][5]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [2, {eos}], "temperature": 0.0}}')
    with LLM(str(tmp_path), **SMALL) as other:
        output = other.generate(PROMPTS[0], SamplingParams(max_tokens=12), use_tqdm=False)[0]
    assert output.outputs[0].finish_reason == "stop"
    assert output["token_ids"] == expected[0][: expected[0].index(eos) + 1]


def test_seeds_do_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=11, max_tokens=10, ignore_eos=True)
    alone = ids(llm.generate(PROMPTS[2], params, use_tqdm=False))[0]
    others = SamplingParams(temperature=1.3, max_tokens=10, ignore_eos=True)
    mixed = llm.generate(PROMPTS, [others, others, params, others, others], use_tqdm=False)
    assert ids(mixed)[2] == alone
    assert ids(llm.generate(PROMPTS[2], params.clone(seed=12), use_tqdm=False))[0] != alone


def test_logprobs(llm: LLM, expected: list[list[int]]) -> None:
    output = llm.generate(PROMPTS[0], GREEDY.clone(logprobs=2), use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry[token].rank == 1 and len(entry) == 2
        assert entry[token].logprob == max(x.logprob for x in entry.values())
    total = sum(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_of_one_token(llm: LLM) -> None:
    """Nothing predicts the first token, so its entry is None; the list has one entry a token all the same."""
    for prompt in ([5], [5, 6]):
        output = llm.generate(prompt, GREEDY.clone(prompt_logprobs=1), use_tqdm=False)[0]
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None


def test_eos_ids_beyond_the_vocabulary_are_never_sampled(model: str, tmp_path: Path, expected: list[list[int]]) -> None:
    """`min_tokens` bans EOS by flat index, where an id of a larger tokenizer would mean another request's token."""
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [2, {211 + expected[1][0]}]}}')
    with LLM(str(tmp_path), **SMALL) as other:
        assert other.engine.eos_token_ids == {2}
        first = SamplingParams(temperature=0, max_tokens=12, min_tokens=12)
        outputs = other.generate(PROMPTS[:2], [first, first], use_tqdm=False)
    assert [output.error for output in outputs] == [None, None] and outputs[1]["token_ids"] == expected[1]


def test_a_snapshot_that_says_finished_is_complete(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may end the request while its output is put together."""
    request = llm.engine.make_request(PROMPTS[0], GREEDY.clone(max_tokens=1))
    llm.engine.submit([request])
    snapshot = type(request)._completion_output

    def slow(self: Any, completion: Any) -> Any:
        before = snapshot(self, completion)
        while llm.engine.has_unfinished:
            llm.engine.step()
        return before

    monkeypatch.setattr(type(request), "_completion_output", slow)
    first = request.output()
    assert request.finished and not first.finished and first.outputs[0].finish_reason is None
    assert request.output().finished and request.output().outputs[0].finish_reason == "length"


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], GREEDY, ValueError, "empty"),
        ([3] * 128, GREEDY, ValueError, "max_model_len is 128"),
        ([3, 211], GREEDY, ValueError, "211 is outside the vocabulary"),
        ([3, -1], GREEDY, ValueError, "-1 is outside the vocabulary"),
        ([3, 1.5], GREEDY, TypeError, "1.5 is not an integer"),
        ("text", GREEDY, ValueError, "no tokenizer"),
        ({"promt": "x"}, GREEDY, ValueError, "prompt_token_ids"),
        ({"promt": "x", 1: 2}, GREEDY, ValueError, "prompt_token_ids"),
        ([3], GREEDY.clone(stop="x"), ValueError, "stop strings need a tokenizer"),
        ([3], GREEDY.clone(logit_bias={500: 1.0}), ValueError, "logit_bias names token 500"),
        ([3], {"temperature": 0}, TypeError, "SamplingParams"),
        (b"ab", GREEDY, TypeError, "decode these bytes"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(llm: LLM, prompt: Any, params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        llm.generate([PROMPTS[0], prompt], [GREEDY, params], use_tqdm=False)
    assert str(caught.value).startswith("prompt 1: ") and "\n" not in str(caught.value)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("prompts", [None, 5, (p for p in PROMPTS), {"a set"}, torch.tensor(3)])
def test_prompts_that_are_no_list(llm: LLM, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts must be a string, token ids, or a list of these, got"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_arrays_and_tensors_are_token_ids(llm: LLM, expected: list[list[int]]) -> None:
    for prompt in (torch.tensor(PROMPTS[0]), torch.tensor(PROMPTS[0]).numpy(), tuple(PROMPTS[0])):
        assert ids(llm.generate(prompt, GREEDY, use_tqdm=False)) == expected[:1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enforce_eager": "no"}, "enforce_eager must be True or False, got 'no'"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be in"),
        ({"device": None}, "unknown device None: use auto, cpu, cuda or cuda:N"),
        ({"tokenizer": ""}, "tokenizer must be a string that is not empty"),  # not the current directory
        ({"chat_template": 5}, "chat_template must be a string"),
        ({"tokenizer": "x", "skip_tokenizer_init": True}, "tokenizer has no use with skip_tokenizer_init=True"),
        ({"chat_template": "{{x}}", "skip_tokenizer_init": True}, "chat_template has no use with"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
    ],
)
def test_options_of_the_wrong_type(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLM("nowhere", **options)


def test_a_missing_chat_template_is_an_error(model: str) -> None:
    with pytest.raises(FileNotFoundError, match="chat_template='nowhere.jinja'"):
        LLM(model, **SMALL, chat_template="nowhere.jinja")


def test_prompt_larger_than_the_cache(model: str) -> None:
    with LLM(model, **{**SMALL, "num_kvcache_blocks": 4}) as small:
        with pytest.raises(ValueError, match="whole KV cache holds 32"):
            small.generate([[3] * 40], GREEDY, use_tqdm=False)
        output = small.generate([[3] * 25], GREEDY.clone(max_tokens=50), use_tqdm=False)[0]
    assert output.outputs[0].finish_reason == "length" and len(output["token_ids"]) == 8


def test_a_cache_larger_than_memory_is_one_sentence(model: str) -> None:
    with pytest.raises(ValueError, match="KV blocks take .* GiB, more than cpu has left: lower num_kvcache_blocks"):
        LLM(model, num_kvcache_blocks=10**12, show_progress=False)


def test_unknown_keywords_name_the_nearest(model: str) -> None:
    with pytest.raises(TypeError, match="did you mean 'max_model_len'"):
        LLM(model, max_model_length=5)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_mistakes_of_a_whole_call_are_named(llm: LLM) -> None:
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams, got dict"):
        llm.generate(PROMPTS[0], {"temperature": 0}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decode these bytes"):
        llm.generate(b"ab", GREEDY, use_tqdm=False)  # type: ignore[arg-type]


def test_a_prompt_in_a_dictionary(llm: LLM, expected: list[list[int]]) -> None:
    """Either of the two, and None for the other one, as vLLM's callers pass them."""
    prompts = [{"prompt_token_ids": PROMPTS[0]}, {"prompt": None, "prompt_token_ids": PROMPTS[0]}]
    assert ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected[:1] * 2
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate({"prompt": "text", "prompt_token_ids": None}, GREEDY, use_tqdm=False)


def test_number_of_params_must_match(llm: LLM) -> None:
    with pytest.raises(ValueError, match="5 prompts but 2 sampling_params"):
        llm.generate(PROMPTS, [GREEDY] * 2, use_tqdm=False)


def test_a_processor_that_raises_fails_alone(llm: LLM, expected: list[list[int]]) -> None:
    def broken(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 3:
            raise RuntimeError("no more")
        return logits

    params = [GREEDY, GREEDY.clone(logits_processors=[broken]), GREEDY, GREEDY, GREEDY]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert outputs[1].outputs[0].finish_reason == "error" and "no more" in (outputs[1].error or "")
    assert outputs[1]["token_ids"] == expected[1][:3]
    assert [ids(outputs)[i] for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]
    assert used_blocks(llm) == 0


def test_a_processor_may_abort_but_not_run_the_engine(llm: LLM, expected: list[list[int]]) -> None:
    def nested(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        llm.generate([9], GREEDY, use_tqdm=False)
        return logits

    def aborting(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        for request_id in list(llm.engine._requests):
            llm.engine.abort(request_id)
        return logits

    outputs = llm.generate(PROMPTS[:2], [GREEDY, GREEDY.clone(logits_processors=[nested])], use_tqdm=False)
    assert outputs[0]["token_ids"] == expected[0] and "must not run the engine" in (outputs[1].error or "")
    params = GREEDY.clone(logits_processors=[aborting], prompt_logprobs=1)
    assert llm.generate(PROMPTS[2], params, use_tqdm=False)[0].outputs[0].finish_reason == "abort"
    assert used_blocks(llm) == 0 and ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_failing_step_ends_its_requests_only(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a step leaks no blocks (nano-vLLM's does) and leaves the engine serving."""
    original = llm.engine.runner.launch
    calls = iter(range(100))

    def failing(batch: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("device on fire")
        return original(batch)

    monkeypatch.setattr(llm.engine.runner, "launch", failing)
    outputs = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    assert all(output.error == "the step failed: device on fire" for output in outputs)
    monkeypatch.undo()
    assert used_blocks(llm) == 0
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


# -- streams, threads, several engines -------------------------------------------------------------------------------


def test_stream(llm: LLM, expected: list[list[int]]) -> None:
    seen = list(llm.stream(PROMPTS[3], GREEDY))
    assert [output["token_ids"] for output in seen] == [expected[3][: i + 1] for i in range(12)]
    assert [output.finished for output in seen] == [False] * 11 + [True]


def test_leaving_a_stream_aborts(llm: LLM) -> None:
    for output in llm.stream(PROMPTS[3], GREEDY):
        if len(output["token_ids"]) == 3:
            break
    assert not llm.engine.has_unfinished and used_blocks(llm) == 0


def test_threads_share_one_engine(llm: LLM, expected: list[list[int]]) -> None:
    results: dict[int, list[list[int]]] = {}

    def work(k: int) -> None:
        results[k] = ids(llm.generate(PROMPTS[k:] + PROMPTS[:k], GREEDY, use_tqdm=False))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {k: expected[k:] + expected[:k] for k in range(4)}


def test_two_engines_in_one_process(model: str, llm: LLM, expected: list[list[int]]) -> None:
    """No port, no process group, no shared-memory name at world size 1, so nothing collides."""
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with LLM(model, **SMALL) as second:
        assert not torch.distributed.is_initialized()
        assert ids(second.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        if before:
            links = [
                os.readlink(f"/proc/self/fd/{fd}")
                for fd in set(os.listdir("/proc/self/fd")) - before
                if os.path.exists(f"/proc/self/fd/{fd}")
            ]
            assert not [link for link in links if "socket" in link or "/dev/shm" in link]


def test_closed_engine_says_so(model: str) -> None:
    llm = LLM(model, **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)


def test_async(model: str, expected: list[list[int]]) -> None:
    async def one(llm: AsyncLLM, prompt: list[int]) -> list[int]:
        outputs = [output async for output in llm.generate(prompt, GREEDY)]
        assert [output.finished for output in outputs[-2:]] == [False, True]
        return outputs[-1]["token_ids"]

    def wait(prompt: list[int], generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)  # so that the end is far away when the request is aborted
        return logits

    async def main() -> None:
        async with AsyncLLM(model, **SMALL) as llm:
            assert await asyncio.gather(*(one(llm, prompt) for prompt in PROMPTS)) == expected
            with pytest.raises(ValueError, match="empty"):
                async for _ in llm.generate([], GREEDY):
                    pass
            slow = GREEDY.clone(max_tokens=100, logits_processors=[wait])
            async for output in llm.generate(PROMPTS[0], slow, request_id="mine"):
                if len(output["token_ids"]) == 2:
                    await llm.abort("mine")
                if output.finished:
                    assert output.outputs[0].finish_reason == "abort"
            assert await one(llm, PROMPTS[1]) == expected[1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_inputs_travel_in_one_copy_and_buffers_stay(llm: LLM) -> None:
    """One host-to-device copy a step, into buffers that live as long as the engine (nano-vllm#175, #176)."""
    llm.reset_prefix_cache()
    inputs = llm.engine.runner.inputs
    views = [
        inputs.decode_view(4, [8] * 4).input_ids.data_ptr(),
        inputs.decode_view(4, [8] * 4).attention.block_table.data_ptr(),
    ]
    start = inputs.decode.num_copies, inputs.mixed.num_copies
    llm.generate(PROMPTS[:4], GREEDY, use_tqdm=False)
    assert (inputs.decode.num_copies - start[0], inputs.mixed.num_copies - start[1]) == (11, 2)
    assert views == [
        inputs.decode_view(4, [8] * 4).input_ids.data_ptr(),
        inputs.decode_view(4, [8] * 4).attention.block_table.data_ptr(),
    ]


def test_async_scheduling_changes_no_token(model: str) -> None:
    """Random arrivals, stops and aborts, preemptions among them: the same tokens whoever waits for whom."""
    results = []
    for overlap in (False, True):
        with LLM(model, **{**SMALL, "num_kvcache_blocks": 24}, async_scheduling=overlap) as llm:
            results.append(random_life(llm, seed=7, num_steps=150, vocab_size=211)[0])
            assert used_blocks(llm) == 0
    assert len(results[0]) > 25
    both = set(results[0]) & set(results[1])
    assert len(both) > 25 and all(results[0][i] == results[1][i] for i in both)


# -- failures with a step in flight ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(model: str) -> Iterator[LLM]:
    """Overlapping steps in a cache that four long answers do not fit into, so that sequences are preempted."""
    with LLM(model, **{**SMALL, "num_kvcache_blocks": 14}, async_scheduling=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def long_answers(model: str) -> list[list[int]]:
    with LLM(model, **SMALL, async_scheduling=False) as llm:
        return [llm.generate(p, GREEDY.clone(max_tokens=40), use_tqdm=False)[0]["token_ids"] for p in PROMPTS]


def run_with_one_fault(llm: LLM, method: str, turn: int, error: BaseException, before: bool) -> list[Any]:
    """Four requests; the runner's `method` raises at its call number `turn`, having done its work or not."""
    engine, calls, original = llm.engine, iter(range(1000)), getattr(llm.engine.runner, method)

    def faulty(argument: Any) -> Any:
        fault = next(calls) == turn
        result = None if fault and before else original(argument)
        if fault:
            raise error
        return result

    requests = [
        engine.make_request(p, GREEDY.clone(max_tokens=n)) for p, n in zip(PROMPTS, (40, 30, 35, 33), strict=False)
    ]
    engine.submit(requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, method, faulty)
        for _ in range(1000):
            if all(request.finished for request in requests):
                return requests
            with contextlib.suppress(KeyboardInterrupt):
                engine.step()
    raise AssertionError("requests that never end")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("device on fire"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failing_launch_spoils_no_other_step(
    crowded: LLM, long_answers: list[list[int]], error: BaseException, before: bool
) -> None:
    """The step in flight keeps its tokens, a sequence preempted by the failed step repeats none."""
    for turn in range(0, 45, 4):
        requests = run_with_one_fault(crowded, "launch", turn, error, before)
        for request, answer in zip(requests, long_answers, strict=False):
            tokens = request.output()["token_ids"]
            assert tokens == answer[: len(tokens)], turn
            assert (request.error is not None) != (len(tokens) == request.params.max_tokens)
        assert used_blocks(crowded) == 0


def test_interrupted_wait_loses_no_token(crowded: LLM, long_answers: list[list[int]]) -> None:
    for turn in range(0, 45, 4):
        requests = run_with_one_fault(crowded, "collect", turn, KeyboardInterrupt(), True)
        for request, answer in zip(requests, long_answers, strict=False):
            assert request.output()["token_ids"] == answer[: request.params.max_tokens], turn


def test_interrupt_right_behind_a_launch(crowded: LLM, long_answers: list[list[int]]) -> None:
    """The step is queued and counted as in flight; it must not be undone and given its tokens, both."""

    class Interrupting(deque[Any]):
        left = 3

        def append(self, item: Any) -> None:
            super().append(item)
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    engine = crowded.engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_in_flight", Interrupting())
        requests = run_with_one_fault(crowded, "launch", 999, KeyboardInterrupt(), True)
    for request, answer in zip(requests, long_answers, strict=False):
        assert request.output()["token_ids"] == answer[: request.params.max_tokens]


def test_last_token_in_flight_survives_a_failing_launch(
    crowded: LLM, long_answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in one of two host buffers, which the step after the failed one must not be given."""
    engine = crowded.engine
    short, failing, later = (
        engine.make_request(prompt, GREEDY.clone(max_tokens=n, logprobs=1))
        for prompt, n in zip(PROMPTS, (3, 20, 20), strict=False)
    )
    engine.submit([short, failing])
    for _ in range(3):
        engine.step()
    launch = engine.runner.launch

    def broken(batch: Any) -> Any:
        launch(batch)
        raise RuntimeError("device on fire")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", broken)
        engine.step()  # only `failing` is in it; the third token of `short` is in flight
    engine.submit([later])
    while engine.has_unfinished:
        engine.step()
    assert failing.error is not None and short.error is None
    assert short.output()["token_ids"] == long_answers[0][:3]
    assert later.output()["token_ids"] == long_answers[2][:20]


def test_a_step_that_samples_nothing_is_waited_for(crowded: LLM) -> None:
    """Its inputs' pinned buffer is written again two steps later: chunks of a long prompt must not run ahead."""
    waits: list[bool] = []
    event = SimpleNamespace(synchronize=lambda: waits.append(True))
    step = LaunchedStep([], None, torch.empty(0, dtype=torch.int64), cast(Any, event), StepOutput([]))
    assert crowded.engine.runner.collect(step).token_ids == [] and waits == [True]


def test_request_ids_are_unique_within_a_call_too(crowded: LLM) -> None:
    """A refused call queues nothing: what is counted of it would keep the engine from overlapping steps for ever."""
    engine = crowded.engine
    request = engine.make_request(PROMPTS[0], GREEDY.clone(repetition_penalty=1.2))
    with pytest.raises(ValueError, match="is in use"):
        engine.submit([request, request])
    assert not engine.has_unfinished and engine._num_following == 0


def test_close_with_a_step_in_flight(model: str) -> None:
    with LLM(model, **SMALL, async_scheduling=True) as llm:
        request = llm.engine.make_request(PROMPTS[0], GREEDY)
        llm.engine.submit([request])
        llm.engine.step()
    assert request.output().outputs[0].finish_reason == "abort" and not llm.engine._in_flight


def test_text_that_cannot_be_made_ends_its_own_request_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may raise for an id that it lacks; the request beside it ends as ever, in the very same step."""
    requests = [llm.engine.make_request(prompt, GREEDY) for prompt in PROMPTS[:2]]
    original = Completion.flush

    def flush(self: Completion, *args: Any) -> None:
        if self is requests[0].completions[0]:
            raise TypeError("expected str instance, NoneType found")
        original(self, *args)

    monkeypatch.setattr(Completion, "flush", flush)
    llm.engine.submit(requests)
    for _ in range(200):
        if not llm.engine.has_unfinished:
            break
        llm.engine.step()
    assert all(request.finished for request in requests) and used_blocks(llm) == 0
    assert requests[0].error == "its text cannot be made: TypeError: expected str instance, NoneType found"
    assert requests[1].error is None


def test_token_budget_by_device() -> None:
    """What is given holds anywhere; otherwise a CPU takes smaller steps, but never too small for one token each."""
    assert EngineConfig("m").token_budget("cuda") == 8192 and EngineConfig("m").token_budget("cpu") == 2048
    assert EngineConfig("m", max_num_batched_tokens=300).token_budget("cpu") == 300
    assert EngineConfig("m", max_num_seqs=5000).token_budget("cpu") == 5000
    with pytest.raises(ValueError, match="max_num_seqs .256. exceeds max_num_batched_tokens .64."):
        EngineConfig("m", max_num_batched_tokens=64)

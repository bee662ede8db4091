"""`AsyncLLM` when things go wrong: ids used twice, lost wake-ups, closed event loops, an engine thread that dies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import save_model

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.async_llm import MAX_REST_S, _Subscriber

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SMALL: dict[str, Any] = dict(max_model_len=128, num_kvcache_blocks=64, max_num_batched_tokens=64, max_num_seqs=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return str(path)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


async def last(llm: AsyncLLM, request_id: str) -> Any:
    return [output async for output in llm.generate([5, 6, 7], LONG, request_id=request_id)][-1]


def test_an_id_in_use_does_not_touch_its_owner(model: str) -> None:
    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            stream = llm.generate([5, 6, 7], LONG, request_id="mine")
            await anext(stream)
            with pytest.raises(ValueError, match="'mine' is in use"):
                await last(llm, "mine")
            outputs = [output async for output in stream]
            assert outputs[-1].outputs[0].finish_reason == "length"

    run(main())


@pytest.mark.parametrize("request_id", [["mine"], 5])
def test_an_id_that_is_no_string_is_refused_and_hurts_nobody(model: str, request_id: Any) -> None:
    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            running = asyncio.create_task(last(llm, "running"))
            await asyncio.sleep(0)
            with pytest.raises(TypeError, match="request_id must be a string"):
                await llm.abort(request_id)
            with pytest.raises(TypeError, match="request_id must be a string"):
                await last(llm, request_id)
            assert (await running).outputs[0].finish_reason == "length"

    run(main())


def test_a_program_may_end_without_close(model: str) -> None:
    """A thread that the interpreter ends inside a kernel takes the process with it: "terminate called", status 134."""
    program = """
import atexit, sys
atexit.register(lambda: print(llm._thread.is_alive()))  # runs after what was registered later
from nanovllm import AsyncLLM
llm = AsyncLLM(sys.argv[1], max_model_len=128, show_progress=False)
"""
    done = subprocess.run([sys.executable, "-c", program, model], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_cancelled_before_and_while_running(model: str) -> None:
    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            tasks = [asyncio.create_task(last(llm, str(i))) for i in range(6)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            await anext(llm.generate([5], LONG))
            tasks[1].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(result, asyncio.CancelledError) for result in results] == [True] * 2 + [False] * 4
            assert {result.outputs[0].finish_reason for result in results[2:]} == {"length"}  # type: ignore[union-attr]
            assert not llm._subscribers.keys() & {"0", "1", "2", "3", "4", "5"}

    run(main())


def test_close_ends_what_runs(model: str) -> None:
    async def main() -> None:
        llm = AsyncLLM(model, **SMALL, show_progress=False)
        tasks = [asyncio.create_task(last(llm, str(i))) for i in range(12)]  # more than fit: some wait
        await asyncio.sleep(0)
        await llm.close()
        for output in await asyncio.gather(*tasks):
            assert output.finished and output.outputs[0].finish_reason == "abort"
        with pytest.raises(RuntimeError, match="closed"):
            await last(llm, "late")

    run(main())


@pytest.mark.parametrize("leave", [SystemExit, asyncio.CancelledError])
def test_a_processor_that_leaves_ends_its_own_request_only(model: str, leave: type[BaseException]) -> None:
    """`sys.exit()` in a processor is the user's mistake; the thread that it would end is everybody's."""

    def leaving(prompt: list[int], output: list[int], logits: Any) -> Any:
        raise leave("good bye")

    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            running = asyncio.create_task(last(llm, "running"))
            await asyncio.sleep(0)
            output = [output async for output in llm.generate([5], LONG.clone(logits_processors=[leaving]))][-1]
            assert output.outputs[0].finish_reason == "error"
            assert output.error == f"logits processor leaving failed: {leave.__name__}: good bye"
            assert [(await task).outputs[0].finish_reason for task in (running, last(llm, "late"))] == ["length"] * 2

    run(main())


def test_a_close_between_two_looks_is_not_lost(model: str) -> None:
    """The thread must clear its wake-up call before it looks for work, or a close in between is never seen."""

    class Racing(threading.Event):
        def clear(self) -> None:
            llm._closing = True  # what close() does, at the worst moment
            self.set()
            super().clear()

    llm = AsyncLLM(model, **SMALL, show_progress=False)
    sleeping, llm._wake = llm._wake, Racing()
    sleeping.set()
    llm._thread.join(10)
    assert not llm._thread.is_alive()


def test_nobody_waits_for_a_dead_thread(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        raise SystemError("broken")

    async def main() -> None:
        llm = AsyncLLM(model, **SMALL, show_progress=False)
        monkeypatch.setattr(llm.engine, "step", step)
        output = await last(llm, "mine")
        assert output.finished and output.outputs[0].finish_reason == "abort"
        llm._thread.join(10)
        with pytest.raises(RuntimeError, match="closed"):
            await last(llm, "late")

    monkeypatch.setattr(threading, "excepthook", lambda details: None)  # which would print the error
    run(main())


def test_an_event_loop_never_waits_for_a_step(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come, go and are aborted while the engine's lock is held; all of it happens after the step."""

    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            held = threading.Event()
            launch = llm.engine.runner.launch
            monkeypatch.setattr(llm.engine.runner, "launch", lambda batch: held.wait(30) and launch(batch))
            tasks = [asyncio.create_task(last(llm, str(i))) for i in range(4)]
            for _ in range(5):
                await asyncio.sleep(0.01)
            tasks[1].cancel()
            await llm.abort("2")
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            assert not held.is_set()
            held.set()
            assert [(await tasks[i]).outputs[0].finish_reason for i in (0, 2, 3)] == ["length", "abort", "length"]

    run(main())


def test_a_closed_event_loop_does_not_stop_the_others(model: str) -> None:
    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            loop = asyncio.new_event_loop()
            loop.close()
            request = llm.engine.make_request([5], LONG)
            request.version = 1
            llm._subscribers["gone"] = _Subscriber(request, loop, asyncio.Event())
            assert (await last(llm, "mine")).outputs[0].finish_reason == "length"
            assert llm._subscribers["gone"].published == 1

    run(main())


def test_other_work_of_a_loop_does_not_lengthen_its_rest(model: str) -> None:
    """A second that a loop spends on something else behind the news is no round of a second."""

    async def main() -> None:
        async with AsyncLLM(model, **SMALL, show_progress=False) as llm:
            llm._rest(time.monotonic() - 30.0)
            assert llm._rest_until - time.monotonic() <= MAX_REST_S

    run(main())


def test_a_busy_loop_rests_but_hears_the_first_and_the_last() -> None:
    request: Any = SimpleNamespace(version=0, finished=False)
    subscriber = _Subscriber(request, None, None)  # type: ignore[arg-type]
    heard = []
    for version, finished, rested in (
        (0, False, True), (1, False, False), (2, False, False), (3, False, True), (3, False, True), (4, False, False),
        (5, True, False), (5, True, True),
    ):  # fmt: skip
        request.version, request.finished = version, finished
        if subscriber.has_news(rested):
            heard.append(version)
    assert heard == [1, 3, 5]

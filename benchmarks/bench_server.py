"""What the HTTP server costs: tokens per second of `AsyncLLM` alone and through `nanovllm serve`'s routes.

    python benchmarks/bench_server.py                 # a device of 0.5 ms a step, played by a timer: no GPU needed
    python benchmarks/bench_server.py --shape Qwen3-0.6B    # on a GPU, with random weights of a published shape

The server runs in a process of its own; the client here reads raw sockets, so that it costs next to nothing. With the
played device everything but the forward pass is real: scheduler, text, streams, HTTP. Prints a table, writes no file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from harness.models import SHAPES, write_config
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from nanovllm import AsyncLLM, SamplingParams
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import StepOutput
from nanovllm.loader.tokenizer import Tokenizer


class PlayedDevice:
    """Stands for the model runner's two halves: a step takes `seconds`, counted from the end of the one before."""

    def __init__(self, seconds: float, token_id: int) -> None:
        self.seconds, self.token_id, self.busy_until = seconds, token_id, 0.0

    def launch(self, batch: ScheduledBatch) -> Any:
        """Queue a step: when it ends, and how many tokens it samples."""
        self.busy_until = max(self.busy_until, time.perf_counter()) + self.seconds
        return self.busy_until, batch.num_samples

    def collect(self, launched: Any) -> StepOutput:
        """Wait for it. Sleeping gives the GIL away, as waiting for a GPU does."""
        end, samples = launched
        time.sleep(max(0.0, end - time.perf_counter() - 60e-6))  # a sleep takes about 60 us longer than asked
        while time.perf_counter() < end:
            time.sleep(0)
        return StepOutput([self.token_id] * samples)


def letters() -> Tokenizer:
    """Every token id is a letter: text for models without a tokenizer, a character a token."""
    backend = Backend(models.BPE({chr(97 + i): i for i in range(26)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {})
    tokenizer.id_to_token = lambda token_id: chr(97 + token_id % 26)  # type: ignore[method-assign]
    return tokenizer


def load(shape: str | None, step_ms: float) -> AsyncLLM:
    """The engine to measure."""
    if shape is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_config(shape, Path(folder))
            llm = AsyncLLM(str(path), load_format="dummy", max_model_len=4096, show_progress=False)
        llm.engine.tokenizer = letters()
        return llm
    llm = AsyncLLM("smollm2", max_model_len=4096, kv_cache_memory_bytes=1 << 28, async_scheduling=True,
                   show_progress=False)  # fmt: skip
    device = PlayedDevice(step_ms / 1e3, llm.engine.require_tokenizer().encode(" hello")[0])
    llm.engine.scheduler.block_manager = BlockManager(1 << 16, 32)  # blocks that nobody fills cost nothing
    llm.engine.runner.launch = device.launch  # type: ignore[method-assign,assignment]
    llm.engine.runner.collect = device.collect  # type: ignore[method-assign]
    return llm


def serve(shape: str | None, step_ms: float, switch_ms: float, connection: Any) -> None:
    """The child process: measure the engine alone whenever asked, else answer HTTP."""
    from nanovllm.server.app import Service, create_app
    from nanovllm.server.run import address, listen
    from nanovllm.server.run import serve as answer

    sys.setswitchinterval(switch_ms / 1e3)
    llm = load(shape, step_ms)
    for streams, tokens in iter(connection.recv, None):
        connection.send((asyncio.run(unwatched(llm, streams, tokens)), asyncio.run(watched(llm, streams, tokens))))
    service, sock = Service("model"), listen("127.0.0.1", 0)
    connection.send(address(sock))
    answer(service, create_app(service), sock, lambda: llm, 1, lambda text: None)


async def unwatched(llm: AsyncLLM, streams: int, tokens: int) -> float:
    """Tokens per second of requests whose end is all that is awaited: what the engine can do."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [llm.engine.make_request([1, i + 5], params) for i in range(streams)]
    async for _ in llm.follow(requests, only_end=True):
        pass
    first = min(request.first_token_time or 0.0 for request in requests)
    return streams * (tokens - 1) / (max(request.finished_time or 0.0 for request in requests) - first)


async def watched(llm: AsyncLLM, streams: int, tokens: int) -> float:
    """Tokens per second of `AsyncLLM.generate`, between the first and the last."""

    async def one(i: int) -> tuple[float, float]:
        params, first = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), 0.0
        async for _ in llm.generate([1, i + 5], params):
            first = first or time.perf_counter()
        return first, time.perf_counter()

    times = await asyncio.gather(*(one(i) for i in range(streams)))
    return streams * (tokens - 1) / (max(last for _, last in times) - min(first for first, _ in times))


async def through_http(url: str, streams: int, tokens: int) -> tuple[float, float]:
    """(tokens per second, tokens per chunk) of streamed completions."""
    host, port = url.removeprefix("http://").split(":")

    async def one(i: int) -> tuple[float, float, int]:
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"prompt": [1, i + 5], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                           "stream": True}).encode()  # fmt: skip
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        first, chunks, tail = 0.0, 0, b""
        while b"[DONE]" not in tail:
            data = await reader.read(1 << 16)
            chunks += data.count(b'"finish_reason":null')
            first = first or (time.perf_counter() if b'"finish_reason":null' in data else 0.0)
            tail = data
        writer.close()
        return first, time.perf_counter(), chunks

    times = await asyncio.gather(*(one(i) for i in range(streams)))
    seconds = max(last for _, last, _ in times) - min(first for first, _, _ in times)
    return streams * (tokens - 1) / seconds, streams * tokens / max(1, sum(chunks for _, _, chunks in times))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="a real device and this shape")
    parser.add_argument("--step-ms", type=float, default=0.5, help="a step of the played device (default: 0.5)")
    parser.add_argument(
        "--switch-ms", type=float, default=0.1, help="Python's thread switch interval (default: 0.1, as serve)"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(args.shape, args.step_ms, args.switch_ms, theirs), daemon=True)
    child.start()
    theirs.close()  # so that its end is noticed
    engine: deque[tuple[float, float]] = deque()
    for streams in args.streams:
        ours.send((streams, args.tokens))
        engine.append(ours.recv())
    ours.send(None)
    url = ours.recv()
    time.sleep(0.5)
    print("streams   unwatched  AsyncLLM.generate    HTTP stream   tokens a chunk")
    for streams in args.streams:
        rate, size = asyncio.run(through_http(url, streams, args.tokens))
        most, bare = engine.popleft()
        print(f"{streams:7} {most:7.0f} t/s {bare:14.0f} t/s {rate:10.0f} t/s {size:16.2f}", flush=True)
    child.terminate()
    child.join()


if __name__ == "__main__":
    main()

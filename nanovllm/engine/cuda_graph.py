"""Steps as CUDA graphs: some 300 launches at 7 to 40 µs each become one launch of 4 µs.

A graph is recorded once per size over buffers that never move; a step fills the buffers and replays the smallest graph
that holds it.

Decodes: sizes 1 to 16 are exact, since that is where padding would show; then steps of 8. A graph is also recorded for
a longest context, for which attention chooses its grid. Fused sizes get a second one for short contexts, where a layer
is a matter of latency and the grid has room for fewer splits: `launch_config.rope_attention_config` says for how many.

Steps with prefill: at 2,048 tokens the host took 13.6 ms to launch a step that keeps the device busy for 5 (H100,
Qwen3-0.6B, Nsight Systems); at 4,096 the first token comes after 14.5 ms instead of 15.6. A graph's size is the tokens
and the sequences that it has room for. Decodes in such a step are chunks of one token.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from nanovllm.kernels.compile_ahead import compile_together

SHORT_CONTEXT = 512
Key = tuple[int, int]  # (rows, longest context), or (tokens, sequences)
CHUNK_SIZES = {  # tokens, by sequences
    1: (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    16: (64, 128, 256, 512, 1024, 2048),
    64: (128, 256, 512, 1024, 2048),
}
# Of the decodes among chunks: the longest context, whose keys one program reads, and all contexts together, which the
# kernel for decodes should read faster. Beyond, such a step is launched one by one. Estimates: to tune.
MAX_DECODE_CONTEXT, MAX_DECODE_KEYS = 8192, 65_536


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record: 1, 2, …, 16, 24, 32, … and `max_num_seqs` itself."""
    return sorted({*range(1, min(16, max_num_seqs) + 1), *range(24, max_num_seqs + 1, 8), max_num_seqs})


def chunk_sizes(max_tokens: int, max_seqs: int, max_len: int) -> list[Key]:
    """`CHUNK_SIZES` cut to what a step can have: up to `max_tokens`, of up to `max_seqs` sequences of `max_len`."""
    found = set()
    for room, sizes in CHUNK_SIZES.items():
        seqs = min(room, max_seqs)
        found |= {(min(tokens, max_tokens, seqs * max_len), seqs) for tokens in sizes}
    return sorted(found)


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all engines: cuBLAS keeps a workspace of 32 MiB for every stream that it was ever used on.

    So their graphs share a workspace, and must not run at the same time; none do, for all are launched on one stream.
    """
    return torch.cuda.Stream(device)


class _Memory:
    """Memory of a CUDA tensor, of which `torch.as_tensor` makes another one that does not own it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": f"<i{tensor.itemsize}",  # the protocol knows no bfloat16, so bits are passed on
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, dtype and strides; the allocator may give it away all the same."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


class _Graphs:
    """Recorded forward passes by key. `forward(*key)` runs on the fixed buffers and returns logits."""

    def __init__(self, forward: Callable[[int, int], torch.Tensor], keys: list[Key]) -> None:
        self._forward = forward
        self._keys = keys
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._logits: dict[Key, torch.Tensor] = {}

    def run_all(self) -> None:
        """The forward passes of all keys, without recording them; the smallest first, whose kernels compile longest."""
        for key in reversed(self._keys):
            self._forward(*key)

    def capture(self, what: str, show_progress: bool, pool: Any = None) -> Any:
        """Record all of them, in the order of the keys: the largest first, so that the others fit into its memory pool.

        Returns the pool, which may be `pool`: graphs that never run at the same time can share one. Their logits share
        it too: kept apart, those of up to 256 rows of 152k tokens would take 1.3 GB.
        `torch.cuda.graph` would collect garbage and empty the allocator's cache before every single one.
        """
        gc.collect()
        stream = _recording_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for key in tqdm(
                self._keys, desc=f"Capturing CUDA graphs of {what}", disable=not show_progress, leave=False
            ):
                # Compiles kernels and fills the caches that a recording must not touch.
                compile_together(functools.partial(self._forward, *key), self.run_all, show_progress)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(*([pool] if pool is not None else []))
                try:
                    self._logits[key] = self._forward(*key)
                finally:
                    graph.capture_end()
                self._logits[key] = _unowned(self._logits[key])
                pool = graph.pool() if pool is None else pool
                self._graphs[key] = graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return pool

    def _run(self, key: Key) -> torch.Tensor:
        """Replay a graph. Its logits stay valid until the next replay of any graph that shares its pool."""
        self._graphs[key].replay()
        return self._logits[key]


class ChunkGraphs(_Graphs):
    """Steps with prefill: a graph for each of `chunk_sizes`. Logits [sequences, vocab]."""

    def __init__(self, forward: Callable[[int, int], torch.Tensor], sizes: list[Key]) -> None:
        super().__init__(forward, sorted(sizes, reverse=True))

    def key_for(self, num_tokens: int, num_seqs: int, decode_contexts: Sequence[int]) -> Key | None:
        """The smallest graph with room for a step; None if it is better launched operation by operation."""
        if max(decode_contexts, default=0) > MAX_DECODE_CONTEXT or sum(decode_contexts) > MAX_DECODE_KEYS:
            return None
        room = [key for key in self._keys if key[0] >= num_tokens and key[1] >= num_seqs]
        return min(room, default=None)

    def replay(self, key: Key) -> torch.Tensor:
        """Run the graph of `key`."""
        return self._run(key)


class DecodeGraphs(_Graphs):
    """One recorded graph per batch size and context range.

    `forward(size, max_context)` runs a whole decode step on the fixed buffers; it returns logits [size, vocab] and
    leaves the sampled tokens where the caller wants them. Sizes up to `short_rows` are recorded for short contexts too.
    """

    def __init__(
        self, forward: Callable[[int, int], torch.Tensor], sizes: list[int], max_context: int, short_rows: int
    ) -> None:
        self._sizes = sizes
        self._max_context = max_context
        self._short_rows = short_rows if max_context > SHORT_CONTEXT else 0
        keys = [(size, max_context) for size in sizes[::-1]]
        keys += [(size, SHORT_CONTEXT) for size in sizes[::-1] if size <= self._short_rows]
        super().__init__(forward, keys)

    def size_for(self, num_seqs: int) -> int:
        """The smallest recorded size that holds `num_seqs` rows."""
        return next(size for size in self._sizes if size >= num_seqs)

    def context_for(self, size: int, max_context: int) -> int:
        """The longest context of the graph that a step of `size` rows takes, none of them longer than `max_context`."""
        short = size <= self._short_rows and max_context <= SHORT_CONTEXT
        return SHORT_CONTEXT if short else self._max_context

    def replay(self, size: int, max_context: int) -> torch.Tensor:
        """Run the graph of `size` rows, none of a longer context."""
        return self._run((size, self.context_for(size, max_context)))

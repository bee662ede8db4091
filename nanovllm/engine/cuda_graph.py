"""Decode steps as CUDA graphs: a step of some 300 launches at 7 µs each becomes one launch of 4 µs.

A graph is recorded once per batch size over buffers that never move; a step fills the buffers and replays the
smallest graph that holds it. Sizes 1 to 16 are exact, since that is where padding would show; then steps of 8.

A graph is also recorded for a longest context, for which attention chooses its grid. Fused sizes get a second one for
short contexts, where a layer is a matter of latency and keys are split no further than they reach:
`launch_config.rope_attention_config` says into how many.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

SHORT_CONTEXT = 512
Key = tuple[int, int]  # (rows, longest context)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record: 1, 2, …, 16, 24, 32, … and `max_num_seqs` itself."""
    return sorted({*range(1, min(16, max_num_seqs) + 1), *range(24, max_num_seqs + 1, 8), max_num_seqs})


class DecodeGraphs:
    """One recorded graph per batch size and context range.

    `forward(size, max_context)` runs a whole decode step on the fixed buffers; it returns logits [size, vocab] and
    leaves the sampled tokens where the caller wants them. Sizes up to `short_rows` are recorded for short contexts too.
    """

    def __init__(
        self, forward: Callable[[int, int], torch.Tensor], sizes: list[int], max_context: int, short_rows: int
    ) -> None:
        self._forward = forward
        self._sizes = sizes
        self._max_context = max_context
        self._short_rows = short_rows if max_context > SHORT_CONTEXT else 0
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._logits: dict[Key, torch.Tensor] = {}

    def capture(self, show_progress: bool) -> None:
        """Record all of them, the largest first so that the smaller ones fit into its memory pool.

        `torch.cuda.graph` would collect garbage and empty the allocator's cache before every single one.
        """
        keys = [(size, self._max_context) for size in self._sizes[::-1]]
        keys += [(size, SHORT_CONTEXT) for size in self._sizes[::-1] if size <= self._short_rows]
        pool: Any = None
        gc.collect()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for key in tqdm(keys, desc="Capturing CUDA graphs", disable=not show_progress, leave=False):
                self._forward(*key)  # compiles kernels and fills the caches that a recording must not touch
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(*([pool] if pool is not None else []))
                try:
                    self._logits[key] = self._forward(*key)
                finally:
                    graph.capture_end()
                pool = graph.pool() if pool is None else pool
                self._graphs[key] = graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def size_for(self, num_seqs: int) -> int:
        """The smallest recorded size that holds `num_seqs` rows."""
        return next(size for size in self._sizes if size >= num_seqs)

    def context_for(self, size: int, max_context: int) -> int:
        """The longest context of the graph that a step of `size` rows takes, none of them longer than `max_context`."""
        short = size <= self._short_rows and max_context <= SHORT_CONTEXT
        return SHORT_CONTEXT if short else self._max_context

    def replay(self, size: int, max_context: int) -> torch.Tensor:
        """Run the graph of `size` rows, none of a longer context; its logits stay valid until the next replay."""
        key = (size, self.context_for(size, max_context))
        self._graphs[key].replay()
        return self._logits[key]

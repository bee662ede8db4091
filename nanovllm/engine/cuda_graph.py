"""Decode steps as CUDA graphs: a step of some 300 launches at 7 µs each becomes one launch of 4 µs.

A graph is recorded once per batch size over buffers that never move; a step fills the buffers and replays the
smallest graph that holds it. Sizes 1 to 16 are exact, since that is where padding would show; then steps of 8.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record: 1, 2, …, 16, 24, 32, … and `max_num_seqs` itself."""
    return sorted({*range(1, min(16, max_num_seqs) + 1), *range(24, max_num_seqs + 1, 8), max_num_seqs})


class DecodeGraphs:
    """One recorded graph per batch size.

    `forward(size)` runs a whole decode step on the fixed buffers; it returns logits [size, vocab] and leaves the
    sampled tokens where the caller wants them.
    """

    def __init__(self, forward: Callable[[int], torch.Tensor], sizes: list[int]) -> None:
        self._forward = forward
        self._sizes = sizes
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}

    def capture(self, show_progress: bool) -> None:
        """Record all sizes, the largest first so that the smaller ones fit into its memory pool.

        `torch.cuda.graph` would collect garbage and empty the allocator's cache before every single one.
        """
        pool: Any = None
        gc.collect()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in tqdm(self._sizes[::-1], desc="Capturing CUDA graphs", disable=not show_progress, leave=False):
                self._forward(size)  # compiles kernels and fills the caches that a recording must not touch
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(*([pool] if pool is not None else []))
                try:
                    self._logits[size] = self._forward(size)
                finally:
                    graph.capture_end()
                pool = graph.pool() if pool is None else pool
                self._graphs[size] = graph
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def size_for(self, num_seqs: int) -> int:
        """The smallest recorded size that holds `num_seqs` rows."""
        return next(size for size in self._sizes if size >= num_seqs)

    def replay(self, size: int) -> torch.Tensor:
        """Run the graph; its logits [size, vocab] stay valid until the next replay."""
        self._graphs[size].replay()
        return self._logits[size]

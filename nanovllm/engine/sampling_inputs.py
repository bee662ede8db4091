"""Sampling parameters at fixed addresses, so that a decode graph can end with the sampled token.

A row of the graph reads temperature, seed and cuts from here at each replay. The host writes them when the batch has
changed, which in a run of decode steps is seldom. Rows whose logits must be changed first (penalties, biases, Python
processors) are sampled outside the graph, from its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nanovllm.engine.staging import Staging
from nanovllm.kernels.sample_cut import RowParams
from nanovllm.layers.sampling_batch import SamplingRow


class SamplingInputs:
    """Owns the host and device buffers; `positions` [max_num_seqs] int64 belong to the input builder."""

    def __init__(self, max_num_seqs: int, positions: torch.Tensor, device: torch.device) -> None:
        self._staging = Staging(max_num_seqs * 32 + 256, device)
        rows = (max_num_seqs,)
        dtypes = [np.float32, np.int64, np.int32, np.float32, np.float32]
        sections = self._staging.reserve([(rows, np.dtype(dtype)) for dtype in dtypes])
        self._temperature, self._seeds, self._top_k, self._top_p, self._min_p = sections
        self._positions = positions
        self._end = sections[-1].end
        self._rows: tuple[SamplingRow, ...] | None = None

    def fill(self, rows: Sequence[SamplingRow]) -> bool:
        """Send the parameters of `rows`; False, and nothing is sent, if some must be sampled outside the graph."""
        if self._rows == tuple(rows):
            return True
        if any(row.params.changes_logits for row in rows):
            return False
        self._rows = None  # until all of it is sent
        n = len(rows)
        params = [row.params for row in rows]
        self._temperature.host[:n] = [p.temperature for p in params]
        self._seeds.host[:n] = np.array([row.seed % 2**64 for row in rows], np.uint64).view(np.int64)
        self._top_k.host[:n] = [min(p.top_k, 2**31 - 1) for p in params]
        self._top_p.host[:n] = [p.top_p for p in params]
        self._min_p.host[:n] = [p.min_p for p in params]
        # Padding rows are greedy.
        self._temperature.host[n:] = 0.0
        self._staging.copy(self._end)
        self._rows = tuple(rows)
        return True

    def view(self, size: int) -> RowParams:
        """The first `size` rows."""
        return RowParams(
            temperature=self._temperature.device[:size],
            seeds=self._seeds.device[:size],
            positions=self._positions[:size],
            top_k=self._top_k.device[:size],
            top_p=self._top_p.device[:size],
            min_p=self._min_p.device[:size],
        )

"""From a `ScheduledBatch` (plain Python) to a `ForwardBatch` (tensors), in one packed transfer to the device a step.

Decode-only steps use buffers at fixed addresses, which is what lets a CUDA graph replay them; the graph fetches what
goes into them. Their block table is kept between steps and only new blocks are written. Steps with prefill chunks are
packed to their exact size, or to that of a graph, whose arrays lie at the same addresses each time.

A token that a step in flight samples is named by the row where it will be (`kernels.feed`); `feed` puts it in place.
"""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.engine.batch import ScheduledBatch, ScheduledSequence
from nanovllm.engine.staging import IN_FLIGHT, Section, Staging
from nanovllm.kernels.feed import feed_tokens_
from nanovllm.kernels.fetch import fetch_step_
from nanovllm.kernels.sample import TokenSink
from nanovllm.layers.attention.backend import AttentionMetadata
from nanovllm.layers.forward_batch import ForwardBatch

_I64, _I32 = np.dtype(np.int64), np.dtype(np.int32)


def staging_bytes(rows: int, tokens: int, max_model_len: int, block_size: int) -> tuple[int, int]:
    """Capacities of the two stagings, of any step and of decodes, for `rows` sequences and `tokens` tokens a step."""
    table = rows * -(-max_model_len // block_size) * 4
    return tokens * 24 + rows * 24 + table + 256, rows * 32 + table + 256


class InputBuilder:
    """Owns the host and device buffers of the inputs; allocates nothing on the device after construction."""

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size, self.max_model_len, self.device = block_size, max_model_len, device
        self.max_blocks = -(-max_model_len // block_size)
        rows = max_num_seqs
        mixed_bytes, decode_bytes = staging_bytes(rows, max_num_batched_tokens, max_model_len, block_size)
        self.mixed = Staging(mixed_bytes, device)
        self._chunks: dict[tuple[int, int], list[Section]] = {}  # by size
        self.decode = Staging(decode_bytes, device)
        self._numbers, self._context_lens, self._table = self.decode.reserve(
            [((3, rows), _I64), ((rows,), _I32), ((rows, self.max_blocks), _I32)]
        )
        # The host's side of the numbers; on the device: rows of `_numbers.device`.
        self._ids, self._positions, self._slots = self._numbers.host
        # Until a step says otherwise, nothing is stored.
        self._slots.fill(-1)
        self._numbers.device[2].fill_(-1)
        self._numbers.slots[:, 2].fill_(-1)
        # Which slot the next graph fetches, and which one the running graph has fetched (`kernels.fetch`).
        self._turn = torch.zeros(2, dtype=torch.int64, device=device)
        self._num_published = 0
        self._query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        # Which sequence's blocks each row of the decode table holds, and how many of them.
        self._row_owner: list[tuple[int, int] | None] = [None] * rows
        self._row_blocks = [0] * rows
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=device)  # by the last step, in batch order
        self._sampled_row: dict[int, int] = {}  # by seq_id

    # -- decode-only steps -------------------------------------------------------------------------------------------

    def build_decode(self, batch: ScheduledBatch, padded: int) -> ForwardBatch:
        """Inputs of a decode-only step, padded to `padded` rows, in the host's half of the fixed buffers.

        They reach the device by `send`, or by `publish` and a graph that begins with `fetch`.
        Padding rows have context length 0 and slot -1: attention and the KV store skip them.
        """
        items, n = batch.scheduled, len(batch.scheduled)
        positions = np.fromiter((item.start for item in items), _I64, n)
        self._ids[:n] = [self._token(item) for item in items]
        self._positions[:n] = positions
        self._context_lens.host[:n] = positions + 1
        for row, item in enumerate(items):
            self._update_table_row(row, item)
        block_index, offset = np.divmod(positions, self.block_size)
        self._slots[:n] = self._table.host[np.arange(n), block_index].astype(_I64) * self.block_size + offset
        if padded > n:
            self._ids[n:padded] = 0
            self._positions[n:padded] = 0
            self._slots[n:padded] = -1
            self._context_lens.host[n:padded] = 0
        return self.decode_view(padded, [item.context_len for item in items])

    def send(self, rows: int) -> None:
        """Copy what `build_decode` made to the device."""
        self.decode.copy(self._table.end_of_rows(rows))

    def publish(self, rows: int) -> int:
        """Leave what `build_decode` made to the graph that is launched next, which must begin with `fetch`.

        Returns the slot, which is also where that graph leaves its tokens (`sink`).
        """
        slot = self._num_published % IN_FLIGHT
        self.decode.publish(slot, self._table.end_of_rows(rows))
        return slot

    def launched(self) -> None:
        """The graph for which inputs were published is under way: it advances the device's turn, this the host's."""
        self._num_published += 1

    def agree(self) -> None:
        """Make the device's turn the host's, whatever has been run meanwhile: see `ModelRunner.drain`."""
        self._turn.fill_(self._num_published % IN_FLIGHT)

    def fetch(self, rows: int, max_context: int) -> None:
        """Bring the published inputs of `rows` rows, none of a longer context, into the fixed buffers."""
        numbers, lengths, table = self._numbers, self._context_lens, self._table
        fetch_step_(
            self._turn,
            (numbers.slots, lengths.slots, table.slots),
            (numbers.device, lengths.device, table.device),
            rows,
            min(-(-max_context // self.block_size), self.max_blocks),
        )

    def decode_view(self, size: int, lengths: list[int]) -> ForwardBatch:
        """The fixed buffers as a decode batch of `size` rows; `lengths`: context lengths, or bounds on them."""
        metadata = AttentionMetadata(
            num_decodes=size,
            query_start=self._query_start[: size + 1],
            context_lens=self._context_lens.device[:size],
            block_table=self._table.device[:size],
            slot_mapping=self._numbers.device[2, :size],
            max_query_len=0,
            max_context_len=max(lengths),
            query_lens_cpu=[1] * size,
            context_lens_cpu=lengths,
        )
        ids, positions = self._numbers.device[0, :size], self.positions[:size]
        return ForwardBatch(ids, positions, metadata, logits_rows=None, sampled=self._sampled)

    def _update_table_row(self, row: int, item: ScheduledSequence) -> None:
        owner, blocks = (item.seq.seq_id, item.seq.num_preemptions), item.block_table
        have = self._row_blocks[row] if self._row_owner[row] == owner else 0
        if have < len(blocks):
            self._row_owner[row] = None  # an interrupt leaves a row that is written anew
            self._table.host[row, have : len(blocks)] = blocks[have:]
            self._row_blocks[row] = len(blocks)
            self._row_owner[row] = owner

    # -- tokens in flight --------------------------------------------------------------------------------------------

    def sampled(self, rows: int) -> torch.Tensor:
        """Where a step leaves its tokens: int64 [rows] on the device, the same memory for every step."""
        return self._sampled[:rows]

    def sink(self, rows: int, echo: torch.Tensor) -> TokenSink:
        """`sampled(rows)`, and that row of the pinned `echo` [slots, rows] whose turn it is."""
        return TokenSink(self.sampled(rows), echo, self._turn)

    def remember_sampled(self, seq_ids: list[int]) -> None:
        """Row r of the tokens that are being sampled belongs to seq_ids[r]."""
        self._sampled_row = {seq_id: row for row, seq_id in enumerate(seq_ids)}

    def feed(self, input_ids: torch.Tensor) -> None:
        """Put the tokens of the step before into `input_ids`, on the device."""
        feed_tokens_(input_ids, self._sampled)

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the decode buffers' rows, int64 [max_num_seqs] on the device."""
        return self._numbers.device[1]

    def _token(self, item: ScheduledSequence) -> int:
        """The token that a decode runs, or where it will be."""
        known = item.seq.token_ids
        return known[item.start] if item.start < len(known) else -1 - self._sampled_row[item.seq.seq_id]

    # -- steps with prefill ------------------------------------------------------------------------------------------

    def build(
        self, batch: ScheduledBatch, prompt_lens: bool = False, size: tuple[int, int] | None = None
    ) -> ForwardBatch:
        """Inputs of any step. `prompt_lens`: also what dynamic NTK needs.

        They are packed to their exact size, or padded to `size` (tokens, sequences) and then where `chunk_view` of it
        expects them. Padding tokens have slot -1 and belong to nobody; padding sequences are empty.
        """
        items, b, t = batch.scheduled, len(batch.scheduled), batch.num_tokens
        width = max(len(item.block_table) for item in items)
        sections = self._chunk_sections(size) if size else self._mixed_sections(t, b, batch.num_samples, width)
        ids, positions, slots, rows, query_start, context_lens, table = (section.host for section in sections)
        query_lens = [item.num_tokens for item in items]
        query_start[0] = 0
        np.cumsum(query_lens, out=query_start[1 : b + 1])
        context_lens[:b] = [item.context_len for item in items]
        table[:b, :width] = 0
        for i, item in enumerate(items):
            span = slice(query_start[i], query_start[i + 1])
            ids[span] = item.token_ids if item.start < item.seq.num_tokens else self._token(item)
            positions[span] = np.arange(item.start, item.context_len)
            slots[span] = item.slots(self.block_size)
            table[i, : len(item.block_table)] = item.block_table
        rows[: batch.num_samples] = [query_start[i + 1] - 1 for i, item in enumerate(items) if item.samples]
        ids[t:], positions[t:], slots[t:], rows[batch.num_samples :] = 0, 0, -1, 0
        query_start[b + 1 :], context_lens[b:] = t, 0
        self.mixed.copy(sections[-1].end)
        if size is not None:
            return self.chunk_view(*size)
        lengths = [item.context_len for item in items]
        ids_d, positions_d, slots_d, rows_d, query_start_d, context_lens_d, table_d = (s.device for s in sections)
        metadata = AttentionMetadata(
            num_decodes=batch.num_decodes,
            query_start=query_start_d,
            context_lens=context_lens_d,
            block_table=table_d,
            slot_mapping=slots_d,
            max_query_len=max(query_lens[batch.num_decodes :], default=0),
            max_context_len=max(lengths),
            query_lens_cpu=query_lens,
            context_lens_cpu=lengths,
        )
        return ForwardBatch(
            ids_d, positions_d, metadata, rows_d, self._prompt_lens(items, query_lens) if prompt_lens else None
        )

    def chunk_view(self, tokens: int, seqs: int) -> ForwardBatch:
        """Where `build` leaves a step of this size: the same memory each time."""
        sections = self._chunk_sections((tokens, seqs))
        ids, positions, slots, rows, query_start, context_lens, table = (section.device for section in sections)
        metadata = AttentionMetadata(
            num_decodes=0,
            query_start=query_start,
            context_lens=context_lens,
            block_table=table,
            slot_mapping=slots,
            max_query_len=tokens,
            max_context_len=self.max_model_len,
            query_lens_cpu=[tokens] + [0] * (seqs - 1),
            context_lens_cpu=[self.max_model_len] * seqs,
        )
        return ForwardBatch(ids, positions, metadata, rows)

    def _chunk_sections(self, size: tuple[int, int]) -> list[Section]:
        """`_mixed_sections` of a graph's size (tokens, sequences), made once."""
        if size not in self._chunks:
            self._chunks[size] = self._mixed_sections(size[0], size[1], size[1], self.max_blocks)
        return self._chunks[size]

    def _mixed_sections(self, tokens: int, seqs: int, samples: int, width: int) -> list[Section]:
        """Token ids, positions, slots, rows of logits, query starts, context lengths, block table."""
        return self.mixed.reserve(
            [((tokens,), _I64)] * 3 + [((samples,), _I64), ((seqs + 1,), _I32), ((seqs,), _I32), ((seqs, width), _I32)]
        )

    def _prompt_lens(self, items: tuple[ScheduledSequence, ...], query_lens: list[int]) -> torch.Tensor:
        lens = np.repeat([item.seq.num_prompt_tokens for item in items], query_lens)
        return torch.from_numpy(lens).to(self.device)

"""A model without numbers, for tests of the scheduler: its KV cache remembers *which text* each slot holds.

The KV of a token depends on every token before it, so a slot stands for a whole prefix. `FakeModel` stores a
fingerprint of that prefix, and checks each slot that a query would read. A wrongly shared block, a block nobody has
written, a lost, repeated or misplaced token: all end in a fingerprint that does not match.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter

from nanovllm.engine.batch import ScheduledBatch, ScheduledSequence
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus

VOCAB = 48
EOS = frozenset({0, 1})
STOP = 2
GARBAGE = -1


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 1024,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
    return Scheduler(max_num_seqs, max_num_batched_tokens, max_model_len, manager)


def make_seq(seq_id: int, prompt: list[int] | int, **rules) -> Sequence:
    """A sequence with the given prompt, or with that many distinct tokens; runs to `max_tokens` unless told."""
    tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    return Sequence(seq_id, f"request-{seq_id}", tokens, **{"max_tokens": 16, **rules})


def next_token(token_ids: list[int]) -> int:
    """The fake model's answer: a function of the whole text."""
    return zlib.crc32(array("q", token_ids).tobytes()) % VOCAB


def expected_answer(seq: Sequence, max_model_len: int, capacity: int) -> tuple[list[int], str, int | None]:
    """Output, finish_reason and stop_reason of `seq` served alone on an endless machine. Written without the engine."""
    output: list[int] = []
    while True:
        token = next_token(seq.prompt_token_ids + output)
        output.append(token)
        if len(output) >= seq.min_tokens:
            if token in seq.eos_token_ids and not seq.ignore_eos:
                return output, "stop", None
            if token in seq.stop_token_ids:
                return output, "stop", token
        total = len(seq.prompt_token_ids) + len(output)
        if len(output) == seq.max_tokens or total == max_model_len or total == capacity + 1:
            return output, "length", None


def fingerprints(seq: Sequence) -> list[int]:
    """Entry p stands for the text up to and including position p, under the sequence's salt."""
    value, prints = zlib.crc32(seq.cache_salt), []
    for token in seq.token_ids:
        value = hash((value, token))
        prints.append(value)
    return prints


class FakeModel:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[int, int] = {}  # slot -> fingerprint

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Run a step as a layer does: store everything, then attend. Returns one token for each that samples."""
        assert all(item.is_decode for item in batch.scheduled[: batch.num_decodes])
        for item in batch.scheduled[: batch.num_decodes]:
            assert item.num_tokens == 1 and item.samples
            assert not self.is_lost(item) or item.seq.is_finished
            self.read(item, item.start)  # a decode needs nothing that this step stores for others
        slots = self.store(batch)
        assert len(set(slots)) == len(slots), "two tokens of one step share a slot"
        for item in batch.scheduled:
            self.read(item, item.context_len)
        return [next_token(i.seq.token_ids[: i.context_len]) for i in batch.scheduled if i.samples]

    @staticmethod
    def is_lost(item: ScheduledSequence) -> bool:
        """Whether the sequence was ended while its token was in flight: what is run for it is never looked at."""
        return item.context_len > item.seq.num_tokens

    def store(self, batch: ScheduledBatch, garbage: bool = False) -> list[int]:
        written = []
        for item in batch.scheduled:
            prints = fingerprints(item.seq)
            for position, slot in zip(range(item.start, item.context_len), item.slots(self.block_size), strict=True):
                if slot >= 0:
                    self.kv[slot] = GARBAGE if garbage or self.is_lost(item) else prints[position]
                    written.append(slot)
        return written

    def read(self, item: ScheduledSequence, context_len: int) -> None:
        prints = fingerprints(item.seq)
        for position in range(0 if self.is_lost(item) else context_len):
            index, offset = divmod(position, self.block_size)
            slot = item.block_table[index] * self.block_size + offset
            assert self.kv.get(slot) == prints[position], f"{item.seq.request_id}: wrong KV at position {position}"


def run_step(scheduler: Scheduler, model: FakeModel) -> ScheduledBatch:
    batch = scheduler.schedule()
    scheduler.update(batch, model.run(batch))
    check_invariants(scheduler)
    return batch


def answer(scheduler: Scheduler, token: int = 9) -> list[int]:
    """One step without a model: every sampled token is `token`. Returns the chunk sizes in batch order."""
    batch = scheduler.schedule()
    scheduler.update(batch, [token] * batch.num_samples)
    check_invariants(scheduler)
    return [item.num_tokens for item in batch.scheduled]


def run_all(scheduler: Scheduler, model: FakeModel, max_steps: int = 10_000) -> list[ScheduledBatch]:
    batches = []
    while scheduler.has_unfinished:
        batches.append(run_step(scheduler, model))
        assert not batches[-1].is_empty, "an idle step with work left"
        assert len(batches) < max_steps, "livelock"
    return batches


def check_invariants(scheduler: Scheduler) -> None:
    """What must hold between any two calls."""
    manager = scheduler.block_manager
    tables = [seq.block_table for seq in scheduler.running]
    refs = Counter(block for table in tables for block in table)
    assert all(len(set(table)) == len(table) for table in tables)
    assert [refs[b] for b in range(manager.num_blocks)] == manager._ref_counts  # in two tables only if shared
    assert set(manager._free) == set(range(manager.num_blocks)) - set(refs)  # free + used = total
    shared = [(b, i) for table in tables for i, b in enumerate(table) if refs[b] > 1]
    assert len(set(shared)) == len({b for b, _ in shared}), "a shared block at two places"
    assert {b: d for b, d in enumerate(manager._digests) if d} == {b: d for d, b in manager._block_of.items()}

    waiting = list(scheduler.waiting.values())
    arrivals = [seq.arrival for seq in scheduler.running + waiting]
    assert arrivals == sorted(arrivals), "somebody jumped the queue"
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert all(seq.status is SequenceStatus.RUNNING for seq in scheduler.running)
    assert all(seq.status is SequenceStatus.WAITING and not seq.block_table for seq in waiting)
    assert all(seq.num_computed_tokens == 0 for seq in waiting)
    for seq in scheduler.running:
        assert len(seq.block_table) * manager.block_size >= seq.num_computed_tokens
        assert seq.token_ids == seq.prompt_token_ids + seq.output_token_ids and seq.num_tokens == len(seq.token_ids)


def check_batch(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """What must hold of a batch just scheduled."""
    assert batch.num_tokens == sum(item.num_tokens for item in batch.scheduled) <= scheduler.max_num_batched_tokens
    assert batch.num_samples == sum(item.samples for item in batch.scheduled)
    assert batch.num_decodes == sum(item.is_decode for item in batch.scheduled)
    ids = [item.seq.seq_id for item in batch.scheduled]
    assert len(set(ids)) == len(ids)
    assert not set(ids) & {seq.seq_id for seq in batch.preempted}
    assert not (batch.preempted and batch.admitted), "admission right after preemption thrashes"
    for item in batch.scheduled:
        seq = item.seq
        assert item.num_tokens >= 1 and seq.num_computed_tokens == item.context_len
        assert item.samples == (item.context_len >= seq.num_tokens)
        assert item.context_len == seq.num_tokens + seq.num_in_flight - 1 if item.samples else seq.num_in_flight == 0

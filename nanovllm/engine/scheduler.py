"""Decides, before each step, which tokens of which sequences run; and after it, who is done.

One budget of tokens a step, spent in this order:
  1. every running sequence that has one token left: decodes are never held up by somebody's long prompt;
  2. running sequences with more left (chunked prefills), in order of arrival;
  3. waiting sequences, first come first served, as far as budget, blocks and `max_num_seqs` go.

`schedule()` moves `num_computed_tokens` forward and writes down what must run; `update()` brings the results. Exactly
one of `update` and `rollback` follows each `schedule`, but not at once: the next step may be scheduled while one is in
flight. A sequence then has a token that nobody knows yet (`num_in_flight`); its length counts, its value does not. Stop
rules that need the value apply one step late, and what that step computed for an ended sequence is dropped.

Memory. Admission reserves blocks for every token a sequence has, so that only a decode can ever run out of blocks. Then
the latest arrival is preempted: it loses its blocks, keeps its tokens, and recomputes later (cheaply, when its blocks
survived in the prefix cache). Hence the invariant that carries the proofs: *every running sequence arrived before every
waiting one, and both are in order of arrival.* The oldest sequence always goes forward, so every request ends.

The idea of one budget for mixed steps is Sarathi-Serve's (arXiv 2403.02310), the token-count view vLLM V1's.
This module knows no tensors, no model and no text.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

from nanovllm.engine.batch import ScheduledBatch, ScheduledSequence
from nanovllm.engine.block_manager import BlockManager, Registered
from nanovllm.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class _Step:
    """A batch in the making."""

    budget: int  # tokens left to give
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    registered: list[Registered] = field(default_factory=list)
    num_samples: int = 0


class Scheduler:
    """Continuous batching over one KV cache. Not thread-safe: one thread owns it."""

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_manager: BlockManager
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({max_num_seqs}) must be between 1 and max_num_batched_tokens "
                f"({max_num_batched_tokens}): every running sequence needs one token a step"
            )
        if max_model_len < 2:
            raise ValueError(f"max_model_len must leave room for a prompt and an answer, got {max_model_len}")
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.block_manager = block_manager
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()  # by seq_id, in order of arrival
        self.running: list[Sequence] = []  # in order of arrival, all before the first waiting
        self.num_preemptions = 0
        # The last token of a sequence needs no KV, so the cache holds sequences one token longer than its slots.
        self.max_seq_len = min(max_model_len, block_manager.capacity_tokens + 1)
        self._sequences: dict[int, Sequence] = {}  # all that are not finished
        self._arrivals = count()

    # -- requests come and go ----------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def check_prompt(self, num_tokens: int) -> None:
        """Raise `ValueError` for a prompt that could never run, even alone."""
        if num_tokens < 1:
            raise ValueError("the prompt is empty: give at least one token")
        if num_tokens >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but max_model_len is {self.max_model_len} and one of them is "
                f"for the answer: shorten it to {self.max_model_len - 1} tokens or raise max_model_len"
            )
        if num_tokens > self.block_manager.capacity_tokens:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but the whole KV cache holds "
                f"{self.block_manager.capacity_tokens}: shorten it or give the KV cache more memory"
            )

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; `ValueError` if it can never run or its id is in use."""
        self.check_prompt(seq.num_tokens)
        if seq.seq_id in self._sequences:
            raise ValueError(f"sequence id {seq.seq_id} is in use: ids of unfinished sequences must be unique")
        seq.arrival = next(self._arrivals)
        self._sequences[seq.seq_id] = seq
        self.waiting[seq.seq_id] = seq

    def abort(self, seq_id: int) -> Sequence | None:
        """End a sequence from outside, at any time; None if it has ended already. A step in flight still runs it, and
        its result is dropped."""
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self.finish(seq, "abort")
        return seq

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence for a reason found outside (stop string, abort, error), and free its blocks.

        For one that has ended already only the reasons are replaced: a stop string may complete with the very token
        that reached `max_tokens`.
        """
        self._end(seq, reason, stop_reason)
        self._drop_finished()

    # -- before a step -----------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """The next step; never empty while there are unfinished sequences and no step is in flight.

        At most one step may be in flight meanwhile. Then it is empty when that one brings every last token.
        """
        step = _Step(self.max_num_batched_tokens)
        self._schedule_decodes(step)
        num_decodes = len(step.scheduled)
        self._continue_prefills(step)
        if not step.preempted:  # whoever was preempted would come straight back and push out the next
            self._admit(step)
        return ScheduledBatch(
            scheduled=tuple(step.scheduled),
            num_decodes=num_decodes,
            num_tokens=self.max_num_batched_tokens - step.budget,
            num_samples=step.num_samples,
            admitted=tuple(step.admitted),
            preempted=tuple(step.preempted),
            registered=tuple(step.registered),
        )

    def _schedule_decodes(self, step: _Step) -> None:
        """One token for every running sequence that has one left. The hot loop: nothing here depends on lengths."""
        block_size, scheduled = self.block_manager.block_size, step.scheduled
        for seq in self.running:  # preemption only pops from the end, which ends this loop early, as it should
            start, in_flight = seq.num_computed_tokens, seq.num_in_flight
            if seq.num_tokens + in_flight - start != 1 or (in_flight and self._ends_in_flight(seq)):
                continue
            if start == len(seq.block_table) * block_size and not self._grow(seq, step):
                break  # `seq` was the latest arrival and has been preempted itself
            seq.num_computed_tokens = start + 1
            seq.num_in_flight = in_flight + 1
            scheduled.append(ScheduledSequence(seq, start, 1, True, True, start, seq.block_table))
            # A block can be found once all of its tokens are known. Two become known at once when overlap ends.
            known = start + 1 - in_flight
            if known % block_size == 0 or start % block_size == 0:
                step.registered += self.block_manager.register(seq, start - 1, known)
        step.num_samples = len(scheduled)
        step.budget -= len(scheduled)  # at most max_num_seqs, hence within the budget

    def _continue_prefills(self, step: _Step) -> None:
        for seq in self.running:  # decodes have nothing left by now
            if step.budget and seq.num_computed_tokens < seq.num_tokens:
                self._schedule_chunk(seq, step, store_from=seq.num_computed_tokens)

    def _admit(self, step: _Step) -> None:
        manager = self.block_manager
        while self.waiting and step.budget and len(self.running) < self.max_num_seqs:
            seq = next(iter(self.waiting.values()))
            computed = manager.get_computed_blocks(seq)
            if not manager.allocate_slots(seq, seq.num_tokens, computed, keep_free=self._headroom()):
                break
            del self.waiting[seq.seq_id]
            self.running.append(seq)
            step.admitted.append(seq)
            seq.status = SequenceStatus.RUNNING
            num_cached = len(computed) * manager.block_size
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = num_cached
                manager.count_lookup(seq, num_cached)
            # With everything cached, the last token still runs for its logits; its KV is not stored again.
            seq.num_computed_tokens = min(num_cached, seq.num_tokens - 1)
            self._schedule_chunk(seq, step, store_from=num_cached)

    def _schedule_chunk(self, seq: Sequence, step: _Step, store_from: int) -> None:
        """As many of the tokens `seq` has left as the budget allows."""
        start = seq.num_computed_tokens
        num_tokens = min(seq.num_tokens - start, step.budget)
        seq.num_computed_tokens = start + num_tokens
        samples = seq.num_computed_tokens == seq.num_tokens
        seq.num_in_flight += samples
        step.scheduled.append(ScheduledSequence(seq, start, num_tokens, False, samples, store_from, seq.block_table))
        step.registered += self.block_manager.register(seq, start, start + num_tokens)
        step.num_samples += samples
        step.budget -= num_tokens

    def _headroom(self) -> int:
        """Blocks an admission leaves free, so that running sequences can grow for a while before one is preempted.

        None when nothing runs: any prompt that `add` accepted then fits.
        """
        return min(len(self.running), max(1, self.block_manager.num_blocks // 100))

    def _grow(self, seq: Sequence, step: _Step) -> bool:
        """A block for the next token of `seq`, at the cost of the latest arrivals; False if it was one of them.

        Sequences scheduled in this step arrived before `seq`, so they are never among the victims.
        """
        while not self.block_manager.allocate_slots(seq, seq.num_tokens + seq.num_in_flight):
            victim = self.running.pop()
            self._requeue(victim)
            victim.num_preemptions += 1
            self.num_preemptions += 1
            step.preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _ends_in_flight(self, seq: Sequence) -> bool:
        """Whether the token that a step in flight samples is the last one by length, whatever it is."""
        num_tokens = seq.num_tokens + seq.num_in_flight
        return num_tokens - seq.num_prompt_tokens >= seq.max_tokens or num_tokens >= self.max_seq_len

    def _requeue(self, seq: Sequence) -> None:
        """Back to the front of the queue, without blocks, with all its tokens."""
        self.block_manager.free(seq)
        seq.num_computed_tokens = 0
        seq.status = SequenceStatus.WAITING
        self.waiting[seq.seq_id] = seq
        self.waiting.move_to_end(seq.seq_id, last=False)

    # -- after a step ------------------------------------------------------------------------------------------------

    def update(self, batch: ScheduledBatch, token_ids: list[int]) -> list[Sequence]:
        """Append the sampled tokens, one for each entry of `batch` that samples, and end who is done.

        Returns the sequences that received a token, in batch order; `is_finished` tells which ended here. Those that
        were ended from outside meanwhile (`abort`, `finish`) are left out.
        """
        if len(token_ids) != batch.num_samples:
            raise ValueError(f"the batch samples {batch.num_samples} tokens, got {len(token_ids)}")
        received: list[Sequence] = []
        tokens, any_ended = iter(token_ids), False
        for item in batch.scheduled:
            if not item.samples:
                continue
            seq, token_id = item.seq, next(tokens)
            seq.num_in_flight -= 1
            if seq.status is SequenceStatus.FINISHED:
                continue
            seq.append_token(token_id)
            received.append(seq)
            stop = stop_rule(seq, token_id, self.max_seq_len)
            if stop is not None:
                self._end(seq, *stop)
                any_ended = True
        if any_ended:
            self._drop_finished()
        return received

    def rollback(self, batch: ScheduledBatch) -> None:
        """Undo `schedule()` after a step that failed: nothing it was to store is believed to exist.

        Its sequences stay and would run again; the engine calls `finish(seq, "error")` for those it gives up. Of
        several batches in flight the latest is rolled back first.
        """
        self.block_manager.unregister(batch.registered)
        for item in batch.scheduled:
            item.seq.num_in_flight -= item.samples
            if item.seq.status is SequenceStatus.RUNNING:
                item.seq.num_computed_tokens = item.start
        for seq in reversed(batch.admitted):  # these may hold blocks that others in the batch should have written
            if seq.status is SequenceStatus.RUNNING:
                self.running.remove(seq)
                self._requeue(seq)

    def _end(self, seq: Sequence, reason: str, stop_reason: int | str | None) -> None:
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if self._sequences.pop(seq.seq_id, None) is not None:
            self.waiting.pop(seq.seq_id, None)
            self.block_manager.free(seq)

    def _drop_finished(self) -> None:
        self.running = [seq for seq in self.running if seq.status is SequenceStatus.RUNNING]


def stop_rule(seq: Sequence, token_id: int, max_seq_len: int) -> tuple[str, int | None] | None:
    """(finish_reason, stop_reason) if `token_id`, the newest token of `seq`, ends it; None if it goes on.

    `max_seq_len` is what the context or the whole KV cache can hold, whichever is less: a sequence that outgrows
    either ends with "length".
    """
    num_output_tokens = seq.num_tokens - seq.num_prompt_tokens
    if num_output_tokens >= seq.min_tokens:
        if token_id in seq.eos_token_ids and not seq.ignore_eos:
            return "stop", None
        if token_id in seq.stop_token_ids:
            return "stop", token_id
    if num_output_tokens >= seq.max_tokens or seq.num_tokens >= max_seq_len:
        return "length", None
    return None

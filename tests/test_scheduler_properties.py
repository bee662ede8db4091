"""Random lives of a scheduler: arrivals, aborts, stops, preemptions, failed steps, shared prefixes, tiny caches.

The machine drives the real scheduler and block manager with the fake model of `scheduler_sim`, whose KV cache knows
which text each slot holds. After every call: no block in two tables unless shared, free + used = total, nobody jumps
the queue, and whatever the prefix cache offers has really been written. At the end: every request has ended, and with
exactly the tokens it would have had alone.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_sim import (
    EOS,
    STOP,
    FakeModel,
    check_batch,
    check_invariants,
    expected_answer,
    fingerprints,
    make_scheduler,
    make_seq,
    run_step,
)

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

# Two texts that begin alike and repeat themselves, so that requests share prefixes of any length.
BASES = ([5, 6, 7, 8] * 6, [5, 6, 7, 8, 9, 9, 9, 9] * 3)
PROMPTS = st.builds(
    lambda base, cut, tail: base[:cut] + tail,
    st.sampled_from(BASES),
    st.integers(0, 24),
    st.lists(st.integers(5, 6), max_size=2),
)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "copies": st.integers(1, 3),
        "max_tokens": st.sampled_from([24, 8, 1]),
        "min_tokens": st.sampled_from([0, 0, 4]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({STOP})]),
        "cache_salt": st.sampled_from([b"", b"", b"", b"salt"]),
        "read_prefix_cache": st.sampled_from([True, True, True, False]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    scheduler: Scheduler

    @initialize(
        num_blocks=st.integers(2, 16),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 12),
        max_model_len=st.sampled_from([64, 12]),
        caching=st.sampled_from([True, True, True, False]),
        requests=st.lists(REQUESTS, min_size=2, max_size=5),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        spare_budget: int,
        max_model_len: int,
        caching: bool,
        requests: list[dict],
    ) -> None:
        budget = max_num_seqs + spare_budget
        self.scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, budget, max_model_len, caching)
        self.model = FakeModel(block_size)
        self.seqs: list[Sequence] = []
        self.expected_reason: dict[int, str] = {}  # of sequences that were ended from outside
        self.promises: dict[bytes, list[int]] = {}  # digest -> what the slots of such a block must hold
        for request in requests:
            self.submit(**request)

    # -- requests ----------------------------------------------------------------------------------------------------

    @rule(request=REQUESTS)
    def add(self, request: dict) -> None:
        self.submit(**request)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end_one(data, "abort")

    @rule()
    def reset_prefix_cache(self) -> None:
        used = self.scheduler.block_manager.usage > 0
        assert self.scheduler.block_manager.reset_prefix_cache() != used

    # -- steps -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.unfinished())
    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = self.scheduler.schedule()
            check_batch(self.scheduler, batch)
            assert batch.is_empty != self.scheduler.has_unfinished
            self.scheduler.update(batch, self.model.run(batch))

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), reason=st.sampled_from(["abort", "error"]))
    def step_with_end_in_flight(self, data: st.DataObject, reason: str) -> None:
        """A request is aborted, or fails by itself, after its step was scheduled."""
        batch = self.scheduler.schedule()
        self.end_one(data, reason)
        check_invariants(self.scheduler)
        received = self.scheduler.update(batch, self.model.run(batch))
        assert not any(seq.seq_id in self.expected_reason for seq in received)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def step_with_text_stop(self, data: st.DataObject) -> None:
        batch = self.scheduler.schedule()
        received = self.scheduler.update(batch, self.model.run(batch))
        if received:
            seq = data.draw(st.sampled_from(received))
            self.scheduler.finish(seq, "stop", "a stop string")
            self.expected_reason[seq.seq_id] = "stop"

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), count=st.integers(1, 6), ended=st.sampled_from([None, None, "abort", "error"]))
    def overlapped_steps(self, data: st.DataObject, count: int, ended: str | None) -> None:
        """Each step is scheduled before the tokens of the one before it are known; somebody may end in between."""
        in_flight = self.scheduler.schedule()
        for turn in range(count):
            following = self.scheduler.schedule()
            check_batch(self.scheduler, following)
            if ended and turn == 0 and self.unfinished():
                self.end_one(data, ended)
            check_invariants(self.scheduler)
            self.scheduler.update(in_flight, self.model.run(in_flight))
            in_flight = following
            if in_flight.is_empty:
                return
        self.scheduler.update(in_flight, self.model.run(in_flight))

    @precondition(lambda self: self.unfinished())
    @rule(both=st.booleans())
    def overlapped_step_fails(self, both: bool) -> None:
        first = self.scheduler.schedule()
        second = self.scheduler.schedule()
        tokens = self.model.run(first)  # the device runs them in order: the second may reuse what the first still read
        self.model.store(second, garbage=True)
        self.scheduler.rollback(second)
        if both:
            self.model.store(first, garbage=True)
            self.scheduler.rollback(first)
        else:
            self.scheduler.update(first, tokens)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data(), written=st.booleans(), abort=st.booleans())
    def step_fails(self, data: st.DataObject, written: bool, abort: bool) -> None:
        """The step dies before or after it spoiled its slots; some requests are given up, the others go on."""
        batch = self.scheduler.schedule()
        if written:
            self.model.store(batch, garbage=True)
        if abort:
            self.end_one(data, "abort")
        self.scheduler.rollback(batch)
        check_invariants(self.scheduler)
        for item in batch.scheduled:
            if not item.seq.is_finished and data.draw(st.booleans()):
                self.scheduler.finish(item.seq, "error")
                self.expected_reason[item.seq.seq_id] = "error"

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def bookkeeping_is_right(self) -> None:
        check_invariants(self.scheduler)

    @invariant()
    def prefix_cache_offers_only_what_was_written(self) -> None:
        manager, size = self.scheduler.block_manager, self.model.block_size
        for seq in self.seqs:
            prints = fingerprints(seq)
            for i, digest in enumerate(seq.block_digests):
                self.promises[digest] = prints[i * size : (i + 1) * size]
        for digest, block in manager._block_of.items():
            held = [self.model.kv.get(block * size + offset) for offset in range(size)]
            assert held == self.promises[digest]

    @invariant()
    def ended_sequences_said_the_right_thing(self) -> None:
        for seq in self.seqs:
            self.check_output(seq)

    def teardown(self) -> None:
        if not hasattr(self, "seqs"):
            return
        bound = 50 + sum(seq.num_tokens + seq.max_tokens for seq in self.seqs) * 8
        for _ in range(bound):
            if not self.scheduler.has_unfinished:
                break
            assert not run_step(self.scheduler, self.model).is_empty
        assert not self.scheduler.has_unfinished, "livelock"
        for seq in self.seqs:
            assert seq.is_finished
            self.check_output(seq)
        assert self.scheduler.block_manager.num_free_blocks == self.scheduler.block_manager.num_blocks

    # -- helpers -----------------------------------------------------------------------------------------------------

    def submit(self, prompt: list[int], copies: int, **rules) -> None:
        manager = self.scheduler.block_manager
        fits = 0 < len(prompt) < self.scheduler.max_model_len and len(prompt) <= manager.num_blocks * manager.block_size
        for _ in range(copies):
            seq = make_seq(len(self.seqs), prompt, eos_token_ids=EOS, **rules)
            try:
                self.scheduler.add(seq)
            except ValueError:
                assert not fits
            else:
                assert fits
                self.seqs.append(seq)

    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.seqs if not seq.is_finished]

    def end_one(self, data: st.DataObject, reason: str) -> None:
        seq = data.draw(st.sampled_from(self.unfinished()))
        if reason == "abort":
            assert self.scheduler.abort(seq.seq_id) is seq
        else:
            self.scheduler.finish(seq, reason)
        self.expected_reason[seq.seq_id] = reason

    def check_output(self, seq: Sequence) -> None:
        capacity = self.scheduler.block_manager.num_blocks * self.scheduler.block_manager.block_size
        output, reason, stop_reason = expected_answer(seq, self.scheduler.max_model_len, capacity)
        if seq.seq_id in self.expected_reason or not seq.is_finished:
            assert seq.output_token_ids == output[: len(seq.output_token_ids)]
            assert seq.finish_reason == self.expected_reason.get(seq.seq_id)
        else:
            assert (seq.output_token_ids, seq.finish_reason, seq.stop_reason) == (output, reason, stop_reason)


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedulerMachine = SchedulerMachine.TestCase

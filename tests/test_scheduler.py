"""The scheduler's rules one by one. The faults it must not have are in `test_scheduler_regressions.py`."""

from __future__ import annotations

import pytest
from scheduler_sim import (
    EOS,
    STOP,
    FakeModel,
    answer,
    check_invariants,
    expected_answer,
    make_scheduler,
    make_seq,
    next_token,
    run_all,
    run_step,
)

from nanovllm.engine.sequence import SequenceStatus

# -- the budget ------------------------------------------------------------------------------------------------------


def test_prompts_are_chunked_to_the_budget_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    for i, length in enumerate((14, 5, 20)):
        scheduler.add(make_seq(i, [i] * length))
    assert answer(scheduler) == [10]  # first prompt, first chunk
    assert answer(scheduler) == [4, 5, 1]  # its rest, the second prompt, one token of the third
    assert answer(scheduler) == [1, 1, 8]  # two decodes first
    assert answer(scheduler) == [1, 1, 8]
    assert answer(scheduler) == [1, 1, 3]
    assert answer(scheduler) == [1, 1, 1]


def test_only_the_chunk_that_reaches_the_last_token_samples() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_seq(0, 20))
    samples = []
    for _ in range(4):
        batch = scheduler.schedule()
        samples.append([item.samples for item in batch.scheduled])
        scheduler.update(batch, [9] * batch.num_samples)
    assert samples == [[False], [False], [True], [True]]


def test_batch_entry_tells_the_device_side_everything() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_num_batched_tokens=6)
    scheduler.add(make_seq(0, list(range(10))))
    scheduler.update(scheduler.schedule(), [])
    (item,) = scheduler.schedule().scheduled
    assert (item.start, item.num_tokens, item.context_len, item.is_decode) == (6, 4, 10, False)
    assert item.token_ids == [6, 7, 8, 9] and (item.start, item.context_len) == (6, 10)
    assert item.block_table == [0, 1, 2] and item.slots(4) == [6, 7, 8, 9]


def test_max_num_seqs_limits_the_running_set() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for i in range(3):
        scheduler.add(make_seq(i, [i, i]))
    assert len(answer(scheduler)) == 2
    assert len(answer(scheduler)) == 2
    scheduler.abort(0)
    assert len(answer(scheduler)) == 2 and not scheduler.waiting


def test_head_of_the_queue_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=4)
    scheduler.add(make_seq(0, 20))
    answer(scheduler)
    scheduler.add(make_seq(1, [1] * 16))  # needs 4 of the 3 free blocks
    scheduler.add(make_seq(2, [2]))  # would fit
    assert answer(scheduler) == [1]


def test_next_step_is_scheduled_while_one_is_in_flight() -> None:
    """The token in flight runs next, at its own position and exactly once; the last one by length runs nowhere."""
    scheduler = make_scheduler(block_size=4)
    seq = make_seq(0, 7, max_tokens=3)
    scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(item.start, item.token_ids) for item in second.scheduled] == [(7, [])]
    assert len(seq.block_digests) == 1, "a block with an unknown token has no digest"
    assert scheduler.update(first, [9]) == [seq]
    third = scheduler.schedule()
    assert [(item.start, item.token_ids) for item in third.scheduled] == [(8, [])]
    assert len(seq.block_digests) == 2
    scheduler.update(second, [8])
    assert scheduler.schedule().is_empty, "its third and last token is in flight"
    scheduler.update(third, [7])
    assert seq.output_token_ids == [9, 8, 7] and seq.finish_reason == "length" and not scheduler.has_unfinished


def test_a_token_after_the_end_is_dropped() -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, 5, eos_token_ids=EOS)
    scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first, [1])
    assert seq.finish_reason == "stop" and scheduler.block_manager.usage == 0
    assert scheduler.update(second, [9]) == []
    assert seq.output_token_ids == [1] and seq.num_in_flight == 0


@pytest.mark.parametrize("overlapped", range(6))
def test_no_block_is_forgotten_when_overlap_ends(overlapped: int) -> None:
    """Then two tokens become known at once, and the first of them may have filled a block."""
    scheduler, model = make_scheduler(), FakeModel(4)
    scheduler.add(make_seq(0, 4, max_tokens=20))
    in_flight = scheduler.schedule()
    for _ in range(overlapped):
        following = scheduler.schedule()
        scheduler.update(in_flight, model.run(in_flight))
        in_flight = following
    scheduler.update(in_flight, model.run(in_flight))
    run_all(scheduler, model)
    assert len(scheduler.block_manager._block_of) == 23 // 4


def test_rollback_of_two_steps_in_flight() -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, 5)
    scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.rollback(second)
    scheduler.rollback(first)
    check_invariants(scheduler)
    assert answer(scheduler) == [5] and answer(scheduler) == [1]


def test_update_refuses_the_wrong_number_of_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(0, 5))
    with pytest.raises(ValueError, match="samples 1 tokens, got 2"):
        scheduler.update(scheduler.schedule(), [1, 2])


# -- how sequences end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "tokens", "output", "reason"),
    [
        ({"eos_token_ids": EOS}, [9, 1, 9], [9, 1], ("stop", None)),  # the second of two EOS ids
        ({"eos_token_ids": EOS, "ignore_eos": True, "max_tokens": 3}, [0, 1, 0], [0, 1, 0], ("length", None)),
        ({"stop_token_ids": frozenset({STOP})}, [9, STOP], [9, STOP], ("stop", STOP)),
        ({"stop_token_ids": frozenset({STOP}), "ignore_eos": True}, [STOP], [STOP], ("stop", STOP)),
        ({"eos_token_ids": EOS, "min_tokens": 3}, [0, 1, 0, 9], [0, 1, 0], ("stop", None)),
        ({"stop_token_ids": frozenset({STOP}), "min_tokens": 2}, [STOP, 9, STOP], [STOP, 9, STOP], ("stop", STOP)),
        ({"eos_token_ids": EOS, "max_tokens": 1}, [0], [0], ("stop", None)),
        ({"max_tokens": 1}, [9], [9], ("length", None)),
        ({"max_tokens": 2, "min_tokens": 2, "eos_token_ids": EOS}, [0, 9], [0, 9], ("length", None)),
    ],
)
def test_stop_rules(rules: dict, tokens: list[int], output: list[int], reason: tuple) -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, 6, **rules)
    scheduler.add(seq)
    for token in tokens:
        if scheduler.has_unfinished:
            answer(scheduler, token)
    assert seq.output_token_ids == output and (seq.finish_reason, seq.stop_reason) == reason
    assert seq.is_finished and scheduler.block_manager.usage == 0


def test_context_is_used_to_its_last_token() -> None:
    scheduler = make_scheduler(max_model_len=10)
    seq = make_seq(0, 7, max_tokens=100)
    scheduler.add(seq)
    run_all(scheduler, FakeModel(4))
    assert seq.num_tokens == 10 and seq.finish_reason == "length"


def test_update_returns_the_sequences_that_got_a_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    a, b, c = make_seq(0, [1]), make_seq(1, [2]), make_seq(2, 20)
    for seq in (a, b, c):
        scheduler.add(seq)
    batch = scheduler.schedule()
    scheduler.finish(b, "error")  # its logits processor raised
    assert scheduler.update(batch, [9, 9]) == [a]
    assert b.output_token_ids == [] and b.finish_reason == "error"


def test_abort_while_the_step_runs_drops_its_result() -> None:
    scheduler, model = make_scheduler(), FakeModel(4)
    a, b = make_seq(0, 9), make_seq(1, 9)  # b shares two blocks that a writes in this step
    scheduler.add(a)
    scheduler.add(b)
    batch = scheduler.schedule()
    assert scheduler.abort(0) is a
    assert scheduler.update(batch, model.run(batch)) == [b]
    run_all(scheduler, model)
    assert a.output_token_ids == [] and (a.finish_reason, b.finish_reason) == ("abort", "length")
    assert scheduler.abort(0) is None and scheduler.abort(77) is None


def test_abort_of_a_waiting_sequence() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for i in range(3):
        scheduler.add(make_seq(i, [i]))
    answer(scheduler)
    scheduler.abort(1)
    assert list(scheduler.waiting) == [2]


def test_text_stop_overrules_length_of_the_same_token() -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, 3, max_tokens=1)
    scheduler.add(seq)
    answer(scheduler)
    scheduler.finish(seq, "stop", "END")
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "END")
    check_invariants(scheduler)


# -- preemption ------------------------------------------------------------------------------------------------------


def test_latest_arrival_is_preempted_and_returns_first() -> None:
    scheduler, model = make_scheduler(num_blocks=6, max_num_seqs=3), FakeModel(4)
    seqs = [make_seq(i, [i] * 4, max_tokens=12) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    batches = run_all(scheduler, model)
    preempted = [seq.seq_id for batch in batches for seq in batch.preempted]
    assert preempted and 0 not in preempted
    for batch in batches:
        assert [s.arrival for s in batch.admitted] == sorted(s.arrival for s in batch.admitted)
    assert scheduler.num_preemptions == len(preempted) == sum(s.num_preemptions for s in seqs)
    for seq in seqs:
        assert seq.output_token_ids == expected_answer(seq, 1024, 24)[0]


def test_preempted_sequence_recomputes_prompt_and_output_then_goes_on() -> None:
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    a, b = make_seq(0, [1] * 4, max_tokens=9), make_seq(1, [2] * 4, max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    answer(scheduler)  # both admitted: a waits for no headroom, b leaves one block and more
    while not b.num_preemptions:
        answer(scheduler)
    assert b.status is SequenceStatus.WAITING and b.num_computed_tokens == 0
    outputs_before = len(b.output_token_ids)
    while b.status is SequenceStatus.WAITING:
        batch = scheduler.schedule()
        scheduler.update(batch, [9] * batch.num_samples)
    (item,) = [item for item in batch.scheduled if item.seq is b]
    assert (item.start, item.num_tokens) == (0, 4 + outputs_before) and item.samples
    assert len(b.output_token_ids) == outputs_before + 1


def test_return_after_preemption_is_no_cache_hit_of_the_prompt() -> None:
    """Statistics speak of first admissions: what a sequence finds of itself saves work but is nobody's reuse."""
    scheduler, model = make_scheduler(num_blocks=6, max_num_seqs=2), FakeModel(4)
    a, b = make_seq(0, [1] * 6, max_tokens=12), make_seq(1, [2] * 6, max_tokens=12)
    scheduler.add(a)
    scheduler.add(b)
    batches = run_all(scheduler, model)
    assert b.num_preemptions > 0
    assert any(item.seq is b and item.start > 0 and not item.is_decode for batch in batches for item in batch.scheduled)
    assert b.num_cached_tokens == 0
    assert (scheduler.block_manager.prefix_query_tokens, scheduler.block_manager.prefix_hit_tokens) == (12, 0)


def test_no_admission_in_a_step_that_preempts() -> None:
    """Even where it would fit: the second of two equal texts gives up its copy and could share the first's at once."""
    scheduler, model = make_scheduler(num_blocks=5), FakeModel(4)
    first, second = make_seq(0, [1, 2], max_tokens=16), make_seq(1, [1, 2], max_tokens=16)
    scheduler.add(first)
    scheduler.add(second)
    batch = run_step(scheduler, model)
    while not batch.preempted:
        batch = run_step(scheduler, model)
    assert batch.preempted == (second,) and batch.admitted == ()
    batch = run_step(scheduler, model)
    assert batch.admitted == (second,) and second.block_table[:2] == first.block_table[:2]


def test_admission_leaves_headroom_for_those_who_run() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_seq(0, [1] * 3))
    scheduler.add(make_seq(1, [2] * 3))
    assert answer(scheduler) == [3]  # the second would take the last block


def test_partial_prefill_can_be_the_victim() -> None:
    scheduler, model = make_scheduler(num_blocks=9, max_num_seqs=2, max_num_batched_tokens=3), FakeModel(4)
    a, b = make_seq(0, [1, 2], max_tokens=20), make_seq(1, list(range(24)), max_tokens=3)
    scheduler.add(a)
    scheduler.add(b)
    batches = run_all(scheduler, model)
    assert b in [seq for batch in batches for seq in batch.preempted]
    assert not [i for batch in batches[:8] for i in batch.scheduled if i.seq is b and i.samples]  # still a prefill
    for seq in (a, b):
        assert seq.output_token_ids == expected_answer(seq, 1024, 36)[0]


# -- limits ------------------------------------------------------------------------------------------------------------


def test_step_of_one_token_limits() -> None:
    """The narrowest machine there is still answers."""
    scheduler, model = make_scheduler(8, 1, max_num_seqs=1, max_num_batched_tokens=1), FakeModel(1)
    seq = make_seq(0, [5, 6, 7], max_tokens=2)
    scheduler.add(seq)
    assert len(run_all(scheduler, model)) == 4
    assert seq.output_token_ids[0] == next_token([5, 6, 7])


@pytest.mark.parametrize(("max_num_seqs", "budget", "max_model_len"), [(0, 4, 64), (5, 4, 64), (1, 1, 1)])
def test_impossible_limits_are_refused(max_num_seqs: int, budget: int, max_model_len: int) -> None:
    with pytest.raises(ValueError, match="max_num_seqs|max_model_len"):
        make_scheduler(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=max_model_len)

"""The scheduler's rules one by one, and a regression test for each scheduler fault known of nano-vLLM.

Tests named `..__nvN` pin an issue of the tracker of GeeeekExplorer/nano-vllm.
"""

from __future__ import annotations

import pytest
from scheduler_sim import (
    EOS,
    STOP,
    FakeModel,
    check_invariants,
    expected_answer,
    make_scheduler,
    make_seq,
    next_token,
    run_all,
    run_step,
)

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import SequenceStatus


def answer(scheduler: Scheduler, token: int = 9) -> list[int]:
    """One step whose every sampled token is `token`; returns the chunk sizes in batch order."""
    batch = scheduler.schedule()
    scheduler.update(batch, [token] * batch.num_samples)
    check_invariants(scheduler)
    return [item.num_tokens for item in batch.scheduled]


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
    assert item.token_ids == [6, 7, 8, 9] and list(item.positions) == [6, 7, 8, 9]
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


def test_schedule_twice_without_update_repeats_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_seq(0, 5))
    assert not scheduler.schedule().is_empty
    assert scheduler.schedule().is_empty


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


# -- faults of nano-vLLM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_lone_sequence_outgrows_cache_ends_with_length__nv190(caching: bool) -> None:
    scheduler, model = make_scheduler(num_blocks=3, enable_prefix_caching=caching), FakeModel(4)
    seq = make_seq(0, 5, max_tokens=1000)
    scheduler.add(seq)
    run_all(scheduler, model)
    assert seq.finish_reason == "length" and seq.num_tokens == 13  # every slot, and a last token that needs none
    assert scheduler.num_preemptions == 0 and scheduler.block_manager.usage == 0


def test_prompt_larger_than_the_cache_rejected__nv191() -> None:
    scheduler = make_scheduler(num_blocks=3)
    with pytest.raises(ValueError, match="13 tokens, but the whole KV cache holds 12"):
        scheduler.add(make_seq(0, 13))
    assert not scheduler.has_unfinished
    seq = make_seq(1, 12)
    scheduler.add(seq)  # exactly fits: one token comes out
    run_all(scheduler, FakeModel(4))
    assert len(seq.output_token_ids) == 1 and seq.finish_reason == "length"


def test_prompt_over_max_model_len_rejected__nv258() -> None:
    scheduler = make_scheduler(max_model_len=16)
    for length in (16, 17, 1000):
        with pytest.raises(ValueError, match=f"{length} tokens, but max_model_len is 16 .* 15 tokens"):
            scheduler.add(make_seq(0, length))
    scheduler.add(make_seq(1, 15))
    with pytest.raises(ValueError, match="empty"):
        scheduler.add(make_seq(2, []))
    with pytest.raises(ValueError, match="sequence id 1 is in use"):
        scheduler.add(make_seq(1, 3))
    assert len(run_all(scheduler, FakeModel(4))) == 1


def test_long_prompts_do_not_stall_decodes() -> None:
    scheduler = make_scheduler(num_blocks=9000, max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=8192)
    victim = make_seq(0, 10, max_tokens=100)
    scheduler.add(victim)
    answer(scheduler)
    for i in range(1, 9):
        scheduler.add(make_seq(i, [i] * 4000))
    for step in range(16):
        sizes = answer(scheduler)
        assert sizes[0] == 1 and len(victim.output_token_ids) == step + 2
        assert sum(sizes) == 2048 or not scheduler.waiting  # and the prompts use all the rest
    assert not scheduler.waiting


def test_identical_prompts_in_same_step_share_blocks__nv219() -> None:
    scheduler, model = make_scheduler(), FakeModel(4)
    seqs = [make_seq(i, 10, max_tokens=3) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    batch = run_step(scheduler, model)
    assert [(item.start, item.num_tokens) for item in batch.scheduled] == [(0, 10), (8, 2), (8, 2), (8, 2)]
    assert len({tuple(item.block_table[:2]) for item in batch.scheduled}) == 1
    assert len({item.block_table[2] for item in batch.scheduled}) == 4  # partial blocks are everybody's own
    assert [seq.num_cached_tokens for seq in seqs] == [0, 8, 8, 8]
    manager = scheduler.block_manager
    assert (manager.prefix_query_tokens, manager.prefix_hit_tokens) == (40, 24)
    run_all(scheduler, model)


def test_prefix_reuse_below_256_tokens() -> None:
    scheduler, model = make_scheduler(block_size=16), FakeModel(16)
    system = list(range(40))
    scheduler.add(make_seq(0, [*system, 1, 2, 3], max_tokens=2))
    run_all(scheduler, model)
    later = make_seq(1, [*system, 4, 5, 6, 7], max_tokens=2)
    scheduler.add(later)
    batch = run_step(scheduler, model)
    assert later.num_cached_tokens == 32 and batch.num_tokens == 12


@pytest.mark.parametrize("same_step", [True, False])
def test_last_full_block_matches(same_step: bool) -> None:
    scheduler, model = make_scheduler(), FakeModel(4)
    first, second = make_seq(0, 8, max_tokens=6), make_seq(1, 8, max_tokens=6)
    scheduler.add(first)
    if not same_step:
        run_step(scheduler, model)
    scheduler.add(second)
    batch = run_step(scheduler, model)
    (item,) = [item for item in batch.scheduled if item.seq is second]
    assert (item.start, item.num_tokens, item.samples, item.is_decode) == (7, 1, True, False)
    assert item.slots(4) == [-1]  # the KV is there already, in a block that is not ours alone
    assert item.block_table == first.block_table[:2] and second.num_cached_tokens == 8
    run_all(scheduler, model)
    assert first.output_token_ids == second.output_token_ids == expected_answer(first, 1024, 256)[0]


def test_answers_are_reused_by_the_next_turn() -> None:
    scheduler, model = make_scheduler(), FakeModel(4)
    turn = make_seq(0, 6, max_tokens=11)
    scheduler.add(turn)
    run_all(scheduler, model)
    follow_up = make_seq(1, [*turn.token_ids, 50, 51])
    scheduler.add(follow_up)
    run_step(scheduler, model)
    assert follow_up.num_cached_tokens == 16  # of 17 tokens; the last one's KV was never needed


def test_failed_step_leaks_no_blocks() -> None:
    """The step dies: those given up free everything, and nobody ever matches what was not written."""
    scheduler, model = make_scheduler(), FakeModel(4)
    a, b, c = make_seq(0, 9), make_seq(1, 9), make_seq(2, 9)
    scheduler.add(a)
    run_step(scheduler, model)
    scheduler.abort(0)
    scheduler.block_manager.reset_prefix_cache()
    scheduler.add(b)
    scheduler.add(c)  # shares two blocks that b should write in the same step
    batch = scheduler.schedule()
    assert batch.scheduled[1].start == 8
    model.store(batch, garbage=True)
    scheduler.rollback(batch)
    check_invariants(scheduler)
    scheduler.finish(b, "error")
    assert scheduler.block_manager.usage == 0
    retry = run_step(scheduler, model)
    assert [(item.seq, item.start, item.num_tokens) for item in retry.scheduled] == [(c, 0, 9)]
    run_all(scheduler, model)
    assert c.output_token_ids == expected_answer(c, 1024, 256)[0]


def test_failed_step_can_be_run_again() -> None:
    """Decode, partial prefill and admission in one batch, all of it rolled back and repeated."""
    scheduler, model = make_scheduler(max_num_batched_tokens=8), FakeModel(4)
    seqs = [make_seq(0, [1, 2, 3]), make_seq(1, [1, 2, 3, 4] * 2), make_seq(2, [1, 2, 3, 4] * 2)]
    for seq in seqs:
        scheduler.add(seq)
    run_step(scheduler, model)
    batch = scheduler.schedule()
    assert [item.num_tokens for item in batch.scheduled] == [1, 3, 1]
    scheduler.abort(1)  # and one of them goes while the step is failing
    scheduler.rollback(batch)
    check_invariants(scheduler)
    again = scheduler.schedule()
    assert [(i.seq.seq_id, i.start) for i in again.scheduled] == [(0, 3), (2, 4)]
    scheduler.update(again, model.run(again))
    run_all(scheduler, model)
    for seq in (seqs[0], seqs[2]):
        assert seq.output_token_ids == expected_answer(seq, 1024, 256)[0]


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

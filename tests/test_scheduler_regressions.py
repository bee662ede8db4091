"""A regression test for each scheduler, prefix-cache and preemption fault known of nano-vLLM.

Tests named `..__nvN` pin an issue of the tracker of GeeeekExplorer/nano-vllm.
"""

from __future__ import annotations

import pytest
from scheduler_sim import (
    FakeModel,
    answer,
    check_invariants,
    expected_answer,
    make_scheduler,
    make_seq,
    run_all,
    run_step,
)


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

"""The block manager as a data structure: reference counts, eviction order, content addresses."""

from __future__ import annotations

import pytest
from scheduler_sim import make_seq

from nanovllm.engine.batch import slot_mapping
from nanovllm.engine.block_manager import BlockManager, block_digest
from nanovllm.engine.sequence import Sequence


def filled(manager: BlockManager, seq: Sequence) -> Sequence:
    """Admit `seq` as the scheduler would: match, allocate, register."""
    computed = manager.get_computed_blocks(seq)
    assert manager.allocate_slots(seq, seq.num_tokens, computed)
    manager.register(seq, len(computed) * manager.block_size, seq.num_tokens)
    return seq


def free_order(manager: BlockManager) -> list[int]:
    return list(manager._free)


def test_blocks_are_taken_in_order_and_counted() -> None:
    manager = BlockManager(5, 4)
    seq = make_seq(0, 9)
    assert manager.allocate_slots(seq, 9)
    assert seq.block_table == [0, 1, 2]
    assert (manager.num_free_blocks, manager.usage, manager.capacity_tokens) == (2, pytest.approx(0.6), 20)
    assert manager.allocate_slots(seq, 12) and seq.block_table == [0, 1, 2]  # room in the last block
    assert manager.allocate_slots(seq, 13) and seq.block_table == [0, 1, 2, 3]


def test_allocation_is_all_or_nothing() -> None:
    manager = BlockManager(3, 4)
    a, b = make_seq(0, 8), make_seq(1, 8)
    assert manager.allocate_slots(a, 8)
    assert not manager.allocate_slots(b, 8)
    assert b.block_table == [] and free_order(manager) == [2]
    assert not manager.allocate_slots(b, 4, keep_free=1)
    assert manager.allocate_slots(b, 4)


def test_finished_sequence_is_freed_tail_first_behind_older_free_blocks() -> None:
    manager = BlockManager(6, 4)
    seq = filled(manager, make_seq(0, 12))
    manager.free(seq)
    assert seq.block_table == []
    assert free_order(manager) == [3, 4, 5, 2, 1, 0]  # the beginning of the text lives longest


def test_block_without_digest_is_reused_before_any_cached_one() -> None:
    manager = BlockManager(3, 4)
    manager.free(filled(manager, make_seq(0, 10)))  # blocks 0 and 1 are full, 2 is not
    assert free_order(manager) == [2, 1, 0]
    manager.free(filled(manager, make_seq(1, [7, 7])))
    assert free_order(manager) == [2, 1, 0]


def test_a_hit_makes_blocks_most_recently_used() -> None:
    manager = BlockManager(4, 4)
    a, b = make_seq(0, list(range(8))), make_seq(1, list(range(50, 58)))
    manager.free(filled(manager, a))
    manager.free(filled(manager, b))
    assert free_order(manager) == [1, 0, 3, 2]
    manager.free(filled(manager, make_seq(2, list(range(8)))))  # as `a`
    assert free_order(manager) == [3, 2, 1, 0]


def test_reused_block_is_forgotten() -> None:
    manager = BlockManager(2, 4)
    prompt = list(range(8))
    manager.free(filled(manager, make_seq(0, prompt)))
    filled(manager, make_seq(1, [9, 9, 9, 9]))  # takes block 1, the tail
    assert manager.get_computed_blocks(make_seq(2, prompt)) == [0]


def test_matching_does_not_evict_what_it_matched() -> None:
    manager = BlockManager(3, 4)
    manager.free(filled(manager, make_seq(0, list(range(12)))))
    longer = make_seq(1, list(range(8)) + [99, 99])
    computed = manager.get_computed_blocks(longer)
    assert computed == [0, 1]
    assert manager.allocate_slots(longer, 10, computed)
    assert longer.block_table == [0, 1, 2]  # 2 was least recently used, and it is not one of the matched


def test_free_cached_blocks_cannot_be_counted_twice() -> None:
    manager = BlockManager(2, 4)
    manager.free(filled(manager, make_seq(0, list(range(8)))))
    longer = make_seq(1, list(range(8)) + [99])
    assert not manager.allocate_slots(longer, 9, manager.get_computed_blocks(longer))
    assert longer.block_table == [] and manager._ref_counts == [0, 0] and manager.num_free_blocks == 2


def test_shared_blocks_are_free_only_when_the_last_holder_leaves() -> None:
    manager = BlockManager(4, 4)
    a = filled(manager, make_seq(0, 8))
    b = filled(manager, make_seq(1, 8))
    assert a.block_table == b.block_table and manager._ref_counts == [2, 2, 0, 0]
    manager.free(a)
    assert manager.num_free_blocks == 2
    manager.free(b)
    assert manager.num_free_blocks == 4


def test_match_is_a_prefix_of_whole_blocks() -> None:
    manager = BlockManager(8, 4)
    filled(manager, make_seq(0, list(range(12))))
    matches = {
        "same": list(range(12)),
        "longer": list(range(20)),
        "third differs": [*range(8), 0, 0, 0, 0],
        "partial block": list(range(7)),
        "second block at the front": list(range(4, 12)),
        "short": list(range(3)),
    }
    found = {name: len(manager.get_computed_blocks(make_seq(9, prompt))) for name, prompt in matches.items()}
    assert found == {
        "same": 3,
        "longer": 3,
        "third differs": 2,
        "partial block": 1,
        "second block at the front": 0,
        "short": 0,
    }


def test_a_block_matches_only_behind_its_own_beginning() -> None:
    manager = BlockManager(8, 4)
    filled(manager, make_seq(0, [1] * 4))
    filled(manager, make_seq(1, [2] * 4 + [3] * 4))
    assert manager.get_computed_blocks(make_seq(2, [1] * 4 + [3] * 4)) == [0]


def test_salt_separates_texts() -> None:
    manager = BlockManager(8, 4)
    filled(manager, make_seq(0, 8, cache_salt=b"alice"))
    assert manager.get_computed_blocks(make_seq(1, 8, cache_salt=b"alice")) == [0, 1]
    assert manager.get_computed_blocks(make_seq(2, 8, cache_salt=b"bob")) == []
    assert manager.get_computed_blocks(make_seq(3, 8)) == []


def test_sequence_may_decline_the_cache_yet_fill_it() -> None:
    manager = BlockManager(8, 4)
    filled(manager, make_seq(0, 8, read_prefix_cache=False))
    assert manager.get_computed_blocks(make_seq(1, 8, read_prefix_cache=False)) == []
    assert manager.get_computed_blocks(make_seq(2, 8)) == [0, 1]


def test_second_copy_of_a_text_stays_anonymous() -> None:
    manager = BlockManager(8, 4)
    filled(manager, make_seq(0, 8))
    copy = filled(manager, make_seq(1, 8, read_prefix_cache=False))
    assert copy.block_table == [2, 3]
    manager.free(copy)
    assert set(free_order(manager)[:2]) == {2, 3}  # nothing to lose: first to be reused
    assert manager.get_computed_blocks(make_seq(2, 8)) == [0, 1]


def test_unregister_forgets_only_what_is_still_there() -> None:
    manager = BlockManager(2, 4)
    a = make_seq(0, 8)
    manager.allocate_slots(a, 8)
    registered = manager.register(a, 0, 8)
    assert [block for _, block in registered] == [0, 1]
    manager.free(a)
    filled(manager, make_seq(1, [9, 9, 9, 9]))  # block 1 now holds another text
    manager.unregister(registered)
    assert manager.get_computed_blocks(make_seq(2, 8)) == []
    assert manager.get_computed_blocks(make_seq(3, [9, 9, 9, 9])) == [1]


def test_unregister_leaves_a_later_copy_alone() -> None:
    manager = BlockManager(2, 4)
    a, b = make_seq(0, 4), make_seq(1, 4)
    manager.allocate_slots(a, 4)
    registered = manager.register(a, 0, 4)
    manager.unregister(registered)
    manager.allocate_slots(b, 4)
    manager.register(b, 0, 4)
    manager.unregister(registered)
    assert manager.get_computed_blocks(make_seq(2, 4)) == b.block_table == [1]


def test_only_blocks_that_become_full_are_registered() -> None:
    manager = BlockManager(8, 4)
    seq = make_seq(0, 10)
    manager.allocate_slots(seq, 10)
    spans = [(0, 3), (3, 4), (4, 7), (7, 10)]
    assert [len(manager.register(seq, *span)) for span in spans] == [0, 1, 0, 1]


def test_reset_forgets_everything_but_not_under_a_running_sequence() -> None:
    manager = BlockManager(4, 4)
    seq = filled(manager, make_seq(0, 8))
    assert not manager.reset_prefix_cache()
    assert manager.get_computed_blocks(make_seq(1, 8)) == [0, 1]
    manager.free(seq)
    assert manager.reset_prefix_cache()
    assert manager.get_computed_blocks(make_seq(2, 8)) == []


def test_disabled_cache_never_matches() -> None:
    manager = BlockManager(4, 4, enable_prefix_caching=False)
    seq = make_seq(0, 8)
    manager.allocate_slots(seq, 8)
    assert manager.register(seq, 0, 8) == []
    assert manager.get_computed_blocks(make_seq(1, 8)) == []


def test_digest_covers_tokens_order_and_parent() -> None:
    digests = [block_digest(p, t) for p in (b"", b"x") for t in ([1, 2], [2, 1], [1, 2, 0], [1 << 40, 2], [-1, 2])]
    assert len(set(digests)) == len(digests)
    assert block_digest(b"x", [1, 2]) == block_digest(b"x", [1, 2])


def test_slot_mapping_is_block_times_size_plus_offset() -> None:
    table = [7, 2, 5]
    everything = [table[p // 4] * 4 + p % 4 for p in range(12)]
    for start in range(12):
        for stop in range(start + 1, 13):
            assert slot_mapping(table, start, stop, 4) == everything[start:stop]
            for store_from in range(13):
                expected = [everything[p] if p >= store_from else -1 for p in range(start, stop)]
                assert slot_mapping(table, start, stop, 4, store_from) == expected


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_cache_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(num_blocks, block_size)

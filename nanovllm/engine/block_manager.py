"""The KV cache as blocks: who holds which, and which hold a prefix that somebody may want again.

The cache is `num_blocks` blocks of `block_size` token slots. A sequence owns a table of blocks; slot = block id *
block_size + offset. Three ideas, from PagedAttention (vLLM) and its automatic prefix caching:

*Reference counts.* Sequences with the same prefix hold the same blocks. Only full blocks are shared, so nobody ever
writes into a shared block and no copy-on-write is needed.

*Content addresses.* The digest of a full block covers its tokens and, through its parent's digest, all tokens before
it (and a salt). The digest is a 128-bit BLAKE2b from the standard library: a user cannot construct a collision, so
a matching digest means matching text, and tokens need not be kept or compared.

*A free block keeps its content.* The free list is also the eviction queue, least recently used first. A finished
sequence gives its blocks back tail first, so that the long tail of a conversation goes before its common beginning;
blocks without a digest have nothing to lose and go to the very front.

Every operation is O(1) per block. This module knows no tensors: it decides where KV goes, never touches it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from nanovllm.engine.sequence import Sequence

DIGEST_BYTES = 16

Registered = tuple[bytes, int]  # a digest and the block that was registered under it


def block_digest(parent: bytes, token_ids: list[int]) -> bytes:
    """Digest of a full block: `parent` is the digest of the block before it, or of the salt for the first block."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockManager:
    """Hands out the blocks of one KV cache. Counters are in blocks unless their name says tokens."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs at least one block and one slot, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_query_tokens = 0  # tokens looked up when a sequence was first admitted
        self.prefix_hit_tokens = 0  # ... and found
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks  # what the block is registered under
        self._block_of: dict[bytes, int] = {}  # the inverse: digest -> block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be reused first

    @property
    def num_free_blocks(self) -> int:
        """Blocks no sequence holds; some of them still hold a prefix that can be matched or evicted."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    # -- prefix cache ------------------------------------------------------------------------------------------------

    def get_computed_blocks(self, seq: Sequence) -> list[int]:
        """The longest run of cached blocks, from the first token on, that hold tokens of `seq`. Changes nothing.

        The last block counts too when it is full: every token of `seq` may be found.
        """
        computed: list[int] = []
        if not (self.enable_prefix_caching and seq.read_prefix_cache):
            return computed
        for digest in self._extend_digests(seq, seq.num_tokens // self.block_size):
            block = self._block_of.get(digest)
            if block is None:
                break
            computed.append(block)
        return computed

    def register(self, seq: Sequence, start: int, stop: int) -> list[Registered]:
        """Make the blocks findable that become full when tokens [start, stop) of `seq` are stored.

        Called when those tokens are *scheduled*, so that a sequence admitted in the same step can share them. If the
        step then fails, `unregister` must be given what this returns: the blocks were never written.
        """
        first, last = start // self.block_size, stop // self.block_size
        registered: list[Registered] = []
        if first == last or not self.enable_prefix_caching:
            return registered
        digests = self._extend_digests(seq, last)
        for i in range(first, last):
            digest, block = digests[i], seq.block_table[i]
            # The first copy of a text stays the one to share; and a block found in the cache has its digest already.
            if digest not in self._block_of and self._digests[block] is None:
                self._digests[block] = digest
                self._block_of[digest] = block
                registered.append((digest, block))
        return registered

    def unregister(self, registered: Iterable[Registered]) -> None:
        """Forget blocks whose content was never written. Harmless for blocks that were evicted since."""
        for digest, block in registered:
            if self._block_of.get(digest) == block:
                del self._block_of[digest]
                self._digests[block] = None

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, as after a change of weights. Returns False, and does nothing, while any
        sequence holds blocks: its KV is of the old weights."""
        if len(self._free) != self.num_blocks:
            return False
        self._block_of.clear()
        self._digests = [None] * self.num_blocks
        return True

    def count_lookup(self, seq: Sequence, hit_tokens: int) -> None:
        """Statistics: one sequence was admitted, and `hit_tokens` of its tokens were in the cache."""
        if self.enable_prefix_caching and seq.read_prefix_cache:
            self.prefix_query_tokens += seq.num_tokens
            self.prefix_hit_tokens += hit_tokens

    # -- blocks ------------------------------------------------------------------------------------------------------

    def allocate_slots(
        self, seq: Sequence, num_tokens: int, computed_blocks: list[int] | None = None, keep_free: int = 0
    ) -> bool:
        """Extend `seq.block_table` until it has slots for `num_tokens` tokens; all or nothing.

        `computed_blocks` (from `get_computed_blocks`, for an empty table) come first and are shared. `keep_free`
        blocks must remain free afterwards. Returns False, and changes nothing, when there are too few.
        """
        shared = computed_blocks or []
        revived = [block for block in shared if self._ref_counts[block] == 0]
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(shared)
        if num_new + len(revived) + keep_free > len(self._free):
            return False
        for block in revived:  # before taking new blocks, which would evict them
            del self._free[block]
        for block in shared:
            self._ref_counts[block] += 1
        seq.block_table.extend(shared)
        for _ in range(num_new):
            seq.block_table.append(self._take_block())
        return True

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of `seq`. What they hold stays findable until they are reused."""
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)
        # A new list, because a step in flight may still be reading the old one.
        seq.block_table = []

    def _take_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:  # evict
            del self._block_of[digest]
            self._digests[block] = None
        self._ref_counts[block] = 1
        return block

    def _extend_digests(self, seq: Sequence, num_full_blocks: int) -> list[bytes]:
        """Digests of the first `num_full_blocks` blocks of `seq`; each block is hashed once in its life."""
        digests, size = seq.block_digests, self.block_size
        if not digests and num_full_blocks:
            digests.append(block_digest(block_digest(seq.cache_salt, []), seq.token_ids[:size]))
        for i in range(len(digests), num_full_blocks):
            digests.append(block_digest(digests[-1], seq.token_ids[i * size : (i + 1) * size]))
        return digests[:num_full_blocks] if len(digests) > num_full_blocks else digests

"""The message from the scheduler to the device side: which sequence runs which tokens, and where their KV goes.

A batch is a snapshot. It stays valid while its step is in flight, whatever happens to its sequences meanwhile:
token lists only grow, and a sequence that loses its blocks gets a new table, so the list held here keeps its entries.
No tensors here; `input_builder` turns a batch into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.engine.sequence import Sequence


class ScheduledSequence(NamedTuple):
    """Tokens [start, start + num_tokens) of one sequence. A tuple, because hundreds are made in every step."""

    seq: Sequence
    start: int  # absolute position of the first token to run; the KV of all tokens before it exists
    num_tokens: int
    is_decode: bool  # one token of a sequence that ran before: reads no KV that this step's other sequences write
    samples: bool  # the chunk reaches the sequence's last token, so its last logits choose the next one
    store_from: int  # KV of positions below this is in shared blocks already and must not be stored
    block_table: list[int]  # covers at least `context_len` tokens

    @property
    def context_len(self) -> int:
        """KV length the last token sees, the tokens of this step included."""
        return self.start + self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to run, as far as they are known: a decode's may be in flight."""
        return self.seq.token_ids[self.start : self.start + self.num_tokens]

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are wanted and some of this chunk's predict one."""
        return self.seq.num_prompt_logprobs is not None and self.start < self.seq.num_prompt_tokens - 1

    def slots(self, block_size: int) -> list[int]:
        """Where the KV of each token goes, -1 = nowhere; see `slot_mapping`."""
        return slot_mapping(self.block_table, self.start, self.context_len, block_size, self.store_from)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Decodes come first, then chunks; among the chunks, the newly admitted sequences come last.

    Within a layer, the KV of *all* tokens must be stored before the attention of the chunks runs: a chunk may read
    blocks that another sequence of the same batch fills. Decodes read only their own token and earlier steps.
    """

    scheduled: tuple[ScheduledSequence, ...]
    num_decodes: int
    num_tokens: int
    num_samples: int  # sequences with `samples`: one row of logits and one sampled token each, in batch order
    admitted: tuple[Sequence, ...] = ()  # entered (or re-entered) the running set in this step
    preempted: tuple[Sequence, ...] = ()  # lost their blocks in this step and wait again
    registered: tuple[tuple[bytes, int], ...] = ()  # prefix-cache entries this step makes true; undone if it fails

    @property
    def is_empty(self) -> bool:
        return not self.scheduled


def slot_mapping(block_table: list[int], start: int, stop: int, block_size: int, store_from: int = 0) -> list[int]:
    """Slots of the tokens at positions [start, stop): block id * block_size + offset, or -1 below `store_from`."""
    first = min(max(start, store_from), stop)
    slots = [-1] * (first - start)
    while first < stop:
        index, offset = divmod(first, block_size)
        last = min(stop, (index + 1) * block_size)
        slot = block_table[index] * block_size + offset
        slots.extend(range(slot, slot + last - first))
        first = last
    return slots

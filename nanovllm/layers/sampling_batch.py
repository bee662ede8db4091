"""The host side of sampling: what R sequences ask for, packed into arrays and sent to the device in one copy.

A `SamplingBatch` depends on the parameters only, so in a run of decode steps it is built once; what changes with each
token (counts for penalties, `min_tokens`) is a second, smaller copy, made only for rows that need it.
This module computes nothing on logits; `logits` and `sampler` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nanovllm.kernels.sample_cut import RowParams
from nanovllm.layers.logits import Penalties
from nanovllm.sampling_params import ResolvedSampling

_ALIGN = 16  # bytes


class TokenCounts:
    """Which tokens a sequence has seen and how often it generated each; follows the output as it grows."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._slot = {token_id: slot for slot, token_id in enumerate(ids.tolist())}
        self._ids = ids
        self._counts = np.zeros(len(ids), np.float32)
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Distinct token ids of prompt and output (int64 [N]) and their counts in the output (float32 [N])."""
        for token_id in output_token_ids[self._num_counted :]:
            slot = self._slot.setdefault(token_id, len(self._slot))
            if slot == len(self._ids):
                self._grow()
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_counted = len(output_token_ids)
        used = len(self._slot)
        return self._ids[:used], self._counts[:used]

    def _grow(self) -> None:
        extra = max(len(self._ids), 64)
        self._ids = np.concatenate([self._ids, np.zeros(extra, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(extra, np.float32)])


@dataclass(slots=True, eq=False)  # eq=False: a row is equal to itself only, which makes comparing batches cheap
class SamplingRow:
    """One sequence as the sampler sees it, for as long as it lives. The lists are the sequence's own."""

    params: ResolvedSampling
    seed: int  # any 64 bits
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # grows by a token a step
    counts: TokenCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self.counts = TokenCounts(self.prompt_token_ids) if self.params.has_penalties else None

    @property
    def bans_end(self) -> bool:
        """Whether the sequence must not end yet."""
        return len(self.output_token_ids) < self.params.min_tokens and bool(self.params.end_token_ids)


@dataclass(frozen=True, slots=True)
class Choice:
    """How N rows choose from their logits: what `kernels.sample_cut.RowParams` holds, without the positions."""

    all_greedy: bool
    any_cut: bool  # whether a row has top-k, top-p or min-p
    temperature: torch.Tensor  # [N] float32, 0 for greedy
    seeds: torch.Tensor  # [N] int64
    top_k: torch.Tensor  # [N] int32, 0 for none
    top_p: torch.Tensor  # [N] float32, 1 for none
    min_p: torch.Tensor  # [N] float32, 0 for none

    def at(self, positions: torch.Tensor) -> RowParams:
        """With the rows' positions, an integer tensor [N]."""
        return RowParams(self.temperature, self.seeds, positions, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True, slots=True)
class Special:
    """The S rows of a batch whose logits are changed before the choice; tensors on the device."""

    numbers: list[int]  # which rows of the batch, ascending
    index: torch.Tensor  # [S] int64, the same
    choice: Choice
    penalties: Penalties
    bias_index: torch.Tensor  # [N] int64, flat indices into [S, V]
    bias: torch.Tensor  # [N] float32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """R rows as the device needs them."""

    rows: tuple[SamplingRow, ...]
    choice: Choice
    special: Special | None
    scored: list[int]  # rows that want log-probabilities
    scored_index: torch.Tensor  # [L] int64, the same

    @classmethod
    def build(cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> SamplingBatch:
        """Pack the parameters of `rows`; one copy to the device."""
        special = [i for i, row in enumerate(rows) if row.params.changes_logits]
        scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        arrays = _pack_choice("", rows) | {"scored": np.array(scored, np.int64)}
        own = [rows[i] for i in special]
        if special:
            arrays |= _pack_choice("special.", own) | _pack_special(special, [row.params for row in own], vocab_size)
        tensors = to_device(arrays, device)
        return cls(
            rows=tuple(rows),
            choice=_choice("", rows, tensors),
            special=_special(special, own, tensors) if special else None,
            scored=scored,
            scored_index=tensors["scored"],
        )

    def special_entries(self, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """What depends on the tokens so far, as flat indices into [S, V]; one copy to the device, if there is any.

        "seen" (int64 [N]) and "counts" (float32 [N]): see `logits.penalise_`. "banned" (int64 [N]): tokens that would
        end a sequence before its `min_tokens`.
        """
        seen, counts, banned = [], [], []
        for place, number in enumerate(self.special.numbers if self.special else ()):
            row, start = self.rows[number], place * vocab_size
            if row.counts is not None:
                ids, count = row.counts.update(row.output_token_ids)
                seen.append(start + ids)
                counts.append(count)
            if row.bans_end:
                banned.append(start + np.array(row.params.end_token_ids, np.int64))
        arrays = {}
        if seen:
            arrays = {"seen": np.concatenate(seen), "counts": np.concatenate(counts)}
        if banned:
            arrays["banned"] = np.concatenate(banned)
        return to_device(arrays, device) if arrays else {}


def _pack_choice(prefix: str, rows: Sequence[SamplingRow]) -> dict[str, np.ndarray]:
    """Arrays of a `Choice`, their names with a prefix."""
    params = [row.params for row in rows]
    return {
        prefix + "temperature": np.array([p.temperature for p in params], np.float32),
        prefix + "seeds": np.array([row.seed % 2**64 for row in rows], np.uint64).view(np.int64),
        prefix + "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        prefix + "top_p": np.array([p.top_p for p in params], np.float32),
        prefix + "min_p": np.array([p.min_p for p in params], np.float32),
    }


def _choice(prefix: str, rows: Sequence[SamplingRow], tensors: dict[str, torch.Tensor]) -> Choice:
    return Choice(
        all_greedy=all(row.params.is_greedy for row in rows),
        any_cut=any(row.params.has_filters for row in rows),
        **{name: tensors[prefix + name] for name in ("temperature", "seeds", "top_k", "top_p", "min_p")},
    )


def _pack_special(special: list[int], params: list[ResolvedSampling], vocab_size: int) -> dict[str, np.ndarray]:
    """Arrays of the special rows, whose parameters are `params`."""
    bias = [(i * vocab_size + token_id, value) for i, p in enumerate(params) for token_id, value in p.logit_bias]
    return {
        "special.index": np.array(special, np.int64),
        "repetition": np.array([p.repetition_penalty for p in params], np.float32),
        "presence": np.array([p.presence_penalty for p in params], np.float32),
        "frequency": np.array([p.frequency_penalty for p in params], np.float32),
        "bias_index": np.array([index for index, _ in bias], np.int64),
        "bias": np.array([value for _, value in bias], np.float32),
    }


def _special(special: list[int], own: Sequence[SamplingRow], tensors: dict[str, torch.Tensor]) -> Special:
    """The special rows, `own`, from their tensors."""
    return Special(
        numbers=special,
        index=tensors["special.index"],
        choice=_choice("special.", own, tensors),
        penalties=Penalties(tensors["repetition"], tensors["presence"], tensors["frequency"]),
        bias_index=tensors["bias_index"],
        bias=tensors["bias"],
    )


def to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on the device, by one copy of all of them: each copy costs the host as much as a launch."""
    offsets, size = {}, 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-array.nbytes // _ALIGN) * _ALIGN
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = host.numpy()
    for name, array in arrays.items():
        buffer[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
    packed = host.to(device, non_blocking=True)
    return {
        name: packed[offsets[name] : offsets[name] + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for name, array in arrays.items()
    }

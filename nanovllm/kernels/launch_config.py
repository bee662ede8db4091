"""Launch configurations: data, chosen by pure functions of the problem's shape. Kernels never tune themselves.

Imports neither torch nor triton, so that the policy is tested as a policy. Constants name the measurement they
come from; "to tune" marks those that have none yet.
"""

from __future__ import annotations

from dataclasses import dataclass


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class RowConfig:
    """Row-wise kernels: a program owns `rows` rows of `block` columns."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """qk_norm_rope_store: a program owns `heads` heads of one token."""

    heads: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Decode attention: tiles of `block_n` keys; at most `max_splits` programs share a sequence's keys.

    `min_split` is the fewest keys worth a program of their own; a multiple of `block_n`.
    """

    block_n: int
    max_splits: int
    min_split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Prefill attention: `block_m` rows (tokens x `pack` heads of one KV head) against tiles of `block_n` keys."""

    block_m: int
    block_n: int
    pack: int
    num_warps: int
    num_stages: int


def rms_norm_config(num_rows: int, width: int) -> RowConfig:
    """One row a program, 16 bytes a thread and load where the width allows. To tune."""
    block = next_power_of_2(width)
    return RowConfig(rows=1, block=block, num_warps=min(max(block // 512, 1), 16))


def silu_mul_config(num_rows: int, width: int) -> RowConfig:
    """`width` is I, the output's. To tune."""
    block = min(next_power_of_2(width), 1024)
    return RowConfig(rows=1, block=block, num_warps=4)


def rope_config(num_tokens: int, num_heads: int, num_kv_heads: int) -> HeadConfig:
    """One head a program while the GPU is not full, then up to eight. To tune."""
    heads = min(next_power_of_2(num_heads), 8) if num_tokens * num_heads >= 2048 else 1
    return HeadConfig(heads=heads, num_warps=4 if heads >= 4 else 1)


def decode_config(
    num_seqs: int, num_kv_heads: int, head_dim: int, element_size: int, max_context_len: int, num_sms: int
) -> DecodeConfig:
    """Splits so that the grid fills the GPU about four times over, none shorter than `min_split` keys. To tune."""
    block_n = 32 if element_size == 4 else 64
    if head_dim > 128:
        block_n //= 2
    programs = max(num_seqs * num_kv_heads, 1)
    wanted = cdiv(4 * num_sms, programs)
    min_split = max(64, block_n)
    max_splits = max(1, min(wanted, cdiv(max_context_len, min_split), 64))
    return DecodeConfig(block_n, max_splits, min_split, num_warps=4, num_stages=3)


def prefill_config(group: int, head_dim: int, element_size: int, max_query_len: int) -> PrefillConfig:
    """`group` = query heads per KV head. To tune."""
    pack = group if group & (group - 1) == 0 and group <= 16 else 1
    if element_size == 4:
        return PrefillConfig(block_m=32, block_n=32, pack=pack, num_warps=4, num_stages=1)
    rows = max_query_len * pack
    if rows <= 64 or head_dim > 128:
        return PrefillConfig(block_m=64, block_n=64, pack=pack, num_warps=4, num_stages=2)
    return PrefillConfig(block_m=128, block_n=64, pack=pack, num_warps=8, num_stages=3)

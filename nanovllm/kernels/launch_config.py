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
class Gpu:
    """What the policies know of a device."""

    num_sms: int
    shared_memory: int  # bytes one program may take
    pdl: bool = False  # programmatic dependent launch: Hopper or later, and a Triton that knows it


H100 = Gpu(num_sms=132, shared_memory=227 * 1024)


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
    """Decode attention: tiles of `block_n` keys, and for each KV head `splits` programs a sequence and `spare` ones.

    That is how many there are; the sequences share them by length, one at least for each. `min_split` is the fewest
    keys worth a program of their own; a multiple of `block_n`. Nor are splits shorter than `keep_whole` times the mean
    length of the sequences. `max_registers`, for `rope_attention` alone and at most
    16 query heads a KV head, caps those of a thread; None leaves it to the compiler.
    """

    block_n: int
    splits: int
    min_split: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    spare: int = 0
    keep_whole: int = 0

    def slots(self, num_seqs: int) -> int:
        """Programs of each KV head. A sequence by itself has its `splits`: nobody is short of what it leaves."""
        return num_seqs * self.splits + (self.spare if num_seqs > 1 else 0)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Prefill attention: `block_m` rows (tokens x `pack` heads of one KV head) against tiles of `block_n` keys."""

    block_m: int
    block_n: int
    pack: int
    num_warps: int
    num_stages: int


# Constants below: H100 80GB HBM3, Triton 3.6.0, CUDA graphs, 2026-11-23, unless a comment says otherwise.


def rms_norm_config(num_rows: int, width: int) -> RowConfig:
    """One row a program.

    Few rows wait for latency: up to 4 warps (width 1024 and 4096, one row: 1.43 and 1.68 us). Many rows wait for
    memory: 16 elements a thread (8192 rows of 4096, with residual: 2.87 TB/s).
    """
    block = next_power_of_2(width)
    num_warps = min(block // 256, 4) if num_rows <= 16 else min(block // 512, 16)
    return RowConfig(rows=1, block=block, num_warps=max(num_warps, 1))


def silu_mul_config(num_rows: int, width: int) -> RowConfig:
    """`width` is I, the output's. Best or within 1 % at 1, 16, 256 and 8192 rows of 3072 (1.35 us; 2.72 TB/s)."""
    return RowConfig(rows=1, block=min(next_power_of_2(width), 1024), num_warps=4)


def rope_config(num_tokens: int, num_heads: int, num_kv_heads: int) -> HeadConfig:
    """One head and one warp a program for few tokens (1.72 us for one), eight heads for many (8192: 2.6 TB/s)."""
    if num_tokens <= 96:
        return HeadConfig(heads=1, num_warps=1)
    return HeadConfig(heads=min(next_power_of_2(num_heads), 8), num_warps=2)


def decode_config(
    num_seqs: int, num_kv_heads: int, head_dim: int, element_size: int, max_context_len: int, gpu: Gpu
) -> DecodeConfig:
    """Programs of 64 keys a tile and 4 warps; splits as short as the batch is small.

    A lone sequence needs short splits to reach every SM, and a deeper pipeline where at most two programs share one.
    A full batch needs no split, except that one long sequence among short ones must not finish last: long splits, but
    room for many.
    Qwen3-0.6B (16 query heads, 8 KV heads of 128, bf16), contexts 100 to 2000: 188 us for 131 sequences (2.75 TB/s),
    29 us for 16; one sequence of 1,024 keys 7.3 us. Tiles of 32 keys and 2 warps are as fast in large batches. Merging
    inside the last program of a sequence, without a second kernel: 2 to 20 % slower up to 16 sequences, 1 % faster
    or slower at 131.
    """
    block_n = 32 if element_size == 4 or head_dim > 128 else 64
    programs = max(num_seqs * num_kv_heads, 1)
    if programs <= gpu.num_sms:
        min_split, most = 64, min(max(gpu.num_sms // programs, 16), 64)
    else:
        min_split, most = 256 if programs <= 2 * gpu.num_sms else 512, 32
    splits = max(1, min(most, cdiv(max_context_len, min_split)))
    row_bytes = next_power_of_2(head_dim) * element_size
    wanted = 3 if splits * programs <= 2 * gpu.num_sms else 2
    num_stages = _stages_that_fit(wanted, 0, 2 * block_n * row_bytes, gpu)
    return DecodeConfig(block_n, splits, min_split, num_warps=4, num_stages=num_stages)


SHARED_BEYOND = 8192  # keys that a sequence of a full batch may have before it gets programs of its own; to tune


def rope_attention_config(
    num_seqs: int, num_kv_heads: int, head_dim: int, element_size: int, max_context_len: int, gpu: Gpu
) -> DecodeConfig:
    """Few keys or few sequences: the first tile of 128 waits in registers. Else tiles are on the way to shared memory.

    Splits are merged by a kernel of their own. Measured in the decode chain (H100, Triton 3.6.0, Qwen3-0.6B,
    2026-11-26), us a layer at contexts 256 / 1,024 / 4,096. One sequence: up to 16 splits 17.2 / 18.8 / 24.1; in two
    stages 17.7 / 18.3 / 25.5. Room for 16 splits also where the bound allows 4: 17.5 instead of 17.9.

    Two to six sequences of 8 KV heads: at most 128 registers a thread, so that two programs share an SM, and three
    programs for two SMs, so that those of the next kernels find room. Two sequences, 12 splits: 18.6 / 20.6 / 30.4,
    with 8 17.9 / 24.3 / 37.2, 16 18.9 / 20.7 / 33.7, 16 and 162 registers 19.0 / 22.6 / 34.2. Three: 18.8 / 22.3 /
    36.9, 4 warps 19.4 / 22.9 / 37.9. Four: 19.3 / 25.9 / 44.5, with 5 splits instead of 6 19.2 / 27.4 / 46.6, 8 19.5 /
    29.4 / 48.0. Six: 22.3 / 28.5 / 56.3, in three stages 20.8 / 30.0 / 55.7. The cap slows down one sequence (19.1 at
    1,024) and sixteen (31.0 at 256).

    Eight, beyond 512 keys: 4 splits in registers 36.1 and 70.8, two in three stages 33.9 and 67.1. Sixteen, up to 512
    keys: no splits 29.1, three stages 30.3; beyond, 4 splits in registers 50.0 and 124; no splits in three stages 47.2
    and 113, in four 47.9 and 116. More programs than SMs, 32 sequences at 256 / 1,024: tiles of 64 in three stages 52.1
    / 85.4, of 128 in registers 55.1 / 93.7.

    Full batches have one program a sequence; where contexts may be long also `spare` ones, fewer than one for each, so
    that sequences of equal length are not split. One of 16,384 keys among others of 256, 16 / 64 sequences: 149 and
    203 without, 66 and 78 with; 31 instead of 15 spare ones for sixteen slower by 5. Where programs fill three SMs of
    four, sequences below twice the mean stay whole: of 1,800 to 2,200 keys, 16 / 32 sequences 72.0 / 118.8, split 78.1
    / 131.6, before 72.1 / 116.8. Nine are faster split: 56.9 instead of 57.6, and of 100 to 2,000 keys 46.6, 53.2.
    """
    if element_size == 4 or head_dim > 128:
        return decode_config(num_seqs, num_kv_heads, head_dim, element_size, max_context_len, gpu)
    programs, short = num_seqs * num_kv_heads, max_context_len <= 512
    block_n, stages, max_registers, min_split, splits, spare, keep_whole = 128, 1, None, 128, 1, 0, 0
    if programs <= 8:
        num_warps, splits = 8, 16
    elif programs <= 48:
        num_warps, max_registers = 8, 128
        splits = max(1, 3 * gpu.num_sms // (2 * programs))
        splits = min(splits, 8) if short else splits
    elif programs > gpu.num_sms:
        num_warps, block_n, stages, min_split = 4, 64, 3, 512
        spare = min(num_seqs - 1, 31) if max_context_len > SHARED_BEYOND else 0
    elif short:
        num_warps, min_split = 8, 512
    else:
        num_warps, stages, min_split = 8, 3, 512
        splits = max(1, gpu.num_sms // programs)
        spare = num_seqs - 1 if splits == 1 and max_context_len > SHARED_BEYOND else 0
    if max_context_len <= min_split:
        splits, spare = 1, 0
    if spare and 4 * programs > 3 * gpu.num_sms:
        keep_whole = 2
    row_bytes = next_power_of_2(head_dim) * element_size
    # A pipeline keeps one tile less than it has stages; a lone tile passes through half by half. 16 KB for the rest.
    while max(stages - 1, 1) * 2 * block_n * row_bytes > gpu.shared_memory - 16384:
        block_n //= 2
    return DecodeConfig(block_n, splits, min_split, num_warps, stages, max_registers, spare, keep_whole)


def _stages_that_fit(stages: int, fixed: int, a_stage: int, gpu: Gpu) -> int:
    """At most `stages` buffers of `a_stage` bytes beside `fixed` bytes (consumer GPUs have 99 KB, an H100 227)."""
    return max(1, min(stages, (gpu.shared_memory - fixed) // a_stage))


def prefill_config(
    num_tokens: int, num_heads: int, group: int, head_dim: int, element_size: int, gpu: Gpu
) -> PrefillConfig:
    """The largest tile of rows that gives every SM more than one program. `group` = query heads per KV head.

    2048 tokens of 16 heads of 128: 52.5 us with 128 rows, 53.5 with 64; 1024 tokens: 26.6 and 24.1.
    """
    pack = group if group & (group - 1) == 0 and group <= 16 else 1
    if element_size == 4:
        return PrefillConfig(block_m=32, block_n=32, pack=pack, num_warps=4, num_stages=1)
    large = head_dim <= 128 and 2 * num_tokens * num_heads >= 3 * 128 * gpu.num_sms
    block_m, block_n = 128 if large else 64, 64 if head_dim <= 128 else 32
    row_bytes = next_power_of_2(head_dim) * element_size
    num_stages = _stages_that_fit(3, block_m * row_bytes, 2 * block_n * row_bytes, gpu)
    return PrefillConfig(block_m, block_n, pack, num_warps=8 if large and head_dim > 64 else 4, num_stages=num_stages)

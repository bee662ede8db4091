"""Configurations of `rms_norm_linear`: which variant, in which shape, and what to guess where nobody has measured.

Data and pure functions; no torch, no triton. What was measured stands in tables: `fusion_table`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from nanovllm.kernels.launch_config import Gpu, cdiv, next_power_of_2

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # dtypes the kernels compute in
MAX_GEMV_ROWS = 8
MAX_PANEL_ROWS = 16
MAX_PAIR_ROWS = 64  # above it, only a measurement may say that a norm and a dependent tile pay
MAX_CHUNKS = 160  # of a row, in the unrolled loops of gemv and panel: compile time grows with it
MAX_GRID_Y = 65535  # blocks of rows of a tile: CUDA's limit
MAX_GUESSED_ROWS = 16  # above it, only a measurement may say that fusion pays
MAX_FLOAT32_ROWS = 4
EARLY_ROWS = 8  # dependents: above it x itself is large, and would travel behind the next kernel's weights
_THREAD_BYTES = 512  # a thread's share of a GEMV's weight tile: half of its registers
_LANE_BYTES = 256  # a lane's share of a GEMV's weight rows, by the heuristic
_WINDOW_BYTES = 384  # of a thread's share of a GEMV's weight rows, where they come in several windows
_PANEL_BYTES = 1200  # what a thread of a panel may ask for; above some 900 of it the compiler loads x in two goes


@dataclass(frozen=True, slots=True)
class Problem:
    """[M, K] x [N, K] -> [M, N]; `n` counts outputs, so with SwiGLU the weight has 2 N rows."""

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    swiglu: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the weight, packed ones counted twice."""
        return 2 * self.n if self.swiglu else self.n

    @property
    def element_size(self) -> int:
        """Bytes an element."""
        return ELEMENT_SIZES[self.dtype]

    def bytes_moved(self, *, fused: bool = True) -> int:
        """Global memory traffic: weight, x and y once; unfused, the normalised x and the packed product as well.

        Bias, residual and gamma are left out: both forms read them once.
        """
        elements = self.weight_rows * self.k + self.m * (self.k + self.n)
        if not fused:
            elements += 2 * self.m * self.k + (2 * self.m * self.weight_rows if self.swiglu else 0)
        return elements * self.element_size


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """One way to run the operator, as text "unfused" or the fields that its variant uses, in their order.

    "gemv/16/256/8", "panel/8/16/1024/4", "tile/16/64/128/4/5", "pair/32/64/128/4/4"; a dependent launch ends in "/pdl",
    one with a late trigger (gemv and panel) in "/late".
    gemv: each warp holds `block_n` / `num_warps` weight rows in registers, in chunks of `block_k` columns.
    panel: the same on tensor cores, for at most `block_m` rows of x; `block_k` columns of the weight are in flight, of
    which each warp multiplies 32 in every 32 * `num_warps`.
    tile: products of [block_n, block_k] by [block_k, block_m], `num_stages` of them in flight.
    pair: two kernels, the norm and a tile without one, which starts beside it, and if the pair is a dependent has asked
    for its weights when the norm has ended.
    `block_n` counts weight rows: with SwiGLU a program writes half as many outputs.
    `launch_pdl`: programmatic dependent launch (Hopper, Triton 3.6): the kernel starts before its predecessor ends and
    waits for it as late as it can, after asking for its weights: they must have been in memory before the predecessor
    began. (The tile of a pair is a dependent of its norm anyhow.) `late_trigger`: let the kernel behind start only when
    x has been asked for.
    """

    variant: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    launch_pdl: bool = False
    late_trigger: bool = False

    def __post_init__(self) -> None:
        if self.late_trigger and not self.launch_pdl:  # it has no text, and the operator would never hear of it
            raise ValueError("late_trigger is for dependent launches: set launch_pdl as well")

    def __str__(self) -> str:
        numbers: tuple[int, ...] = ()
        if self.variant == "gemv":
            numbers = (self.block_n, self.block_k, self.num_warps)
        elif self.variant == "panel":
            numbers = (self.block_m, self.block_n, self.block_k, self.num_warps)
        elif self.variant in ("tile", "pair"):
            numbers = (self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages)
        ending = ["late" if self.late_trigger else "pdl"] if self.launch_pdl else []
        return "/".join([self.variant, *map(str, numbers), *ending])

    @classmethod
    def parse(cls, text: str) -> FusionConfig:
        """The inverse of `str`; ValueError for text that is none."""
        match = re.fullmatch(
            r"unfused|(?:gemv(?:/\d+){3}|panel(?:/\d+){4})(?:/pdl|/late)?|(?:tile|pair)(?:/\d+){5}(?:/pdl)?", text
        )
        if match is None:
            known = '"unfused", "gemv/16/256/8", "panel/8/16/1024/4", "tile/16/64/128/4/5" or "pair/32/64/128/4/4"'
            raise ValueError(f"no fusion config: {text!r}; use {known}")
        variant, *parts = text.split("/")
        if variant == "unfused":
            return UNFUSED
        numbers = [int(part) for part in parts if part.isdigit()]
        flags = (len(parts) > len(numbers), parts[-1] == "late")
        if variant == "gemv":
            block_n, block_k, num_warps = numbers
            return cls("gemv", 0, block_n, block_k, num_warps, 1, *flags)
        block_m, block_n, block_k, num_warps, num_stages = (*numbers, 1)[:5]
        return cls(variant, block_m, block_n, block_k, num_warps, num_stages, *flags)

    def chunks_ahead(self, problem: Problem) -> int:
        """Chunks of its rows that a warp of a gemv has in flight: all, or what a third of its registers holds."""
        chunks = cdiv(problem.k, self.block_k)
        if problem.m > 1:
            return chunks
        lane = self.block_n // self.num_warps * self.block_k * problem.element_size // 32
        return min(chunks, max(1, _WINDOW_BYTES // max(lane, 1)))

    def faults(self, problem: Problem, gpu: Gpu) -> list[str]:
        """Why this configuration cannot run `problem` on `gpu`; [] when it can."""
        if self.variant == "unfused":
            return []
        blocks = {"block_n": self.block_n, "num_warps": self.num_warps}
        if self.variant != "panel":
            blocks["block_k"] = self.block_k
        if self.variant != "gemv":
            blocks["block_m"] = self.block_m
        found = [f"{name}={v} is no power of two" for name, v in blocks.items() if v < 1 or v & (v - 1)]
        if self.num_warps > 32:
            found.append(f"num_warps={self.num_warps} is more than 32")
        if self.late_trigger and self.variant in ("tile", "pair"):
            found.append("late_trigger is for dependent launches of gemv and panel")
        if self.launch_pdl and not gpu.pdl:
            found.append("launch_pdl needs a GPU that launches dependents: Hopper or later, with Triton 3.6")
        if found:
            return found
        if problem.swiglu and self.block_n < 2:
            found.append("swiglu needs block_n >= 2: a gate row and its up row")
        if self.variant == "panel":
            return self._panel_faults(problem, gpu)
        if self.variant == "gemv":
            chunks = self.chunks_ahead(problem)
            held = self.block_n * chunks * self.block_k * problem.element_size
            if self.block_k < 32 or cdiv(problem.k, self.block_k) > MAX_CHUNKS:
                found.append(f"block_k={self.block_k} is too narrow for {problem.k} columns")
            least = self.num_warps * (2 if problem.swiglu else 1)
            if self.block_n < least:
                found.append(f"each of {self.num_warps} warps takes rows of its own: block_n must be at least {least}")
            if problem.m > MAX_GEMV_ROWS:
                found.append(f"a GEMV takes at most {MAX_GEMV_ROWS} rows, x has {problem.m}")
            if held > _THREAD_BYTES * 32 * self.num_warps:
                found.append(f"a weight tile of {held} bytes does not fit into the registers of {self.num_warps} warps")
            held += self.num_warps * (problem.m - 1) * chunks * self.block_k * problem.element_size
            if held > _PANEL_BYTES * 32 * self.num_warps:
                found.append(f"{problem.m} rows of x do not fit beside the weight into the registers of a warp")
            return found
        smallest = {"block_m": 16, "block_n": 16, "block_k": 16, "num_stages": 1}
        found += [f"{name} must be at least {low}" for name, low in smallest.items() if getattr(self, name) < low]
        buffers = self.num_stages * (self.block_n + self.block_m) * self.block_k * problem.element_size
        if buffers > gpu.shared_memory:
            found.append(f"{buffers} bytes of tiles exceed the {gpu.shared_memory} of shared memory")
        if problem.m > MAX_GRID_Y * self.block_m:
            found.append(f"a grid has at most {MAX_GRID_Y:,} blocks of {self.block_m} rows, x has {problem.m}")
        return found

    def _panel_faults(self, problem: Problem, gpu: Gpu) -> list[str]:
        width = 32 * self.num_warps
        found = []
        if problem.element_size != 2:
            found.append(f"a panel multiplies 16-bit numbers, not {problem.dtype}")
        if problem.m > self.block_m:
            found.append(f"a panel takes at most block_m={self.block_m} rows, x has {problem.m}")
        least = 16 if self.block_m == 8 or problem.swiglu else 8
        if self.block_m > MAX_PANEL_ROWS:
            found.append(f"a panel takes at most {MAX_PANEL_ROWS} rows of x, block_m is {self.block_m}")
        if self.block_m < 8 or self.block_n < least:
            found.append(
                f"a panel of {self.block_m} rows of x (at least 8) takes {least} of the weight, not {self.block_n}"
            )
        if cdiv(problem.k, width) > MAX_CHUNKS:
            found.append(f"{self.num_warps} warps are too few for {problem.k} columns")
        if self.block_k < 1 or self.block_k % width:
            found.append(f"block_k={self.block_k} is no multiple of 32 columns for each of {self.num_warps} warps")
        # Weight, x and gamma in flight and two accumulators, in bytes a thread.
        held = (self.block_n + self.block_m + 8) * self.block_k * 2 // width + self.block_n * self.block_m * 4 // 32
        if held > _PANEL_BYTES:
            found.append(f"{held} bytes a thread do not fit into its registers")
        shared = self.num_warps * self.block_n * self.block_m * 4  # the warps' products on their way to one sum
        if shared > gpu.shared_memory:
            found.append(f"{shared} bytes of products exceed the {gpu.shared_memory} of shared memory")
        return found


UNFUSED = FusionConfig("unfused")


def heuristic(problem: Problem, gpu: Gpu, *, dependent: bool = False) -> FusionConfig:
    """A configuration for any problem, on GPUs and for shapes that nobody measured.

    In float32 tiles are never chosen: they sum along K in one chain, and on channels that differ by 1000 that loses
    more than twice what cuBLAS's split sums lose (H100, 2026-11-23). `dependent`: launched as one, where the GPU can.
    """
    dependent = dependent and gpu.pdl
    if problem.m > (MAX_FLOAT32_ROWS if problem.element_size == 4 else MAX_GUESSED_ROWS):
        pair = dependent and problem.element_size == 2 and problem.m <= MAX_PAIR_ROWS
        config = pair_config(problem, gpu) if pair else UNFUSED
    elif problem.m == 1 or problem.element_size == 4:
        config = gemv_config(problem, gpu)
    else:
        config = panel_config(problem)
    if config.variant == "unfused" or config.faults(problem, gpu):
        return UNFUSED
    late = config.variant != "pair" and problem.m > EARLY_ROWS
    return dataclasses.replace(config, launch_pdl=dependent, late_trigger=dependent and late)


def pair_config(problem: Problem, gpu: Gpu) -> FusionConfig:
    """Tiles of 64 weight rows, which fill a matrix instruction; of 32 where those of 64 would leave half the GPU idle.

    Then x fills it: with 64 rows, of which those that x lacks cost nothing. As dependents (H100, 2026-11-26) this is
    the best of all, or within 3 % of it, for most problems of 17 to 64 rows. A layer of Qwen3-0.6B's decode chain at
    256 / 1,024 keys (output and down projections as tiles), us: 32 rows 41.3 / 76.5, with QKV of 64 rows 43.0 / 77.7,
    gate_up of 32 rows too 43.1 / 78.0; 64 rows 55.3 / 121, 57.4 / 123, 56.9 / 124.
    """
    block_m, block_n, stages = max(16, next_power_of_2(problem.m)), 64, 4
    if cdiv(problem.weight_rows, 32) <= gpu.num_sms:
        block_m, block_n, stages = 64, 32, 5
    block_k = min(128, max(16, next_power_of_2(problem.k)))
    stage = (block_n + block_m) * block_k * problem.element_size
    return FusionConfig("pair", block_m, block_n, block_k, 4, max(1, min(stages, gpu.shared_memory // stage)))


def gemv_config(problem: Problem, gpu: Gpu) -> FusionConfig:
    """Warps of 256 or 512 bytes of weight a lane; where N <= K, on the way back to the residual stream, of one row.

    What counts is the whole layer of the decode chain, for programs of the next kernels must find room beside these
    before they may ask for their weights. Layer of Qwen3-0.6B, one row (H100, 2026-11-26), us at contexts 128 / 256 /
    384, rows by warps: as here (QKV 4 x 8, output and down projection 1 x 4, gate_up 8 x 4) 15.7 / 16.7 / 17.1. Others
    differ in one place: QKV 2 x 8 16.0 / 17.0 / 17.4; gate_up 4 x 4 15.6 / 16.9 / 17.5, 4 x 8 15.8 / 16.7 / 17.3,
    8 x 8 16.6 / 17.5 / 18.1; down projection 1 x 8 16.2 / 17.0 / 17.2. The shapes that were best for the linears alone
    (gate_up 4 x 1, output projection 2 x 4) took a microsecond more. At 256: Llama-3.2-1B 46.9 instead of 47.9 with one
    row by 4 warps for the down projection; Qwen3-4B 76.2 instead of 77.9 with it for the output projection.
    """
    row = problem.k * problem.element_size
    if problem.swiglu:
        rows, num_warps, lane = (8, 4, 2 * _LANE_BYTES) if problem.m == 1 else (4, 4, _LANE_BYTES)
    elif problem.n <= problem.k:
        rows, num_warps, lane = 1, 4, _LANE_BYTES
    else:
        rows, num_warps, lane = 4, 8, _LANE_BYTES
    while rows > (2 if problem.swiglu else 1) and rows * row > 32 * lane:
        rows //= 2
    while num_warps > 1 and cdiv(problem.weight_rows, rows * num_warps) < 0.9 * gpu.num_sms:
        num_warps //= 2
    block_k = min(512 // problem.element_size, max(32, next_power_of_2(problem.k)))  # 16 bytes a lane
    return FusionConfig("gemv", 0, rows * num_warps, block_k, num_warps)


def panel_config(problem: Problem) -> FusionConfig:
    """All of K in flight where a thread's registers hold it; few warps, for their products meet in shared memory.

    As for a GEMV the whole layer counts. Qwen3-0.6B (H100, 2026-11-26), us at context 256: four rows 19.8 as here, QKV
    of 32 rows by 4 warps 20.7, gate_up of 16 by 2 20.0, output or down projection in two goes 20.8 and 21.6; eight rows
    21.9, 22.9, 21.8, 22.2, 24.0; sixteen 28.8, QKV by 4 warps 29.1, with its whole K in flight 29.8, gate_up by 4 warps
    29.1, of 32 rows 30.0 to 33.1. Its head, sixteen rows: 106 us as here, 16 rows with all of K in flight 114, norm and
    cuBLAS 119. Four linears of Llama-3.2-1B, two to sixteen rows: norm and cuBLAS for gate_up (67 MB) and down (34 MB)
    57.2 to 62.3; gate_up as here 52.2 to 57.1, down as here 52.9 to 59.9.
    """
    block_m = max(8, next_power_of_2(problem.m))
    wide, many = problem.weight_rows >= 2048, problem.weight_rows >= 8192
    half = problem.dtype == "float16"  # takes more registers than bfloat16: what just fits there spills here
    light = wide and not many and not problem.swiglu and problem.k <= 1024  # attention starts beside it: leave room
    block_n, held = 16, 256  # bytes of weight a thread
    if block_m > 8:
        block_n = 16 if wide or problem.swiglu else 8
    elif not many and not (half and problem.k > 1024):
        block_n, held = (32 if wide and problem.k <= 1024 and (half or not light) else 16), 512
    fewest = 2 if light and block_m == 8 and not half else 4
    num_warps = max(fewest, next_power_of_2(cdiv(block_n * problem.k * problem.element_size, 32 * held)))
    if num_warps > 8:  # a window of K in flight
        num_warps = 4 if many or block_m > 8 else 8
    elif many and problem.k > 1024:
        num_warps = 4
    if block_m > 8 and problem.swiglu and not half and problem.k <= 8192:
        num_warps = 2
    while num_warps > 1 and 32 * num_warps >= 2 * problem.k:
        num_warps //= 2
    if light and block_m > 8:
        held //= 2
        num_warps = num_warps if half else 2
    elif many and block_m > 8 and not problem.swiglu and not half and problem.k <= 1024:
        block_n, num_warps = 32, 4
    width = 32 * num_warps
    block_k = max(1, min(cdiv(problem.k, width), held * 32 * num_warps // (block_n * 2 * width))) * width
    return FusionConfig("panel", block_m, block_n, block_k, num_warps)

"""The jitted half of `rms_norm_linear_fusion`: three kernels, for one row, a handful and a few dozen.

Read that module first: it states the formula, the cast order, the grid and the traffic. Here a program owns BLOCK_N
rows of the weight, for all (`gemv_kernel`) or BLOCK_M rows of x, and the whole length K: so the sum of squares is
complete where the products are, and no program waits for another. Every program repeats that sum; x is small and comes
from the L2 cache, while the weight is what memory's time goes to.

SwiGLU needs rows n and N + n of the packed weight in one program: the rows of a tile alternate gate, up, gate, up (in
a panel eight and eight), so that the main loop does not know, and the epilogue splits neighbours.

Weight rows beyond the edge are clamped to the last one and not stored: no mask stands between a load and its vector
width.

NORM=False leaves the norm out: `linear_residual`, the other half of a decoder layer.
PDL (programmatic dependent launch): a program starts while the kernel before it still runs, asks for its weights, and
waits only before its first load of anything that kernel wrote. A GEMV or a panel holds the weights in registers by
then; the tiles of `tile_kernel` stream through shared memory in a loop that must not contain the wait (triton#11905),
so it brings the beginning of its weight rows as far as the L2 cache. The kernel behind may start at once, or, LATE,
when x has been asked for: its weights would otherwise travel in front of x. `chain_config` says when which is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _weight_rows(place, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Weight row (int64) at each `place` of this program's BLOCK_N. N counts outputs."""
    place += tl.program_id(0) * BLOCK_N
    if SWIGLU:
        row = tl.minimum(place // 2, N - 1) + (place % 2) * N
    else:
        row = tl.minimum(place, N - 1)
    return row.to(tl.int64)


@jit()
def _load_residual(residual, row, M, N, residual_stride, OUTPUTS: tl.constexpr):
    """This program's columns of the residual, [rows, OUTPUTS]; zeros for rows from M on.

    Gemv and panel ask for it with x: behind a sum it would cost a wait.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (row < M)[:, None] & (output < N)[None, :]
    return tl.load(residual + row[:, None] * residual_stride + output[None, :], mask=inside, other=0.0)


@jit()
def _store(total, row, M, y, N, OUTPUTS: tl.constexpr):
    """Store this program's OUTPUTS columns. total: float32 [rows, OUTPUTS]; row: int64, not stored from M on."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (row < M)[:, None] & (output < N)[None, :]
    tl.store(y + row[:, None] * N + output[None, :], total.to(y.dtype.element_ty), mask=inside)


@jit()
def _finish(
    total, stream, row, M, weight_row, bias, y, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Bias, SwiGLU, residual, store. total: float32 [BLOCK_M, BLOCK_N], already normalised; row: int64 [BLOCK_M];
    stream: the residual [BLOCK_M, outputs], or None."""
    if bias is not None:
        total += tl.load(bias + weight_row).to(tl.float32)[None, :]
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    if SWIGLU:
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, OUTPUTS, 2)))
        total = gate * tl.sigmoid(gate) * up
    if stream is not None:
        total += stream.to(tl.float32)
    _store(total, row, M, y, N, OUTPUTS)


@jit()
def _load_chunk(tile, column, start, K: tl.constexpr, WIDTH: tl.constexpr, ONCE: tl.constexpr):
    """WIDTH columns from `start` on of the rows that `tile` points at; zeros beyond K. ONCE: not needed again."""
    policy: tl.constexpr = "evict_first" if ONCE else ""
    if K % WIDTH == 0:
        return tl.load(tile + start, eviction_policy=policy)
    return tl.load(tile + start, mask=start + column < K, other=0.0, eviction_policy=policy)


@jit()
def _wide(value):
    """float32 of `value`. Of two bfloat16 in a register, each takes one instruction; the compiler needs three for both.

    A GEMV waits for x with its weights in registers, so every instruction behind the wait is time. Unpacking is half of
    them: the four linears of Qwen3-0.6B take 13.0 us a layer instead of 13.8 (H100, 2026-11-26).
    """
    if value.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r", [value], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return value.to(tl.float32)


@jit(do_not_specialize=("N",))
def gemv_kernel(
    x, weight, gamma, bias, residual, y, N, x_stride, weight_stride, residual_stride, eps,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr, NORM: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """All M rows of x against BLOCK_N rows of the weight, on CUDA cores. weight: [N or 2 N, K] with row stride.

    A warp owns whole rows of the weight, so that all of its sums stay within it: no barrier. Its rows are asked for at
    once and stay in registers, in chunks of BLOCK_K columns: that keeps enough bytes in flight to saturate memory, and
    nothing of it depends on the kernel before. Of rows that are too wide, AHEAD chunks are in flight (M = 1).
    """
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    column = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, None, :], (WARPS, 1, BLOCK_K))
    place = tl.arange(0, WARPS)[:, None] * (BLOCK_N // WARPS) + tl.arange(0, BLOCK_N // WARPS)[None, :]
    weight_row = _weight_rows(place, N, BLOCK_N, SWIGLU)
    tile = weight + weight_row[:, :, None] * weight_stride + column
    chunks, scales = (), ()
    for i in tl.static_range(AHEAD):
        chunks = chunks + (_load_chunk(tile, column, i * BLOCK_K, K, BLOCK_K, True),)  # type: ignore[assignment]
        if NORM and gamma is not None:
            scale = _load_chunk(gamma + column, column, i * BLOCK_K, K, BLOCK_K, False)
            scales = scales + (scale,)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()

    # All of x, and the residual, are asked for before the first sum, behind which they would wait once more.
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    HELD: tl.constexpr = M * CHUNKS if AHEAD == CHUNKS else AHEAD
    values, streams = (), ()
    for j in tl.static_range(HELD):
        row = x + tl.full((), j // CHUNKS, tl.int64) * x_stride + column
        values = values + (_load_chunk(row, column, (j % CHUNKS) * BLOCK_K, K, BLOCK_K, False),)  # type: ignore[assignment]
    for m in tl.static_range(M):
        if residual is not None:
            stream = _load_residual(residual, tl.full((1,), m, tl.int64), M, N, residual_stride, OUTPUTS)
            streams = streams + (stream,)  # type: ignore[assignment]
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    for m in tl.static_range(M):
        products = tl.zeros((WARPS, BLOCK_N // WARPS, BLOCK_K), tl.float32)
        squares = tl.zeros((WARPS, 1, BLOCK_K), tl.float32)
        for i in tl.static_range(CHUNKS):
            value = _wide(values[m * CHUNKS + i])
            if NORM:
                squares += value * value
                if gamma is not None:
                    value *= _wide(scales[i])
            products += _wide(chunks[i]) * value
            if i + AHEAD < CHUNKS:
                next_chunk = _load_chunk(tile, column, (i + AHEAD) * BLOCK_K, K, BLOCK_K, True)
                next_value = _load_chunk(x + column, column, (i + AHEAD) * BLOCK_K, K, BLOCK_K, False)
                chunks, values = chunks + (next_chunk,), values + (next_value,)  # type: ignore[assignment]
                if NORM and gamma is not None:
                    next_scale = _load_chunk(gamma + column, column, (i + AHEAD) * BLOCK_K, K, BLOCK_K, False)
                    scales = scales + (next_scale,)  # type: ignore[assignment]
        total = tl.sum(products, axis=2)
        if NORM:
            total *= tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
        if bias is not None:
            total += tl.load(bias + weight_row).to(tl.float32)
        if SWIGLU:
            gate, up = tl.split(tl.reshape(total, (WARPS, OUTPUTS // WARPS, 2)))
            total = gate * tl.sigmoid(gate) * up
        total = tl.reshape(total, (1, OUTPUTS))
        if residual is not None:
            total += streams[m].to(tl.float32)
        _store(total, tl.full((1,), m, tl.int64), M, y, N, OUTPUTS)


@jit()
def _prefetch_rows(tile, COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr):
    """Ask for COLUMNS columns of the rows at `tile` ([rows, 1]) to come into the L2 cache (Hopper), in SEGMENTS pieces.

    A piece is a multiple of 16 bytes.
    """
    LENGTH: tl.constexpr = COLUMNS // SEGMENTS
    start = tile + (tl.arange(0, SEGMENTS) * LENGTH)[None, :]
    size = tl.zeros(start.shape, tl.int32) + LENGTH * (tile.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit()
def _row_rstd(x_tile, real, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of the `real` rows at `x_tile` ([BLOCK_K, BLOCK_M] pointers): float32 [BLOCK_M]."""
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + tl.arange(0, BLOCK_K) < K)[:, None] & real
        value = tl.load(x_tile + start, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, axis=0)
    return tl.rsqrt(squares / K + eps)


@jit(do_not_specialize=("M", "N"))
def tile_kernel(
    x, weight, gamma, bias, residual, y, M, N, K, x_stride, weight_stride, residual_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NORM: tl.constexpr, FIRST: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Program (i, j): weight rows of block i times rows j * BLOCK_M.. of x, on tensor cores.

    The weight is the left operand, so that a matrix instruction's 64 (or 16) rows are rows of the weight and its
    narrow side is the few rows of x: nothing is padded but the last few. Only where 64 rows of x meet fewer of the
    weight, the sides are changed.
    FIRST takes rstd from a pass over x of its own before the loop, for dtypes that cannot hold x * gamma; otherwise
    the squares accumulate from the tiles that the products use and rstd is multiplied in at the end.
    """
    weight_row = _weight_rows(tl.arange(0, BLOCK_N), N, BLOCK_N, SWIGLU)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    tile = weight + weight_row[:, None] * weight_stride + column[None, :]
    x_tile = x + row[None, :] * x_stride + column[:, None]
    real = (row < M)[None, :]  # padding is zeros: clamped, dozens of reads of the last row would queue up for one line
    if PDL:  # above the loop: a pipelined loop would load x before a wait inside it
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            _prefetch_rows(weight + weight_row[:, None] * weight_stride, PREFETCH, SEGMENTS)
        tl.extra.cuda.gdc_wait()
    if NORM and FIRST:
        rstd = _row_rstd(x_tile, real, K, eps, BLOCK_M, BLOCK_K)

    WEIGHT_LEFT: tl.constexpr = BLOCK_N >= 64 or BLOCK_M < 64
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_LEFT else (BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(tile + start, eviction_policy="evict_first")
            value = tl.load(x_tile + start, mask=real, other=0.0)
        else:
            inside = start + column < K
            w = tl.load(tile + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            value = tl.load(x_tile + start, mask=inside[:, None] & real, other=0.0)
        if NORM:
            value = value.to(tl.float32)
            if FIRST:
                value *= rstd[None, :]
            else:
                squares += tl.sum(value * value, axis=0)
            if gamma is not None:
                if EVEN_K:
                    scale = tl.load(gamma + start + column)
                else:
                    scale = tl.load(gamma + start + column, mask=start + column < K, other=0.0)
                value *= scale.to(tl.float32)[:, None]
        if WEIGHT_LEFT:
            acc = tl.dot(w, value.to(w.dtype), acc, input_precision="ieee")
        else:
            acc = tl.dot(tl.trans(value.to(w.dtype)), tl.trans(w), acc, input_precision="ieee")
    total = tl.trans(acc) if WEIGHT_LEFT else acc
    if NORM and not FIRST:
        total *= tl.rsqrt(squares / K + eps)[:, None]
    stream = None
    if residual is not None:
        stream = _load_residual(residual, row, M, N, residual_stride, BLOCK_N // 2 if SWIGLU else BLOCK_N)
    _finish(total, stream, row, M, weight_row, bias, y, N, BLOCK_M, BLOCK_N, SWIGLU)


@jit()
def _panel_rows(n, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Weight row (int64) at place `n` of a panel: with SwiGLU eight gate rows, then their eight up rows, and so on."""
    if SWIGLU:
        output = tl.program_id(0) * (BLOCK_N // 2) + n // 16 * 8 + n % 8
        row = tl.minimum(output, N - 1) + n // 8 % 2 * N
    else:
        row = tl.minimum(tl.program_id(0) * BLOCK_N + n, N - 1)
    return row.to(tl.int64)


@jit()
def _fragment(chunk, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """[4, 8, WARPS, ROWS / 8, 8] as loaded -> [WARPS, ROWS, 32], an operand; no value changes its thread.

    Lane (g, t) of a warp holds columns 8 t .. 8 t + 7 of row g; a matrix instruction wants columns 2 t, 2 t + 1,
    2 t + 8 and 2 t + 9 there. Columns are summed over, so their order is free as long as both operands share it:
    column (t, j, e) of 4 x 4 x 2 is called (j, t, e), and every lane already holds what it should.
    """
    chunk = tl.reshape(tl.permute(chunk, (2, 3, 1, 0, 4)), (WARPS, ROWS, 4, 4, 2))
    return tl.reshape(tl.permute(chunk, (0, 1, 3, 2, 4)), (WARPS, ROWS, 32))


@jit()
def _row_rstd_of(squares, K, eps):
    """1 / rms [rows / 8, 8] of the rows whose squares are spread over lanes and warps: [4, 8, WARPS, rows / 8]."""
    total = tl.sum(tl.sum(squares, axis=0), axis=1)
    return tl.rsqrt(tl.trans(total) / K + eps)


@jit(do_not_specialize=("M", "N"))
def panel_kernel(
    x, weight, gamma, bias, residual, y, M, N, x_stride, weight_stride, residual_stride, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    NORM: tl.constexpr, FIRST: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows of x against BLOCK_N rows of the weight: a GEMV's way of loading, a tensor core's products.

    The weight goes from memory into the registers in which the matrix instruction takes it, past shared memory, and
    BLOCK_K columns of it are in flight: all of them where they fit, before anything is known about x. Each warp
    multiplies 32 of every WIDTH columns; the warps' products are summed once, at the end.
    The order of a loaded tensor's dimensions, [4, 8, WARPS, rows / 8, 8], decides which thread holds what: Triton
    deals lanes and warps out along it. Another order would be right as well, by way of shared memory.
    """
    if PDL and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = 32 * WARPS
    CHUNKS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    AHEAD: tl.constexpr = min(BLOCK_K // WIDTH, CHUNKS)
    lane = tl.arange(0, 8)[None, :, None, None, None]
    first = tl.arange(0, 4)[:, None, None, None, None] * 8 + tl.arange(0, WARPS)[None, None, :, None, None] * 32
    column = first + tl.arange(0, 8)[None, None, None, None, :]
    place = lane + tl.arange(0, BLOCK_N // 8)[None, None, None, :, None] * 8
    tile = weight + _panel_rows(place, N, BLOCK_N, SWIGLU) * weight_stride + column
    row = tl.minimum(lane + tl.arange(0, BLOCK_M // 8)[None, None, None, :, None] * 8, M - 1)
    x_tile = x + row.to(tl.int64) * x_stride + column
    scale = tl.broadcast_to(column, (4, 8, WARPS, 1, 8))  # as wide as a row of x: the same threads need it

    chunks, scales, values = (), (), ()
    for i in tl.static_range(AHEAD):
        chunks = chunks + (_load_chunk(tile, column, i * WIDTH, K, WIDTH, True),)  # type: ignore[assignment]
        if NORM and gamma is not None:
            scales = scales + (_load_chunk(gamma + scale, scale, i * WIDTH, K, WIDTH, False),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()

    for i in tl.static_range(AHEAD):
        values = values + (_load_chunk(x_tile, column, i * WIDTH, K, WIDTH, False),)  # type: ignore[assignment]
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    output_row = tl.arange(0, BLOCK_M).to(tl.int64)
    stream = None
    if residual is not None:
        stream = _load_residual(residual, output_row, M, N, residual_stride, OUTPUTS)
    if PDL and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    if FIRST:
        squares = tl.zeros((4, 8, WARPS, BLOCK_M // 8), tl.float32)
        for i in tl.static_range(AHEAD):
            squares += tl.sum(values[i].to(tl.float32) * values[i].to(tl.float32), axis=4)
        for i in range(AHEAD, CHUNKS):  # not unrolled: these are loaded once more below
            value = _load_chunk(x_tile, column, i * WIDTH, K, WIDTH, False).to(tl.float32)
            squares += tl.sum(value * value, axis=4)
        rstd = _row_rstd_of(squares, K, eps)
    # The wider of the two goes left, where a matrix instruction takes 16 rows; right it takes 8.
    LEFT: tl.constexpr = BLOCK_N if BLOCK_M == 8 else BLOCK_M
    RIGHT: tl.constexpr = BLOCK_M if BLOCK_M == 8 else BLOCK_N
    even = tl.zeros((WARPS, LEFT, RIGHT), tl.float32)
    odd = tl.zeros((WARPS, LEFT, RIGHT), tl.float32)  # two chains of products: half the latency
    if not FIRST:
        squares = tl.zeros((WARPS, BLOCK_M, BLOCK_M), tl.float32)  # of a row with itself, on the diagonal
    for i in tl.static_range(CHUNKS):
        chunk, value = chunks[i], values[i]  # type: ignore[var-annotated]
        if i + AHEAD < CHUNKS:
            chunks = chunks + (_load_chunk(tile, column, (i + AHEAD) * WIDTH, K, WIDTH, True),)  # type: ignore[assignment]
            values = values + (_load_chunk(x_tile, column, (i + AHEAD) * WIDTH, K, WIDTH, False),)  # type: ignore[assignment]
            if NORM and gamma is not None:
                scales = scales + (_load_chunk(gamma + scale, scale, (i + AHEAD) * WIDTH, K, WIDTH, False),)  # type: ignore[assignment]
        if NORM:
            if not FIRST:
                raw = _fragment(value, WARPS, BLOCK_M)
                squares = tl.dot(raw, tl.trans(raw, 0, 2, 1), squares)
            value = value.to(tl.float32)
            if FIRST:
                value *= tl.trans(rstd)[None, :, None, :, None]
            if gamma is not None:
                value *= scales[i].to(tl.float32)
        a, b = _fragment(chunk, WARPS, BLOCK_N), _fragment(value.to(chunk.dtype), WARPS, BLOCK_M)
        if BLOCK_M > 8:
            a, b = b, a
        if i % 2 == 0:
            even = tl.dot(a, tl.trans(b, 0, 2, 1), even)
        else:
            odd = tl.dot(a, tl.trans(b, 0, 2, 1), odd)
    total = tl.sum(even + odd, axis=0)
    if BLOCK_M == 8:
        total = tl.trans(total)
    if NORM and not FIRST:
        itself = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        mean = tl.sum(tl.sum(tl.where(itself[None, :, :], squares, 0.0), axis=2), axis=0) / K
        total *= tl.rsqrt(mean + eps)[:, None]
    if bias is not None:
        total += tl.load(bias + _panel_rows(tl.arange(0, BLOCK_N), N, BLOCK_N, SWIGLU)).to(tl.float32)[None, :]
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, BLOCK_N // 16, 2, 8)), (0, 1, 3, 2)))
        total = tl.reshape(gate * tl.sigmoid(gate) * up, (BLOCK_M, OUTPUTS))
    if stream is not None:
        total += stream.to(tl.float32)
    _store(total, output_row, M, y, N, OUTPUTS)

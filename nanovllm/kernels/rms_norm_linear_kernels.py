"""The jitted half of `rms_norm_linear_fusion`: three kernels, for one row, a handful and a few dozen.

Read that module first: it states the formula, the cast order, the grid and the traffic. Here a program owns BLOCK_N
rows of the weight, for all (`gemv_kernel`) or BLOCK_M (`tile_kernel`) rows of x, and the whole length K: so the sum
of squares is complete where the products are, and no program waits for another. Every program repeats that sum; x is
small and comes from the L2 cache, while the weight is what memory's time goes to.

SwiGLU needs rows n and N + n of the packed weight in one program: the rows of a tile alternate gate, up, gate, up, so
that the main loop does not know, and the epilogue splits neighbours.

Rows beyond the edge are clamped to the last one and not stored: no mask stands between a load and its vector width.

NORM=False leaves the norm out: `linear_residual`, the other half of a decoder layer.
PDL (programmatic dependent launch): a program starts while the kernel before it still runs, asks for its weights, and
waits only before its first load of anything that kernel wrote. A GEMV holds the weights in registers by then; the
tiles of `tile_kernel` stream through shared memory in a loop that must not contain the wait (triton#11905), so it
brings its weight rows as far as the L2 cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _weight_rows(N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Rows of the weight that this program multiplies, int64 [BLOCK_N]. N counts outputs."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWIGLU:
        row = tl.minimum(place // 2, N - 1) + (place % 2) * N
    else:
        row = tl.minimum(place, N - 1)
    return row.to(tl.int64)


@jit()
def _finish(
    total, row, row_inside, weight_row, bias, residual, y, N, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Bias, SwiGLU, residual, store. total: float32 [BLOCK_M, BLOCK_N], already normalised; row: int64 [BLOCK_M]."""
    if bias is not None:
        total += tl.load(bias + weight_row).to(tl.float32)[None, :]
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    if SWIGLU:
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, OUTPUTS, 2)))
        total = gate * tl.sigmoid(gate) * up
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = row_inside[:, None] & (output < N)[None, :]
    if residual is not None:
        stream = tl.load(residual + row[:, None] * residual_stride + output[None, :], mask=inside, other=0.0)
        total += stream.to(tl.float32)
    tl.store(y + row[:, None] * N + output[None, :], total.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("N",))
def gemv_kernel(
    x, weight, gamma, bias, residual, y, N, x_stride, weight_stride, residual_stride, eps,
    M: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All M rows of x against BLOCK_N rows of the weight, on CUDA cores. weight: [N or 2 N, K] with row stride.

    The whole tile [BLOCK_N, K] is asked for at once and stays in registers, in chunks of BLOCK_K columns: that keeps
    enough bytes in flight to saturate memory, and nothing of it depends on the kernel before.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    column = tl.arange(0, BLOCK_K)
    weight_row = _weight_rows(N, BLOCK_N, SWIGLU)
    tile = weight + weight_row[:, None] * weight_stride + column[None, :]
    chunks, scales = (), ()
    for i in tl.static_range(CHUNKS):
        if K % BLOCK_K == 0:
            chunk = tl.load(tile + i * BLOCK_K, eviction_policy="evict_first")
        else:
            inside = (i * BLOCK_K + column < K)[None, :]
            chunk = tl.load(tile + i * BLOCK_K, mask=inside, other=0.0, eviction_policy="evict_first")
        chunks = chunks + (chunk,)  # type: ignore[assignment]
        if NORM and gamma is not None:
            scale = tl.load(gamma + i * BLOCK_K + column, mask=i * BLOCK_K + column < K, other=0.0)
            scales = scales + (scale,)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()

    # All of x is asked for before the first sum: a reduction is a barrier, and no load moves across it.
    values = ()
    for j in tl.static_range(M * CHUNKS):
        start = (j % CHUNKS) * BLOCK_K
        value = tl.load(x + (j // CHUNKS) * x_stride + start + column, mask=start + column < K, other=0.0)
        values = values + (value,)  # type: ignore[assignment]
    for m in tl.static_range(M):
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for i in tl.static_range(CHUNKS):
            value = values[m * CHUNKS + i].to(tl.float32)
            if NORM:
                squares += value * value
                if gamma is not None:
                    value *= scales[i].to(tl.float32)
            products += chunks[i].to(tl.float32) * value[None, :]
        total = tl.sum(products, axis=1)[None, :]
        if NORM:
            total *= tl.rsqrt(tl.sum(squares) / K + eps)
        row = tl.full((1,), m, tl.int64)
        _finish(total, row, row >= 0, weight_row, bias, residual, y, N, residual_stride, 1, BLOCK_N, SWIGLU)


@jit()
def _prefetch_rows(weight, weight_row, weight_stride, K, SEGMENTS: tl.constexpr):
    """Ask for weight rows to be brought into the L2 cache (Hopper), each in SEGMENTS pieces of n x 16 bytes."""
    length = K // SEGMENTS
    start = weight + weight_row[:, None] * weight_stride + (tl.arange(0, SEGMENTS) * length)[None, :]
    size = tl.zeros(start.shape, tl.int32) + length * (weight.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit()
def _row_rstd(x_tile, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of the rows at `x_tile` ([BLOCK_K, BLOCK_M] pointers): float32 [BLOCK_M]."""
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = (start + tl.arange(0, BLOCK_K) < K)[:, None]
        value = tl.load(x_tile + start, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(value * value, axis=0)
    return tl.rsqrt(squares / K + eps)


@jit(do_not_specialize=("M", "N"))
def tile_kernel(
    x, weight, gamma, bias, residual, y, M, N, K, x_stride, weight_stride, residual_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NORM: tl.constexpr, FIRST: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Program (i, j): weight rows of block i times rows j * BLOCK_M.. of x, on tensor cores.

    The weight is the left operand, so that a matrix instruction's 64 (or 16) rows are rows of the weight and its
    narrow side is the few rows of x: nothing is padded but the last few.
    FIRST takes rstd from a pass over x of its own before the loop, for dtypes that cannot hold x * gamma; otherwise
    the squares accumulate from the tiles that the products use and rstd is multiplied in at the end.
    """
    weight_row = _weight_rows(N, BLOCK_N, SWIGLU)
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    tile = weight + weight_row[:, None] * weight_stride + column[None, :]
    x_tile = x + tl.minimum(row, M - 1)[None, :] * x_stride + column[:, None]
    if PDL:  # above the loop: a pipelined loop would load x before a wait inside it
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            _prefetch_rows(weight, weight_row, weight_stride, K, PREFETCH)
        tl.extra.cuda.gdc_wait()
    if NORM and FIRST:
        rstd = _row_rstd(x_tile, K, eps, BLOCK_M, BLOCK_K)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            w = tl.load(tile + start, eviction_policy="evict_first")
            value = tl.load(x_tile + start)
        else:
            inside = start + column < K
            w = tl.load(tile + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            value = tl.load(x_tile + start, mask=inside[:, None], other=0.0)
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
        acc = tl.dot(w, value.to(w.dtype), acc, input_precision="ieee")
    if NORM and not FIRST:
        acc *= tl.rsqrt(squares / K + eps)[None, :]
    total = tl.trans(acc)
    _finish(total, row, row < M, weight_row, bias, residual, y, N, residual_stride, BLOCK_M, BLOCK_N, SWIGLU)


@jit(do_not_specialize=("M", "N"))
def panel_kernel(
    x, weight, gamma, bias, residual, y, M, N, x_stride, weight_stride, residual_stride, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    NORM: tl.constexpr, FIRST: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M rows of x against BLOCK_N rows of the weight, on tensor cores, the weight held in registers.

    A GEMV's way of asking for all of its weights at once, with `tile_kernel`'s products. K is cut into SLICES, one a
    warp, for a dozen weight rows are too few to occupy several warps otherwise: their products are summed at the end.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (K + SLICES * BLOCK_K - 1) // (SLICES * BLOCK_K)
    weight_row = _weight_rows(N, BLOCK_N, SWIGLU)
    column = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [SLICES, BLOCK_K] of a chunk
    tile = weight + weight_row[None, :, None] * weight_stride + column[:, None, :]
    chunks, scales = (), ()
    for i in tl.static_range(CHUNKS):
        start = i * SLICES * BLOCK_K
        if K % (SLICES * BLOCK_K) == 0:
            chunk = tl.load(tile + start, eviction_policy="evict_first")
        else:
            inside = (start + column < K)[:, None, :]
            chunk = tl.load(tile + start, mask=inside, other=0.0, eviction_policy="evict_first")
        chunks = chunks + (chunk,)  # type: ignore[assignment]
        if NORM and gamma is not None:
            scale = tl.load(gamma + start + column, mask=start + column < K, other=0.0)
            scales = scales + (scale,)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, BLOCK_M).to(tl.int64)
    x_tile = x + tl.minimum(row, M - 1)[None, None, :] * x_stride + column[:, :, None]
    values = ()
    for i in tl.static_range(CHUNKS):
        start = i * SLICES * BLOCK_K
        value = tl.load(x_tile + start, mask=(start + column < K)[:, :, None], other=0.0)
        values = values + (value,)  # type: ignore[assignment]
    squares = tl.zeros((SLICES, BLOCK_M), tl.float32)
    if NORM:
        for i in tl.static_range(CHUNKS):
            squares += tl.sum(values[i].to(tl.float32) * values[i].to(tl.float32), axis=1)
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.static_range(CHUNKS):
        value = values[i]
        if NORM:
            value = value.to(tl.float32)
            if FIRST:
                value *= rstd[None, None, :]
            if gamma is not None:
                value *= scales[i].to(tl.float32)[:, :, None]
        acc += tl.dot(chunks[i], value.to(chunks[i].dtype), input_precision="ieee")
    total = tl.sum(acc, axis=0)
    if NORM and not FIRST:
        total *= rstd[None, :]
    _finish(tl.trans(total), row, row < M, weight_row, bias, residual, y, N, residual_stride, BLOCK_M, BLOCK_N, SWIGLU)

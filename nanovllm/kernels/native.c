/* A decoder layer on a CPU, in float32: the operations that `kernels/native.py` compiles, loads and describes.

Linear layers of few rows are bound by the weights' bytes, and what a BLAS does for large matrices (copying blocks of
both operands into a layout of its own) only costs there. Here a thread owns a range of weight rows, which it reads once,
as they lie, and multiplies with all rows of x: 4 weight rows by 3 rows of x is the block whose 12 sums, with the operands
of one step, fill the 16 registers of AVX2. While a block is multiplied, the next weight rows are prefetched at the
rate at which they will be needed. Norm, bias, SwiGLU and residual ride along, so a layer is four calls and attention.

Every sum along k runs in the same order whatever m is: a row's result does not depend on its company.

Vectors are GCC's extension, which clang has too: no intrinsics, any CPU. OpenMP's threads are those of PyTorch. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(LANES) && defined(__AVX512F__)
#define LANES 16 /* floats a vector holds */
#elif !defined(LANES)
#define LANES 8
#endif

enum { ROWS = 4, COLS = 3 };       /* weight rows and rows of x in a block of sums */
enum { MIN_TILE = 48, MAX_TILE = 126, TILE_FLOATS = 1 << 16 }; /* rows of x taken at a time: a share of the L2 cache */
enum { QUERY_ROWS = 48, MAX_PAGE = 64, MAX_DIM = 256 }; /* of attention; `native.py` refuses more of the latter two */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Keeps a loaded vector in its register; else GCC reads it from memory again for every product. */
#if (defined(__AVX512F__) && LANES == 16) || (defined(__AVX2__) && !defined(__AVX512F__) && LANES == 8)
#define KEEP(v) __asm__("" : "+v"(v))
#else
#define KEEP(v)
#endif

INLINE vec load(const float *p) { return *(const vec *)p; }

INLINE float sum_of(vec v) {
    typedef float quad __attribute__((vector_size(16)));
    union { vec v; quad q[LANES / 4]; } parts = {v};
    quad q = parts.q[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) q += parts.q[i];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

/* e to the x, off by at most 2 units in the last place; x is cut to -87 ... 88 (Cephes' polynomial). NaN stays NaN. */
INLINE float exp_(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* rounds: 1.5 * 2^23 has no fraction */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000u; /* 2^n */
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* ---------------------------------------------------------------------------------------------- products of rows */

/* sums[r * ld + c] = w[r] . x[c], for 4 rows of w and `cols` rows of x, k floats each; x's are k apart.
   Each step also prefetches from two streams, which advance by `pace` floats. */
INLINE void block(const int cols, const float *const w[ROWS], const float *x, int64_t k, float *sums, int64_t ld,
                  const float *const ahead[2], int64_t pace) {
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3], *a0 = ahead[0], *a1 = ahead[1];
    vec acc[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) acc[r][c] = (vec){0};
    int64_t i = 0;
    _Pragma("GCC unroll 1") for (; i + LANES <= k; i += LANES) {
        __builtin_prefetch(a0), a0 += pace;
        __builtin_prefetch(a1), a1 += pace;
        vec xs[COLS];
        UNROLL for (int c = 0; c < cols; c++) {
            xs[c] = load(x + c * k + i);
            KEEP(xs[c]);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            vec ws = load((r == 0 ? w0 : r == 1 ? w1 : r == 2 ? w2 : w3) + i);
            KEEP(ws);
            UNROLL for (int c = 0; c < cols; c++) acc[r][c] += ws * xs[c];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) sums[r * ld + c] = sum_of(acc[r][c]);
    for (; i < k; i++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < cols; c++) sums[r * ld + c] += w[r][i] * x[c * k + i];
}

/* sums[r * ld + c] = w[r] . x[c] for m rows of x, while 2 k floats behind next[0] and next[1] come into the cache. */
INLINE void rows(const float *const w[ROWS], const float *x, int64_t m, int64_t k, float *sums, int64_t ld,
                 const float *const next[2]) {
    int64_t passes = (m + COLS - 1) / COLS, pace = (2 * LANES + passes - 1) / passes, c = 0;
    const float *ahead[2] = {next[0], next[1]};
    for (; c + COLS <= m; c += COLS) {
        block(COLS, w, x + c * k, k, sums + c, ld, ahead, pace);
        ahead[0] += k / LANES * pace, ahead[1] += k / LANES * pace;
    }
    if (m - c == 1) block(1, w, x + c * k, k, sums + c, ld, ahead, pace);
    if (m - c == 2) block(2, w, x + c * k, k, sums + c, ld, ahead, pace);
}

/* ------------------------------------------------------------------------------------------------------- linear */

INLINE void rms_norm(float *y, const float *x, const float *gamma, float eps, int64_t k) {
    vec acc = {0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) acc += load(x + i) * load(x + i);
    float squares = sum_of(acc);
    for (; i < k; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / (float)k + eps);
    for (i = 0; i < k; i++) y[i] = x[i] * scale * gamma[i];
}

/* y [m, n] = act(norm(x) w^T + bias), or added to y. x: [m, k]; w: [n, k], with swiglu [2 n, k], gate rows first;
   gamma: [k] or none for no norm; bias: one a row of w, or none; scratch: MAX_TILE rows of k floats if there is a norm.
   Without swiglu a block holds 4 rows of w, with it 2 gate rows and their 2 up rows. */
void linear(float *y, const float *x, const float *w, const float *gamma, float eps, const float *bias, float *scratch,
            int64_t m, int64_t n, int64_t k, int32_t swiglu, int32_t add) {
    int64_t fit = TILE_FLOATS / k, tile = fit < MIN_TILE ? MIN_TILE : fit > MAX_TILE ? MAX_TILE : fit / COLS * COLS;
    int64_t wide = swiglu ? ROWS / 2 : ROWS, blocks = (n + wide - 1) / wide;
#pragma omp parallel
    for (int64_t first = 0; first < m; first += tile) {
        int64_t count = m - first < tile ? m - first : tile;
        const float *xs = x + first * k;
        if (gamma) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) rms_norm(scratch + i * k, xs + i * k, gamma, eps, k);
            xs = scratch;
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            float sums[ROWS][MAX_TILE];
            int64_t j = b * wide, valid = n - j < wide ? n - j : wide, row[ROWS];
            for (int r = 0; r < ROWS; r++) { /* behind the last row, that one again */
                int64_t in = r % wide < valid ? r % wide : valid - 1;
                row[r] = j + in + (r >= wide ? n : 0);
            }
            const float *ws[ROWS] = {w + row[0] * k, w + row[1] * k, w + row[2] * k, w + row[3] * k};
            const float *next[2] = {ws[0] + wide * k, ws[2] + wide * k};
            rows(ws, xs, count, k, sums[0], MAX_TILE, next);
            if (bias)
                for (int r = 0; r < ROWS; r++)
                    for (int64_t i = 0; i < count; i++) sums[r][i] += bias[row[r]];
            if (swiglu)
                for (int r = 0; r < 2; r++)
                    for (int64_t i = 0; i < count; i++) sums[r][i] *= sums[r + 2][i] / (1.0f + exp_(-sums[r][i]));
            for (int64_t i = 0; i < count; i++)
                for (int64_t r = 0; r < valid; r++) {
                    float *out = y + (first + i) * n + j + r;
                    *out = sums[r][i] + (add ? *out : 0.0f);
                }
        }
    }
}

/* ---------------------------------------------------------------------------------------------------- attention */

/* One head of `dim` floats: norm, if there is one, and half-split rotation by angle = cos [dim / 2] | sin [dim / 2]. */
INLINE void rotate(float *y, const float *x, const float *gamma, float eps, const float *angle, int64_t dim) {
    float normed[MAX_DIM];
    if (gamma) rms_norm(normed, x, gamma, eps, dim), x = normed;
    for (int64_t i = 0, half = dim / 2; i < half; i++) {
        float low = x[i], high = x[half + i], cosine = angle[i], sine = angle[half + i];
        y[i] = low * cosine - high * sine;
        y[half + i] = high * cosine + low * sine;
    }
}

/* qkv [tokens, (hq + 2 hkv) dim]: queries to q [tokens, hq, dim], keys and values to the caches [., hkv, page, dim]. */
void rope_store(float *q, float *k_cache, float *v_cache, const float *qkv, const float *q_gamma, const float *k_gamma,
                float eps, const float *cos_sin, const int64_t *positions, const int64_t *slots, int64_t tokens,
                int64_t hq, int64_t hkv, int64_t dim, int64_t page) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = qkv + t * (hq + 2 * hkv) * dim, *angle = cos_sin + positions[t] * dim;
        for (int64_t h = 0; h < hq; h++) rotate(q + (t * hq + h) * dim, row + h * dim, q_gamma, eps, angle, dim);
        if (slots[t] < 0) continue;
        for (int64_t h = 0; h < hkv; h++) {
            int64_t slot = ((slots[t] / page * hkv + h) * page + slots[t] % page) * dim;
            rotate(k_cache + slot, row + (hq + h) * dim, k_gamma, eps, angle, dim);
            memcpy(v_cache + slot, row + (hq + hkv + h) * dim, (size_t)dim * sizeof(float));
        }
    }
}

/* acc[c] = acc[c] * fade[c] + p[c] . v at d, for `cols` query rows, `keys` rows of v and `width` vectors. */
INLINE void weigh(const int cols, const int width, float *acc, const float (*p)[MAX_PAGE], const float *v,
                  const float *fade, int64_t keys, int64_t dim) {
    vec sums[COLS][2];
    UNROLL for (int c = 0; c < cols; c++)
        UNROLL for (int i = 0; i < width; i++) sums[c][i] = load(acc + c * dim + i * LANES) * fade[c];
    for (int64_t t = 0; t < keys; t++)
        UNROLL for (int i = 0; i < width; i++) {
            vec value = load(v + t * dim + i * LANES);
            KEEP(value);
            UNROLL for (int c = 0; c < cols; c++) sums[c][i] += value * p[c][t];
        }
    UNROLL for (int c = 0; c < cols; c++)
        UNROLL for (int i = 0; i < width; i++) *(vec *)(acc + c * dim + i * LANES) = sums[c][i];
}

INLINE void weigh_all(const int cols, float *acc, const float (*p)[MAX_PAGE], const float *v, const float *fade,
                      int64_t keys, int64_t dim) {
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh(cols, 2, acc + d, p, v + d, fade, keys, dim);
    if (d < dim) weigh(cols, 1, acc + d, p, v + d, fade, keys, dim);
}

/* Queries of one KV head: `tokens` of them from position `first` on, `group` heads a token, and their keys page by page
   with the softmax carried along (arXiv 1805.02867). q, out: rows of one token `stride` apart; window: keys seen. */
static void attend(float *out, const float *q, int64_t stride, const float *k_cache, const float *v_cache,
                   const int32_t *pages, int64_t first, int64_t tokens, int64_t window, int64_t head, int64_t hkv,
                   int64_t group, int64_t dim, int64_t page, float scale) {
    float query[QUERY_ROWS * MAX_DIM], acc[QUERY_ROWS * MAX_DIM], p[QUERY_ROWS][MAX_PAGE], scores[MAX_PAGE][QUERY_ROWS];
    float best[QUERY_ROWS], total[QUERY_ROWS], fade[QUERY_ROWS];
    int64_t count = tokens * group, width = group * dim, end = first + tokens;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t d = 0; d < width; d++) query[i * width + d] = q[i * stride + d] * scale;
    memset(acc, 0, (size_t)(count * dim) * sizeof(float));
    for (int64_t r = 0; r < count; r++) best[r] = -INFINITY, total[r] = 0.0f;
    for (int64_t at = first >= window ? first - window + 1 : 0, keys; at < end; at += keys) {
        keys = page - at % page < end - at ? page - at % page : end - at;
        int64_t base = ((pages[at / page] * hkv + head) * page + at % page) * dim;
        for (int64_t t = 0; t < keys; t += ROWS) {
            const float *ks[ROWS], *v = v_cache + base + t * dim, *next[2] = {v, v + 2 * dim};
            for (int64_t r = 0; r < ROWS; r++) ks[r] = k_cache + base + (t + r < keys ? t + r : keys - 1) * dim;
            rows(ks, query, count, dim, scores[t], QUERY_ROWS, next);
        }
        for (int64_t r = 0; r < count; r++) { /* this row sees the page's keys from..., to... */
            int64_t last = first + r / group - at, from = last >= window ? last - window + 1 : 0;
            int64_t to = last + 1 < keys ? last + 1 : keys;
            float most = best[r], sum = 0.0f;
            memset(p[r], 0, (size_t)keys * sizeof(float));
            fade[r] = 1.0f;
            if (from >= to) continue;
            for (int64_t t = from; t < to; t++) most = scores[t][r] > most ? scores[t][r] : most;
            for (int64_t t = from; t < to; t++) p[r][t] = scores[t][r];
            for (int64_t t = from; t < to; t++) p[r][t] = exp_(p[r][t] - most);
            for (int64_t t = from; t < to; t++) sum += p[r][t];
            fade[r] = exp_(best[r] - most);
            total[r] = total[r] * fade[r] + sum;
            best[r] = most;
        }
        int64_t r = 0;
        for (; r + COLS <= count; r += COLS) weigh_all(COLS, acc + r * dim, p + r, v_cache + base, fade + r, keys, dim);
        if (count - r == 1) weigh_all(1, acc + r * dim, p + r, v_cache + base, fade + r, keys, dim);
        if (count - r == 2) weigh_all(2, acc + r * dim, p + r, v_cache + base, fade + r, keys, dim);
    }
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t d = 0; d < width; d++) out[i * stride + d] = acc[i * width + d] / total[i * group + d / dim];
}

/* The queries of n sequences, each the last of its keys, over their pages. q, out: [tokens, hq, dim]; query_start [n + 1]:
   rows of q; lens [n]: keys of a sequence; table: [n, width] blocks; window: keys a query sees, itself included. */
void attention(float *out, const float *q, const float *k_cache, const float *v_cache, const int32_t *table,
               const int32_t *query_start, const int32_t *lens, int64_t n, int64_t width, int64_t hq, int64_t hkv,
               int64_t dim, int64_t page, float scale, int64_t window) {
    int64_t group = hq / hkv, tile = QUERY_ROWS / group, taken = 0;
#pragma omp parallel
    {
        int64_t at = 0, mine; /* all threads count the tasks, each runs those that it draws */
#pragma omp atomic capture
        mine = taken++;
        for (int64_t i = 0; i < n; i++)
            for (int64_t t = query_start[i]; t < query_start[i + 1]; t += tile)
                for (int64_t head = 0; head < hkv; head++, at++) {
                    if (at != mine) continue;
                    int64_t tokens = query_start[i + 1] - t < tile ? query_start[i + 1] - t : tile;
                    int64_t own = (t * hq + head * group) * dim;
                    attend(out + own, q + own, hq * dim, k_cache, v_cache, table + i * width,
                           lens[i] - (query_start[i + 1] - t), tokens, window, head, hkv, group, dim, page, scale);
#pragma omp atomic capture
                    mine = taken++;
                }
    }
}

int32_t lanes(void) { return LANES; }

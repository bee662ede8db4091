/* A decoder layer on a CPU, in float32: the operations that `kernels/native.py` compiles, loads and describes.

A linear layer of few rows is bound by the weights' bytes, and one of many rows by arithmetic. A BLAS is made for the
second: it copies blocks of both operands into a layout of its own, which costs twice the weight's bytes. Here a thread
owns a range of weight rows and reads them once, as they lie, while it multiplies them with all rows of x:

    dots      sums over vectors along k, 4 weight rows by 3 rows of x: up to a dozen rows
    panels    sums in vectors along the rows of x, 6 weight rows by 2 vectors, x transposed first: up to a hundred
    many      panels of weight rows instead, 6 rows of x at a time: more, where the copy of the weight does not count

All keep 12 vectors of sums in the 16 registers of AVX2. While a block is multiplied, the weight rows of the next are
prefetched. Norm, bias, SwiGLU and residual ride along, so a layer is four such calls, the rotation and attention.
A row's sums are added in the same order whatever rows are beside it, as long as their number calls for the same form.

Vectors are GCC's extension, which clang has too: no intrinsics, any CPU. OpenMP's threads are those of PyTorch. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(LANES) && defined(__AVX512F__)
#define LANES 16 /* floats a vector holds */
#elif !defined(LANES)
#define LANES 8
#endif

enum { DOT_ROWS = 4, DOT_COLS = 3 };                          /* weight rows and rows of x in a block of dots */
enum { PANEL_ROWS = 6, PANEL = 2 * LANES, PANEL_STEPS = 768 }; /* the same of panels; steps along k between stores */
enum { MIN_FEW = 64, MAX_FEW = 128, FEW_FLOATS = 98304 };     /* rows of x that are few: within half an L2 cache */
enum { MAX_TILE = 64, MAX_CHUNK = 1024 };                      /* weight rows and rows of x taken at a time when many */
enum { QUERIES = 48, MAX_PAGE = 64, MAX_DIM = 256 };          /* of attention; `native.py` refuses more */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(LANES * 4)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__) /* elements of a and b, which count from 0 and 4 */
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(16)))){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Keeps a loaded vector in its register; else GCC reads it from memory again for every product. */
#if (defined(__AVX512F__) && LANES == 16) || (defined(__AVX2__) && !defined(__AVX512F__) && LANES == 8)
#define KEEP(v) __asm__("" : "+v"(v))
#else
#define KEEP(v)
#endif

int omp_get_thread_num(void); /* its header is not there wherever clang is */

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

INLINE float sum_of(vec v) {
    union { vec v; quad q[LANES / 4]; } parts = {v};
    quad q = parts.q[0];
    UNROLL for (int i = 1; i < LANES / 4; i++) q += parts.q[i];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

INLINE vec pick(bits mask, vec a, vec b) { return (vec)((mask & (bits)a) | (~mask & (bits)b)); }
INLINE vec max_of(vec a, vec b) { return pick(a > b, a, b); }

/* e to the x, off by at most 2 units in the last place; 0 below -87, x is cut to 88 (Cephes' polynomial). NaN stays. */
INLINE vec exp_(vec x) {
    bits zero = x < -87.0f;
    x = pick(zero, (vec){0}, pick(x > 88.0f, (vec){0} + 88.0f, x));
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* rounds: 1.5 * 2^23 has no fraction */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec power = (vec)(((bits)shifted << 23) + 0x3f800000); /* 2^n */
    return (vec)(~zero & (bits)(p * power));
}

/* gate = silu(gate) * up, n of each and what else is in the last vector. */
INLINE void swiglu_(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec g = load(gate + i);
        store(gate + i, g / (1.0f + exp_(-g)) * load(up + i));
    }
}

/* ----------------------------------------------------------------------------------------------------- products */

/* sums[r * ld + c] = w[r] . x[c], for 4 rows of w and `cols` rows of x, k floats each; x's are k apart.
   Each step also prefetches from two streams, which advance by `pace` floats. */
INLINE void dot_block(const int cols, const float *const w[], const float *x, int64_t k, float *sums, int64_t ld,
                      const float *const next[2], int64_t pace) {
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3], *next0 = next[0], *next1 = next[1];
    vec acc[DOT_ROWS][DOT_COLS];
    UNROLL for (int r = 0; r < DOT_ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) acc[r][c] = (vec){0};
    int64_t i = 0;
    _Pragma("GCC unroll 1") for (; i + LANES <= k; i += LANES) {
        __builtin_prefetch(next0), next0 += pace;
        __builtin_prefetch(next1), next1 += pace;
        vec xs[DOT_COLS];
        UNROLL for (int c = 0; c < cols; c++) {
            xs[c] = load(x + c * k + i);
            KEEP(xs[c]);
        }
        UNROLL for (int r = 0; r < DOT_ROWS; r++) {
            vec ws = load((r == 0 ? w0 : r == 1 ? w1 : r == 2 ? w2 : w3) + i);
            KEEP(ws);
            UNROLL for (int c = 0; c < cols; c++) acc[r][c] += ws * xs[c];
        }
    }
    UNROLL for (int r = 0; r < DOT_ROWS; r++)
        UNROLL for (int c = 0; c < cols; c++) sums[r * ld + c] = sum_of(acc[r][c]);
    for (; i < k; i++)
        for (int r = 0; r < DOT_ROWS; r++)
            for (int c = 0; c < cols; c++) sums[r * ld + c] += w[r][i] * x[c * k + i];
}

/* sums[r * ld + c] = w[r] . x[c] for m rows of x, while 2 k floats behind each of next come into the cache. */
INLINE void dots(const float *const w[], const float *x, int64_t m, int64_t k, float *sums, int64_t ld,
                 const float *const next[2]) {
    int64_t passes = (m + DOT_COLS - 1) / DOT_COLS, pace = (2 * LANES + passes - 1) / passes, c = 0;
    const float *ahead[2] = {next[0], next[1]};
    for (; c + DOT_COLS <= m; c += DOT_COLS) {
        dot_block(DOT_COLS, w, x + c * k, k, sums + c, ld, ahead, pace);
        ahead[0] += k / LANES * pace, ahead[1] += k / LANES * pace;
    }
    if (m - c == 1) dot_block(1, w, x + c * k, k, sums + c, ld, ahead, pace);
    if (m - c == 2) dot_block(2, w, x + c * k, k, sums + c, ld, ahead, pace);
}

/* Whether m rows of x are multiplied in panels; dots do not compute the padding of the last one. */
INLINE int in_panels(int64_t m) { return (m + PANEL - 1) / PANEL * PANEL * 10 <= m * 11; }

/* sums[r * ld + c] (+)= w[r] . column c of the panel x [k, PANEL], steps from ... to - 1 along k, for 6 rows of w.
   What lies `ahead` of w, if anything, comes into the cache. */
INLINE void panel_block(const float *const w[], int64_t from, int64_t to, const float *x, float *sums, int64_t ld,
                        int64_t ahead) {
    vec acc[PANEL_ROWS][2];
    UNROLL for (int r = 0; r < PANEL_ROWS; r++)
        acc[r][0] = acc[r][1] = (vec){0};
    for (int64_t i = from; i < to;) {
        if (ahead) UNROLL for (int r = 0; r < PANEL_ROWS; r++) __builtin_prefetch(w[r] + i + ahead);
        int64_t stop = min(i + 16, to); /* a cache line of each row */
        _Pragma("GCC unroll 4") for (; i < stop; i++) {
            vec low = load(x + i * PANEL), high = load(x + i * PANEL + LANES);
            KEEP(low);
            KEEP(high);
            UNROLL for (int r = 0; r < PANEL_ROWS; r++) {
                vec ws = w[r][i] - (vec){0};
                KEEP(ws);
                acc[r][0] += ws * low;
                acc[r][1] += ws * high;
            }
        }
    }
    UNROLL for (int r = 0; r < PANEL_ROWS; r++)
        UNROLL for (int v = 0; v < 2; v++) {
            float *sum = sums + r * ld + v * LANES;
            if (from) acc[r][v] += load(sum);
            store(sum, acc[r][v]);
        }
}

/* sums[r * ld + c] = w[r] . x[c] for m rows of x, which lie in panels [k, PANEL]; the last panel's padding included. */
INLINE void panels(const float *const w[], const float *x, int64_t m, int64_t k, float *sums, int64_t ld,
                   int64_t ahead) {
    for (int64_t from = 0; from < k; from += PANEL_STEPS)
        for (int64_t c = 0; c < m; c += PANEL)
            panel_block(w, from, min(from + PANEL_STEPS, k), x + c * k, sums + c, ld, c ? 0 : ahead);
}

/* ------------------------------------------------------------------------------------------------------- linear */

INLINE float rms_scale(const float *x, float eps, int64_t k) {
    vec acc = {0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) acc += load(x + i) * load(x + i);
    float squares = sum_of(acc);
    for (; i < k; i++) squares += x[i] * x[i];
    return 1.0f / sqrtf(squares / (float)k + eps);
}

INLINE void rms_norm(float *y, const float *x, const float *gamma, float eps, int64_t k) {
    float scale = rms_scale(x, eps, k);
    for (int64_t i = 0; i < k; i++) y[i] = x[i] * scale * gamma[i];
}

/* Up to PANEL rows of x, normalised if there is a gamma, as a panel [k, PANEL]; its padding repeats the last row.
   Vectors of four along k are turned four at a time. */
static void pack(float *panel, const float *x, const float *gamma, float eps, int64_t m, int64_t k) {
    const float *row[PANEL];
    float scale[PANEL];
    for (int64_t c = 0; c < PANEL; c++) {
        row[c] = x + min(c, m - 1) * k;
        scale[c] = !gamma ? 1.0f : c < m ? rms_scale(row[c], eps, k) : scale[m - 1];
    }
    int64_t i = 0;
    for (; i + 4 <= k; i += 4)
        for (int64_t c = 0; c < PANEL; c += 4) {
            quad q[4];
            UNROLL for (int r = 0; r < 4; r++) {
                q[r] = *(const quad *)(row[c + r] + i);
                if (gamma) q[r] = q[r] * scale[c + r] * *(const quad *)(gamma + i);
            }
            quad low0 = MIX(q[0], q[1], 0, 4, 1, 5), low1 = MIX(q[2], q[3], 0, 4, 1, 5);
            quad high0 = MIX(q[0], q[1], 2, 6, 3, 7), high1 = MIX(q[2], q[3], 2, 6, 3, 7);
            quad *out = (quad *)(panel + i * PANEL + c);
            out[0] = MIX(low0, low1, 0, 1, 4, 5), out[PANEL / 4] = MIX(low0, low1, 2, 3, 6, 7);
            out[PANEL / 2] = MIX(high0, high1, 0, 1, 4, 5), out[PANEL / 4 * 3] = MIX(high0, high1, 2, 3, 6, 7);
        }
    for (; i < k; i++)
        for (int64_t c = 0; c < PANEL; c++) panel[i * PANEL + c] = gamma ? row[c][i] * scale[c] * gamma[i] : row[c][i];
}

/* A linear layer of few rows, up to MAX_FEW: a thread reads its weight rows once. */
static void few(float *y, const float *x, const float *w, const float *gamma, float eps, const float *bias,
                float *scratch, int64_t m, int64_t n, int64_t k, int32_t swiglu, int32_t add, int64_t threads) {
    int wide = in_panels(m), height = wide ? PANEL_ROWS : DOT_ROWS, width = swiglu ? height / 2 : height;
    int64_t blocks = (n + width - 1) / width;
#pragma omp parallel num_threads(threads)
    { /* every thread prepares all rows of x: that is less than to wait for the others and to fetch what they made */
        float *own = scratch + omp_get_thread_num() * (m + PANEL - 1) * k;
        const float *xs = wide || gamma ? own : x;
        if (wide)
            for (int64_t i = 0; i < m; i += PANEL) pack(own + i * k, x + i * k, gamma, eps, min(m - i, PANEL), k);
        else if (gamma)
            for (int64_t i = 0; i < m; i++) rms_norm(own + i * k, x + i * k, gamma, eps, k);
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < blocks; b++) {
            float sums[PANEL_ROWS][MAX_FEW];
            const float *ws[PANEL_ROWS];
            int64_t j = b * width, valid = min(n - j, width), row[PANEL_ROWS];
            for (int r = 0; r < height; r++) { /* behind the last row, that one again */
                row[r] = j + min(r % width, valid - 1) + (r < width ? 0 : n);
                ws[r] = w + row[r] * k;
            }
            const float *next[2] = {ws[0] + width * k, ws[2] + width * k};
            if (wide)
                panels(ws, xs, m, k, sums[0], MAX_FEW, width * k);
            else
                dots(ws, xs, m, k, sums[0], MAX_FEW, next);
            if (bias)
                for (int r = 0; r < height; r++)
                    for (int64_t i = 0; i < m; i++) sums[r][i] += bias[row[r]];
            if (swiglu)
                for (int r = 0; r < width; r++) swiglu_(sums[r], sums[r + width], m);
            for (int64_t i = 0; i < m; i++)
                for (int64_t r = 0; r < valid; r++) {
                    float *out = y + i * n + j + r;
                    *out = sums[r][i] + (add ? *out : 0.0f);
                }
        }
    }
}

/* A linear layer of many rows: panels the other way round. A thread packs a tile of weight rows and multiplies it with
   blocks of rows of x, so that the sums lie as y does. */
static void many(float *y, const float *x, const float *w, const float *gamma, float eps, const float *bias,
                 float *scratch, int64_t m, int64_t n, int64_t k, int32_t swiglu, int32_t add, int64_t threads) {
    int64_t tile = MAX_TILE * k > FEW_FLOATS ? 2 * PANEL : MAX_TILE, width = swiglu ? tile / 2 : tile;
    int64_t tiles = (n + width - 1) / width;
    int64_t chunks = (m + MAX_CHUNK - 1) / MAX_CHUNK, least = (8 * threads + tiles - 1) / tiles;
    if (chunks < least) chunks = min(least, m / MIN_FEW); /* or a thread waits long for another's last one */
    int64_t chunk = (m + chunks - 1) / chunks;
    const float *xs = gamma ? scratch : x;
    float *packs = gamma ? scratch + m * k : scratch;
#pragma omp parallel num_threads(threads)
    {
        if (gamma) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < m; i++) rms_norm(scratch + i * k, x + i * k, gamma, eps, k);
        }
        float *packed = packs + omp_get_thread_num() * tile * k, sums[PANEL_ROWS][MAX_TILE];
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t part = 0; part < chunks; part++) {
                int64_t j = t * width, valid = min(n - j, width), end = min((part + 1) * chunk, m);
                for (int64_t c = 0; c < tile; c += PANEL) { /* with swiglu the second half are up rows */
                    int64_t up = c / width, at = c % width;
                    if (at < valid)
                        pack(packed + c * k, w + (up * n + j + at) * k, 0, 0.0f, min(valid - at, PANEL), k);
                }
                for (int64_t i = part * chunk; i < end; i += PANEL_ROWS) {
                    int64_t count = min(end - i, PANEL_ROWS);
                    const float *rows[PANEL_ROWS];
                    for (int r = 0; r < PANEL_ROWS; r++) rows[r] = xs + (i + min(r, count - 1)) * k;
                    panels(rows, packed, tile, k, sums[0], MAX_TILE, PANEL_ROWS * k);
                    for (int64_t r = 0; r < count; r++) {
                        float *sum = sums[r], *out = y + (i + r) * n + j;
                        if (bias)
                            for (int64_t c = 0; c < valid; c++) {
                                sum[c] += bias[j + c];
                                if (swiglu) sum[width + c] += bias[n + j + c];
                            }
                        if (swiglu) swiglu_(sum, sum + width, valid);
                        for (int64_t c = 0; c < valid; c++) out[c] = add ? out[c] + sum[c] : sum[c];
                    }
                }
            }
    }
}

/* y [m, n] = act(norm(x) w^T + bias), or added to y. x: [m, k]; w: [n, k], with swiglu [2 n, k], gate rows first;
   gamma: [k], or none for no norm; bias: one a row of w, or none; scratch: `native.py` knows its size. With swiglu,
   half the rows of a block are gate rows, the others their up rows. */
void linear(float *y, const float *x, const float *w, const float *gamma, float eps, const float *bias, float *scratch,
            int64_t m, int64_t n, int64_t k, int32_t swiglu, int32_t add, int64_t threads) {
    int64_t limit = FEW_FLOATS / k < MIN_FEW ? MIN_FEW : min(FEW_FLOATS / k, MAX_FEW);
    (m > limit ? many : few)(y, x, w, gamma, eps, bias, scratch, m, n, k, swiglu, add, threads);
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

/* acc[c] = acc[c] * fade[c] + sum over t of p[t * QUERIES + c] v[t], for `cols` queries, `keys` rows of v and `width`
   vectors of a row, while the same number of vectors from `next` on come into the cache. */
INLINE void weigh_block(const int cols, const int width, float *acc, const float *p, const float *v,
                        const float *fade, int64_t keys, int64_t dim, const float *next) {
    vec sums[2 * DOT_COLS][4];
    UNROLL for (int c = 0; c < cols; c++)
        UNROLL for (int i = 0; i < width; i++) sums[c][i] = load(acc + c * dim + i * LANES) * fade[c];
    for (int64_t t = 0; t < keys; t++) {
        UNROLL for (int i = 0; i < width; i += 2) __builtin_prefetch(next + (t * width + i) * LANES);
        vec values[4];
        UNROLL for (int i = 0; i < width; i++) {
            values[i] = load(v + t * dim + i * LANES);
            KEEP(values[i]);
        }
        UNROLL for (int c = 0; c < cols; c++) {
            vec weight = p[t * QUERIES + c] - (vec){0};
            KEEP(weight);
            UNROLL for (int i = 0; i < width; i++) sums[c][i] += weight * values[i];
        }
    }
    UNROLL for (int c = 0; c < cols; c++)
        UNROLL for (int i = 0; i < width; i++) store(acc + c * dim + i * LANES, sums[c][i]);
}

/* The same for whole rows of v, dim floats: 12 vectors of sums at a time if there are as many. */
INLINE void weigh(const int cols, float *acc, const float *p, const float *v, const float *fade,
                  int64_t keys, int64_t dim, const float *next) {
    const int width = cols > DOT_COLS ? 2 : 4;
    int64_t d = 0;
    for (; d + width * LANES <= dim; d += width * LANES)
        weigh_block(cols, width, acc + d, p, v + d, fade, keys, dim, next + d * keys);
    for (; d < dim; d += LANES) weigh_block(cols, 1, acc + d, p, v + d, fade, keys, dim, next + d * keys);
}

/* scores[t][r] = k[t] . query[r] for `keys` rows of k. The queries lie in rows, and v comes into the cache; or, when
   they are many, in panels. */
INLINE void score(float (*scores)[QUERIES], const float *query, int64_t count, int wide, const float *k, const float *v,
                  int64_t keys, int64_t dim) {
    int height = wide ? PANEL_ROWS : DOT_ROWS;
    for (int64_t t = 0; t < keys; t += height) {
        const float *ks[PANEL_ROWS], *next[2] = {v + t * dim, v + (t + 2) * dim};
        for (int r = 0; r < height; r++) ks[r] = k + min(t + r, keys - 1) * dim;
        if (wide)
            panels(ks, query, count, dim, scores[t], QUERIES, 0);
        else
            dots(ks, query, count, dim, scores[t], QUERIES, next);
    }
}

/* Queries of one KV head: `tokens` of them from position `first` on, `group` heads a token, and their keys page by page
   with the softmax carried along (arXiv 1805.02867). q, out: tokens are `stride` apart; window: keys a query sees. */
static void attend(float *out, const float *q, int64_t stride, const float *k_cache, const float *v_cache,
                   const int32_t *pages, int64_t first, int64_t tokens, int64_t window, int64_t head, int64_t hkv,
                   int64_t group, int64_t dim, int64_t page, float scale) {
    float rows[QUERIES * MAX_DIM], packed[QUERIES * MAX_DIM], acc[QUERIES * MAX_DIM];
    float scores[MAX_PAGE + PANEL_ROWS][QUERIES], best[QUERIES], total[QUERIES], fade[QUERIES];
    int64_t count = tokens * group, end = first + tokens;
    int wide = QUERIES % PANEL == 0 && in_panels(count);
    for (int64_t r = 0; r < count; r++) {
        const float *from = q + r / group * stride + r % group * dim;
        for (int64_t d = 0; d < dim; d++) rows[r * dim + d] = from[d] * scale;
    }
    for (int64_t r = 0; r < QUERIES; r++) best[r] = -1e30f, total[r] = 0.0f; /* finite: infinity less itself is NaN */
    if (wide)
        for (int64_t r = 0; r < count; r += PANEL) 
            pack(packed + r * dim, rows + r * dim, 0, 0.0f, min(count - r, PANEL), dim);
    memset(acc, 0, (size_t)(count * dim) * sizeof(float));
    for (int64_t at = first >= window ? first - window + 1 : 0, keys; at < end; at += keys) {
        keys = min(page - at % page, end - at);
        int64_t base = ((pages[at / page] * hkv + head) * page + at % page) * dim;
        const float *v = v_cache + base, *next = k_cache + base;
        if (at + keys < end) next = k_cache + (pages[at / page + 1] * hkv + head) * page * dim;
        score(scores, wide ? packed : rows, count, wide, k_cache + base, v, keys, dim);
        for (int64_t r = 0; r < count; r++) { /* of this page, row r sees the keys from ... to - 1 */
            int64_t last = first + r / group - at, from = last >= window ? last - window + 1 : 0;
            for (int64_t t = 0; t < min(from, keys); t++) scores[t][r] = -INFINITY;
            for (int64_t t = last < 0 ? 0 : last + 1; t < keys; t++) scores[t][r] = -INFINITY;
        }
        for (int64_t r = 0; r < count; r += LANES) {
            vec most = load(best + r), sum = {0};
            for (int64_t t = 0; t < keys; t++) most = max_of(load(scores[t] + r), most);
            for (int64_t t = 0; t < keys; t++) {
                vec p = exp_(load(scores[t] + r) - most);
                store(scores[t] + r, p);
                sum += p;
            }
            store(fade + r, exp_(load(best + r) - most));
            store(total + r, load(total + r) * load(fade + r) + sum);
            store(best + r, most);
        }
        int64_t r = 0;
        for (; r + 2 * DOT_COLS <= count; r += 2 * DOT_COLS)
            weigh(2 * DOT_COLS, acc + r * dim, scores[0] + r, v, fade + r, keys, dim, next);
        for (; r + DOT_COLS <= count; r += DOT_COLS)
            weigh(DOT_COLS, acc + r * dim, scores[0] + r, v, fade + r, keys, dim, next);
        for (; r < count; r++) weigh(1, acc + r * dim, scores[0] + r, v, fade + r, keys, dim, next);
    }
    for (int64_t r = 0; r < count; r++)
        for (int64_t d = 0; d < dim; d++)
            out[r / group * stride + r % group * dim + d] = acc[r * dim + d] / total[r];
}

/* The queries of n sequences, the last of their keys, over their pages. q, out: [tokens, hq, dim]; query_start [n + 1]:
   rows of q; lens [n]: keys of a sequence; table: [n, width] blocks; window: keys a query sees, itself included. */
void attention(float *out, const float *q, const float *k_cache, const float *v_cache, const int32_t *table,
               const int32_t *query_start, const int32_t *lens, int64_t n, int64_t width, int64_t hq, int64_t hkv,
               int64_t dim, int64_t page, float scale, int64_t window) {
    int64_t group = hq / hkv, tile = QUERIES / group, taken = 0;
#pragma omp parallel
    {
        int64_t at = 0, mine; /* all threads count the tasks, each runs those that it draws */
#pragma omp atomic capture
        mine = taken++;
        for (int64_t i = 0; i < n; i++)
            for (int64_t t = query_start[i]; t < query_start[i + 1]; t += tile)
                for (int64_t head = 0; head < hkv; head++, at++) {
                    if (at != mine) continue;
                    int64_t left = query_start[i + 1] - t, own = (t * hq + head * group) * dim;
                    attend(out + own, q + own, hq * dim, k_cache, v_cache, table + i * width, lens[i] - left,
                           min(left, tile), window, head, hkv, group, dim, page, scale);
#pragma omp atomic capture
                    mine = taken++;
                }
    }
}

int32_t lanes(void) { return LANES; }

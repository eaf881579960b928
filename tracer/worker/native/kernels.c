/* Attention rows and logit statistics on CPUs: what tracer.worker.attention and tracer.statistics say in torch, in one
 * pass over memory each. Built for this machine at the worker's start (tracer/worker/native.py) and checked there
 * against the torch versions; float32 arithmetic throughout.
 *
 * Vectors are GCC's (also clang's) vector extension: 16 floats, lowered to what the CPU has. Threads are OpenMP's, so
 * that the engine's own pool does the work: a second pool would fight it for the same cores. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));
typedef uint8_t vb __attribute__((vector_size(16), aligned(1)));

enum { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, E5M2 = 4 };

/* -- element types --------------------------------------------------------------------------------------------- */

INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    union { uint32_t u; float f; } v;
    if (magnitude >= 0x7c00) {
        v.u = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
        return v.f;
    }
    v.u = magnitude << 13; /* subnormal halves come out right by the scaling */
    v.f *= 0x1p112f;
    v.u |= sign;
    return v.f;
#endif
}

INLINE uint16_t float_to_half(float f) { /* to nearest, ties to even; beyond 65,504 infinity */
#if defined(__F16C__)
    return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#else
    union { float f; uint32_t u; } v = {f};
    uint32_t sign = v.u >> 16 & 0x8000, magnitude = v.u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        v.u = magnitude;
        v.f += 0.5f; /* the addition rounds to the grid of subnormal halves */
        return (uint16_t)(sign | (v.u - 0x3f000000));
    }
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
#endif
}

INLINE int64_t bytes_of(int64_t dtype) { return dtype == F32 ? 4 : dtype >= E4M3 ? 1 : 2; }

/* An fp8 element has the leading bits of a half: E5M2 all of them, E4M3 but for an exponent that counts from 8 less. */
INLINE float byte_to_float(uint8_t b, int dtype) {
    if (dtype == E5M2) return half_to_float((uint16_t)(b << 8));
    if ((b & 0x7f) == 0x7f) return NAN;
    return half_to_float((uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
}

INLINE float load_one(const void *p, int64_t i, int dtype) {
    if (dtype == F32) return ((const float *)p)[i];
    if (dtype >= E4M3) return byte_to_float(((const uint8_t *)p)[i], dtype);
    uint16_t h = ((const uint16_t *)p)[i];
    if (dtype == F16) return half_to_float(h);
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

INLINE vf halves_to_floats(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#else
    vf out;
    for (int j = 0; j < LANES; j++) out[j] = half_to_float(h[j]);
    return out;
#endif
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf load(const void *p, int64_t i, int dtype) {
    if (dtype == F32) return *(const vf *)((const float *)p + i);
    if (dtype >= E4M3) { /* see byte_to_float */
        vh b = __builtin_convertvector(*(const vb *)((const uint8_t *)p + i), vh);
        if (dtype == E5M2) return halves_to_floats(b << 8);
        vf out = halves_to_floats((b & 0x80) << 8 | (b & 0x7f) << 7) * 256.0f;
        return choose(__builtin_convertvector(b & 0x7f, vi) == 0x7f, (vf){0} + NAN, out);
    }
    const uint16_t *h = (const uint16_t *)p + i;
    if (dtype == BF16) return (vf)(__builtin_convertvector(*(const vh *)h, vu) << 16);
    return halves_to_floats(*(const vh *)h);
}

INLINE void store(void *p, int64_t i, int dtype, vf v) { /* dtype: F32 or F16 */
    if (dtype == F32) {
        *(vf *)((float *)p + i) = v;
        return;
    }
    uint16_t *h = (uint16_t *)p + i;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)h, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < LANES; j++) h[j] = float_to_half(v[j]);
#endif
}

INLINE void store_one(void *p, int64_t i, int dtype, float f) {
    if (dtype == F32) ((float *)p)[i] = f;
    else ((uint16_t *)p)[i] = float_to_half(f);
}

/* -- arithmetic ------------------------------------------------------------------------------------------------ */

INLINE vf splat(float f) { return f - (vf){0}; }

INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

INLINE float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float out = 0;
    for (int j = 0; j < LANES; j++) out += v[j];
    return out;
#endif
}

INLINE float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float out = v[0];
    for (int j = 1; j < LANES; j++) out = v[j] > out ? v[j] : out;
    return out;
#endif
}

INLINE int any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int out = 0;
    for (int j = 0; j < LANES; j++) out |= mask[j];
    return out;
#endif
}

/* e^x for x <= 0, relative error about 1e-7: e^x = 2^n e^r with |r| <= log(2)/2 and a Taylor sum of degree 7. */
INLINE vf vexp(vf x) {
    vi tiny = x < -87.0f;
    x = choose(tiny, splat(-87.0f), x);
    vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return choose(tiny, splat(0.0f), p * (vf)power);
}

/* -- attention rows -------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t dtype; /* of keys */
    int64_t heads, kv_heads, head_size, block_size;
    int64_t block_stride, head_stride; /* of the cache, in elements */
    int64_t first, per_token, per_dim; /* where key element (token, dim) lies in its block and head, if affine */
    const int64_t *offsets;            /* [block_size, head_size], if it is not */
    const float *slopes;               /* [heads], ALiBi; or NULL */
    const float *sinks;                /* [heads]; or NULL */
    int64_t window;                    /* visible keys, the query's own included; 0 without a window */
    int64_t query_dtype;
    float scale, soft_cap; /* scale: of a query's product with a key's elements; soft_cap 0: none */
    float key_scale;       /* a key is key_scale * element */
} Layer;

typedef struct {
    int64_t query;       /* row of the query tensor */
    int64_t table;       /* row of the block table */
    int64_t position;    /* of the query: keys 0 ... position */
    int64_t prompt;      /* prompt tokens */
    const int64_t *heads; /* chosen query heads, ascending */
    int64_t head_count;
    int64_t dtype;       /* of the stored weights */
} Row;

enum { FEATURES = 4, TOPS = 2 };

/* Scores of up to HEADS query heads against 16 * VECTORS tokens of one block; the keys' elements of one dim and
 * successive tokens are adjacent. */
INLINE void score_tile(const void *keys, int dtype, int64_t per_dim, const float *query, int64_t size, float *out,
                       int64_t stride, int heads, int vectors) {
    vf acc[4][8];
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < vectors; v++) acc[h][v] = splat(0.0f);
    for (int64_t d = 0; d < size; d++) {
        for (int v = 0; v < vectors; v++) {
            vf k = load(keys, d * per_dim + v * LANES, dtype);
            for (int h = 0; h < heads; h++) acc[h][v] += k * query[h * size + d];
        }
    }
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < vectors; v++) *(vf *)(out + h * stride + v * LANES) = acc[h][v];
}

#define TILE(DTYPE, HEADS, VECTORS) score_tile(keys, DTYPE, per_dim, query, size, out, stride, HEADS, VECTORS)
#define BY_HEADS(DTYPE, VECTORS)                                                                                       \
    switch (heads) {                                                                                                   \
    case 1: TILE(DTYPE, 1, VECTORS); break;                                                                            \
    case 2: TILE(DTYPE, 2, VECTORS); break;                                                                            \
    case 3: TILE(DTYPE, 3, VECTORS); break;                                                                            \
    default: TILE(DTYPE, 4, VECTORS);                                                                                  \
    }
#define BY_DTYPE(VECTORS)                                                                                              \
    if (dtype == BF16) {                                                                                               \
        BY_HEADS(BF16, VECTORS)                                                                                        \
    } else if (dtype == F32) {                                                                                         \
        BY_HEADS(F32, VECTORS)                                                                                         \
    } else {                                                                                                           \
        BY_HEADS(F16, VECTORS)                                                                                         \
    }

static void score_block(const char *keys, int dtype, int64_t per_dim, int64_t tokens, const float *query, int64_t size,
                        float *out, int64_t stride, int heads) {
    int64_t bytes = bytes_of(dtype);
    /* As wide as the registers allow: the elements of one dim lie together, and read in order they are prefetched. */
    while (tokens >= 8 * LANES && heads <= 3) {
        BY_DTYPE(8)
        keys += 8 * LANES * bytes, out += 8 * LANES, tokens -= 8 * LANES;
    }
    while (tokens >= 4 * LANES) {
        BY_DTYPE(4)
        keys += 4 * LANES * bytes, out += 4 * LANES, tokens -= 4 * LANES;
    }
    while (tokens > 0) {
        BY_DTYPE(1)
        keys += LANES * bytes, out += LANES, tokens -= LANES;
    }
}

/* One block's keys as float32 [head_size, block_size], from wherever the backend put them. */
static void gather_block(const Layer *layer, const char *block, float *tile) {
    int64_t size = layer->head_size, tokens = layer->block_size;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t d = 0; d < size; d++) {
            int64_t at = layer->offsets ? layer->offsets[t * size + d]
                                        : layer->first + t * layer->per_token + d * layer->per_dim;
            tile[d * tokens + t] = load_one(block, at, (int)layer->dtype);
        }
}

/* The same for fp8 keys whose elements of one dim are adjacent: eight bits are widened once, not once per 4 heads. */
static void widen_block(const Layer *layer, const char *keys, int64_t tokens, float *tile) {
    for (int64_t d = 0; d < layer->head_size; d++)
        for (int64_t t = 0; t < tokens; t += LANES) {
            int64_t from = d * layer->per_dim + t, to = d * layer->block_size + t;
            *(vf *)(tile + to) = layer->dtype == E4M3 ? load(keys, from, E4M3) : load(keys, from, E5M2);
        }
}

/* Scores become what the softmax sees, for layers that do more than to scale them. */
static void adjust(const Layer *layer, float *s, int64_t low, int64_t high, int64_t position, int64_t head) {
    for (int64_t j = low; j < high; j++) s[j] *= layer->scale;
    if (layer->soft_cap != 0.0f)
        for (int64_t j = low; j < high; j++) s[j] = layer->soft_cap * tanhf(s[j] / layer->soft_cap);
    if (layer->slopes)
        for (int64_t j = low; j < high; j++) s[j] += layer->slopes[head] * (float)(j - position);
}

static int64_t first_equal(const float *s, int64_t low, int64_t high, float value) {
    int64_t j = low;
    while (j < high && !any(*(const vf *)(s + j) == value)) j += LANES;
    while (j < high && s[j] != value) j++;
    return j < high ? j : -1;
}

/* Softmax of scale * s[low ... high), whose memory goes on for LANES more values; s becomes the weights, and so does
 * out[at ... at + high), unless it is NULL. Scores that are no numbers make no row: all of it is NaN, as in torch.
 * features: entropy, sink mass, prompt mass, self weight; tops: largest weight outside position 0, its position. */
static void softmax_row(const Layer *layer, float scale, float *s, int64_t low, int64_t high, int64_t prompt,
                        int64_t head, float *features, float *tops, char *out, int64_t at, int dtype) {
    for (int64_t j = high; j < high + LANES; j++) s[j] = -INFINITY; /* whole vectors from here on */
    vf top = splat(-INFINITY);
    vi lost = {0};
    for (int64_t j = low; j < high; j += LANES) {
        vf v = *(vf *)(s + j) * scale;
        top = larger(v, top), lost |= v != v;
        *(vf *)(s + j) = v;
    }
    float most = largest(top), sink = layer->sinks ? layer->sinks[head] : -INFINITY;
    most = sink > most ? sink : most;
    vf total = splat(0.0f), moment = splat(0.0f);
    for (int64_t j = low; j < high; j += LANES) {
        vf y = larger(*(vf *)(s + j) - most, splat(-1e4f)), e = vexp(y);
        total += e, moment += e * y;
        *(vf *)(s + j) = e;
    }
    int broken = any(lost) || !isfinite(most);
    float keys = sum(total), z = keys + (layer->sinks ? expf(sink - most) : 0.0f), norm = broken ? NAN : 1.0f / z;
    float share = keys * norm, mass = 0.0f;
    int64_t stop = prompt < high ? prompt : high;
    vf part = splat(0.0f), best = splat(0.0f);
    for (int64_t j = low; j < high; j += LANES) {
        vf w = *(vf *)(s + j) * norm, seen = w;
        *(vf *)(s + j) = w;
        if (j + LANES <= stop) part += w;
        else for (int64_t i = j; i < stop; i++) mass += s[i];
        if (j == 0) seen[0] = 0.0f;
        best = larger(seen, best);
        if (!out) continue;
        if (j + LANES <= high) store(out, at + j, dtype, w);
        else for (int64_t i = j; i < high; i++) store_one(out, at + i, dtype, s[i]);
    }
    if (out && low) memset(out + at * (dtype == F32 ? 4 : 2), 0, (size_t)low * (dtype == F32 ? 4 : 2));
    features[0] = logf(z) * share - sum(moment) * norm;
    features[1] = (low == 0 ? s[0] : 0.0f) + (1.0f - share > 0.0f ? 1.0f - share : 0.0f);
    features[2] = mass + sum(part);
    features[3] = s[high - 1];
    for (int f = 0; broken && f < FEATURES; f++) features[f] = NAN;
    for (int64_t j = 0; broken && out && j < low; j++) store_one(out, at + j, dtype, NAN);
    tops[0] = largest(best);
    tops[1] = tops[0] > 0.0f ? (float)first_equal(s, low > 1 ? low : 1, high, tops[0]) : -1.0f;
}

enum { AT_ONCE = 4, TOGETHER = 16 }; /* queries that score_block takes, and rows of a prompt that share a block */

/* Scores of `count` queries of one KV head against keys low ... high of one request, query i's at scores + i * stride.
 * tile: room for one block. */
static void score_range(const Layer *layer, int64_t group, const char *cache, const int32_t *table, int64_t low,
                        int64_t high, const float *queries, int count, float *scores, int64_t stride, float *tile) {
    int64_t size = layer->head_size, bytes = bytes_of(layer->dtype);
    int64_t adjacent = !layer->offsets && layer->per_token == 1;
    for (int64_t b = low / layer->block_size; b * layer->block_size < high; b++) {
        const char *block = cache + ((int64_t)table[b] * layer->block_stride + group * layer->head_stride) * bytes;
        int64_t start = b * layer->block_size, left = high - start, per_dim = layer->block_size;
        int64_t tokens = left < layer->block_size ? (left + LANES - 1) / LANES * LANES : layer->block_size;
        const char *keys = (char *)tile;
        int dtype = F32;
        if (adjacent && layer->dtype < E4M3) {
            keys = block + layer->first * bytes, dtype = (int)layer->dtype, per_dim = layer->per_dim;
        } else if (adjacent) {
            widen_block(layer, block + layer->first, tokens, tile);
        } else {
            gather_block(layer, block, tile);
        }
        for (int at = 0; at < count; at += AT_ONCE)
            score_block(keys, dtype, per_dim, tokens, queries + at * size, size, scores + at * stride + start, stride,
                        count - at < AT_ONCE ? count - at : AT_ONCE);
    }
}

INLINE void load_query(const Layer *layer, const void *query, int64_t at, float *out) {
    for (int64_t d = 0; d < layer->head_size; d++) out[d] = load_one(query, at + d, (int)layer->query_dtype);
}

/* Scores s[low ... high) of one head to weights, whatever the layer does on the way; see softmax_row. */
INLINE void finish_row(const Layer *layer, float *s, int64_t low, int64_t high, int64_t prompt, int64_t head,
                       float *features, float *tops, char *out, int64_t at, int dtype) {
    int more = layer->soft_cap != 0.0f || layer->slopes;
    if (more) adjust(layer, s, low, high, high - 1, head);
    softmax_row(layer, more ? 1.0f : layer->scale, s, low, high, prompt, head, features, tops, out, at, dtype);
}

/* All chosen query heads of one KV head of one row. scratch: 4 score rows of `stride`, 4 queries, one gathered block. */
static void attend_group(const Layer *layer, const Row *row, int64_t group, const void *query, int64_t query_row,
                         int64_t query_head, const char *cache, const int32_t *table, char *out, float *features,
                         float *tops, float *scratch, int64_t stride) {
    int64_t size = layer->head_size, per_group = layer->heads / layer->kv_heads, high = row->position + 1;
    int64_t low = layer->window && high > layer->window ? high - layer->window : 0;
    float *queries = scratch + AT_ONCE * stride, *tile = queries + AT_ONCE * size;
    int64_t slots[AT_ONCE];
    for (int64_t at = 0; at < row->head_count;) {
        int count = 0;
        for (; at < row->head_count && count < AT_ONCE; at++) {
            int64_t head = row->heads[at];
            if (head / per_group != group || head >= layer->heads) continue;
            load_query(layer, query, row->query * query_row + head * query_head, queries + count * size);
            slots[count++] = at;
        }
        if (!count) continue;
        score_range(layer, group, cache, table, low, high, queries, count, scratch, stride, tile);
        for (int h = 0; h < count; h++)
            finish_row(layer, scratch + h * stride, low, high, row->prompt, row->heads[slots[h]],
                       features + slots[h] * FEATURES, tops + slots[h] * TOPS, out, slots[h] * high, (int)row->dtype);
    }
}

/* Heads that this layer does not have: no row, so zeros and NaN. */
static void blank_heads(const Layer *layer, const Row *row, char *out, float *features, float *tops) {
    int64_t keys = row->position + 1, bytes = row->dtype == F32 ? 4 : 2;
    for (int64_t at = 0; at < row->head_count; at++) {
        if (row->heads[at] < layer->heads) continue;
        for (int f = 0; f < FEATURES; f++) features[at * FEATURES + f] = NAN;
        tops[at * TOPS] = 0.0f, tops[at * TOPS + 1] = -1.0f;
        if (out) memset(out + at * keys * bytes, 0, (size_t)(keys * bytes));
    }
}

/* Floats of scratch that one thread needs. */
int64_t scratch_floats(int64_t stride, int64_t head_size, int64_t block_size) {
    return AT_ONCE * stride + (AT_ONCE + block_size) * head_size;
}

/* The same for attend_prompt. */
int64_t prompt_floats(int64_t stride, int64_t head_size, int64_t block_size) {
    return TOGETHER * stride + (TOGETHER + block_size) * head_size;
}

int64_t threads(void) {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* How many threads may work where there is scratch for `slots`: other libraries change the pool's size as they like. */
int64_t team(int64_t slots) {
    int64_t most = threads();
    return most < slots ? most : slots;
}

/* Weights and features of one layer for every row that wants it.
 *
 * outs, features, tops: [rows] addresses of this layer's [heads, keys], [heads, 4] and [heads, 2]; features 0: the row
 * does not want the layer; outs 0: features alone. table: int32, `table_stride` entries a row. scratch: `slots` times
 * `scratch_floats(stride, ...)`, one for each thread, with stride at least the longest row + block_size + 16. */
void attend(const Layer *layer, const Row *rows, int64_t count, const uint64_t *outs, const uint64_t *features,
            const uint64_t *tops, const void *query, int64_t query_row, int64_t query_head, const void *cache,
            const int32_t *table, int64_t table_stride, float *scratch, int64_t stride, int64_t slots) {
    int64_t tasks = count * layer->kv_heads, each = scratch_floats(stride, layer->head_size, layer->block_size);
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1) num_threads((int)team(slots))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t which = task / layer->kv_heads, group = task % layer->kv_heads, thread = 0;
        const Row *row = rows + which;
        if (!features[which]) continue;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        char *out = (char *)(uintptr_t)outs[which];
        float *feature = (float *)(uintptr_t)features[which], *top = (float *)(uintptr_t)tops[which];
        if (group == 0) blank_heads(layer, row, out, feature, top);
        attend_group(layer, row, group, query, query_row, query_head, cache, table + row->table * table_stride, out,
                     feature, top, scratch + thread * each, stride);
    }
}

/* `count` successive rows of a prompt's map of one layer, the first of them `row`, for the row's heads, all of which the
 * layer has. out: [heads, count, keys], in the row's type, zeros after each row's own position; table: this request's
 * blocks. scratch: `slots` times `prompt_floats(stride, ...)`, with stride as for `attend`. */
void attend_prompt(const Layer *layer, const Row *row, int64_t count, int64_t keys, char *out, const void *query,
                   int64_t query_row, int64_t query_head, const char *cache, const int32_t *table, float *scratch,
                   int64_t stride, int64_t slots) {
    int64_t size = layer->head_size, each = prompt_floats(stride, size, layer->block_size);
    int64_t parts = (count + TOGETHER - 1) / TOGETHER, tasks = row->head_count * parts, bytes = row->dtype == F32 ? 4 : 2;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1) num_threads((int)team(slots))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t slot = task / parts, first = task % parts * TOGETHER, head = row->heads[slot], thread = 0;
        int rows = count - first < TOGETHER ? (int)(count - first) : TOGETHER;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
        float *scores = scratch + thread * each, *queries = scores + TOGETHER * stride, *tile = queries + TOGETHER * size;
        float features[FEATURES], tops[TOPS];
        int64_t position = row->position + first;
        int64_t low = layer->window && position + 1 > layer->window ? position + 1 - layer->window : 0;
        for (int r = 0; r < rows; r++)
            load_query(layer, query, (row->query + first + r) * query_row + head * query_head, queries + r * size);
        score_range(layer, head / (layer->heads / layer->kv_heads), cache, table, low, position + rows, queries, rows,
                    scores, stride, tile);
        for (int r = 0; r < rows; r++) {
            int64_t high = position + r + 1, from = layer->window && high > layer->window ? high - layer->window : 0;
            int64_t at = (slot * count + first + r) * keys;
            finish_row(layer, scores + r * stride, from, high, row->prompt, head, features, tops, out, at,
                       (int)row->dtype);
            memset(out + (at + high) * bytes, 0, (size_t)((keys - high) * bytes));
        }
    }
}

typedef struct {
    int64_t query, queries; /* first row of the query tensor, and how many */
    int64_t table;          /* row of the block table */
    int64_t key, keys;      /* first position, and how many */
    int64_t computed;       /* position of the step's first query: no window reaches further back than from there */
    int64_t dtype;          /* of what is stored */
    int64_t query_stride, key_stride; /* elements from one position to the next, in what is stored */
} Pick;

INLINE void copy_row(const void *from, int64_t at, int from_dtype, int64_t step, float scale, void *to, int64_t place,
                     int dtype, int64_t size) {
    for (int64_t d = 0; d < size; d++)
        store_one(to, place + d, dtype, load_one(from, at + d * step, from_dtype) * scale);
}

static void pick_keys(const Layer *layer, const Pick *pick, const char *cache, const int32_t *table, void *out) {
    int64_t size = layer->head_size, bytes = bytes_of(layer->dtype);
    int64_t visible = layer->window ? pick->computed + 1 - layer->window : 0;
    for (int64_t i = 0; i < pick->keys; i++) {
        int64_t position = pick->key + i, token = position % layer->block_size;
        int64_t block = table[position / layer->block_size];
        for (int64_t h = 0; h < layer->kv_heads; h++) {
            if (position < visible) { /* a block that the window gave back may hold another request's keys */
                for (int64_t d = 0; d < size; d++)
                    store_one(out, i * pick->key_stride + h * size + d, (int)pick->dtype, NAN);
                continue;
            }
            const char *base = cache + (block * layer->block_stride + h * layer->head_stride) * bytes;
            int64_t place = i * pick->key_stride + h * size;
            if (!layer->offsets) {
                copy_row(base, layer->first + token * layer->per_token, (int)layer->dtype, layer->per_dim,
                         layer->key_scale, out, place, (int)pick->dtype, size);
                continue;
            }
            for (int64_t d = 0; d < size; d++)
                store_one(out, place + d, (int)pick->dtype,
                          load_one(base, layer->offsets[token * size + d], (int)layer->dtype) * layer->key_scale);
        }
    }
}

/* Queries and keys of one layer, as they are (fp8 ones as the numbers they stand for), for every row that wants them.
 * queries, keys: [rows] addresses of this layer's part of [positions, layers, heads, head_size], or 0. */
void collect(const Layer *layer, const Pick *picks, int64_t count, const uint64_t *queries, const uint64_t *keys,
             const void *query, int64_t query_row, int64_t query_head, const char *cache, const int32_t *table,
             int64_t table_stride) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
    for (int64_t r = 0; r < count; r++) {
        const Pick *pick = picks + r;
        void *out = (void *)(uintptr_t)queries[r], *key_out = (void *)(uintptr_t)keys[r];
        for (int64_t i = 0; out && i < pick->queries; i++)
            for (int64_t h = 0; h < layer->heads; h++)
                copy_row(query, (pick->query + i) * query_row + h * query_head, (int)layer->query_dtype, 1, 1.0f, out,
                         i * pick->query_stride + h * layer->head_size, (int)pick->dtype, layer->head_size);
        if (key_out) pick_keys(layer, pick, cache, table + pick->table * table_stride, key_out);
    }
}

/* Means over layers and heads of [count, 4] features, without NaN, and the largest of [count, 2] tops.
 * out: entropy, sink mass, prompt mass, self weight, top weight, top position, index of the top in [count]. */
void summarise(const float *features, const float *tops, int64_t count, double *out) {
    int64_t seen = 0, best = -1;
    for (int f = 0; f < FEATURES; f++) out[f] = 0.0;
    for (int64_t i = 0; i < count; i++) {
        if (isnan(features[i * FEATURES])) continue;
        for (int f = 0; f < FEATURES; f++) out[f] += features[i * FEATURES + f];
        seen++;
        if (tops[i * TOPS + 1] >= 0.0f && (best < 0 || tops[i * TOPS] > tops[best * TOPS])) best = i;
    }
    for (int f = 0; f < FEATURES; f++) out[f] = seen ? out[f] / (double)seen : NAN;
    out[4] = best < 0 ? 0.0 : tops[best * TOPS];
    out[5] = best < 0 ? -1.0 : tops[best * TOPS + 1];
    out[6] = (double)best;
}

/* -- logits ---------------------------------------------------------------------------------------------------- */

enum { NUMBERS = 3 };

INLINE int before(float a, float b) { return isnan(a) ? !isnan(b) : a > b; }

/* Keeps the `k` largest in descending order, the first of equals first; NaN is larger than any number, as in torch. */
static void insert(float *best, int32_t *ids, int64_t k, float z, int32_t id) {
    if (!before(z, best[k - 1])) return;
    int64_t at = k - 1;
    for (; at > 0 && before(z, best[at - 1]); at--) best[at] = best[at - 1], ids[at] = ids[at - 1];
    best[at] = z, ids[at] = id;
}

static void top_logits(const void *z, int dtype, int64_t vocab, int64_t k, float *best, int32_t *ids) {
    for (int64_t i = 0; i < k; i++) best[i] = -INFINITY, ids[i] = (int32_t)i;
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        vf v = load(z, i, dtype);
        if (any(~(v <= best[k - 1])))
            for (int j = 0; j < LANES; j++) insert(best, ids, k, v[j], (int32_t)(i + j));
    }
    for (; i < vocab; i++) insert(best, ids, k, load_one(z, i, dtype), (int32_t)i);
}

/* One row: logsumexp, entropy and varentropy; the row itself to `copy` (dtype F32 or F16) if that is not NULL.
 * A largest logit that is no finite number makes all three NaN, as in torch. */
static void one_row(const void *z, int dtype, int64_t vocab, float most, float *numbers, void *copy, int copy_dtype) {
    double total = 0.0, first = 0.0, second = 0.0;
    for (int64_t start = 0; start < vocab; start += 1024) { /* short float sums, added up in double */
        int64_t stop = start + 1024 < vocab ? start + 1024 : vocab, i = start;
        vf t = splat(0.0f), f = splat(0.0f), s = splat(0.0f);
        for (; i + LANES <= stop; i += LANES) {
            vf v = load(z, i, dtype);
            if (copy) store(copy, i, copy_dtype, v);
            vf y = larger(v - most, splat(-1e4f)), p = vexp(y);
            t += p, f += p * y, s += p * y * y;
        }
        total += sum(t), first += sum(f), second += sum(s);
        for (; i < stop; i++) {
            float v = load_one(z, i, dtype), y = v - most > -1e4f ? v - most : -1e4f, p = expf(y);
            if (copy) store_one(copy, i, copy_dtype, v);
            total += p, first += p * y, second += p * y * y;
        }
    }
    first /= total, second /= total;
    double spread = second - first * first;
    numbers[0] = most + (float)log(total);
    numbers[1] = (float)(log(total) - first);
    numbers[2] = (float)(spread > 0.0 ? spread : 0.0);
    for (int i = 0; !isfinite(most) && i < NUMBERS; i++) numbers[i] = NAN;
}

/* Statistics of raw logits [rows, vocab], `stride` elements from row to row.
 * numbers: [rows, 3] logsumexp, entropy, varentropy; best, ids: [rows, k]; copies: [rows] addresses or 0. */
void logits(const char *z, int64_t dtype, int64_t rows, int64_t vocab, int64_t stride, int64_t k, float *numbers,
            float *best, int32_t *ids, const uint64_t *copies, const int64_t *copy_dtypes) {
    int64_t bytes = dtype == F32 ? 4 : 2;
#pragma omp parallel for schedule(dynamic, 1) if (rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        const char *row = z + r * stride * bytes;
        void *copy = (void *)(uintptr_t)copies[r];
        int type = (int)dtype;
        top_logits(row, type, vocab, k, best + r * k, ids + r * k);
        one_row(row, type, vocab, best[r * k], numbers + r * NUMBERS, copy, (int)copy_dtypes[r]);
    }
}

/* Logit of `token` in each row, and how many tokens have a larger one; a token below 0 gives NaN and -1. */
void ranks(const char *z, int64_t dtype, int64_t rows, int64_t vocab, int64_t stride, const int64_t *tokens,
           float *picked, int64_t *larger_than) {
    int64_t bytes = dtype == F32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        const char *row = z + r * stride * bytes;
        picked[r] = NAN, larger_than[r] = -1;
        if (tokens[r] < 0 || tokens[r] >= vocab) continue;
        float mine = load_one(row, tokens[r], (int)dtype);
        vi count = {0};
        int64_t i = 0, more = 0;
        for (; i + LANES <= vocab; i += LANES) count -= load(row, i, (int)dtype) > mine;
        for (; i < vocab; i++) more += load_one(row, i, (int)dtype) > mine;
        for (int j = 0; j < LANES; j++) more += count[j];
        picked[r] = mine, larger_than[r] = more;
    }
}

/*
 * Attention with decomposed relative positions for CPUs with AVX-512, in inference: the logits of a few queries and keys
 * at a time, so that they stay in the cache ("FlashAttention", arXiv 2205.14135), with the bias made beside them and
 * never whole. Windows are read where they lie in the page.
 *
 * hatch_build.py compiles this file twice: for float32, and with BFLOAT16 defined for bfloat16. Products are summed in
 * float32 in both. cpu_kernel.py calls it; attention.py has the same in plain PyTorch.
 *
 * Everything that enters a product is packed into words of 32 bits, one float32 or two neighbouring bfloat16, so that
 * one routine, `multiply`, serves both precisions, the logits, the values and the relative positions.
 */

#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t value_t;
#define ATTENTION image_encoder_vit_attention_bfloat16
#define VALUES_PER_WORD 2
#else
typedef float value_t;
#define ATTENTION image_encoder_vit_attention_float32
#define VALUES_PER_WORD 1
#endif

#define INLINE static inline __attribute__((always_inline))

#define LANES 16               /* of a vector of words */
#define ROWS 14                /* queries of a block: with a panel's two vectors, 28 sums, of 32 registers */
#define PANEL (2 * LANES)      /* columns of a packed matrix that lie together */
#define KEYS_PER_TILE 256      /* their keys and values stay in the second-level cache */
#define QUERIES_PER_TASK 504   /* at most; 36 blocks, over which packing a tile of keys is spread */
#define TILE_STRIDE (KEYS_PER_TILE + LANES) /* rows of a power of two would compete for the same lines of the cache */
#define INTERFACE 2            /* of ATTENTION below: cpu_kernel.py calls no other */
#define MASKED (-1e30f)        /* the logit of no key; finite, since infinities subtracted give no number */
#define LOG2_E 1.44269504f
#define VECTOR_BYTES 64

/* A call, which all threads share. Grids are in patches. */
typedef struct {
    const value_t *qkv;        /* (images, height, width, 3, heads, dim) */
    const value_t *padding;    /* (3, heads, dim), what windows hold beyond the page; unused without windows */
    value_t *attended;         /* (images, height, width, heads, dim) */
    uint32_t *table_h, *table_w; /* packed by pack_table */
    long height, width, heads, dim;
    long rows, columns;        /* of a region, which is a window or the page: attention stays within it */
    long regions_down, regions_across;
    long queries_per_task, tasks_per_region, tasks;
    char *scratch;             /* one part for each thread */
    size_t scratch_size;       /* of a part */
    atomic_long next_task, next_scratch;
} call_t;

/* Where a thread keeps what a task needs; each part is aligned to a vector. */
typedef struct {
    uint32_t *queries;         /* (blocks, words, ROWS) */
    float *bias_h, *bias_w;    /* (blocks, ROWS, length + slack): the bias by key row and by key column */
    float *output;             /* (blocks, ROWS, dims): the weighted values so far */
    float *maxima;             /* (blocks, ROWS): the largest logit so far */
    float *sums;               /* (blocks, ROWS, LANES): of the weights so far, lane by lane */
    uint32_t *keys, *values;   /* a tile, packed in panels */
    float *logits;             /* (ROWS, TILE_STRIDE) */
    uint32_t *weights;         /* the same, exponentiated and packed */
    float *products;           /* (ROWS, columns of the panels): what queries have in common with a table */
} scratch_t;

INLINE long at_most(long limit, long number) { return number < limit ? number : limit; }
INLINE long ceil_div(long number, long by) { return (number + by - 1) / by; }
INLINE long round_up(long number, long to) { return ceil_div(number, to) * to; }

/* How many words the vectors of a token have, and how many columns its panels. */
INLINE long words_of(const call_t *call) { return call->dim / VALUES_PER_WORD; }
INLINE long dims_of(const call_t *call) { return round_up(call->dim, PANEL); }
/* Biases are read by whole vectors from any key on. */
INLINE long bias_stride(long length) { return round_up(length, LANES) + LANES; }

INLINE __m512 multiply_add(__m512 sum, uint32_t word, __m512i panel) {
#ifdef BFLOAT16
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)word), (__m512bh)panel);
#else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int)word)), _mm512_castsi512_ps(panel), sum);
#endif
}

/*
 * result = keep * result + factor * left . panel, where result is (ROWS, PANEL), left (ROWS, steps) with any strides in
 * words, panel (steps, PANEL). `keep` has a factor for each row, NULL is 1.
 */
INLINE void multiply(float *result, long stride, const float *keep, float factor, const uint32_t *left,
                     long row_stride, long step_stride, const uint32_t *panel, long steps) {
    __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) low[row] = high[row] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, left += step_stride, panel += PANEL) {
        __m512i first = _mm512_load_si512(panel), second = _mm512_load_si512(panel + LANES);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; row++) {
            low[row] = multiply_add(low[row], left[row * row_stride], first);
            high[row] = multiply_add(high[row], left[row * row_stride], second);
        }
    }
    __m512 factors = _mm512_set1_ps(factor);
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++) {
        float *to = result + row * stride;
        __m512 old_low = _mm512_load_ps(to), old_high = _mm512_load_ps(to + LANES);
        if (keep) {
            old_low = _mm512_mul_ps(old_low, _mm512_set1_ps(keep[row]));
            old_high = _mm512_mul_ps(old_high, _mm512_set1_ps(keep[row]));
        }
        _mm512_store_ps(to, _mm512_fmadd_ps(low[row], factors, old_low));
        _mm512_store_ps(to + LANES, _mm512_fmadd_ps(high[row], factors, old_high));
    }
}

/*
 * 2^x by the polynomial that is closest to it between two whole numbers: to 1e-7, for bfloat16 to 8e-5. `scalef` rounds
 * its exponent down, as the part that is left here is to be added to.
 */
INLINE __m512 exp2_of(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
#ifdef BFLOAT16
    __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.0780235112f), rest, _mm512_set1_ps(0.226067831f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.695833691f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.999925156f));
#else
    __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.00187757056f), rest, _mm512_set1_ps(0.00898935963f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0558262962f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.240153627f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.693153071f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.999999925f));
#endif
    return _mm512_scalef_ps(sum, x);
}

/* Transposes a square of LANES x LANES words by swapping ever larger blocks across the diagonal. */
INLINE void transpose(__m512i square[LANES]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int side = 1; side < LANES; side *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(side));
        __m512i next = _mm512_add_epi32(lane, _mm512_set1_epi32(side));
        __m512i upper = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(LANES - side));
        __m512i lower = _mm512_mask_add_epi32(next, odd, lane, _mm512_set1_epi32(LANES));
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & side) continue;
            __m512i first = square[row], second = square[row + side];
            square[row] = _mm512_permutex2var_epi32(first, upper, second);
            square[row + side] = _mm512_permutex2var_epi32(first, lower, second);
        }
    }
}

/* Packs the words of up to LANES vectors as columns: to[word][vector]. Columns without a vector are zero. */
INLINE void pack_columns(uint32_t *to, long stride, const value_t *const *vectors, long count, long words) {
    for (long first = 0; first < words; first += LANES) {
        long steps = at_most(LANES, words - first);
        __mmask16 mask = (__mmask16)((1u << steps) - 1);
        __m512i square[LANES];
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++)
            square[row] = row < count ? _mm512_maskz_loadu_epi32(mask, vectors[row] + first * VALUES_PER_WORD)
                                      : _mm512_setzero_si512();
        transpose(square);
#pragma GCC unroll 16
        for (int step = 0; step < LANES; step++)
            if (step < steps) _mm512_storeu_si512(to + (first + step) * stride, square[step]);
    }
}

/* Packs up to PANEL vectors as the columns of a panel (words, PANEL), to be multiplied by queries. */
INLINE void pack_panel(uint32_t *to, const value_t *const *vectors, long count, long words) {
    pack_columns(to, PANEL, vectors, count, words);
    pack_columns(to + LANES, PANEL, vectors + LANES, count - LANES, words);
}

/* Packs a tile's values into panels of dims, (dims / PANEL, words of keys, PANEL); leaves columns beyond `dim` alone. */
INLINE void pack_values(uint32_t *to, const value_t *const *vectors, long count, long dim) {
    for (long first = 0; first < dim; first += LANES) {
        __mmask16 mask = (__mmask16)((1u << at_most(LANES, dim - first)) - 1);
        uint32_t *at = to + first / PANEL * (KEYS_PER_TILE / VALUES_PER_WORD * PANEL) + first % PANEL;
        for (long key = 0; key < count; key += VALUES_PER_WORD, at += PANEL) {
#ifdef BFLOAT16
            __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, vectors[key] + first));
            __m512i odd = _mm512_setzero_si512();
            if (key + 1 < count) odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, vectors[key + 1] + first));
            _mm512_store_si512(at, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#else
            _mm512_store_ps(at, _mm512_maskz_loadu_ps(mask, vectors[key] + first));
#endif
        }
    }
}

INLINE long table_panels(long length) { return ceil_div(2 * length - 1, PANEL); }

/*
 * Packs a table of relative positions (2 * length - 1, dim) in panels, backwards: so a query's products with its keys,
 * whose offsets fall as the keys rise, follow one another.
 */
static void pack_table(uint32_t *to, const value_t *table, long length, const call_t *call) {
    long offsets = 2 * length - 1;
    for (long first = 0; first < offsets; first += PANEL, to += PANEL * words_of(call)) {
        const value_t *vectors[PANEL];
        long count = at_most(PANEL, offsets - first);
        for (long i = 0; i < count; i++) vectors[i] = table + (offsets - 1 - first - i) * call->dim;
        pack_panel(to, vectors, count, words_of(call));
    }
}

/* The bias along one axis of a block of queries at `positions` of it: bias[query][key], key < length. */
static void relative_bias(float *bias, const long *positions, long length, const uint32_t *queries,
                          const uint32_t *table, float *products, long words) {
    long lowest = positions[0], highest = positions[0];
    for (int i = 1; i < ROWS; i++) {
        if (positions[i] < lowest) lowest = positions[i];
        if (positions[i] > highest) highest = positions[i];
    }
    /* The query at position p and key k meet in column length - 1 - p + k of the table. */
    long first = (length - 1 - highest) / PANEL, last = (2 * length - 2 - lowest) / PANEL;
    long columns = (last - first + 1) * PANEL;
    memset(products, 0, (size_t)(ROWS * columns) * sizeof(float));
    for (long panel = first; panel <= last; panel++)
        multiply(products + (panel - first) * PANEL, columns, NULL, 1, queries, 1, ROWS, table + panel * PANEL * words,
                 words);
    for (int i = 0; i < ROWS; i++)
        memcpy(bias + i * bias_stride(length), products + i * columns + length - 1 - positions[i] - first * PANEL,
               (size_t)length * sizeof(float));
}

/* The token at a row and column of the page, or what stands for it beyond. */
INLINE const value_t *token(const call_t *call, long image, long row, long column) {
    if (row >= call->height || column >= call->width) return call->padding;
    return call->qkv + ((image * call->height + row) * call->width + column) * 3 * call->heads * call->dim;
}

/* Writes the bias of a block on the keys of a tile that starts at `row` and `column` of the region. */
INLINE void write_bias(float *logits, const float *bias_h, const float *bias_w, long stride_h, long stride_w,
                       long row, long column, long columns, long keys) {
    for (int i = 0; i < ROWS; i++, logits += TILE_STRIDE, bias_h += stride_h, bias_w += stride_w) {
        long done = 0, run;
        for (long r = row, c = column; done < keys; done += run, r++, c = 0) {
            run = at_most(columns - c, keys - done);
            __m512 of_row = _mm512_set1_ps(bias_h[r]);
            /* The last vector of a run sticks out of it: the next run, or the end of the tile, writes over that. */
            for (long j = 0; j < run; j += LANES)
                _mm512_storeu_ps(logits + done + j, _mm512_add_ps(of_row, _mm512_loadu_ps(bias_w + c + j)));
        }
        for (long j = keys; j < round_up(keys, PANEL); j++) logits[j] = MASKED;
    }
}

/*
 * Turns the logits of a block into weights relative to the largest logit so far, and updates that and the sums. `keep`
 * (LANES) is what earlier weights are to be multiplied by.
 */
INLINE void softmax(uint32_t *weights, float *keep, float *maxima, float *sums, const float *logits, long keys) {
    const __m512 log2_e = _mm512_set1_ps(LOG2_E);
    float largest[LANES], shift[LANES];
    for (int i = 0; i < ROWS; i++) {
        __m512 lanes = _mm512_load_ps(logits + i * TILE_STRIDE);
        for (long j = LANES; j < keys; j += LANES)
            lanes = _mm512_max_ps(lanes, _mm512_load_ps(logits + i * TILE_STRIDE + j));
        largest[i] = _mm512_reduce_max_ps(lanes);
    }
    /* All rows in one vector. */
    const __mmask16 rows = (1 << ROWS) - 1;
    __m512 before = _mm512_maskz_loadu_ps(rows, maxima);
    __m512 now = _mm512_max_ps(before, _mm512_maskz_loadu_ps(rows, largest));
    _mm512_mask_storeu_ps(maxima, rows, now);
    _mm512_storeu_ps(keep, exp2_of(_mm512_mul_ps(_mm512_sub_ps(before, now), log2_e)));
    _mm512_storeu_ps(shift, _mm512_mul_ps(now, log2_e));
    for (int i = 0; i < ROWS; i++, logits += TILE_STRIDE, weights += TILE_STRIDE, sums += LANES) {
        __m512 shifts = _mm512_set1_ps(shift[i]);
        __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(keep[i]));
        for (long j = 0; j < keys; j += PANEL) {
            __m512 low = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(logits + j), log2_e, shifts));
            __m512 high = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(logits + j + LANES), log2_e, shifts));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
#ifdef BFLOAT16
            _mm512_store_si512(weights + j / VALUES_PER_WORD, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
            _mm512_store_ps(weights + j, low);
            _mm512_store_ps(weights + j + LANES, high);
#endif
        }
        _mm512_store_ps(sums, sum);
    }
}

INLINE value_t rounded(float number) {
#ifdef BFLOAT16
    return (value_t)_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(number)));
#else
    return number;
#endif
}

/* Attends from some queries of one head in one region to all keys of the region. */
static void run_task(const call_t *call, const scratch_t *scratch, long task) {
    long part = task % call->tasks_per_region;
    long head = task / call->tasks_per_region % call->heads;
    long region = task / call->tasks_per_region / call->heads;
    long left = region % call->regions_across * call->columns;
    long top = region / call->regions_across % call->regions_down * call->rows;
    long image = region / call->regions_across / call->regions_down;

    /* Queries are real tokens only; keys are those of the whole region. */
    long real_columns = at_most(call->columns, call->width - left);
    long real_tokens = at_most(call->rows, call->height - top) * real_columns;
    long first_query = part * call->queries_per_task;
    long queries = at_most(call->queries_per_task, real_tokens - first_query);
    long keys = call->rows * call->columns, words = words_of(call), dims = dims_of(call);
    long stride_h = bias_stride(call->rows), stride_w = bias_stride(call->columns);
    if (queries <= 0) return; /* the region ended before */
    long blocks = ceil_div(queries, ROWS);

    for (long block = 0; block < blocks; block++) {
        long rows[ROWS], columns[ROWS];
        const value_t *vectors[LANES];
        for (int i = 0; i < ROWS; i++) {
            long query = at_most(real_tokens - 1, first_query + block * ROWS + i);
            rows[i] = query / real_columns;
            columns[i] = query % real_columns;
            vectors[i] = token(call, image, top + rows[i], left + columns[i]) + head * call->dim;
        }
        uint32_t *packed = scratch->queries + block * ROWS * words;
        pack_columns(packed, ROWS, vectors, ROWS, words);
        relative_bias(scratch->bias_h + block * ROWS * stride_h, rows, call->rows, packed, call->table_h,
                      scratch->products, words);
        relative_bias(scratch->bias_w + block * ROWS * stride_w, columns, call->columns, packed, call->table_w,
                      scratch->products, words);
        for (int i = 0; i < ROWS; i++) scratch->maxima[block * ROWS + i] = MASKED;
    }
    memset(scratch->output, 0, (size_t)(blocks * ROWS * dims) * sizeof(float));
    memset(scratch->sums, 0, (size_t)(blocks * ROWS * LANES) * sizeof(float));
    memset(scratch->values, 0, (size_t)(KEYS_PER_TILE / VALUES_PER_WORD * dims) * sizeof(uint32_t));

    float scale = 1 / __builtin_sqrtf((float)call->dim);
    for (long first = 0; first < keys; first += KEYS_PER_TILE) {
        long tile = at_most(KEYS_PER_TILE, keys - first);
        const value_t *key_vectors[KEYS_PER_TILE], *value_vectors[KEYS_PER_TILE];
        for (long i = 0; i < tile; i++) {
            long row = (first + i) / call->columns, column = (first + i) % call->columns;
            const value_t *query = token(call, image, top + row, left + column) + head * call->dim;
            key_vectors[i] = query + call->heads * call->dim;
            value_vectors[i] = query + 2 * call->heads * call->dim;
        }
        for (long key = 0; key < tile; key += PANEL)
            pack_panel(scratch->keys + key * words, key_vectors + key, at_most(PANEL, tile - key), words);
        pack_values(scratch->values, value_vectors, tile, call->dim);

        for (long block = 0; block < blocks; block++) {
            long query = block * ROWS;
            float keep[LANES];
            write_bias(scratch->logits, scratch->bias_h + query * stride_h, scratch->bias_w + query * stride_w,
                       stride_h, stride_w, first / call->columns, first % call->columns, call->columns, tile);
            for (long key = 0; key < tile; key += PANEL)
                multiply(scratch->logits + key, TILE_STRIDE, NULL, scale, scratch->queries + query * words, 1, ROWS,
                         scratch->keys + key * words, words);
            softmax(scratch->weights, keep, scratch->maxima + query, scratch->sums + query * LANES, scratch->logits,
                    round_up(tile, PANEL));
            for (long dim = 0; dim < dims; dim += PANEL)
                multiply(scratch->output + query * dims + dim, dims, keep, 1, scratch->weights, TILE_STRIDE, 1,
                         scratch->values + dim * (KEYS_PER_TILE / VALUES_PER_WORD), ceil_div(tile, VALUES_PER_WORD));
        }
    }

    for (long i = 0; i < queries; i++) {
        long row = top + (first_query + i) / real_columns, column = left + (first_query + i) % real_columns;
        value_t *to = call->attended + (((image * call->height + row) * call->width + column) * call->heads + head) * call->dim;
        float share = 1 / _mm512_reduce_add_ps(_mm512_load_ps(scratch->sums + i * LANES));
        for (long d = 0; d < call->dim; d++) to[d] = rounded(scratch->output[i * dims + d] * share);
    }
}

/* Lays a thread's scratch memory out from the address `memory` on, and returns its size in bytes. */
static size_t lay_out(scratch_t *scratch, uintptr_t memory, const call_t *call) {
    long queries = call->queries_per_task, words = words_of(call), dims = dims_of(call);
    long longest = call->rows > call->columns ? call->rows : call->columns;
    uintptr_t at = memory;
#define PART(pointer, count) \
    pointer = (void *)at;    \
    at += (uintptr_t)round_up((count) * (long)sizeof(*pointer), VECTOR_BYTES)
    PART(scratch->queries, queries * words + LANES); /* the last column is packed by a whole vector */
    PART(scratch->bias_h, queries * bias_stride(call->rows));
    PART(scratch->bias_w, queries * bias_stride(call->columns));
    PART(scratch->output, queries * dims);
    PART(scratch->maxima, queries);
    PART(scratch->sums, queries * LANES);
    PART(scratch->keys, KEYS_PER_TILE * words);
    PART(scratch->values, KEYS_PER_TILE / VALUES_PER_WORD * dims);
    PART(scratch->logits, ROWS * TILE_STRIDE);
    PART(scratch->weights, ROWS * TILE_STRIDE);
    PART(scratch->products, ROWS * table_panels(longest) * PANEL);
#undef PART
    return at - memory;
}

static void run_tasks(void *argument) {
    call_t *call = argument;
    scratch_t scratch;
    size_t part = (size_t)atomic_fetch_add(&call->next_scratch, 1);
    lay_out(&scratch, (uintptr_t)call->scratch + part * call->scratch_size, call);
    for (long task; (task = atomic_fetch_add(&call->next_task, 1)) < call->tasks;) run_task(call, &scratch, task);
}

#ifndef BFLOAT16
const int image_encoder_vit_interface = INTERFACE;
#endif

/*
 * Computes `attended` from `qkv`; all arrays as in call_t, contiguous, the tables (2 * length - 1, dim) for the side of
 * a window, or those of the page where `window` is 0. `dim` is even. `parallel` is GOMP_parallel of the OpenMP library
 * whose threads PyTorch uses: threads of our own would compete with those. Returns -1 where memory is short, else 0.
 */
int ATTENTION(value_t *attended, const value_t *qkv, const value_t *padding, const value_t *table_h,
              const value_t *table_w, long images, long height, long width, long heads, long dim, long window,
              unsigned threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    call_t call = {.qkv = qkv, .padding = padding, .attended = attended};
    call.height = height, call.width = width, call.heads = heads, call.dim = dim;
    call.rows = window ? window : height;
    call.columns = window ? window : width;
    call.regions_down = ceil_div(height, call.rows);
    call.regions_across = ceil_div(width, call.columns);
    long tokens = call.rows * call.columns;
    call.tasks_per_region = ceil_div(tokens, QUERIES_PER_TASK);
    call.queries_per_task = round_up(ceil_div(tokens, call.tasks_per_region), ROWS);
    call.tasks = images * call.regions_down * call.regions_across * heads * call.tasks_per_region;

    scratch_t unused;
    size_t table_h_size = (size_t)(table_panels(call.rows) * PANEL * words_of(&call)) * sizeof(uint32_t);
    size_t table_w_size = (size_t)(table_panels(call.columns) * PANEL * words_of(&call)) * sizeof(uint32_t);
    call.scratch_size = lay_out(&unused, 0, &call);
    char *memory = aligned_alloc(VECTOR_BYTES, table_h_size + table_w_size + threads * call.scratch_size);
    if (!memory) return -1;
    call.table_h = (uint32_t *)memory;
    call.table_w = (uint32_t *)(memory + table_h_size);
    call.scratch = memory + table_h_size + table_w_size;
    pack_table(call.table_h, table_h, call.rows, &call);
    pack_table(call.table_w, table_w, call.columns, &call);
    parallel(run_tasks, &call, threads, 0);
    free(memory);
    return 0;
}
